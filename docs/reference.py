"""reference: a page for each group of public names, and an index, written anew in each build (mkdocs-gen-files)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import griffe
import mkdocs_gen_files

ROOT = Path(__file__).parent.parent
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


package = griffe.load("actsteer", search_paths=[ROOT])
public = [target(thing) for thing in package["public"].members.values() if thing.is_alias]
pages: dict[str, list[griffe.Object | griffe.Alias]] = {page: [] for page in PAGES}
for thing in public:
    if not thing.is_module and thing.module.name != "errors":  # each of which has a page
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
