"""The steering-vectors package: its objects as banks, and vectors as its objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from actsteer.errors import FileFormatError, SiteNotFoundError, close_names
from actsteer.sites.blocks import find_blocks
from actsteer.sites.resolve import named_sites
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector

_PARTS = {  # a layer type -> the names that families have for it, inside a block
    "decoder_block": ("",),
    "self_attn": (".self_attn", ".attn", ".attention", ".self_attention"),
    "mlp": (".mlp", ".feed_forward"),
    "input_layernorm": (".input_layernorm", ".ln_1"),
    "post_attention_layernorm": (".post_attention_layernorm", ".ln_2"),
}
_ENDS = {"self_attn": ":out.0"}  # which part of the output is meant


def from_steering_vectors(vector: Any, *, model: nn.Module, concept: str | None = None) -> VectorBank:
    """A bank of one vector, of an object with `layer_activations` and `layer_type`, as that package trains them.

    Args:
        vector: their `SteeringVector`; layer N of type "decoder_block" is the output of the 0-based block N.
        model: the model whose names the sites get.
        concept: the vector's name, "vector" unless given.

    Raises:
        TypeError, FileFormatError: another kind of object, or of layer.
        SiteNotFoundError: the model has no such layer.

    >>> from types import SimpleNamespace
    >>> import torch
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    >>> theirs = SimpleNamespace(layer_activations={1: torch.ones(2)}, layer_type="decoder_block")
    >>> from_steering_vectors(theirs, model=Model()).sites
    ('layers.1',)
    """
    rows = getattr(vector, "layer_activations", None)
    kind = getattr(vector, "layer_type", "decoder_block")
    if not isinstance(rows, Mapping) or not all(isinstance(row, Tensor) for row in rows.values()):
        raise TypeError(f"expected a SteeringVector of steering-vectors, got {type(vector).__name__}")
    if kind not in _PARTS:
        raise FileFormatError(f"layer_type {kind!r}: expected one of {', '.join(_PARTS)}; name the sites yourself")
    blocks, count = find_blocks(model)
    sites = named_sites(model)
    directions: dict[str, Tensor] = {}
    for number, row in rows.items():
        at = number if number >= 0 else count + number
        found = [f"{blocks}.{at}{part}" for part in _PARTS[kind] if f"{blocks}.{at}{part}" in sites]
        if not found:
            raise SiteNotFoundError(f"layer {number}: the model has {blocks}.0 to {blocks}.{count - 1}, and no {kind}")
        directions[found[0] + _ENDS.get(kind, "")] = row.reshape(-1)
    name = concept or "vector"
    return VectorBank({name: SteeringVector(directions, concept=name)})


def to_steering_vectors(vector: SteeringVector, *, model: nn.Module) -> Any:
    """The vector as an object of that package, whose `apply(model, multiplier=c)` adds c · v: `from_steering_vectors`
    of it is the vector again, without its metadata.

    Args:
        vector: directions at the outputs of blocks, or all at one kind of part of them: attention, an MLP, a norm.
        model: the model whose names the sites have.

    Raises:
        ImportError: there is no `steering_vectors`.
        SiteNotFoundError: a site that their objects have no place for.
        FileFormatError: sites of several kinds, of which an object has one.

    ```py
    theirs = to_steering_vectors(fit_pairs(model, tokenizer, pairs, sites=residual_sites(model, 12)), model=model)
    with theirs.apply(model, multiplier=0.5): ...
    ```
    """
    try:
        from steering_vectors import SteeringVector as Theirs
    except ImportError as error:
        raise ImportError("objects of steering-vectors need that package: pip install steering-vectors") from error
    blocks, count = find_blocks(model)
    places = {
        f"{blocks}.{number}{part}{_ENDS.get(kind, '')}": (kind, number)
        for kind, parts in _PARTS.items()
        for part in parts
        for number in range(count)
    }
    if strange := [site for site in vector if site not in places]:
        raise SiteNotFoundError(
            f"site {strange[0]!r} is neither a block of {blocks} nor a part of one that they know, of "
            f"{', '.join(_PARTS)}. {close_names(strange[0], places)}"
        )
    kinds = sorted({places[site][0] for site in vector})
    if len(kinds) != 1:
        raise FileFormatError(f"expected sites of one kind, as an object has them, got {kinds}; select those of one")
    return Theirs(layer_activations={places[site][1]: vector[site] for site in vector}, layer_type=kinds[0])
