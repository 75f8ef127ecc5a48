"""At sites: a tensor (d,) that an intervention needs beside the direction, one for all sites or one for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError, SiteNotFoundError, close_names
from actsteer.sites.device import brought
from actsteer.vectors.vector import SteeringVector

SiteTensors: TypeAlias = Mapping[str, Tensor] | SteeringVector | Tensor
"""A tensor (d,), or site -> one."""


def owned(given: SiteTensors, name: str) -> dict[str, Float[Tensor, " d"]] | Float[Tensor, " d"]:
    """A copy of what the caller gave as the argument of this name.

    Raises:
        TypeError, ShapeError: it is no such thing, or not finite.
    """
    if isinstance(given, Mapping | SteeringVector):
        return {site: _copied(given[site], name) for site in given}
    return _copied(given, name)


def one_of(given: Mapping[str, Tensor], site: str, name: str) -> Float[Tensor, " d"]:
    """That of one site.

    Raises:
        SiteNotFoundError: there is none.
    """
    if site not in given:
        raise SiteNotFoundError(f"{name} has nothing for site {site!r}. {close_names(site, given)}")
    return given[site]


def fitting(given: object, direction: Float[Tensor, " d"], name: str) -> Float[Tensor, " d"]:
    """That of the site, in the direction's dtype and on its device.

    Raises:
        TypeError: it has one for each site, and none was chosen.
        ShapeError: it has another size.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: it has one for each site; take that of one with .at(site)")
    if len(given) != len(direction):
        raise ShapeError(f"{name}: it has {len(given)} features, the direction {len(direction)}")
    return brought(given, direction.device, direction.dtype)


def _copied(given: Tensor, name: str) -> Float[Tensor, " d"]:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor (d,), or a mapping site -> one, got {type(given).__name__}")
    if given.ndim != 1 or not given.is_floating_point() or not bool(given.isfinite().all()):
        raise ShapeError(
            f"{name}: expected a finite floating tensor (d,), got {given.dtype} of shape {tuple(given.shape)}"
        )
    with torch.inference_mode(mode=False):  # so that it works in autograd later
        return given.detach().clone()
