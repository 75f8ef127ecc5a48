"""Stop: end a forward pass once every site has run, by a rule: what ran once in the first pass runs once in each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from torch import nn

from actsteer.errors import StatisticsError

EVERY = 32
"""Every so many passes one runs whole, and is held against the first."""


class Stop(BaseException):
    """Nothing is left to be seen in this forward pass."""


@final
class Stopper:
    """Ends a forward pass by raising `Stop` when the last of several sites has run.

    The first pass runs whole. Where each site ran exactly once in it, later passes end when all of them have, but for
    every 32nd, which runs whole again.

    Args:
        allowed: whether a pass may end early.
    """

    def __init__(self, sites: Iterable[str], *, allowed: bool) -> None:
        self._sites = tuple(sites)
        self._once = allowed  # whether each site runs once in a pass, as far as is known
        self.passes = 0
        """How many have begun."""
        self._times: dict[str, int] = {}
        self._left = 0  # sites that have not run in it
        self._ends_early = False

    def begin(self) -> None:
        """A new forward pass."""
        self.passes += 1
        self._times, self._left = dict.fromkeys(self._sites, 0), len(self._sites)
        self._ends_early = self._once and self.passes > 1 and self.passes % EVERY != 0

    def ran(self, site: str) -> None:
        """This site has run, and been seen; raises `Stop` if the pass ends here."""
        self._times[site] += 1
        if self._times[site] == 1:
            self._left -= 1
            if not self._left and self._ends_early:
                raise Stop

    def end(self) -> None:
        """The pass is over.

        Raises:
            StatisticsError: passes ended early, and a site runs more than once in this one.
        """
        if self.passes == 1:
            self._once = self._once and all(times == 1 for times in self._times.values())
        elif self._once and (more := [site for site, times in self._times.items() if times > 1]):
            raise StatisticsError(
                f"pass {self.passes}: the sites {more} ran more than once, but once in the first pass; earlier passes "
                "ended when every site had run, and may have missed some; start again with stop=False"
            )


def must_finish(model: nn.Module) -> bool:
    """Whether every pass must run whole: FSDP, and offloading by accelerate, bring a module's weights before its
    forward and take them away after it."""
    modules = list(model.modules())
    bases = {base for kind in {type(module) for module in modules} for base in kind.__mro__}
    return any(base.__module__.startswith("torch.distributed.") for base in bases) or any(
        "_hf_hook" in vars(module) and module._parameters and module._modules for module in modules
    )
