"""errors: a page for each class of error, and their tree, from the docstrings, written anew in each build."""

from __future__ import annotations

from collections.abc import Iterator

import mkdocs_gen_files

from actsteer.errors import ActsteerError


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
