"""sites: the modules of a model that can be steered."""

from __future__ import annotations

from typing import Annotated

import typer
from torch import nn

from actsteer.cli import models, screen
from actsteer.cli.options import TrustRemoteCode
from actsteer.sites.axes import known_size
from actsteer.sites.blocks import residual_sites
from actsteer.sites.place import split_site
from actsteer.sites.resolve import found_by, named_sites, resolve


def sites(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or name, or module:factory.")],
    pattern: Annotated[str, typer.Argument(help="An exact name, a glob, or re:EXPRESSION.")] = "**",
    residual: Annotated[
        bool, typer.Option("--residual", help="The outputs of a transformer's blocks, of which PATTERN selects.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """List the sites of a model, or those that a pattern selects: name, class, features where the class tells.

    In a pattern, * stays between two dots, and ** is any number of names.

    Of a Hugging Face model only the config is read, not the weights.
    """
    loaded = models.load(model, trust_remote_code=trust_remote_code, empty=True).model
    modules = named_sites(loaded)
    names = [site for _, found in found_by(loaded, pattern) for site in found]
    if residual:
        names = [site for site in residual_sites(loaded) if site in names]
    names = [site for site in names if site and _runs(modules[split_site(site)[0]])]
    places = resolve(loaded, names)
    rows = [(site, type(place.module).__name__, known_size(place) or "") for site, place in places.items()]
    screen.table("site", "class", "features", rows=rows, numbers=["features"])


def _runs(module: nn.Module) -> bool:
    """Whether it is called at all, as a list of modules is not."""
    return type(module).forward is not nn.Module.forward
