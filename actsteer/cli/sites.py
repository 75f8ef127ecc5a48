"""sites: the modules of a model that can be steered."""

from __future__ import annotations

from typing import Annotated

import typer
from torch import nn

from actsteer.cli import models, screen
from actsteer.cli.options import TrustRemoteCode
from actsteer.sites.axes import known_size
from actsteer.sites.place import split_site
from actsteer.sites.resolve import find_sites, named_sites, resolve


def sites(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or name, or module:factory.")],
    pattern: Annotated[str, typer.Argument(help="An exact name, a glob, or re:EXPRESSION.")] = "*",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """List the sites of a model, or those that a pattern selects: name, class, features where the class tells.

    Of a Hugging Face model only the config is read, not the weights.
    """
    loaded = models.load(model, trust_remote_code=trust_remote_code, empty=True).model
    modules = named_sites(loaded)
    names = [site for site in find_sites(loaded, pattern) if site and _runs(modules[split_site(site)[0]])]
    places = resolve(loaded, names)
    rows = [(site, type(place.module).__name__, known_size(place) or "") for site, place in places.items()]
    screen.table("site", "class", "features", rows=rows, numbers=["features"])


def _runs(module: nn.Module) -> bool:
    """Whether it is called at all, as a list of modules is not."""
    return type(module).forward is not nn.Module.forward
