"""pages: what the site takes from the repository, written anew in each build (mkdocs-gen-files)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from urllib.parse import urljoin

import griffe
import mkdocs_gen_files

from actsteer.errors import ActsteerError

ROOT = Path(__file__).parent.parent
FILES = {"tests/CASES.md": "explanation/cases.md", "benchmarks/README.md": "explanation/benchmarks.md"}
PAGES = {  # in the order of the index: the title, and what comes first
    "vectors": ("Vectors and banks", "SteeringVector"),
    "sites": ("Sites", "find_sites"),
    "collecting": ("Collecting", "collect"),
    "estimators": ("Estimators", "MeanDifference"),
    "training": ("Fitting and training", "fit"),
    "steering": ("Steering", "Steerer"),
    "interventions": ("Interventions", "Add"),
    "gates": ("Gates", "ProjectionAbove"),
    "tuning": ("Tuning", "calibrate"),
    "folding": ("Folding", "fold"),
    "looking": ("Looking", "look"),
    "integrations": ("Integrations", "fit_pairs"),
    "protocols": ("To write your own", "Estimator"),
    "types": ("Types in signatures", "Sites"),
}


def page_of(thing: griffe.Object) -> str:
    """The page of a public name: its folder, and of the larger folders a part."""
    _, folder, inner, *_ = thing.path.split(".")
    if isinstance(thing, griffe.Class) and any(str(base).startswith("Protocol") for base in thing.bases):
        return "protocols"
    if folder == "steering" and inner in PAGES:
        return inner
    if folder == "estimators":
        return "estimators" if "__call__" in thing.members else "training"
    return {"files": "vectors"}.get(folder, folder)


def integrations(package: griffe.Object) -> list[griffe.Object | griffe.Alias]:
    """What the modules of integrations say in `__all__`, or else define."""
    found = []
    for module in package["integrations"].modules.values():
        names = module.exports or [name for name, own in module.members.items() if not own.is_alias and name[0] != "_"]
        found += [module[str(name)] for name in names]
    return [thing for thing in found if thing.is_function or thing.is_class]


def types(things: Iterable[griffe.Object | griffe.Alias]) -> dict[str, griffe.Object]:
    """The names of types in the signatures of these, and in what they stand for."""
    found: dict[str, griffe.Object] = {}
    for thing in map(target, things):
        each = [own for own in (thing, *thing.members.values()) if isinstance(own, griffe.Function)]
        said = [parameter.annotation for own in each for parameter in own.parameters]
        said += [thing.value] if isinstance(thing, griffe.Attribute) else []
        paths = {
            name.canonical_path
            for own in said
            if isinstance(own, griffe.Expr)
            for name in own.iterate()
            if isinstance(name, griffe.ExprName)
        }
        aliases = [
            target(package[path.removeprefix("actsteer.")]) for path in sorted(paths) if path.startswith("actsteer.")
        ]
        new = {
            own.path: own
            for own in aliases
            if str(getattr(own, "annotation", None)) == "TypeAlias" and own.path not in found
        }
        found |= new | types(new.values())
    return found


def target(thing: griffe.Object | griffe.Alias) -> griffe.Object:
    return thing.final_target if isinstance(thing, griffe.Alias) else thing


def row(thing: griffe.Object | griffe.Alias, page: str) -> str:
    """A line of the index."""
    said = thing.docstring.value if thing.docstring else f"`{thing.value}`"
    said = said.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return f"| [`{thing.name}`]({page}.md#{thing.path}) | {said} |\n"


def tree(kind: type[ActsteerError], depth: int = 0) -> Iterator[tuple[int, type[ActsteerError]]]:
    """A class and those below it, and how deep each lies."""
    yield depth, kind
    for own in kind.__subclasses__():
        yield from tree(own, depth + 1)


package = griffe.load("actsteer", search_paths=[ROOT])
public = [target(thing) for thing in package["public"].members.values() if thing.is_alias]
pages: dict[str, list[griffe.Object | griffe.Alias]] = {page: [] for page in PAGES}
for thing in public:
    if not thing.is_module and thing.module.name != "errors":  # they have pages of their own, below
        pages[page_of(thing)].append(thing)
pages["integrations"] = integrations(package)
pages["types"] = sorted(types(chain(*pages.values())).values(), key=lambda thing: thing.name)

with mkdocs_gen_files.open("reference/index.md", "w") as index:
    index.write(
        "# Reference\n\nThe public names: `from actsteer import NAME`; the integrations have modules of their own.\n"
    )
    for page, (title, first) in PAGES.items():
        in_full = "\n    options: {show_root_full_path: true}" if page == "integrations" else ""
        things = sorted(pages[page], key=lambda thing: thing.name != first)
        rows = "".join(row(thing, page) for thing in things)
        index.write(f"\n## [{title}]({page}.md)\n\n| name | what it is |\n|---|---|\n{rows}")
        with mkdocs_gen_files.open(f"reference/{page}.md", "w") as file:
            file.write(f"# {title}\n\n" + "\n\n".join(f"::: {thing.path}{in_full}" for thing in things) + "\n")

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

for source, page in FILES.items():
    text = (ROOT / source).read_text()
    if "\n# " in text:  # several pages in one
        text = "# Benchmarks\n\n" + re.sub(r"^#", "##", text, flags=re.M)
    with mkdocs_gen_files.open(page, "w") as file:
        base = f"https://github.com/actsteer/actsteer/blob/main/{source}"
        file.write(re.sub(r"\]\(([^)#]+)\)", lambda link, base=base: f"]({urljoin(base, link[1])})", text))
