"""The buffer backend: a patch that reads tensors which stay where they are; new strengths are copied into them.

Code that was compiled with it reads the same addresses for ever, so that neither a change of strength nor attaching and
detaching compiles anything again; detached, it adds zero (`Steerer.install`).
"""

from __future__ import annotations

from collections.abc import Callable

from actsteer.steering.plan import Plan


def hold(plan: Plan) -> Callable[[], None]:
    """Have the edits keep their tensors from now on, which have room for every concept; returns what lets them go."""
    plan.count_every()
    for edit in plan.edits.values():
        edit.in_place = True

    def release() -> None:
        for edit in plan.edits.values():
            edit.in_place = False

    return release
