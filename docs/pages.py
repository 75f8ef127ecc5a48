"""pages: the parts of the site that the code says, written anew in each build (mkdocs-gen-files): the reference."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).parent.parent
TITLES = {
    "vectors": "Vectors and banks",
    "sites": "Sites",
    "collecting": "Collecting",
    "estimators": "Estimators",
    "steering": "Steering",
    "tuning": "Tuning",
    "folding": "Folding",
    "looking": "Looking",
    "integrations": "Integrations",
}


def public() -> dict[str, list[str]]:
    """The public names in full, by the folder that each is from; of integrations, those of their modules."""
    names = defaultdict(list)
    for line in ast.parse((ROOT / "actsteer" / "public.py").read_text()).body:
        if isinstance(line, ast.ImportFrom) and line.module:
            folder = line.module.split(".")[1]
            names["vectors" if folder == "files" else folder] += [f"{line.module}.{name.name}" for name in line.names]
    return names | {"integrations": integrations()}


def integrations() -> list[str]:
    folder = ROOT / "actsteer" / "integrations"
    return [
        f"actsteer.integrations.{file.stem}.{line.name}"
        for file in sorted(folder.glob("*.py"))
        for line in ast.parse(file.read_text()).body
        if isinstance(line, ast.FunctionDef | ast.ClassDef) and not line.name.startswith("_")
    ]


for folder, title in TITLES.items():
    with mkdocs_gen_files.open(f"reference/{folder}.md", "w") as page:
        page.write(f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in public()[folder]) + "\n")
