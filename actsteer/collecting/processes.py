"""Processes: they wait for one another before a collective call, fail together, and bring their sums together.

What they tell one another is in the store of the process group. A failure is final: whoever meets after it is told its
reason, until the group is made anew.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store

from actsteer.collecting.moments import Covariance, Moments, Scatter, moved_sums
from actsteer.errors import DistributedError
from actsteer.sites.shards import Group, is_alone, meshes

Classes: TypeAlias = dict[Any, dict[str, Moments]]
"""Label -> site -> moments."""

_STAYS = 60.0
"""For so many seconds rank 0, which keeps the store, stays after a failure until the others have heard of it."""
_ROLL_CALL = 3.0
"""So many seconds the processes that are left wait for one another to say so."""


# --- failing together ------------------------------------------------------------------------------------------------
@contextmanager
def announced() -> Iterator[None]:
    """Tell the other processes if this one fails, so that they fail too, with the reason, where they would wait for it.

    Raises:
        DistributedError: another process has failed, before or meanwhile.
    """
    if is_alone():
        yield
        return
    store, own = _store(), f"rank {dist.get_rank()} failed: "
    failed = False
    with suppress(RuntimeError):  # the store may be gone; that matters to those alone who meet
        failed = store.check(["failed"])
    if failed:
        raise _heard(store)
    try:
        yield
    except BaseException as error:
        said = str(error) if isinstance(error, DistributedError) else f"{own}{type(error).__name__}: {error}"
        first = said
        with suppress(RuntimeError):  # the store is gone, and with it whoever could be told
            first = store.compare_set("failed", "", said).decode()
            _heard(store)
        if first.startswith(own) or first == said or not isinstance(error, Exception):
            raise
        raise DistributedError(first) from error


def meet(ranks: Sequence[int], where: str, *, says: str = "here") -> dict[int, str]:
    """Wait until all these processes are at this point, and return what each says; their collective calls cannot hang.

    Raises:
        DistributedError: one of them has failed, is elsewhere, or does not come within the timeout of the group.
    """
    store, own = _store(), dist.get_rank()
    with _reached(where):
        group = ",".join(map(str, ranks))
        number = store.add(f"{group}/calls of {own}", 1)
        place, before = f"{group}/{number}", f"{group}/{number - 1}"
        store.set(f"{place}/{own}", json.dumps([where, says]))
        if store.add(f"{place}/count", 1) == len(ranks):
            store.compare_set(f"{place}/outcome", "", "failed" if store.check(["failed"]) else "met")
        outcome = _outcome(store, f"{place}/outcome")
        if outcome == "failed":
            raise _heard(store)
        if outcome == "late":
            missing = [rank for rank in ranks if not store.check([f"{place}/{rank}"])]
            store.compare_set("failed", "", f"{where}: ranks {missing} did not come; see whether they were killed")
            raise _heard(store)
        said = {rank: json.loads(store.get(f"{place}/{rank}")) for rank in ranks}
        if number > 1:  # all have read the last one, or they would not be here
            for key in (f"{before}/{own}", *(f"{before}/{name}" for name in ("count", "outcome") if own == ranks[0])):
                store.delete_key(key)
    if len({there for there, _ in said.values()}) > 1:
        places = ", ".join(f"rank {rank} at {there}" for rank, (there, _) in said.items())
        raise DistributedError(f"the ranks are at different calls: {places}; make the same ones on every rank")
    return {rank: word for rank, (_, word) in said.items()}


def _store() -> Store:
    return PrefixStore("actsteer", dist.distributed_c10d._get_default_store())


def _outcome(store: Store, key: str) -> str:
    """What becomes of a meeting. The first to say decides for all, or some would go on and others not."""
    patience: Any = store.timeout  # type: ignore[attr-defined]
    start, pause, looked = time.monotonic(), 0.0005, 0.0
    while not store.check([key]):
        waited = time.monotonic() - start
        if waited > patience.total_seconds():
            return store.compare_set(key, "", "late").decode()
        if waited - looked > 0.2:  # now and then, whether a rank has failed, which will not come
            looked = waited
            if store.check(["failed"]):
                return store.compare_set(key, "", "failed").decode()
        time.sleep(pause)
        pause = min(0.05, 2 * pause)
    return store.get(key).decode()


def _heard(store: Store) -> DistributedError:
    """The error with the reason of the failure; and this process counts among those that know it."""
    if store.add(f"heard/{dist.get_rank()}", 1) == 1:
        store.add("heard", 1)
        if dist.get_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            atexit.register(_stay, store, dist.get_world_size())
    return DistributedError(store.get("failed").decode())


def _stay(store: Store, processes: int) -> None:
    """Rank 0 leaves once the others have heard: its store goes with it."""
    patience: Any = store.timeout  # type: ignore[attr-defined]
    end = time.monotonic() + min(_STAYS, patience.total_seconds())
    with suppress(RuntimeError):
        while store.add("heard", 0) < processes and time.monotonic() < end:
            time.sleep(0.05)


@contextmanager
def _reached(where: str) -> Iterator[None]:
    """What the store raises, in words."""
    try:
        yield
    except DistributedError:
        raise
    except RuntimeError as error:
        raise DistributedError(
            f"{where}: the store of the process group does not answer ({error}); rank 0, which keeps it, has left or "
            "was killed: look at what it said last"
        ) from error


@contextmanager
def _unbroken(ranks: Sequence[int], where: str) -> Iterator[None]:
    """What collective calls raise where a process is lost in the middle of them, with its rank."""
    try:
        yield
    except DistributedError:
        raise
    except RuntimeError as error:
        store, end, missing = _store(), time.monotonic() + _ROLL_CALL, list(ranks)
        with _reached(where):
            store.set(f"still here/{dist.get_rank()}", "")
            while missing and time.monotonic() < end:
                missing = [rank for rank in missing if not store.check([f"still here/{rank}"])]
                time.sleep(0.05)
        if not missing:
            raise
        raise DistributedError(f"{where}: ranks {missing} were lost in the middle of it ({error})") from error


# --- one forward pass over several processes -------------------------------------------------------------------------
def in_step(batches: Iterable[Any], model: nn.Module) -> Iterator[Any]:
    """The batches, each once all processes that compute the forward pass together have one too.

    Raises:
        DistributedError: another process has failed, or has fewer or more batches; the forward pass would hang.
    """
    ranks = () if is_alone() else _together(model)
    if len(ranks) < 2:
        yield from batches
        return
    iterator = iter(batches)
    missing: Any = object()
    step = 0
    while True:
        step += 1
        batch = next(iterator, missing)
        said = meet(ranks, f"batch {step}", says="done" if batch is missing else "more")
        if len(set(said.values())) > 1:
            has, has_not = ([r for r, word in said.items() if word == wanted] for wanted in ("more", "done"))
            raise DistributedError(
                f"ranks {has} have a batch number {step}, ranks {has_not} do not, and the model is sharded over "
                "them; give every rank the same number of batches"
            )
        if batch is missing:
            return
        yield batch


def _together(model: nn.Module) -> tuple[int, ...]:
    """The ranks whose forward passes wait for one another."""
    ranks: set[int] = set()
    for module in model.modules():
        for mesh in meshes(module):
            ranks |= set(mesh.mesh.flatten().tolist())
        if type(module).__name__ == "FullyShardedDataParallel":
            group: Any = module.process_group
            ranks |= set(dist.get_process_group_ranks(group))
    return tuple(sorted(ranks))


# --- the sums of all of them -----------------------------------------------------------------------------------------
def reduce(
    classes: Mapping[Any, Mapping[str, Moments]],
    metadata: Mapping[str, str],
    replicas: Sequence[int],
    *,
    by_class: bool,
    group: Group,
) -> tuple[Classes, dict[str, str], tuple[int, ...]]:
    """The moments of all processes merged, their metadata, and the ranks that have them now.

    Of `replicas`, who saw the same rows, the first alone counts.

    The means come together first, a few numbers per feature; then each process moves its scatter to the common mean,
    and the scatters are summed.
    """
    own = {label: dict(moments) for label, moments in classes.items()}
    if is_alone(group):
        return own, dict(metadata), tuple(replicas)
    ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    if dist.get_rank() not in ranks:
        raise DistributedError(f"all_reduce: rank {dist.get_rank()} is not among the ranks {ranks} of the group")
    with announced():
        meet(ranks, "all_reduce")
        with _unbroken(ranks, "all_reduce"):
            counted = min((rank for rank in replicas if rank in ranks), default=dist.get_rank()) == dist.get_rank()
            headers: list[Any] = [None] * len(ranks)
            dist.all_gather_object(headers, _Header.of(own, metadata, counted=counted, by_class=by_class), group=group)
            kind = _agreed(headers, ranks)
            labels = list(dict.fromkeys(label for header in headers for label in header.counts))
            device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else "cpu"
            merged: Classes = {label: {} for label in labels}
            for site, size in kind.sizes.items():
                empty = Moments.empty(size, covariance=kind.covariance, device=device)
                parts = [
                    own[label][site] if counted and label in own and own[label][site].d else empty for label in labels
                ]
                counts = torch.tensor([[h.counts.get(label, {}).get(site, 0) for label in labels] for h in headers])
                means = torch.stack([torch.stack([part._origin, part._offset]).to(device) for part in parts])
                everyone = [torch.empty_like(means) for _ in ranks]
                dist.all_gather(everyone, means, group=group)
                for index, (label, part) in enumerate(zip(labels, parts, strict=True)):
                    each = torch.stack([e[index] for e in everyone])
                    merged[label][site] = _merged(part, counts[:, index].double(), each, empty, group)
                    merged[label][site].dtype = kind.dtypes.get(site)
        return merged, kind.metadata, ranks


def _merged(part: Moments, counts: Tensor, means: Tensor, empty: Moments, group: Group) -> Moments:
    """One site of one class: `counts` (ranks,), and `means` (ranks, 2, d), an origin and an offset each."""
    total = counts.sum()
    if not total:
        return empty
    origin = means[int((counts > 0).nonzero()[0]), 0]
    offsets = (means[:, 0] - origin) + means[:, 1]
    offset = (counts / total).to(offsets) @ offsets
    merged = Moments(int(total), origin)
    merged._total = offset * merged.count
    shift = (part._origin.to(origin.device) - origin) + part._offset.to(origin.device) - offset
    if part._scatter is not None:
        sums = part._scatter.to(origin.device)
        third, fourth = moved_sums(sums, part.count, shift)
        merged._scatter = Scatter(sums.second.addr(shift, shift * part.count), third, fourth)
        for tensor in (merged._scatter.second, third, fourth):
            dist.all_reduce(tensor, group=group)
    if part._squares is not None:
        merged._squares = part._squares.to(origin.device) + shift.square() * part.count
        dist.all_reduce(merged._squares, group=group)
    return merged


class _Header(NamedTuple):
    """What every process tells of its moments."""

    sizes: dict[str, int]
    """Site -> features; 0 where this process has seen no rows."""
    counts: dict[Any, dict[str, int]]
    covariance: Covariance
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    by_class: bool

    @classmethod
    def of(cls, classes: Classes, metadata: Mapping[str, str], *, counted: bool, by_class: bool) -> _Header:
        first = next(iter(classes.values()), {})
        return cls(
            {site: own.d for site, own in first.items()},
            {
                label: {site: own.count if counted else 0 for site, own in moments.items()}
                for label, moments in classes.items()
            },
            next((own.kept for own in first.values()), False),
            {site: own.dtype for site, own in first.items() if own.dtype is not None},
            dict(metadata),
            by_class,
        )

    @property
    def is_empty(self) -> bool:
        """Whether this process has seen no rows, and knows of no sizes."""
        return not any(self.sizes.values())

    def as_with_rows(self, other: _Header) -> _Header:
        """The same with what only rows tell, the sizes and the axes, from one who has some."""
        sizes = other.sizes if not self.sizes or self.sizes.keys() == other.sizes.keys() else self.sizes
        axes = {key: value for key, value in other.metadata.items() if key.startswith("axis ")}
        covariance = self.covariance if self.sizes else other.covariance
        return self._replace(sizes=sizes, metadata=axes | self.metadata, covariance=covariance, dtypes=other.dtypes)


def _agreed(headers: Sequence[_Header], ranks: Sequence[int]) -> _Header:
    """The header of the first rank that has rows; every other rank has the same statistics.

    Raises:
        DistributedError: another rank has other statistics.
    """
    first, rank_of_first = next(
        ((header, rank) for header, rank in zip(headers, ranks, strict=True) if not header.is_empty),
        (headers[0], ranks[0]),
    )
    for rank, header in zip(ranks, headers, strict=True):
        own = header.as_with_rows(first) if header.is_empty else header
        for name, expected, got in (
            ("sites of sizes", first.sizes, own.sizes),
            ("metadata", first.metadata, own.metadata),
            ("covariance", first.covariance, own.covariance),
            ("dtypes", first.dtypes, own.dtypes),
            ("classes", first.by_class, own.by_class),
        ):
            if expected != got:
                raise DistributedError(
                    f"all_reduce: rank {rank} has the {name} {got}, rank {rank_of_first} {expected}; collect at the "
                    "same sites of one model, in one way, on every rank"
                )
    return first
