"""pages: what the code says, as pages that are written anew in each build (mkdocs-gen-files): reference and errors."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import mkdocs_gen_files

from actsteer.errors import ActsteerError

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


def tree(kind: type[ActsteerError], depth: int = 0) -> Iterator[tuple[int, type[ActsteerError]]]:
    """A class and those below it, and how deep each lies."""
    yield depth, kind
    for own in kind.__subclasses__():
        yield from tree(own, depth + 1)


with mkdocs_gen_files.open("errors/index.md", "w") as index:
    index.write(
        "# Errors\n\nCatch `ActsteerError`, or the built-in kind that an error resembles. Each class has a page: what "
        "happened, three common causes and their cures. `actsteer explain NAME` prints it without a browser.\n\n"
    )
    for depth, kind in tree(ActsteerError):
        name, like, what = kind.__name__, kind.__bases__[-1].__name__, (kind.__doc__ or "").partition("\n")[0]
        index.write(f"{'    ' * depth}- [`{name}`]({name}.md) (`{like}`): {what}\n")
        with mkdocs_gen_files.open(f"errors/{name}.md", "w") as page:
            page.write(f"::: actsteer.errors.{name}\n    options: {{heading_level: 1}}\n")
