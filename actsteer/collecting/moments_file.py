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
    """Write moments, and a JSON document that describes them, as a file of this kind."""
    tensors: dict[str, Tensor] = {}
    entries = []
    for index, (label, moments) in enumerate(classes.items()):
        for number, own in enumerate(moments.values()):
            tensors |= {f"{index}/{number}/{name}": tensor for name, tensor in _tensors(own).items()}
        counts = {site: own.count for site, own in moments.items()}
        dtypes = {site: None if own.dtype is None else str(own.dtype)[6:] for site, own in moments.items()}
        entries.append({"label": label, "counts": counts, "dtypes": dtypes})
    sealed.write(sealed.checked(path), tensors, {"kind": kind, "classes": entries, **described})


def read(path: str | PathLike[str], kind: str) -> tuple[Classes, dict[str, Any]]:
    """What `write` wrote: the moments, and the document.

    Every shape and type is checked: a seal tells an altered file from a whole one, and not who has written it.

    Raises:
        FileFormatError: the file is corrupt, foreign, or of a newer version.
    """
    tensors, document = sealed.read(sealed.checked(path), kind=kind)
    try:
        classes: Classes = {}
        sizes: dict[str, int | None] = {}
        for index, entry in enumerate(document["classes"]):
            label, own = entry["label"], {}
            for number, (site, count) in enumerate(entry["counts"].items()):
                parts = {name: tensors.pop(f"{index}/{number}/{name}", None) for name in _NAMES}
                own[site] = _moments(count, parts, d=sizes.setdefault(site, None))
                own[site].dtype = _dtype(entry["dtypes"][site])
                sizes[site] = own[site].d
            if type(label) not in (int, str, type(None)) or label in classes:
                raise ValueError(f"expected a label for each class, got {label!r}")
            classes[label] = own
        _check(kind, classes, document)
        if tensors:
            raise ValueError(f"{sorted(tensors)} are tensors of no site")
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path}: the document does not describe the tensors ({error!r}); collect again"
        ) from None
    return classes, document


_NAMES = ("origin", "total", "squares", "second", "third", "fourth")
_KEPT = ({"squares"}, {"second", "third", "fourth"}, set[str]())
"""Beside origin and total: variances, a covariance, or nothing."""


def _tensors(moments: Moments) -> dict[str, Tensor]:
    found = {"origin": moments._origin, "total": moments._total}
    if (sums := moments._scatter) is not None:
        found |= {"second": sums.second, "third": sums.third, "fourth": sums.fourth}
    if moments._squares is not None:
        found["squares"] = moments._squares
    return found


def _moments(count: Any, tensors: Mapping[str, Tensor | None], *, d: int | None) -> Moments:
    """Moments of `d` features, if that is known."""
    if type(count) is not int or not 0 <= count < 2**63:
        raise ValueError(f"expected a count, got {count!r}")
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    origin, total, squares, second, third, fourth = (tensors[name] for name in _NAMES)
    if origin is None or total is None or found.keys() - {"origin", "total"} not in _KEPT:
        raise ValueError(f"expected origin and total, and one of {_KEPT}, got {sorted(found)}")
    size = len(origin) if d is None and origin.ndim else d
    shapes: dict[str, tuple[int | None, ...]] = {"origin": (size,), "total": (size,), "squares": (size,)}
    shapes |= {"second": (size, size), "third": (size,), "fourth": ()}
    for name, tensor in found.items():
        if tensor.dtype != torch.float64 or tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name}: expected float64 of shape {shapes[name]}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    made = Moments(count, origin)
    made._total, made._squares = total, squares
    if second is not None and third is not None and fourth is not None:
        made._scatter = Scatter(second, third, fourth)
    return made


def _dtype(name: Any) -> torch.dtype | None:
    """The dtype of this name; None of no rows."""
    if name is None:
        return None
    found = getattr(torch, name) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"expected a floating dtype, got {name!r}")
    return found


def _check(kind: str, classes: Classes, document: Mapping[str, Any]) -> None:
    """Raise ValueError unless there are the classes and the metadata that files of this kind have."""
    if None in classes and len(classes) > 1:
        raise ValueError("rows with classes and rows without")
    if kind == "checkpoint":
        return
    if (None in classes) != (kind == "statistics"):
        raise ValueError(f"expected {'no ' if kind == 'statistics' else ''}classes, got {list(classes)}")
    if kind == "class statistics":
        sites = document["sites"]
        if type(sites) is not list or any(type(site) is not str for site in sites):
            raise ValueError(f"expected a list of sites, got {sites!r}")
        if any(list(own) != sites for own in classes.values()):
            raise ValueError(f"expected the sites {sites} in every class")
    metadata = document["metadata"]
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"expected metadata of strings, got {metadata!r}")
