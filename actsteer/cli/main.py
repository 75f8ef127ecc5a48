"""main: the entry point. An interrupt is an exit code, 130, and no traceback, while all is imported too."""

from __future__ import annotations

import sys

from actsteer.cli.interrupts import CODE, Interrupts


def main() -> None:
    """Run the command line."""
    interrupts = Interrupts()
    try:
        interrupts.listen()
        from actsteer.cli.run import run

        run(interrupts)
    except KeyboardInterrupt:
        sys.exit(CODE)
    finally:
        interrupts.came = True  # what is left is Python's own end, for which nobody waits
