"""Handles: what takes back what was attached, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import final


@final
class Handles:
    """Steps that undo, the last first. Each is added before its effect, and forgotten only after it has succeeded.

    A step finds out what there is to do, so that it may run before its effect, and more than once.

    >>> found, handles = [], Handles()
    >>> handles.add(found.clear)
    >>> found.append(1)
    >>> handles.close()
    >>> found, bool(handles)
    ([], False)
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    def add(self, step: Callable[[], None]) -> None:
        """Have `close` call this, before what was added earlier."""
        self._steps.append(step)

    def close(self) -> None:
        """Undo everything. A step that raises is kept, for another try, and does not keep the others from running.

        But one that raises a warning has done its work: the user has made errors of warnings. After an interrupt the
        steps that are left are run once more, and then the interrupt is raised.
        """
        try:
            self._undo()
        except BaseException as error:
            if not isinstance(error, Exception):
                with suppress(Exception):
                    self._undo()
            raise

    def _undo(self) -> None:
        failed: Exception | None = None
        for step in reversed(tuple(self._steps)):
            try:
                step()
            except Exception as error:
                failed = failed or error
                if not isinstance(error, Warning):
                    continue
            self._steps.remove(step)
        if failed is not None:
            raise failed
