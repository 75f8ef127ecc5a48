"""The buffer backend: a patch that reads tensors which stay where they are; new strengths are copied into them.

Code that was compiled with it reads the same addresses for ever, so that neither a change of strength nor attaching and
detaching compiles anything again; detached, it adds zero (`Steerer.install`).
"""

from __future__ import annotations

from collections.abc import Callable

from actsteer.steering.edit import SiteEdit


def hold(edit: SiteEdit) -> Callable[[], None]:
    """Have the edit keep its tensors from now on; returns what lets them go again."""
    edit.in_place = True

    def release() -> None:
        edit.in_place = False

    return release
