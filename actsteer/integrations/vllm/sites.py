"""Sites: where a model of vLLM has what a Hugging Face model calls a site, and what its modules take and give."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

from torch import Tensor, nn

from actsteer.errors import OutputError, SiteNotFoundError, UnsupportedModelError
from actsteer.sites.place import Place, split_site
from actsteer.sites.resolve import resolve

Rest: TypeAlias = Literal["none", "apart", "sum", "unknown"]
"""What a second tensor is that a module takes or gives. "none": there should be none; "apart": something else; "sum":
the activation is the sum of both; "unknown": it may be."""

_IN_PARTS = {  # blocks that give (hidden, residual), whose sum is the residual stream; each is compared in the tests
    *("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
    *("Gemma2DecoderLayer", "Gemma3DecoderLayer"),
}
_NOT_CALLED = {"TorchCompileWithNoGuardsWrapper", "ParallelLMHead"}  # whose forward is run past their hooks
_NORMS = {"RMSNorm", "GemmaRMSNorm"}  # give (normed, the stream)
_LINEAR = {"LinearBase", "Linear"}
_OUTSIDE = {*_NORMS, "LayerNorm", "VocabParallelEmbedding", "Embedding"}  # served outside of the blocks, too
_FUSED = {"QKVParallelLinear", "MergedColumnParallelLinear"}
_IN_ORDER = {"GPT2LMHeadModel", "Phi3ForCausalLM"}  # fuse as Hugging Face does, in its order; compared in the tests
_IN_OWN_WAY = {"FusedMoE", "MoERunnerInterface", "MLAAttention", "MambaBase"}  # do the work of the modules beside them


@final
@dataclass(frozen=True)
class Where:
    """A site of a model of vLLM.

    Args:
        place: the module, and whether its input or its output is meant.
        rest: what the second tensor is, if there is one.
        reads: whether the edit, or a gate, depends on the activation; else it is enough to add to a part of it.
        argument, residual: the place and the name of the arguments that have the activation and its rest.
    """

    place: Place
    rest: Rest
    reads: bool
    argument: tuple[int, str]
    residual: tuple[int, str]

    def opened(self, value: Any) -> tuple[Tensor, Tensor | None]:
        """The activation's tensor in what the module gave, and what is to be added to it to get the activation."""
        if isinstance(value, Tensor):
            return value, None
        if not isinstance(value, tuple) or not value or not isinstance(value[0], Tensor):
            raise OutputError(
                f"site {self.place.site!r}: {type(self.place.module).__name__} gives a {type(value).__name__}, in "
                "which no activation is known; steer the block, or its mlp"
            )
        beside = value[1] if len(value) > 1 and isinstance(value[1], Tensor) else None
        if beside is not None and self.rest == "none" and self.reads:
            raise OutputError(
                f"site {self.place.site!r}: {type(self.place.module).__name__} gives two tensors, and what the second "
                "is to the activation is not known; steer the block, or its mlp"
            )
        return value[0], beside if self.rest == "sum" else None


def find(model: nn.Module, site: str, *, reads: bool) -> Where | None:
    """Where a site is; None where another process of the pipeline has it.

    Args:
        reads: as of what is found.

    Raises:
        SiteNotFoundError: there is none, or vLLM has fused the module with others.
        UnsupportedModelError: the module is not called as a module, or what it gives cannot be read.
    """
    name, side, path = split_site(site)
    modules = dict(model.named_modules())
    name = _named(model, modules, name, site)
    if _is_elsewhere(modules, name):
        return None
    place = resolve(model, [name])[name]
    place = Place(site=site, name=name, module=place.module, side=side, path=path)
    module = place.module
    _check_kind(model, modules, place)
    if {own.__name__ for own in type(module).__mro__} & _NOT_CALLED:
        raise UnsupportedModelError(
            f"site {site!r}: vLLM does not call this {type(module).__name__} as a module, and an edit would be lost; "
            "steer a block"
        )
    kind = next(own.__name__ for own in type(module).__mro__ if "forward" in vars(own))  # whose forward it runs
    is_norm = bool({own.__name__ for own in type(module).__mro__} & _NORMS)
    parameters = list(inspect.signature(getattr(module, "forward_native", module.forward)).parameters)
    argument = "hidden_states" if "hidden_states" in parameters else parameters[0]
    if path not in ((), ("0",), (argument,) if side == "in" else ()):
        raise SiteNotFoundError(
            f"site {site!r}: of what vLLM's {type(module).__name__} {'takes' if side == 'in' else 'gives'}, the first "
            "tensor is known, and no other"
        )
    rest: Rest = "none"
    if "residual" in parameters:
        rest = "sum" if kind in _IN_PARTS else "apart" if is_norm and side == "out" else "unknown"
    if rest == "unknown" and (reads or side == "in"):  # what is added to a part of an output is added to the sum
        raise UnsupportedModelError(
            f"site {site!r}: vLLM's {type(module).__name__} has the residual stream in two parts, which are known of "
            f"{', '.join(sorted(_IN_PARTS))} alone; an edit at a norm's input would change the stream beside it, too: "
            "steer its output, or the block or the mlp before it"
        )
    places = {own: place for place, own in enumerate(parameters)}
    return Where(place, rest, reads, (places[argument], argument), (places.get("residual", len(places)), "residual"))


def _check_kind(model: nn.Module, modules: Mapping[str, nn.Module], place: Place) -> None:
    """That the module is one that means in vLLM what it does in Hugging Face's model.

    It is a block, or a block's attention, mlp, norm or other direct part, or a linear layer, or, outside of the blocks,
    a norm or an embedding.

    Raises:
        UnsupportedModelError: it is another, or one whose output is another.
    """
    name, module = place.name, place.module
    kinds, tells = _kinds(module), f"site {place.site!r}: vLLM's {type(module).__name__}"
    above = _prefixes(name)
    blocks = [own for own in above if isinstance(modules.get(own.rpartition(".")[0]), nn.ModuleList)]
    inside = above[above.index(blocks[0]) + 1 :] if blocks else []
    if not (kinds & _LINEAR or (len(inside) < 2 if blocks else kinds & _OUTSIDE)):
        raise UnsupportedModelError(
            f"{tells} is no block, no direct part of one, no linear layer, and no norm or embedding outside of the "
            "blocks, and may give something else than Hugging Face's module of that name, or rows that are no tokens "
            "(a gated activation multiplies, a norm of heads has a row for each); steer the module around it, or a "
            "linear layer in it"
        )
    language: Any = getattr(model, "get_language_model", lambda: model)()
    if not any(own is module for own in language.modules()) or (
        language is not model and kinds & {"VocabParallelEmbedding", "Embedding"}
    ):
        raise UnsupportedModelError(
            f"{tells} is not run on the tokens of a pass, one after another, in a model that takes more than text; "
            "steer a block of its language model"
        )
    if found := [own for above in inside[:-1] for own in modules[above].modules() if _kinds(own) & _IN_OWN_WAY]:
        raise UnsupportedModelError(
            f"{tells} is a part of {inside[0].rpartition('.')[2]}, and {type(found[0]).__name__} does the work of such "
            "parts in a way of its own; steer the whole, or the block"
        )
    if place.side == "in":
        return
    if kinds & _FUSED and type(model).__name__ not in _IN_ORDER:
        raise UnsupportedModelError(
            f"{tells} computes several layers in one, in an order of its own; that is known to be Hugging Face's of "
            f"{', '.join(sorted(_IN_ORDER))} alone: steer its input, {place.name}:in, or the block"
        )
    apart = [own for own in module.modules() if not getattr(own, "reduce_results", True)]
    if (not blocks or inside) and any(getattr(own, "tp_size", 1) > 1 for own in apart):
        raise UnsupportedModelError(
            f"{tells} gives a part of a sum in each process of a tensor-parallel group (reduce_results=False), and an "
            "edit would be made several times; steer the block"
        )


def _kinds(module: nn.Module) -> set[str]:
    """The names of its classes; of a layer that adapters are put on, those of the layer."""
    return {own.__name__ for own in type(getattr(module, "base_layer", module)).__mro__}


def _named(model: nn.Module, modules: Mapping[str, nn.Module], name: str, site: str) -> str:
    """The name that vLLM has for a module; its own where it has one."""
    last = name.rpartition(".")[2]
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        if last in parts and name not in modules:
            raise SiteNotFoundError(
                f"site {site!r}: vLLM computes {', '.join(parts)} in one module, {fused}, and there is no {last} by "
                "itself; steer what it reads, or the block"
            )
    if name in modules or any(_is_missing(modules.get(own)) for own in _prefixes(name)):
        return name
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = None if mapper is None else mapper.map_name(f"{name}.weight")
    found = str(mapped).removesuffix(".weight") if mapped is not None else name
    return found if found.rpartition(".")[2] == last else name


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _is_missing(module: nn.Module | None) -> bool:
    return module is not None and type(module).__name__ == "PPMissingLayer"


def _is_elsewhere(modules: Mapping[str, nn.Module], name: str) -> bool:
    return any(_is_missing(modules.get(own)) for own in _prefixes(name))
