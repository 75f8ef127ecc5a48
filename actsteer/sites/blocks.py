"""Blocks: the layers of a transformer, by number and by name."""

from __future__ import annotations

import re

from torch import nn

from actsteer.errors import UnsupportedModelError
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
