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

Rest: TypeAlias = Literal["none", "sum", "unknown"]
"""What a second tensor beside an activation is: not there, a part of which the activation is the sum, or not known."""

_IN_PARTS = (  # blocks that give (hidden, residual), whose sum is the residual stream; each is compared in the tests
    *("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Gemma2DecoderLayer", "Gemma3DecoderLayer"),
    *("MistralDecoderLayer", "Olmo2DecoderLayer"),
)
_NOT_CALLED = {"TorchCompileWithNoGuardsWrapper", "ParallelLMHead"}  # whose forward is run past their hooks
_NORMS = ("RMSNorm", "GemmaRMSNorm")  # take parts of a sum, and give (normed, the sum)


@final
@dataclass(frozen=True)
class Where:
    """A site of a model of vLLM.

    Args:
        place: the module, and whether its input or its output is meant.
        rest: what the second tensor is, if there is one.
        argument, residual: the place and the name of the arguments that have the activation and its rest.
    """

    place: Place
    rest: Rest
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
        beside = value[1] if self.rest == "sum" and len(value) > 1 else None
        return value[0], beside if isinstance(beside, Tensor) else None


def find(model: nn.Module, site: str, *, reads: bool) -> Where | None:
    """Where a site is; None where another process of the pipeline has it.

    Args:
        reads: whether the edit, or a gate, depends on the activation; else it is enough to add to a part of it.

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
    kinds = {own.__name__ for own in type(module).__mro__}
    is_known = bool(kinds & {*_IN_PARTS, *_NORMS})
    parameters = list(inspect.signature(module.forward).parameters)
    argument = "hidden_states" if "hidden_states" in parameters else parameters[0]
    if side == "in":
        if path not in ((), ("0",), (argument,)):
            raise SiteNotFoundError(f"site {site!r}: vLLM's {type(module).__name__} has its activation in {argument!r}")
        rest: Rest = "none" if "residual" not in parameters else "sum" if is_known else "unknown"
    else:
        if path not in ((), ("0",)):
            raise SiteNotFoundError(f"site {site!r}: of what vLLM's {type(module).__name__} gives the first is known")
        rest = "none" if "residual" not in parameters or kinds & set(_NORMS) else "sum" if is_known else "unknown"
    if reads and rest == "unknown":
        raise UnsupportedModelError(
            f"site {site!r}: a {type(module).__name__} of vLLM keeps the activation in two parts, and how is not known "
            f"(it is of {', '.join(_IN_PARTS)}); add there, or read at a module that gives one tensor, as its mlp"
        )
    places = {own: place for place, own in enumerate(parameters)}
    return Where(place, rest, (places[argument], argument), (places.get("residual", len(places)), "residual"))


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
