"""Blocks: the layers of a transformer, by number and by name, and the usual places in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import TypeAlias

from torch import nn

from actsteer.errors import SiteNotFoundError, UnsupportedModelError
from actsteer.sites.features import ATTENTION
from actsteer.sites.resolve import hook_points
from actsteer.sites.wrappers import class_name, named_modules, unwrapped

_BLOCK = re.compile(
    r"(?P<blocks>(?:.+\.)?(?:layers?|h|blocks?))\.(?P<number>\d+)"
    r"(?P<side>|:out|:out\.0|\.hook_resid_post|:in|:in\.hidden_states|:in\.0|\.hook_resid_pre)"
)
_INSIDE = re.compile(r"(^|\.)(layers?|h|blocks?)\.\d+\.")  # a list inside a block
_BY_TYPE = {  # a config's model_type -> where its causal language model has them, if not in model.layers
    **dict.fromkeys(("gpt2", "gptj", "gpt_neo", "gpt_bigcode", "bloom", "falcon", "codegen", "qwen"), "transformer.h"),
    **dict.fromkeys(("mpt", "dbrx"), "transformer.blocks"),
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    **dict.fromkeys(
        (
            *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "phi"),
            *("phi3", "olmo", "olmo2", "olmo3", "stablelm", "starcoder2", "cohere", "cohere2", "smollm3", "granite"),
            *("gemma3_text", "deepseek_v2", "deepseek_v3", "glm", "glm4", "exaone4", "minimax", "gpt_oss", "ministral"),
        ),
        "model.layers",
    ),
}

Blocks: TypeAlias = int | slice | Iterable[int] | None
"""Numbers of blocks, from 0, or from -1 for the last one; None: all."""
_ATTENTION = (*ATTENTION, "linear_attn")  # what a block calls it
_MLP = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "moe", "fc2", "linear2")  # or the last layer of it
_HOOKS = {"attention": "hook_attn_out", "MLP": "hook_mlp_out"}  # of TransformerLens
_POST_NORMS = (  # of blocks that norm what they add to the residual stream: behind the attention, behind the MLP
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
)


def blocks_of_type(kind: str) -> str | None:
    """The name of the list of blocks in a model of this `model_type`; None if it is not a common one.

    >>> blocks_of_type("llama"), blocks_of_type("gpt2"), blocks_of_type("mine")
    ('model.layers', 'transformer.h', None)
    """
    return _BY_TYPE.get(kind)


def find_blocks(model: nn.Module) -> tuple[str, int]:
    """The name of the model's list of transformer blocks, and how many there are.

    Of a multimodal model those of its text model; of a TransformerLens model, "blocks".

    Raises:
        UnsupportedModelError: it has none, or several of which any could be meant.
    """
    host = unwrapped(model)
    if bool(getattr(getattr(host, "config", None), "is_encoder_decoder", False)):
        raise UnsupportedModelError(
            f"{class_name(model)} has an encoder and a decoder; name the sites, for it is open which blocks are meant"
        )
    lists = {
        name: len(module)
        for name, module in named_modules(model)
        if isinstance(module, nn.ModuleList) and len(module) and re.fullmatch(r"(.+\.)?(layers?|h|blocks?)", name)
    }
    if hook_points(model) and "blocks" in lists:
        return "blocks", lists["blocks"]
    outer = {name: size for name, size in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    texts = {name: size for name, size in outer.items() if re.search(r"language_model|text_model", name)}
    found = texts if len(outer) > 1 and texts else outer
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{class_name(model)}: expected one list of blocks, such as model.layers, found {sorted(found) or 'none'}; "
            "name the sites instead of the blocks"
        )
    return next(iter(found.items()))


def block_of(site: str) -> tuple[str, int] | None:
    """The list of blocks and the number of the block at whose output a site is; None if it is at no block's.

    The input of block N is the output of block N - 1.

    >>> block_of("model.layers.14"), block_of("transformer.h.3:in"), block_of("model.layers.14.mlp.layers.1")
    (('model.layers', 14), ('transformer.h', 2), None)
    """
    found = _BLOCK.fullmatch(site)
    if found is None or _INSIDE.search(found["blocks"]):
        return None
    before = ":in" in found["side"] or found["side"] == ".hook_resid_pre"
    return found["blocks"], int(found["number"]) - before


def residual_sites(model: nn.Module, blocks: Blocks = None) -> tuple[str, ...]:
    """The residual stream behind the blocks of a transformer: the outputs of the blocks.

    Args:
        model: a transformer with one list of blocks: most of Hugging Face's, a TransformerLens model, or yours.
        blocks: a number, several, or a slice, counted from 0, negative ones from the end; all unless given.

    Raises:
        SiteNotFoundError: there is no such block.
        UnsupportedModelError: the model has no list of blocks, or several.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.attn, self.mlp = nn.Identity(), nn.Identity()
    >>> model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block(), Block()])})
    >>> residual_sites(model), residual_sites(model, -1), attention_sites(model, range(2))
    (('blocks.0', 'blocks.1', 'blocks.2'), ('blocks.2',), ('blocks.0.attn', 'blocks.1.attn'))
    >>> residual_writers(model, slice(1, None))
    ('blocks.1.attn', 'blocks.1.mlp', 'blocks.2.attn', 'blocks.2.mlp')
    """
    behind = ".hook_resid_post" if hook_points(model) else ""
    return tuple(block + behind for block in _chosen(model, blocks))


def attention_sites(model: nn.Module, blocks: Blocks = None) -> tuple[str, ...]:
    """The outputs of the attention of the blocks; blocks that have none are left out. See `residual_sites`.

    Raises:
        SiteNotFoundError, UnsupportedModelError: as `residual_sites`; no block has an attention under a usual name.
    """
    return _parts(model, blocks, {"attention": _ATTENTION})


def mlp_sites(model: nn.Module, blocks: Blocks = None) -> tuple[str, ...]:
    """The outputs of the MLPs of the blocks, of mixtures of experts too. See `residual_sites`.

    Raises:
        SiteNotFoundError, UnsupportedModelError: as `residual_sites`; no block has an MLP under a usual name.
    """
    return _parts(model, blocks, {"MLP": _MLP})


def residual_writers(model: nn.Module, blocks: Blocks = None) -> tuple[str, ...]:
    """What the residual stream is the sum of: the outputs of attention and MLP in the blocks.

    Where a norm stands between them and the stream, as in Gemma 2 and OLMo 2, the output of the norm. Unless `blocks`
    are chosen, the input of the first block too, which is what the embeddings write: then it is the whole stream.

    Raises:
        SiteNotFoundError, UnsupportedModelError: as `residual_sites`; a block lacks either under a usual name.

    >>> attn, mlp = nn.Identity(), nn.Identity()
    >>> model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"attn": attn, "mlp": mlp})])})
    >>> residual_writers(model), residual_writers(model, 0)
    (('h.0:in', 'h.0.attn', 'h.0.mlp'), ('h.0.attn', 'h.0.mlp'))
    """
    found = _parts(model, blocks, {"attention": _ATTENTION, "MLP": _MLP}, writers=True)
    if blocks is not None:
        return found
    first = _chosen(model, 0)[0]
    return (f"{first}.hook_resid_pre" if hook_points(model) else f"{first}:in", *found)


def _chosen(model: nn.Module, blocks: Blocks) -> list[str]:
    """The names of the blocks that are meant."""
    home, count = find_blocks(model)
    if blocks is None or isinstance(blocks, slice):
        numbers = list(range(count)[slice(None) if blocks is None else blocks])
    else:
        if not isinstance(blocks, int | Iterable):
            raise TypeError(f"blocks: expected a number, several, or a slice, got {blocks!r}")
        numbers = [blocks] if isinstance(blocks, int) else list(blocks)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not -count <= number < count:
            raise SiteNotFoundError(
                f"block {number!r}: {class_name(model)} has the blocks 0 to {count - 1} in {home!r}, or -{count} to -1"
            )
    if not numbers:
        raise SiteNotFoundError(f"no blocks are meant by {blocks!r}; {class_name(model)} has {count} in {home!r}")
    return [f"{home}.{number}" for number in sorted({number % count for number in numbers})]


def _parts(
    model: nn.Module, blocks: Blocks, wanted: dict[str, tuple[str, ...]], *, writers: bool = False
) -> tuple[str, ...]:
    chosen, points = _chosen(model, blocks), hook_points(model)
    if points:
        found = [f"{block}.{_HOOKS[what]}" for block in chosen for what in wanted]
        if missing := [name for name in found if name not in points]:
            raise UnsupportedModelError(f"{class_name(model)} has no hook points {missing[:3]}; name the sites instead")
        return tuple(found)
    modules = dict(named_modules(model))
    found = []
    for block in chosen:
        own = {what: _named(modules, block, names) for what, names in wanted.items()}
        lacks = [what for what, name in own.items() if name is None]
        if lacks and writers:
            raise _unnamed(model, modules, block, lacks)
        for name in own.values() if writers else ():
            if name is not None and "residual" in signature(modules[name].forward).parameters:  # as BLOOM's
                raise UnsupportedModelError(
                    f"{class_name(model)}: {name!r} takes the residual stream and adds to it itself; name the last "
                    "layer in it instead"
                )
        after = _post_norms(modules, block) if writers else {}
        found += [after.get(what, name) for what, name in own.items() if name is not None]
    if not found:
        raise _unnamed(model, modules, chosen[0], list(wanted))
    return tuple(found)


def _named(modules: Mapping[str, nn.Module], block: str, names: Iterable[str]) -> str | None:
    """The part of a block that has one of these names."""
    return next((f"{block}.{name}" for name in names if f"{block}.{name}" in modules), None)


def _unnamed(model: nn.Module, modules: Mapping[str, nn.Module], block: str, parts: list[str]) -> UnsupportedModelError:
    children = [name for name, _ in modules[block].named_children()]
    return UnsupportedModelError(
        f"{class_name(model)}: no {' and no '.join(parts)} has a usual name in {block!r}, which has {children}; name "
        "the sites instead"
    )


def _post_norms(modules: Mapping[str, nn.Module], block: str) -> dict[str, str]:
    """What stands between the parts of a block and the residual stream; nothing unless there is a norm behind both."""
    for names in _POST_NORMS:
        after = [f"{block}.{name}" for name in names]
        if all(name in modules for name in after):
            return dict(zip(_HOOKS, after, strict=True))
    return {}
