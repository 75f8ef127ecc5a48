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
    global _begun, _depth
    if is_alone():
        yield
        return
    _present()
    _begun += not _depth
    _depth += 1
    try:
        yield
    except DistributedError:
        raise
    except BaseException as error:
        if hasattr(error, "actsteer_announced"):  # by a pass inside of this one, whose batches it makes
            raise
        own = f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}"
        reason = _present().end(own)
        if reason != own:
            raise DistributedError(reason) from error
        error.actsteer_announced = True  # type: ignore[attr-defined]
        raise
    finally:
        _depth -= 1


def meet(ranks: Sequence[int], where: str, *, says: str = "here") -> dict[int, str]:
    """Wait until all these processes are at this point, and return what each says; their collective calls cannot hang.

    After a failure that somebody has caught, a process may be a call behind the others: its call fails, and the others
    wait until it has caught up.

    Raises:
        DistributedError: one of them has failed, or does not come.
    """
    epoch, ranks = _present(), tuple(ranks)
    met = [begun for others, begun in _begun_when_met.items() if set(ranks) <= set(others)]
    while True:
        said = epoch.meet(ranks, where, f"{_begun - max(met, default=0)} {says}")
        begun = {rank: int(own.partition(" ")[0]) for rank, own in said.items()}
        most = max(begun.values())
        if not epoch.number or min(begun.values()) == most:
            _begun_when_met[ranks] = _begun
            return {rank: own.partition(" ")[2] for rank, own in said.items()}
        if begun[dist.get_rank()] < most:
            ahead = [rank for rank in ranks if begun[rank] == most]
            raise DistributedError(f"{where}: after a failure ranks {ahead} have gone on; there is nobody to meet here")


@final
class _Epoch:
    """The time from one failure to the next, in one world of processes."""

    def __init__(self, world: Store, number: int) -> None:
        self.world, self.number = world, number
        self._store = PrefixStore(f"actsteer/{number}", world)
        self._meetings: dict[tuple[int, ...], int] = {}  # how often the processes of a group have met

    def end(self, reason: str = "") -> str:
        """Go on to the next one; returns the reason, which is that of the first process that ended this one."""
        global _epoch
        _epoch = _Epoch(self.world, self.number + 1)
        return self._store.compare_set("ended", "", reason).decode()

    def meet(self, ranks: tuple[int, ...], where: str, says: str) -> dict[int, str]:
        """Wait until all these processes are here, and return what each says."""
        store, own, number = self._store, dist.get_rank(), self._meetings.get(ranks, 0)
        self._meetings[ranks] = number + 1
        name, last = (f"{','.join(map(str, ranks))}/{n}" for n in (number, number - 1))
        keys = [f"{name}/{rank}" for rank in ranks]
        store.set(f"{name}/{own}", says)
        outcome = self._outcome(f"{name}/outcome", keys)
        if outcome == "ended":
            raise DistributedError(self.end())
        if outcome == "late":
            raise DistributedError(f"{where}: some of the ranks {ranks} did not come; is it called on every one?")
        said = {rank: store.get(key).decode() for rank, key in zip(ranks, keys, strict=True)}
        if number:  # all have read the last one, or they would not be here
            store.delete_key(f"{last}/{own}")
            if own == ranks[0]:
                store.delete_key(f"{last}/outcome")
        return said

    def _outcome(self, key: str, arrivals: list[str]) -> str:
        """What becomes of a meeting; the first to say decides for all, or some would go on and others not."""
        patience: Any = self._store.timeout  # type: ignore[attr-defined]
        deadline, pause = time.monotonic() + patience.total_seconds(), 0.0005
        while True:
            for outcome, holds in (
                ("met", self._store.check(arrivals)),
                ("ended", self._store.check(["ended"])),
                ("late", time.monotonic() > deadline),
            ):
                if holds:
                    return self._store.compare_set(key, "", outcome).decode()
            if self._store.check([key]):
                return self._store.get(key).decode()
            time.sleep(pause)
            pause = min(0.05, 2 * pause)


_epoch: _Epoch | None = None
_begun = 0  # how many passes over data
_begun_when_met: dict[tuple[int, ...], int] = {}  # how many, when the processes of a group last met
_depth = 0  # how many of them are running, one inside of the other


def _present() -> _Epoch:
    """The present epoch; another world, after another `init_process_group`, begins with its first."""
    global _epoch, _begun
    world = dist.distributed_c10d._get_default_store()
    if _epoch is None or _epoch.world is not world:
        _epoch, _begun = _Epoch(world, 0), 0
        _begun_when_met.clear()
    return _epoch
