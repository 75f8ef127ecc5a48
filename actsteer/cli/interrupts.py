"""Interrupts: what Ctrl-C does, whatever the process is at; light, so that it is there before anything else is."""

from __future__ import annotations

import os
import signal
from types import FrameType

CODE = 130
"""The exit code, as a shell has it."""


class Interrupts:
    """What is called for SIGINT: KeyboardInterrupt, so that a command undoes what is half done, or the end at once.

    At once it ends while a module is imported, for C code on the way swallows KeyboardInterrupt, makes another error of
    it or aborts; at the second interrupt; and when the command is over. Files that a process leaves so are removed by
    the next one (`files/replacing.py`).
    """

    def __init__(self) -> None:
        self.came = False
        """Whether one came; then the next one ends the process."""

    def listen(self) -> None:
        """Be called from now on, unless interrupts are ignored, as behind `nohup`, or are another's."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self)

    def __call__(self, _: int, frame: FrameType | None) -> None:
        if self.came or _is_importing(frame):
            os._exit(CODE)
        self.came = True
        raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "importlib":
            return True
        frame = frame.f_back
    return False
