"""Private names: every private part of torch and of its neighbours that this library uses, and what is lost without it.

torch promises nothing of a name that begins with an underscore, so `PARTS` lists every one that any file here uses; a
test compares the two, and `.ci/versions` looks for each in the oldest torch and in the newest. Where a part can be done
without, it is looked up here, with a stand-in that costs time and loses no edit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import torch

OLDEST = (2, 10)  # the oldest torch on which all tests pass; pyproject.toml says the same

_ALL = "whatever uses it: an AttributeError names it"
_CHECKPOINTS = "time, to look in every edit for a running checkpoint; and pads are steered, as under a checkpoint"
_NAMES = "the names of sites under this wrapper"

# what is used -> what is lost in a version that lacks it
PARTS: Mapping[str, str] = MappingProxyType(
    {
        # with a stand-in below
        "torch._C._autograd._top_saved_tensors_default_hooks": _CHECKPOINTS,
        "torch._C._is_fwd_grad_enabled": _CHECKPOINTS,
        "torch._C._functorch.is_functorch_wrapped_tensor": "time: torch.where looks for strengths of 0",
        "torch._dynamo.eval_frame._stance": "an edit that the stance skip_guard_eval_unsafe hides is not refused",
        "torch._dynamo.eval_frame.skip_code": "silence: torch.compile warns of what it cannot trace in a checkpoint",
        "torch._inductor.freezing": "the refusal to fold into weights that compiled code has frozen",
        # of modules and tensors
        "torch.nn.Module._parameters": _ALL,
        "torch.nn.Module._buffers": _ALL,
        "torch.nn.Module._modules": _ALL,
        "torch.nn.Module._forward_hooks": _ALL,
        "torch.nn.Module._forward_pre_hooks": _ALL,
        "torch.nn.Module._forward_pre_hooks_with_kwargs": _ALL,
        "torch.nn.Module._compiled_call_impl": _ALL,
        "torch.nn.modules.batchnorm._BatchNorm": _ALL,
        "torch.nn.modules.batchnorm._NormBase": _ALL,
        "torch.nn.modules.conv._ConvNd": _ALL,
        "torch.Tensor._version": _ALL,
        "torch.nested._internal.nested_tensor.NestedTensor._ragged_idx": "jagged activations: an AttributeError",
        "torch.autograd.graph.Node._saved_alpha": "a sum with alpha looks like a plain one until the fold's proof",
        "torch.utils._pytree.SUPPORTED_NODES": "output classes of the user's own that torch's registry knows",
        # by which checkpoints, wrappers and processes are known
        "torch.utils.checkpoint.unpack_hook": "that a checkpoint's backward pass has run: a warning without cause",
        "torch.utils.checkpoint.recompute_fn": "the same",
        "torch._dynamo.eval_frame.OptimizedModule._orig_mod": _NAMES,
        "torch.distributed.fsdp.FullyShardedDataParallel._fsdp_wrapped_module": _NAMES,
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper": _NAMES,
        "torch.distributed.algorithms.ActivationWrapper._checkpoint_wrapped_module": _NAMES,
        "torch.distributed.tensor.DTensor._local_tensor": "the digest of sharded weights, by which resuming knows them",
        "torch.distributed.distributed_c10d._get_default_store": "statistics of several processes: an AttributeError",
        "torch.distributed.fsdp.FSDPModule._get_fsdp_state": "statistics under FSDP2: the rows of one rank alone count",
        "torch.distributed.fsdp.FSDPModule._fsdp_param_group": "the same",
        "torch.distributed.fsdp.FSDPModule._fsdp_param_groups": "the same, in newer torch",
        # of transformers, accelerate, vLLM and numpy
        "transformers.PreTrainedModel._tp_size": "statistics under tensor parallelism: every row counts once per rank",
        "transformers.PreTrainedModel._device_mesh": "the same",
        "transformers.PreTrainedModel._is_stateful": "the refusal to share prefixes where the cache is a state",
        "transformers.PreTrainedConfig._commit_hash": "the model's revision in evidence",
        "accelerate.hooks._hf_hook": "that a pass runs whole where weights are offloaded",
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs": "the bank: no engine that has one starts",
        "vllm.config.ParallelConfig._api_process_count": "the refusal to replace a bank that other servers know",
        "numpy._core.multiarray._reconstruct": "files of peers that hold numpy arrays: they are refused",
    }
)


def refuse_older(version: str) -> None:
    """ImportError if a torch of this version is older than the oldest on which every promise holds."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"actsteer: expected torch {oldest} or newer, got {version}, in which some edits of compiled code would be "
            f"lost or refused; install a newer one: pip install 'torch>={oldest}'"
        )


refuse_older(torch.__version__)


def _part(name: str, stand_in: Any) -> Any:
    """A part of torch that may be missing."""
    try:
        return attrgetter(name.removeprefix("torch."))(torch)
    except AttributeError:
        return stand_in


# what takes the place of the tensors that autograd saves, as a checkpoint does; None where nothing does
saves_otherwise: Callable[[bool], Any] = _part(
    "torch._C._autograd._top_saved_tensors_default_hooks", lambda ignore_is_tracing: True
)
# False inside an autograd function's forward, as a reentrant checkpoint runs it
is_outside_of_functions: Callable[[], bool] = _part("torch._C._is_fwd_grad_enabled", lambda: False)
# whether torch.func (vmap, grad, ...) follows this tensor
is_functorch_wrapped: Callable[[torch.Tensor], bool] = _part(
    "torch._C._functorch.is_functorch_wrapped_tensor", lambda tensor: True
)


def dynamo() -> Any:
    """The machinery of torch.compile; None where nothing has loaded it, and nothing can be compiled."""
    return sys.modules.get("torch._dynamo")


def skips_guards() -> bool:
    """Whether `torch.compiler.set_stance` has compiled code run unchecked."""
    stance = dynamo() and getattr(dynamo().eval_frame, "_stance", None)
    return bool(getattr(stance, "skip_guard_eval_unsafe", False))


def leave_untraced(function: Callable[..., Any]) -> None:
    """Have torch.compile, if it is loaded, run a function as it is."""
    skip = dynamo() and getattr(dynamo().eval_frame, "skip_code", None)
    if skip is not None:
        skip(function.__code__)


def has_frozen_weights() -> bool:
    """Whether inductor has written weights into code in this process."""
    return "torch._inductor.freezing" in sys.modules
