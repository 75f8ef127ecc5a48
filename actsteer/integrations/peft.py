"""PEFT: a steering as a LoRA adapter, which stock engines serve beside the plain model.

Needs the `peft` package, of the extra `actsteer[peft]`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Literal, TypeAlias, final

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from actsteer.collecting.batches import Batches
from actsteer.collecting.eval_mode import buffers_kept
from actsteer.errors import NotFoldable
from actsteer.files.replacing import filling
from actsteer.folding.affine import AffineMap
from actsteer.folding.fold import affine_steering
from actsteer.folding.layers import kind_of, obstacle
from actsteer.folding.proof import Proof
from actsteer.folding.trace import Trace
from actsteer.sites.place import Place
from actsteer.sites.resolve import Sites
from actsteer.sites.wrappers import named_modules, unwrapped
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import Interventions, Steerable
from actsteer.steering.strength import Strengths

_At: TypeAlias = Literal["input", "output"]
_ADAPTED = ("linear", "transposed linear", "embedding")
_INSTEAD = "fold it into a copy of the model, or keep the Steerer"


@final
@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A LoRA adapter: each layer's W becomes W + B A.

    Args:
        config: the `peft.LoraConfig`.
        tensors: A (r, in) and B (out, r) of every layer, float32, by the names that PEFT gives them in a file.
    """

    config: Any
    tensors: Mapping[str, Tensor]

    def save(self, path: str | PathLike[str]) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into a folder, as PEFT's `save_pretrained` does.

        The folder is made if there is none; its files change when both are written.

        Raises:
            OSError: there is no folder for it, or it may not be written.
        """
        with filling(Path(path)) as folder:
            self.config.save_pretrained(str(folder))
            save_file(dict(self.tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def to_peft(
    vectors: Steerable,
    c: Strengths | None,
    model: nn.Module,
    *,
    verify_on: Batches | None = None,
    intervention: Interventions | None = None,
    sites: Sites | None = None,
) -> LoraAdapter:
    """The steering as a LoRA adapter, which PEFT and engines such as vLLM serve with no plugin, beside the plain model.

    An edit h + U A h without a constant part, such as `Ablate` (rank 1: U = -c u, A = uᵀ) or a `LowRank` with b = 0, is
    a LoRA exactly: at the output of a linear layer without a bias W becomes W + U (A W), at the input of any linear
    layer W + (W U) A, in an embedding the rows change as an output does. Layers that are tied may differ then, for an
    adapter leaves the weights alone.

    With `verify_on`, sites may also be sums of such layers' outputs, such as all `residual_writers(model)`: one pass
    shows which layers those are, and the outputs of the model with the adapter, which PEFT loads into a copy, must be
    those of the hooked one, as `fold` has it. Without, nothing runs: each site is such a layer's, and the model is
    taken to call the layer, and not to read its weight. Pads are edited too, which changes no answer at a token.

    The factors are computed in float64 and kept in float32. All have the rank r of the largest, filled up with zeros,
    and the scaling is 1; vLLM asks for `--max-lora-rank` of r or more. An engine rounds B A x to its own dtype: in
    bfloat16 `Ablate` leaves of a direction what that rounding is.

    Args:
        vectors, c, intervention, sites: as for `fold`; a c of None is that of a `Steering`, or 1.
        model: it stays as it is, bit for bit.
        verify_on: as for `fold`.

    Raises:
        ImportError: there is no `peft`.
        NotFoldable: a LoRA cannot be that: what adds a constant, as `Add` does, for LoRA has no bias; an edit that is
            not affine; a gate, positions or strengths per row or step; another layer.
        AttachedError: a Steerer is attached to the model.
        ActsteerError: and what `Steerer` raises.

    Source: LoRA, Hu et al. 2021; directional ablation, Arditi et al. 2024.

    >>> from peft import PeftModel
    >>> from actsteer import Ablate, SteeringVector
    >>> import tempfile
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    >>> v, x = SteeringVector({"2": torch.tensor([3.0, 4.0])}), torch.randn(5, 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_peft(v, 1.0, model, intervention=Ablate()).save(folder)
    ...     adapted = PeftModel.from_pretrained(model, folder)
    >>> bool((adapted(x) @ v["2"]).abs().max() < 1e-5)
    True
    """
    peft = _library()
    steerer, maps = affine_steering(model, vectors, c, intervention=intervention, sites=sites, axis=None)
    _check(steerer, maps)
    layers: dict[str, _Layer] = {}
    with buffers_kept(model):
        proof = None if verify_on is None else Proof(steerer, verify_on)
        for site, name, module, at in _written(model, steerer, maps, proof):
            _check_layer(model, site, name, module, maps[site], at=at)
            layers.setdefault(name, _Layer(module)).edit(maps[site], at=at)
    adapter = _adapter(peft, model, layers)
    if proof is not None and (failure := proof.failure(_adapted(peft, model, adapter))) is not None:
        raise NotFoldable(f"with the adapter, {failure}; {_INSTEAD}")
    return adapter


def _library() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA adapters need the peft package; pip install 'actsteer[peft]'") from error
    return peft


def _check(steerer: Steerer, maps: Mapping[str, AffineMap]) -> None:
    """NotFoldable, unless the edits are linear, on the last axis, and one at least."""
    if not maps:
        raise NotFoldable(
            "the steering changes nothing at this c, and PEFT has no empty adapter; serve the plain model"
        )
    for site, edit in maps.items():
        if bool(edit.bias.any()):
            raise NotFoldable(
                f"site {site!r}: the edit adds a constant, of norm {float(edit.bias.norm()):.3g}, as Add does, and a "
                f"LoRA has no bias; {_INSTEAD}, or serve the bank with the plugin for vLLM"
            )
        if steerer.axes.get(site, -1) != -1:
            raise NotFoldable(
                f"site {site!r}: a LoRA edits the last axis, -1, and not axis {steerer.axes[site]}; {_INSTEAD}"
            )


def _written(
    model: nn.Module, steerer: Steerer, maps: Mapping[str, AffineMap], proof: Proof | None
) -> Iterator[tuple[str, str, nn.Module, _At]]:
    """Site, layer's name, layer, and the side of it that the edit is at; in the order in which the edits come."""
    sums: dict[str, Place] = {}
    for site in maps:
        place = steerer.edits[site].place
        if kind_of(place.module) in _ADAPTED:  # its output is edited before what it is a part of
            yield site, place.name, place.module, "input" if place.side == "in" else "output"
        elif proof is None:
            raise NotFoldable(
                f"site {site!r}: {place.name} ({type(place.module).__name__}) is no linear layer or embedding; name "
                "one that writes there, or give verify_on=, inputs on which they are found and the adapter is proved"
            )
        else:
            sums[site] = place
    if not sums or proof is None:
        return
    trace = Trace(model, sums, proof.batches[0])
    for site in trace.in_order():
        writers, others = trace.writers(site, settled=frozenset())
        if others or not writers:
            why = "; ".join(f"{other} has a part in it" for other in dict.fromkeys(others))
            raise NotFoldable(f"site {site!r}: {why or 'no layer makes it'}; {_INSTEAD}, or choose another site")
        yield from ((site, run.name, run.module, "output") for run in writers)


def _check_layer(model: nn.Module, site: str, name: str, module: nn.Module, edit: AffineMap, *, at: _At) -> None:
    """NotFoldable, where a LoRA of this layer would not be the edit."""
    names = [other for other, own in named_modules(unwrapped(model)) if own is module]
    bias = module._parameters.get("bias")
    why = obstacle(module, edit, at=at)
    if kind_of(module) not in _ADAPTED:
        why = "it is no linear layer or embedding, and has no LoRA"
    elif kind_of(module) == "embedding" and at == "input":
        why = "an embedding's input is no activation"
    elif not name:
        why = "it is the whole model, which PEFT does not adapt"
    elif len(names) > 1:
        why = f"it is one module with {next(own for own in names if own != name)}, and PEFT adapts one name"
    elif why is None and at == "output" and bias is not None:
        wide = bias.detach().double().to(edit.reads.device)
        moved = (edit.adds @ (edit.reads @ wide)).norm()
        if moved > torch.finfo(bias.dtype).eps * wide.norm():
            why = f"its bias would change too, by {float(moved):.3g}, and a LoRA has no bias"
    if why is not None:
        raise NotFoldable(f"site {site!r}: {name or 'the model'} ({type(module).__name__}): {why}; {_INSTEAD}")


class _Layer:
    """What the edits add to the weight W (out, in) of a layer, B A; in float64."""

    def __init__(self, module: nn.Module) -> None:
        self.kind = kind_of(module)
        self._module = module
        rows, columns = self._weight().shape
        self._b: Float[Tensor, "out r"] = torch.zeros(rows, 0, dtype=torch.float64)
        self._a: Float[Tensor, "r in"] = torch.zeros(0, columns, dtype=torch.float64)

    def _weight(self) -> Float[Tensor, "out in"]:
        weight = self._module._parameters["weight"]
        assert weight is not None
        return weight.detach() if self.kind == "linear" else weight.detach().T

    def edit(self, edit: AffineMap, *, at: _At) -> None:
        """W + B A becomes M (W + B A), or at the input (W + B A) M."""
        weight, adds, reads = self._weight().double(), edit.adds, edit.reads
        if at == "output":
            reads = (reads.to(weight) @ weight).cpu() + (reads.cpu() @ self._b) @ self._a
        else:
            adds = (weight @ adds.to(weight)).cpu() + self._b @ (self._a @ adds.cpu())
        self._b, self._a = torch.cat([self._b, adds.cpu()], dim=1), torch.cat([self._a, reads.cpu()])

    @property
    def rank(self) -> int:
        """r."""
        return len(self._a)

    def factors(self, name: str, *, rank: int) -> dict[str, Tensor]:
        """A and B by their names, filled up with zeros to a rank."""
        more = rank - self.rank
        found = {"A": pad(self._a, (0, 0, 0, more)), "B": pad(self._b, (0, more))}
        keys = "lora_embedding_{}" if self.kind == "embedding" else "lora_{}.weight"
        return {f"base_model.model.{name}.{keys.format(key)}": own.float().contiguous() for key, own in found.items()}


def _adapter(peft: ModuleType, model: nn.Module, layers: Mapping[str, _Layer]) -> LoraAdapter:
    rank = max(layer.rank for layer in layers.values())
    host: Any = unwrapped(model)
    others = [name for name, _ in named_modules(model) if name not in layers and _ends_with_one(name, layers)]
    generates = hasattr(host, "can_generate") and host.can_generate() and not host.config.is_encoder_decoder
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if generates else None,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(layers),
        exclude_modules=others or None,  # for PEFT takes what a name ends with
        fan_in_fan_out=any(layer.kind == "transposed linear" for layer in layers.values()),
        base_model_name_or_path=getattr(host, "name_or_path", None) or None,
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= layer.factors(name, rank=rank)
    return LoraAdapter(config, tensors)


def _ends_with_one(name: str, targets: Iterable[str]) -> bool:
    return any(name.endswith(f".{target}") for target in targets)


def _adapted(peft: ModuleType, model: nn.Module, adapter: LoraAdapter) -> nn.Module:
    """A copy of the model into which PEFT has loaded the adapter."""
    with TemporaryDirectory() as folder:
        adapter.save(folder)
        adapted: nn.Module = peft.PeftModel.from_pretrained(copy.deepcopy(unwrapped(model)), folder)
    return adapted
