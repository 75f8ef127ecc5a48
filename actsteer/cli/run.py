"""run: the command line. What goes wrong is one line on stderr, and an exit code: 1, or 2 for wrong usage."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

from actsteer.cli.interrupts import CODE, Interrupts
from actsteer.errors import ActsteerError, documented, explained

_TRACEBACK = "ACTSTEER_TRACEBACK"


def run(interrupts: Interrupts) -> None:
    """Run the command that the process was called with."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode
    if not sys.stderr.isatty() and "COLUMNS" not in os.environ:
        os.environ.setdefault("TERMINAL_WIDTH", "160")  # of typer's messages
    try:
        from actsteer.cli import screen
        from actsteer.cli.app import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        if sys.argv[1:2] == ["explain"]:  # to which the errors point, of those too who have no use for the rest
            return _explain_plainly(*sys.argv[2:3])
        sys.exit("the command line needs typer and rich; pip install 'actsteer[cli]'")

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        screen.complain("warning", str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        try:
            app()
        except Exception as error:
            if interrupts.came:  # which C code has made an error of
                sys.exit(CODE)
            if os.environ.get(_TRACEBACK):
                raise
            screen.complain("error", _described(error))
            sys.exit(1)


def _described(error: Exception) -> str:
    """The message; also what explains it, or of what is not one of this library's errors its kind and its place."""
    if isinstance(error, ActsteerError):
        return f"{error} [actsteer explain {documented(type(error)).__name__}]"
    if isinstance(error, OSError) or "actsteer[" in str(error):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}; with {_TRACEBACK}=1 in the environment, all of the traceback"


def _explain_plainly(name: str | None = None) -> None:
    try:
        print(explained(name))
    except LookupError as error:
        sys.exit(f"error: {error}")
