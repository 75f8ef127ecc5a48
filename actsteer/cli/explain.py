"""explain: what an error means, what its common causes are, and how each is cured."""

from __future__ import annotations

from typing import Annotated

import typer

from actsteer.cli import screen
from actsteer.errors import explained


def explain(
    name: Annotated[str | None, typer.Argument(help="Its class, as in ShapeError; without it, all of them.")] = None,
) -> None:
    """Explain an error: what happened, three common causes and the cure of each, and the address of its page."""
    try:
        text = explained(name)
    except LookupError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from None
    screen.write(text + "\n")
