"""main: the entry point. What the user can mend is one line on stderr, and an exit code: 1, or 2 for wrong usage."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from actsteer.errors import ActsteerError


def main() -> None:
    """Run the command line."""
    try:
        from actsteer.cli import screen
        from actsteer.cli.app import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit("the command line needs typer and rich; pip install 'actsteer[cli]'")

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        screen.complain("warning", str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        try:
            app()
        except (ActsteerError, OSError, ImportError) as error:
            if isinstance(error, ImportError) and "actsteer[" not in str(error):
                raise  # of the user's own model, and not of an extra of ours
            screen.complain("error", str(error))
            sys.exit(1)
