"""docstrings: as the site shows them (a griffe extension): examples as code, public names as links."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

PUBLIC = {
    name.name: f"{line.module}.{name.name}"
    for line in ast.parse((Path(__file__).parent.parent / "actsteer" / "public.py").read_text()).body
    if isinstance(line, ast.ImportFrom)
    for name in line.names
}
EXAMPLE = re.compile(r"^( *)>>> .*(?:\n *\S.*|\n(?: *\n)+(?=\1>>>) *\S.*)*", re.M)  # up to a line that is empty
SEVERAL = re.compile(r"^( +(?:[A-Z]\w+, )+[A-Z]\w+): ", re.M)  # errors that have one cause
NAME = re.compile(r"(?<!\[)`(\w+)`")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **kwargs: Any) -> None:
        if isinstance(obj, griffe.Object) and obj.docstring:
            text = SEVERAL.sub(lambda found: found[1].replace(", ", " | ") + ": ", obj.docstring.value)
            parts = text.split("\n\n")
            for index, part in enumerate(parts):
                if not part.startswith((">>>", " ")):  # an example or a drawing
                    parts[index] = NAME.sub(lambda found: linked(found[1], obj.name), part)
            obj.docstring.value = EXAMPLE.sub(fenced, "\n\n".join(parts))


def fenced(example: re.Match[str]) -> str:
    indent = example[1]
    return f"{indent}```pycon\n{example[0]}\n{indent}```"


def linked(name: str, at: str) -> str:
    """A public name in a docstring, as a link to where it is described, if that is elsewhere."""
    if name not in PUBLIC or name == at:
        return f"`{name}`"
    return f'<autoref identifier="{PUBLIC[name]}" optional><code>{name}</code></autoref>'
