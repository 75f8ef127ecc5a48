"""Meeting: processes that wait for one another before a collective call, and fail together where one of them fails.

What they know of each other is in epochs. A failure ends the present one: every process learns of it once, at its next
meeting or when it fails itself, and goes on in the next epoch, in which the meetings are counted from the beginning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, final

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from actsteer.errors import DistributedError

Group: TypeAlias = "dist.ProcessGroup | None"


def is_alone(group: Group = None) -> bool:
    """Whether there are no other processes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1


@contextmanager
def announced() -> Iterator[None]:
    """Tell the other processes if this one fails, so that they fail too, with the reason, where they would wait for it.

    Raises:
        DistributedError: in place of what happens here because another process has failed.
    """
    if is_alone():
        yield
        return
    try:
        yield
    except DistributedError:
        raise
    except BaseException as error:
        epoch = _present()
        own = f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}"
        reason = epoch.end(own)
        if reason != own:
            raise DistributedError(reason) from error
        raise


def meet(ranks: Sequence[int], where: str, *, says: str = "here") -> dict[int, str]:
    """Wait until all these processes are at this point, and return what each says; their collective calls cannot hang.

    Raises:
        DistributedError: one of them has failed, or does not come.
    """
    epoch, ranks, own = _present(), tuple(ranks), dist.get_rank()
    store, number = epoch.store, epoch.meetings.get(ranks, 0)
    name, last = (f"{','.join(map(str, ranks))}/{n}" for n in (number, number - 1))
    keys = [f"{name}/{rank}" for rank in ranks]
    store.set(f"{name}/{own}", says)
    patience: Any = store.timeout  # type: ignore[attr-defined]
    deadline, pause = time.monotonic() + patience.total_seconds(), 0.0005
    outcome = ""
    while not outcome:
        if store.check(keys):
            outcome = store.compare_set(f"{name}/outcome", "", "met").decode()
        elif store.check(["ended"]):  # the first outcome holds for all, or some would go on and others not
            outcome = store.compare_set(f"{name}/outcome", "", "ended").decode()
        elif time.monotonic() > deadline:
            raise DistributedError(f"{where}: some of the ranks {ranks} did not come; is it called on every one?")
        else:
            time.sleep(pause)
            pause = min(0.05, 2 * pause)
    if outcome == "ended":
        raise DistributedError(epoch.end())
    said = {rank: store.get(key).decode() for rank, key in zip(ranks, keys, strict=True)}
    epoch.meetings[ranks] = number + 1
    if number:  # all have read the last one, or they would not be here
        store.delete_key(f"{last}/{own}")
        if own == ranks[0]:
            store.delete_key(f"{last}/outcome")
    return said


@final
class _Epoch:
    """The time from one failure to the next, in one world of processes."""

    def __init__(self, world: Store, number: int) -> None:
        self.world, self._number = world, number
        self.store = PrefixStore(f"actsteer/{number}", world)
        self.meetings: dict[tuple[int, ...], int] = {}
        """How often the processes of a group have met."""

    def end(self, reason: str = "") -> str:
        """Go on to the next one; returns the reason, which is that of the first process that ended this one."""
        global _epoch
        _epoch = _Epoch(self.world, self._number + 1)
        return self.store.compare_set("ended", "", reason).decode()


_epoch: _Epoch | None = None


def _present() -> _Epoch:
    """The present epoch; another world, after another `init_process_group`, begins with its first."""
    global _epoch
    world = dist.distributed_c10d._get_default_store()
    if _epoch is None or _epoch.world is not world:
        _epoch = _Epoch(world, 0)
    return _epoch
