"""Peers: the processes that run one model together, and those among them that see the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from actsteer.collecting.meeting import is_alone, meet
from actsteer.errors import DistributedError


def replicas(model: nn.Module) -> tuple[int, ...]:
    """The ranks that run this model on the same data as this process: its tensor-parallel group, with itself.

    They are the ranks along those dimensions of the parameters' device mesh that data parallelism does not use.
    """
    if is_alone():
        return ()
    data = {ranks for module in model.modules() for mesh in _data_meshes(module) for ranks in _along(mesh)}
    found = [ranks for module in model.modules() for mesh in _meshes(module) for ranks in _along(mesh)]
    return tuple(sorted(frozenset().union(*(ranks for ranks in found if ranks not in data))))


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
        batch = next(iterator, missing)
        said = meet(ranks, f"batch {step + 1}", says="done" if batch is missing else "more")
        if len(set(said.values())) > 1:
            has, has_not = ([r for r, word in said.items() if word == wanted] for wanted in ("more", "done"))
            raise DistributedError(
                f"ranks {has} have a batch number {step + 1}, ranks {has_not} do not, and the model is sharded over "
                "them; give every rank the same number of batches"
            )
        if batch is missing:
            return
        yield batch
        step += 1


def _together(model: nn.Module) -> tuple[int, ...]:
    """The ranks whose forward passes wait for one another."""
    ranks: set[int] = set()
    for module in model.modules():
        for mesh in _meshes(module):
            ranks |= set(mesh.mesh.flatten().tolist())
        if type(module).__name__ == "FullyShardedDataParallel":
            group: Any = module.process_group
            ranks |= set(dist.get_process_group_ranks(group))
    return tuple(sorted(ranks))


def _meshes(module: nn.Module) -> list[Any]:
    """The device meshes of the module's own parameters; of transformers' tensor parallelism, that of the model."""
    meshes = [getattr(parameter, "device_mesh", None) for parameter in module._parameters.values()]
    if (getattr(module, "tp_size", None) or getattr(module, "_tp_size", None) or 1) > 1:
        meshes.append(getattr(module, "_device_mesh", None))
    return [mesh for mesh in meshes if mesh is not None]


def _data_meshes(module: nn.Module) -> list[Any]:
    """The meshes over which FSDP shards this module, each process with data of its own; empty without FSDP."""
    if not hasattr(module, "_get_fsdp_state"):
        return []
    sharded: Any = module
    state = sharded._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group.mesh_info.mesh for group in groups if group is not None]


def _along(mesh: Any) -> list[frozenset[int]]:
    """The ranks in line with this process, in each dimension of a mesh."""
    return [frozenset(dist.get_process_group_ranks(mesh.get_group(dim))) for dim in range(mesh.ndim)]
