"""Moments file: moments to and from a sealed safetensors file, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor

from actsteer.collecting.moments import Moments, Scatter
from actsteer.errors import FileFormatError
from actsteer.files import sealed

Classes: TypeAlias = dict[int | str | None, dict[str, Moments]]
"""Label -> site -> moments; all under None where there are no classes."""


def write(
    path: str | PathLike[str],
    kind: str,
    classes: Mapping[Any, Mapping[str, Moments]],
    described: Mapping[str, Any],
) -> None:
    """Write moments, and a JSON document that describes them, under a kind of their own."""
    tensors: dict[str, Tensor] = {}
    entries = []
    for index, (label, moments) in enumerate(classes.items()):
        for number, own in enumerate(moments.values()):
            tensors |= {f"{index}/{number}/{name}": tensor for name, tensor in _tensors(own).items()}
        counts = {site: own.count for site, own in moments.items()}
        entries.append({"label": label, "counts": counts})
    sealed.write(path, tensors, {"kind": kind, "classes": entries, **described})


def read(path: str | PathLike[str], kind: str) -> tuple[Classes, dict[str, Any]]:
    """What `write` wrote: the moments, and the document."""
    tensors, document = sealed.read(path, kind=kind)
    try:
        classes: Classes = {
            entry["label"]: {
                site: _moments(int(count), {name: tensors.get(f"{index}/{number}/{name}") for name in _NAMES})
                for number, (site, count) in enumerate(entry["counts"].items())
            }
            for index, entry in enumerate(document["classes"])
        }
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path}: the document does not describe the tensors ({error!r}); collect again"
        ) from None
    return classes, document


_NAMES = ("origin", "offset", "second", "third", "fourth")


def _tensors(moments: Moments) -> dict[str, Tensor]:
    found = {"origin": moments._origin, "offset": moments._offset}
    if (sums := moments._scatter) is not None:
        found |= {"second": sums.second, "third": sums.third, "fourth": sums.fourth}
    return found


def _moments(count: int, tensors: Mapping[str, Tensor | None]) -> Moments:
    origin, offset, second, third, fourth = (tensors[name] for name in _NAMES)
    if origin is None or offset is None or any(t is not None and t.dtype != torch.float64 for t in tensors.values()):
        raise ValueError("a tensor is missing, or not float64")
    made = Moments(count, origin)
    made._offset = offset
    if second is not None and third is not None and fourth is not None:
        made._scatter = Scatter(second, third, fourth)
    return made
