"""A portrait of one steered model: what the figures need, as plain lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from actsteer import record
from reference.mnist.model import SITES
from reference.mnist.study import Edit, Study, steered

BINS = 40


def portrait(study: Study, methods: Mapping[str, Sequence[Edit]], method: str) -> dict[str, Any]:
    """Mean activation per layer, histograms and the logits of one example, before and after steering by one method.

    Drawn from held-out images of the new digits.
    """
    edits = methods[method]
    own = study.data.held_out.of(*study.new)
    with torch.inference_mode():
        logits = {"unsteered": study.model(own.x)}
        with steered(study.model, edits):
            logits["steered"] = study.model(own.x)
    before = record(study.model, own.x, sites=SITES, progress=False)
    with steered(study.model, edits):
        after = record(study.model, own.x, sites=SITES, progress=False)
    example = first_turned(own.y, before=logits["unsteered"], after=logits["steered"])
    return {
        "method": method,
        "layer means": {
            name: [float(acts[site].mean()) for site in SITES]
            for name, acts in {"unsteered": before, "steered": after}.items()
        },
        "histograms": {site: _histograms(before[site], after[site]) for site in SITES},
        "example": {
            "digit": int(own.y[example]),
            "image": own.x[example].reshape(28, 28).tolist(),
            "logits": {name: found[example].tolist() for name, found in logits.items()},
        },
    }


def first_turned(truth: Tensor, *, before: Tensor, after: Tensor) -> int:
    """The first image that steering turns from wrong to right; the first of all if there is none."""
    was, is_now = (logits.argmax(dim=1) == truth for logits in (before, after))
    return int((is_now & ~was).int().argmax())


def _histograms(before: Tensor, after: Tensor) -> dict[str, list[float]]:
    both = torch.cat([before, after])
    edges = torch.linspace(float(both.min()), float(both.max()), BINS + 1)
    shares = {
        name: (torch.histogram(acts.flatten(), edges).hist / acts.numel()).tolist()
        for name, acts in {"unsteered": before, "steered": after}.items()
    }
    return {"edges": edges.tolist(), **shares}
