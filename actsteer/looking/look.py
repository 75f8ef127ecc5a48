"""look: what a steering does to inputs, on one page that is all in one file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn
from tqdm.auto import tqdm

from actsteer.errors import AttachedError, ShapeError
from actsteer.files.replacing import replacing
from actsteer.looking import page
from actsteer.looking.subjects import SeenRows, SeenText, prompts, see_rows, see_text
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites
from actsteer.steering.attached import steerers
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import AllPositions, Gates, Interventions, Steerable, steering_of
from actsteer.steering.strength import Strengths
from actsteer.tuning.calibration import Calibration


@final
class Look:
    """A page: `save` writes it, a notebook shows it.

    Args:
        html: all of it.
    """

    __slots__ = ("html",)

    def __init__(self, html: str) -> None:
        self.html = html

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a file that needs no other: no server, no network."""
        with replacing(Path(path)) as beside:
            beside.write_bytes(self.html.encode("utf-8", "replace"))  # a token may be half a character

    def __repr__(self) -> str:
        return f"Look({len(self.html.encode('utf-8', 'replace')):,} bytes)"

    def _repr_html_(self) -> str:
        style = "width:100%;height:44em;border:1px solid rgba(128,128,128,.4);border-radius:6px"
        inside = f'sandbox="allow-scripts" style="{style}" srcdoc="{escape(self.html)}"'
        return f'<iframe title="actsteer look" {inside}></iframe>'


def look(
    model: nn.Module,
    steering: Steerable,
    *,
    inputs: Any,
    tokenizer: Any = None,
    c: Strengths | None = None,
    intervention: Interventions | None = None,
    gate: Gates | None = None,
    positions: AllPositions | None = None,
    sites: Sites | None = None,
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    max_new_tokens: int = 32,
    chat: bool = False,
    image_shape: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    calibration: Calibration | None = None,
    progress: bool = True,
) -> Look:
    """A page that shows what a steering does to these inputs: the model runs on them plain, and then steered.

    Of texts every token has the colour of h·v/‖v‖, of what its gate decided, or of ‖h' - h‖/‖h‖, by how much the edit
    moved the activation in the steered run; and both continuations stand side by side, the likeliest token each time.
    Of other inputs the rows, drawn as images where they are such, take the place of the tokens, and the softmax of the
    model's outputs that of the continuations.

    Args:
        steering: anything that a Steerer takes; a concept that a mapping `c` does not name is left out.
        inputs: texts, or conversations with `chat`; what the tokenizer makes of texts, of which the ids and the mask
            are used; or one floating tensor with a row for each input. (n, 1 or 3, H, W) are images. Of many rows the
            first 200 are shown.
        tokenizer: that of a language model.
        c, intervention, gate, positions, sites, axis, row_axis, token_axis: as for `Steerer`.
        max_new_tokens: how many tokens a language model goes on for; 0 shows the texts alone.
        chat: apply the tokenizer's chat template.
        image_shape: (H, W) or (C, H, W) of rows that are images and come flat.
        classes: the names of the model's outputs, in their order.
        calibration: what `calibrate` has found, for a map of effect and cost.

    Raises:
        ImportError: jinja2 or matplotlib is missing; pip install 'actsteer[look]'.
        AttachedError: the model is steered already.
        BatchError: inputs that are none of these, or texts without a tokenizer.
        ShapeError, UnsupportedModelError: a site that has not one activation for each token or row.
        ActsteerError: and what `Steerer` raises.

    >>> import torch
    >>> from actsteer import SteeringVector
    >>> model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.tensor([3.0, 4.0])}, concept="nine")
    >>> shown = look(model, v, inputs=torch.eye(2), c=2.0, progress=False)
    >>> "nine" in shown.html, shown.html.count('class="item')
    (True, 2)
    """
    page.check_extra()
    if there := steerers(model):
        raise AttachedError(f"the model is steered already, by {there[0]!r}; leave its block, to see it unsteered too")
    parts = {"c": c, "intervention": intervention, "gate": gate, "positions": positions, "sites": sites}
    chosen = steering_of(steering, parts)
    if not isinstance(chosen.c, int | float | Tensor) and not callable(chosen.c):
        chosen = chosen.select(*(concept for concept in chosen.concepts if concept in chosen.c))
    steerer = Steerer(model, chosen, axis=axis, row_axis=row_axis, token_axis=token_axis)
    texts = prompts(inputs, tokenizer, chat=chat)
    seen: list[SeenText] | SeenRows
    if texts is None:
        seen = see_rows(model, steerer, inputs)
    else:
        bar = tqdm(texts, desc="look", unit="text", disable=not progress, delay=2.0)
        seen = [see_text(model, steerer, ids, tokenizer, length=max_new_tokens) for ids in bar]
    images = _images(seen, image_shape)
    total = 0 if texts is not None else len(inputs)
    return Look(page.rendered(steerer, chosen, seen, images, classes=classes, calibration=calibration, total=total))


def _images(seen: list[SeenText] | SeenRows, image_shape: Sequence[int] | None) -> Tensor | None:
    """The rows as images (n, 1 or 3, H, W), if they are such.

    Raises:
        ShapeError: an image_shape that they have not.
    """
    if isinstance(seen, list):
        return None
    rows = seen.inputs
    if image_shape is None:
        return rows if rows.ndim == 4 and rows.shape[1] in (1, 3) else None
    shape = (1, *image_shape) if len(image_shape) == 2 else tuple(image_shape)
    size = rows[0].numel()
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[0] * shape[1] * shape[2] != size:
        raise ShapeError(
            f"image_shape: expected (H, W) or (1 or 3, H, W) of {size} numbers, got {tuple(image_shape)}; a row of the "
            f"inputs has shape {tuple(rows.shape[1:])}"
        )
    return rows.reshape(len(rows), *shape)
