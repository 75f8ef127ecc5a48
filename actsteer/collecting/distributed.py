"""Distributed: the sums of all processes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from actsteer.collecting.meeting import Group, is_alone, meet
from actsteer.collecting.moments import Covariance, Moments, Scatter, moved_sums
from actsteer.errors import DistributedError

Classes: TypeAlias = dict[Any, dict[str, Moments]]
"""Label -> site -> moments."""


def reduce(
    classes: Mapping[Any, Mapping[str, Moments]],
    metadata: Mapping[str, str],
    replicas: Sequence[int],
    *,
    group: Group,
) -> tuple[Classes, tuple[int, ...]]:
    """The moments of all processes merged, and the ranks that have them now; of `replicas` the first alone counts.

    The means come together first, a few numbers per feature; then each process moves its scatter to the common mean,
    and the scatters are summed.
    """
    own = {label: dict(moments) for label, moments in classes.items()}
    if is_alone(group):
        return own, tuple(replicas)
    ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    if dist.get_rank() not in ranks:
        raise DistributedError(f"all_reduce: rank {dist.get_rank()} is not among the ranks {ranks} of the group")
    meet(ranks, "all_reduce")
    counted = min((rank for rank in replicas if rank in ranks), default=dist.get_rank()) == dist.get_rank()
    headers = _gathered(_Header.of(own, metadata, counted), group)
    _check_alike(headers, ranks)
    labels = list(dict.fromkeys(label for header in headers for label in header.counts))
    if None in labels and len(labels) > 1:
        raise DistributedError(
            "all_reduce: some ranks have statistics by class, others not; collect alike on every rank"
        )
    sizes = next(header.sizes for header in headers if header.sizes)
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else "cpu"
    merged: Classes = {label: {} for label in labels}
    for site, size in sizes.items():
        empty = Moments.empty(size, covariance=headers[0].covariance, device=device)
        parts = [own[label][site] if counted and label in own else empty for label in labels]
        counts = torch.tensor([[h.counts.get(label, {}).get(site, 0) for label in labels] for h in headers]).double()
        means = torch.stack([torch.stack([part._origin, part._offset]).to(device) for part in parts])
        everyone = [torch.empty_like(means) for _ in ranks]
        dist.all_gather(everyone, means, group=group)
        for index, (label, part) in enumerate(zip(labels, parts, strict=True)):
            merged[label][site] = _merged(
                part, counts[:, index], torch.stack([e[index] for e in everyone]), empty, group
            )
    return merged, ranks


def _merged(part: Moments, counts: Tensor, means: Tensor, empty: Moments, group: Group) -> Moments:
    """One site of one class: `counts` (ranks,), and `means` (ranks, 2, d), an origin and an offset each."""
    total = counts.sum()
    if not total:
        return empty
    origin = means[int((counts > 0).nonzero()[0]), 0]
    offsets = (means[:, 0] - origin) + means[:, 1]
    offset = (counts / total).to(offsets) @ offsets
    merged = Moments(int(total), origin)
    merged._offset = offset
    if empty.has_covariance and part._scatter is not None:
        shift = (part._origin.to(origin.device) - origin) + part._offset.to(origin.device) - offset
        sums = part._scatter.to(origin.device)
        third, fourth = moved_sums(sums, part.count, shift)
        second = sums.second.addr(shift, shift * part.count)
        for tensor in (second, third, fourth):
            dist.all_reduce(tensor, group=group)
        merged._scatter = Scatter(second, third, fourth)
    if part._squares is not None:
        shift = (part._origin.to(origin.device) - origin) + part._offset.to(origin.device) - offset
        merged._squares = part._squares.to(origin.device) + shift.square() * part.count
        dist.all_reduce(merged._squares, group=group)
    return merged


class _Header:
    """What every process tells of its moments."""

    def __init__(self, sizes: dict[str, int], counts: dict[Any, dict[str, int]], metadata: dict[str, str]) -> None:
        self.sizes, self.counts, self.metadata = sizes, counts, metadata
        self.covariance: Covariance = False

    @classmethod
    def of(cls, classes: Classes, metadata: Mapping[str, str], counted: bool) -> _Header:
        first = next(iter(classes.values()), {})
        header = cls({site: own.d for site, own in first.items()}, {}, dict(metadata))
        header.counts = {
            label: {site: own.count if counted else 0 for site, own in moments.items()}
            for label, moments in classes.items()
        }
        header.covariance = next(iter(first.values())).kept if first else False
        return header


def _gathered(header: _Header, group: Group) -> list[_Header]:
    headers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(headers, header, group=group)
    return headers


def _check_alike(headers: Sequence[_Header], ranks: Sequence[int]) -> None:
    for rank, header in zip(ranks, headers, strict=True):
        for name, first, own in (
            ("sites of sizes", headers[0].sizes, header.sizes),
            ("metadata", headers[0].metadata, header.metadata),
            ("covariance", headers[0].covariance, header.covariance),
        ):
            if first != own:
                raise DistributedError(
                    f"all_reduce: rank {rank} has the {name} {own}, rank {ranks[0]} {first}; collect at the same "
                    "sites of one model on every rank"
                )
