"""Described: what the metadata of a vector say of its sites: their axes, and their offsets."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from actsteer.errors import ShapeError

_OFFSET = "offset "


def named(concept: str | None, metadata: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of the metadata, with the concept's name in it.

    Raises:
        TypeError: something in it is no string.
    """
    told = dict(metadata or {}) | ({} if concept is None else {"concept": concept})
    for key, value in told.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata maps str to str, got {key!r}: {value!r}; convert the value with str()")
    return told


def axes_in(
    described: Iterable[tuple[Container[str], Mapping[str, str]]], asked: Container[str] | None = None
) -> dict[str, str]:
    """The metadata "axis SITE" of several vectors: the feature axis at a site, where it was collected or given.

    Args:
        described: the sites and the metadata of each vector.
        asked: these keys alone, where they are given.

    Raises:
        ShapeError: two of them have different axes at one site.
    """
    axes: dict[str, str] = {}
    for sites, metadata in described:
        for key, axis in metadata.items():
            if not key.startswith("axis ") or (asked is not None and key not in asked):
                continue
            if (site := key[5:]) in sites and axes.setdefault(key, axis) != axis:
                raise ShapeError(
                    f"site {site!r}: the vectors were collected along different axes, {axes[key]} and {axis}; collect "
                    "them along one"
                )
    return axes


def offsets_in(sites: Iterable[str], metadata: Mapping[str, str]) -> dict[str, float]:
    """Site -> b of what is read there, h · v + b: "offset SITE", which scales and adds up as the direction does.

    Raises:
        ValueError: it is no number.
    """
    told = {site: metadata[key] for site in sites if (key := f"{_OFFSET}{site}") in metadata}
    try:
        return {site: float(text) for site, text in told.items()}
    except ValueError as error:
        raise ValueError(f"metadata: expected a number as 'offset SITE', got {told}; leave it out") from error


def with_offsets(metadata: Mapping[str, str], offsets: Mapping[str, float]) -> dict[str, str]:
    """The metadata with these offsets in the place of those that it has."""
    kept = {key: text for key, text in metadata.items() if not key.startswith(_OFFSET)}
    return kept | {f"{_OFFSET}{site}": repr(offset) for site, offset in offsets.items()}
