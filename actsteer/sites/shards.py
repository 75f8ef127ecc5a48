"""Shards: activations of which each process holds a part, as tensor parallelism makes them, and which processes do."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actsteer.errors import OutputError

Group: TypeAlias = "dist.ProcessGroup | None"


def is_alone(group: Group = None) -> bool:
    """Whether there are no other processes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1


def replicas(model: nn.Module) -> tuple[int, ...]:
    """The ranks that run this model on the same data as this process: its tensor-parallel group, with itself.

    They are the ranks along those dimensions of the parameters' device mesh that data parallelism does not use.
    """
    if is_alone():
        return ()
    data = {ranks for module in model.modules() for mesh in _data_meshes(module) for ranks in _along(mesh)}
    found = [ranks for module in model.modules() for mesh in meshes(module) for ranks in _along(mesh)]
    return tuple(sorted(frozenset().union(*(ranks for ranks in found if ranks not in data))))


def is_sharded(module: nn.Module) -> bool:
    """Whether the module itself has a parameter that is a DTensor."""
    return any(_is_dtensor(parameter) for parameter in module._parameters.values())


def is_gathered_now_and_then(module: nn.Module) -> bool:
    """Whether FSDP shards the module, which may hold whole parameters between passes until FSDP frees them."""
    return any(kind.__module__.startswith("torch.distributed.fsdp") for kind in type(module).__mro__)


def is_parallel(module: nn.Module) -> bool:
    """Whether each process may hold a part of what the module gives, as under tensor parallelism."""
    return is_sharded(module) and not is_gathered_now_and_then(module)


def full_shape(activation: Tensor, module: nn.Module) -> tuple[int, ...]:
    """The shape of the whole activation, of which this process may hold some features."""
    if _columns(activation, module) is not None:
        return (*activation.shape[:-1], _features(module)[1])
    return tuple(activation.shape)


def full(activation: Tensor, module: nn.Module, *, site: str) -> Tensor:
    """The whole activation, gathered from all processes where each holds a part.

    Raises:
        OutputError: on every process, if the processes hold different plain tensors: how those go together is unknown.
    """
    if (placed := _columns(activation, module)) is not None:
        from torch.distributed.tensor import DTensor

        mesh, placements = placed
        activation = DTensor.from_local(activation, mesh, placements, run_check=False)
    if not _is_dtensor(activation):
        _check_same_everywhere(activation, module, site)
        return activation
    gathered: Tensor = activation.full_tensor()  # type: ignore[attr-defined]
    return gathered


def whole_rows(activation: Tensor, module: nn.Module) -> Tensor:
    """All features of the rows that this process holds."""
    if _columns(activation, module) is None and not _is_dtensor(activation):
        return activation
    return full(activation, module, site="")


def share(shift: Tensor, activation: Tensor, module: nn.Module) -> Tensor:
    """What this process adds to its part of the activation, from what is added to the whole; both of one rank."""
    return _placed(shift, activation, module, None)


def own_part(edited: Tensor, activation: Tensor, module: nn.Module) -> Tensor:
    """The part of an edited activation that lies here, as `activation` does of the unedited one."""
    placements: Any = getattr(activation, "placements", None)
    if placements is not None and any(placement.is_partial() for placement in placements):
        placements = None  # it was summed for the edit, and is the same everywhere now
    return _placed(edited, activation, module, placements)


def _placed(tensor: Tensor, activation: Tensor, module: nn.Module, placements: Any) -> Tensor:
    columns = _columns(activation, module)
    if columns is None and not _is_dtensor(activation):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = getattr(activation, "device_mesh", None) if columns is None else columns[0]
    placed = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if columns is not None:
        own: Tensor = placed.redistribute(placements=columns[1]).to_local()
        return own
    return placed if placements is None else placed.redistribute(placements=placements)


def _is_dtensor(tensor: Tensor | None) -> bool:
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    distributed = sys.modules.get("torch.distributed.tensor")  # never imported: then there are none
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def _features(module: nn.Module) -> tuple[int, int]:
    """The axis of the weight along which the features lie that the module gives, and their number."""
    if isinstance(module, nn.Embedding):
        return 1, module.embedding_dim
    assert isinstance(module, nn.Linear)
    return 0, module.out_features


def _columns(activation: Tensor, module: nn.Module) -> tuple[Any, list[Any]] | None:
    """(mesh, placements) of the plain output of a column-parallel module, which holds some of the features."""
    if "torch.distributed.tensor" not in sys.modules:  # then there are no shards
        return None
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, (nn.Linear, nn.Embedding)) or not _is_dtensor(weight) or _is_dtensor(activation):
        return None
    dim, size = _features(module)
    if activation.shape[-1] >= size or not any(placement.is_shard(dim) for placement in weight.placements):
        return None
    from torch.distributed.tensor import Replicate, Shard

    features = activation.ndim - 1
    placements = [Shard(features) if placement.is_shard(dim) else Replicate() for placement in weight.placements]
    return weight.device_mesh, placements


def _check_same_everywhere(activation: Tensor, module: nn.Module, site: str) -> None:
    weight: Any = next((parameter for parameter in module._parameters.values() if _is_dtensor(parameter)), None)
    if weight is None or any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
        return  # not parallel; or FSDP, whose processes have data of their own
    from torch.distributed.tensor import DTensor, Shard

    mesh = weight.device_mesh
    with torch.no_grad():
        own = activation.double().sum().reshape(1)
        sums = DTensor.from_local(own, mesh, [Shard(0)] * mesh.ndim, run_check=False).full_tensor()
    if not bool(((sums == sums[0]) | sums.isnan()).all()):
        raise OutputError(
            f"site {site!r}: each process holds another part of the activation of {type(module).__name__}, as a plain "
            "tensor; choose another site, or give its parallel style use_local_output=False"
        )


def meshes(module: nn.Module) -> list[Any]:
    """The device meshes of the module's parameters; under transformers' tensor parallelism, that of the model."""
    found = [getattr(parameter, "device_mesh", None) for parameter in module._parameters.values()]
    if (getattr(module, "tp_size", None) or getattr(module, "_tp_size", None) or 1) > 1:
        found.append(getattr(module, "_device_mesh", None))
    return [mesh for mesh in found if mesh is not None]


def _data_meshes(module: nn.Module) -> list[Any]:
    """The meshes over which FSDP shards this module; their processes see different data. Empty without FSDP."""
    if not hasattr(module, "_get_fsdp_state"):
        return []
    sharded: Any = module
    state = sharded._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group.mesh_info.mesh for group in groups if group is not None]


def _along(mesh: Any) -> list[frozenset[int]]:
    """The ranks in line with this process, in each dimension of a mesh."""
    return [frozenset(dist.get_process_group_ranks(mesh.get_group(dim))) for dim in range(mesh.ndim)]
