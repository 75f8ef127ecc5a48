"""Unpadded: a batch of texts without its pads, which a Steerer leaves alone and folded weights cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from actsteer.tokens.inputs import signature_of

_MASK, _DECODER = "attention_mask", ("decoder_", "labels")


def named(model: nn.Module, batch: Any) -> Any:
    """A batch of positional arguments by name, if a mask is among them; any other as it is."""
    signature = signature_of(model)
    if not isinstance(batch, tuple | list) or not signature.unmasked < len(batch) <= len(signature.names):
        return batch
    return dict(zip(signature.names, batch, strict=False))


def unpadded(batch: Any) -> list[Any]:
    """The rows of a batch whose attention mask shows pads, each by itself and without them; else the batch as it is.

    >>> import torch
    >>> ids, mask = torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]])
    >>> [own["input_ids"].tolist() for own in unpadded({"input_ids": ids, "attention_mask": mask})]
    [[[5, 6]], [[7]]]
    """
    if not isinstance(batch, Mapping):
        return [batch]
    masks = {name: batch.get(name) for name in (_MASK, f"decoder_{_MASK}")}
    known = {name: mask for name, mask in masks.items() if isinstance(mask, Tensor) and mask.ndim == 2}
    if all(bool(mask.all()) for mask in known.values()):
        return [batch]
    count = len(next(iter(known.values())))
    rows = [row for row in range(count) if all(bool(mask[row].any()) for mask in known.values())]
    return [{name: _row(name, value, row, count, known) for name, value in batch.items()} for row in rows]


def at_tokens(outputs: list[Tensor], batch: Mapping[str, Any]) -> list[Tensor]:
    """Of the outputs of a batch with pads, what stands at its tokens; whole, where there is one for every row."""
    found: list[Tensor] = []
    for own in outputs:
        known = [batch.get(f"decoder_{_MASK}"), batch.get(_MASK)]
        masks = [mask.bool() for mask in known if isinstance(mask, Tensor) and mask.ndim == 2]
        shaped = [mask for mask in masks if mask.shape == own.shape[:2]]
        flat = [mask.reshape(-1) for mask in masks if own.ndim and mask.numel() == len(own)]  # all tokens in a row
        if shaped or flat or own.ndim <= 2:  # others, such as attention weights, are of pads too
            found.append(own[(shaped or flat)[0]] if shaped or flat else own)
    return found


def _row(name: str, value: Any, row: int, count: int, masks: Mapping[str, Tensor]) -> Any:
    """One row's tokens of what belongs to all rows."""
    if not isinstance(value, Tensor) or not value.ndim or len(value) != count:
        return value
    mask = masks.get(f"decoder_{_MASK}" if name.startswith(_DECODER) else _MASK)
    if name == "labels" and mask is None:  # of the tokens themselves, where there is no decoder
        mask = masks.get(_MASK)
    own = value[row : row + 1]
    return own if mask is None or value.shape[:2] != mask.shape else own[:, mask[row].bool()]
