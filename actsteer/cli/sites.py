"""sites: the modules of a model that can be steered."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from torch import nn

from actsteer.cli import models, screen
from actsteer.cli.options import TrustRemoteCode
from actsteer.errors import UnsupportedModelError
from actsteer.sites.blocks import find_blocks, residual_sites
from actsteer.sites.features import known_size
from actsteer.sites.place import Place, split_site
from actsteer.sites.resolve import found_by, named_sites, resolve
from actsteer.sites.wrappers import unwrapped


def sites(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or name, or module:factory.")],
    pattern: Annotated[str, typer.Argument(help="An exact name, a glob, or re:EXPRESSION.")] = "**",
    residual: Annotated[
        bool, typer.Option("--residual", help="The outputs of a transformer's blocks, of which PATTERN selects.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """List the sites of a model, or those that a pattern selects: name, class, features where they are known.

    In a pattern, * stays between two dots, and ** is any number of names. Features are known of layers by their class
    and, of a Hugging Face language model, of what has the width of its residual stream. Of such a model only the config
    is read, not the weights.
    """
    loaded = models.load(model, trust_remote_code=trust_remote_code, empty=True).model
    modules = named_sites(loaded)
    names = [site for _, found in found_by(loaded, pattern) for site in found]
    if residual:
        names = [site for site in residual_sites(loaded) if site in names]
    names = [site for site in names if site and _runs(modules[split_site(site)[0]])]
    places = resolve(loaded, names)
    blocks, width = _stream(loaded)
    rows = []
    for site, place in places.items():
        features = known_size(place) or (width if width and _is_of_stream(place, blocks, width) else None)
        rows.append((site, type(place.module).__name__, features or ""))
    screen.table("site", "class", "features", rows=rows, numbers=["features"])


def _stream(model: nn.Module) -> tuple[str, int | None]:
    """The list of the blocks, and how wide their residual stream is: as wide as the embeddings of tokens at its start.

    Of another model, such as one for images, the config's size may be that of its last stage alone: None.
    """
    host: Any = unwrapped(model)
    try:
        blocks, _ = find_blocks(model)
        width: int = host.config.get_text_config().hidden_size
        tokens = host.get_input_embeddings()
    except (UnsupportedModelError, AttributeError, NotImplementedError):
        return "", None
    return blocks, width if isinstance(tokens, nn.Embedding) and tokens.embedding_dim == width else None


def _is_of_stream(place: Place, blocks: str, width: int) -> bool:
    """Whether it is the output of a block, of the attention or MLP that a block adds to its stream, or of a norm."""
    if place.side != "out" or place.path not in ((), ("0",)) or not place.name.startswith(blocks.rpartition(".")[0]):
        return False
    block, kind = rf"{re.escape(blocks)}\.\d+", type(place.module).__name__
    if kind.endswith("Norm"):
        return getattr(getattr(place.module, "weight", None), "shape", None) == (width,)
    is_added = re.fullmatch(rf"{block}\.\w+", place.name) and kind.endswith(("Attention", "MLP"))
    return bool(is_added or re.fullmatch(block, place.name))


def _runs(module: nn.Module) -> bool:
    """Whether it is called at all, as a list of modules is not."""
    return type(module).forward is not nn.Module.forward
