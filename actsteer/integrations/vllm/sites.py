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
