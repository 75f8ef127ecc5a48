"""repository: pages that are files elsewhere in the repository, whose links lead there from the site too."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urljoin

import mkdocs_gen_files

ROOT = Path(__file__).parent.parent
FILES = {"tests/CASES.md": "explanation/cases.md", "benchmarks/README.md": "explanation/benchmarks.md"}

for source, page in FILES.items():
    text = (ROOT / source).read_text()
    if "\n# " in text:  # several pages in one
        text = "# Benchmarks\n\n" + re.sub(r"^#", "##", text, flags=re.M)
    with mkdocs_gen_files.open(page, "w") as file:
        base = f"https://github.com/actsteer/actsteer/blob/main/{source}"
        file.write(re.sub(r"\]\(([^)#]+)\)", lambda link, base=base: f"]({urljoin(base, link[1])})", text))
