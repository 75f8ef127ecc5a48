"""Shards: activations of which each process holds a part, as tensor parallelism makes them."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameter of the module's own is a DTensor."""
    return any(_is_dtensor(parameter) for parameter in module._parameters.values())


def full_shape(activation: Tensor, module: nn.Module) -> tuple[int, ...]:
    """The shape of the whole activation, of which this process may hold a part."""
    if _columns(activation, module) is not None:
        assert isinstance(module, nn.Linear)
        return (*activation.shape[:-1], module.out_features)
    return tuple(activation.shape)


def full(activation: Tensor, module: nn.Module) -> Tensor:
    """The whole activation, gathered from all processes where each holds a part."""
    if (placed := _columns(activation, module)) is not None:
        from torch.distributed.tensor import DTensor

        mesh, placements = placed
        activation = DTensor.from_local(activation, mesh, placements, run_check=False)
    if not _is_dtensor(activation):
        return activation
    gathered: Tensor = activation.full_tensor()  # type: ignore[attr-defined]
    return gathered


def share(shift: Tensor, activation: Tensor, module: nn.Module) -> Tensor:
    """What this process adds to its part of the activation, from what is added to the whole; both of one rank."""
    placed = _columns(activation, module)
    if placed is None and not _is_dtensor(activation):
        return shift
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = getattr(activation, "device_mesh", None) if placed is None else placed[0]
    everywhere = DTensor.from_local(shift, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if placed is None:
        return everywhere
    own: Tensor = everywhere.redistribute(placements=placed[1]).to_local()
    return own


def _is_dtensor(tensor: Tensor | None) -> bool:
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    distributed = sys.modules.get("torch.distributed.tensor")  # never imported: then there are none
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def _columns(activation: Tensor, module: nn.Module) -> tuple[Any, list[Any]] | None:
    """(mesh, placements) of the plain output of a column-parallel linear module, which holds some of the features."""
    weight: Any = getattr(module, "weight", None)
    if _is_dtensor(activation) or not (isinstance(module, nn.Linear) and _is_dtensor(weight)):
        return None
    if activation.shape[-1] >= module.out_features:
        return None
    from torch.distributed.tensor import Replicate, Shard

    features = activation.ndim - 1
    placements = [Shard(features) if placement.is_shard(0) else Replicate() for placement in weight.placements]
    return weight.device_mesh, placements
