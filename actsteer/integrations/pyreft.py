"""pyreft: the LoReFT edits that it saves, as a low-rank edit."""

from __future__ import annotations

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from actsteer.errors import FileFormatError
from actsteer.files.pt import loaded
from actsteer.files.untrusted import not_plain
from actsteer.sites.blocks import find_blocks
from actsteer.sites.resolve import find_sites
from actsteer.steering.interventions.low_rank import LowRank

_SIDES = {"output": "", "input": ":in"}


def from_pyreft(folder: str | PathLike[str], *, model: nn.Module, concept: str | None = None) -> LowRank:
    """The edit h + Rᵀ(W h + b - R h) of every layer, as `ReftModel.save(folder)` of pyreft writes it.

    Where in a text pyreft edits is said by its data, and is not in the files: give a Steerer the `positions`.

    Args:
        folder: with config.json, and a `.bin` of W, b and R for each layer, from which tensors alone are read.
        model: the model whose names the sites get.
        concept: the edit's name, the folder's unless given.

    Raises:
        FileFormatError: a file that lacks something or does not fit, an intervention that is no LoReFT, a component
            other than a block's output or input or a module's, several edits at one site.
        SiteNotFoundError: the model has no such site.

    Source: ReFT, Wu et al. 2024.

    ```py
    with Steerer(model, from_pyreft("reft_emoji_chat", model=model), positions="last"): ...
    ```
    """
    path = Path(folder)
    config = path / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        places = [(own[0], str(own[1]), str(own[2]), int(own[3])) for own in content["representations"]]
        kinds = [str(kind) for kind in content["intervention_types"]]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise FileFormatError(
            f"{config}: expected representations and types as pyreft saves them ({error!r})"
        ) from None
    if strange := [kind for kind in kinds if not kind.rstrip("'>").endswith(".LoreftIntervention")]:
        raise FileFormatError(f"{config}: expected LoreftInterventions alone, got {strange[0]}")
    sites: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for layer, component, unit, units in places:
        if unit != "pos":
            raise FileFormatError(f"{config}: expected edits of positions, unit 'pos', got {unit!r}")
        (site,) = find_sites(model, _site(config, model, layer, component))
        if site in sites:
            raise FileFormatError(f"{config}: several edits at site {site!r}, of other positions each; a site has one")
        sites[site] = _edit(_file(path, layer, component, unit, units))
    return LowRank(sites, concept=path.resolve().name if concept is None else concept)


def _site(config: Path, model: nn.Module, layer: Any, component: str) -> str:
    """block_output of layer 3, or model.layers[3].mlp.output."""
    if component in ("block_output", "block_input") and isinstance(layer, int):
        return f"{find_blocks(model)[0]}.{layer}{_SIDES[component[6:]]}"
    module, _, side = component.rpartition(".")
    if not re.fullmatch(r"[\w.\[\]]+", module) or side not in _SIDES:
        raise FileFormatError(
            f"{config}: component {component!r}: expected block_output, block_input, or a module's path with .output "
            "or .input"
        )
    return re.sub(r"\[(\d+)\]", r".\1", module) + _SIDES[side]


def _file(folder: Path, layer: Any, component: str, unit: str, units: int) -> Path:
    """The file of one layer, by the names that pyvene gave it until 0.1.6, with dots, or gives it since."""
    parts = [] if "." in component else ["layer", str(layer)]
    parts += ["comp", component, "unit", unit, "nunit", str(units)]
    names = [f"intkey_{'.'.join(parts)}#0.bin", f"intkey_{'_'.join(parts).replace('.', '_')}#0.bin"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileFormatError(f"{folder}: expected one of the files {names}")


def _edit(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """A = W - R, R and b, of float32 at least, from W (r, d), b (r,) and Rᵀ (d, r)."""
    content, _ = loaded(path)
    names = ("weight", "bias", "rotate_layer")
    if not isinstance(content, dict) or set(content) != set(names):
        raise FileFormatError(f"{path}: expected the tensors {', '.join(names)}")
    for name in names:
        if not isinstance(content[name], Tensor) or (problem := not_plain(content[name])) is not None:
            raise FileFormatError(f"{path}: {name}: {problem}")
    weight, bias, rotate = (content[name].float() for name in names)
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or rotate.shape != weight.shape[::-1]:
        shapes = [tuple(own.shape) for own in (weight, bias, rotate)]
        raise FileFormatError(f"{path}: expected weight (r, d), bias (r,) and rotate_layer (d, r), got {shapes}")
    if not all(bool(own.isfinite().all()) for own in (weight, bias, rotate)):
        raise FileFormatError(f"{path}: expected finite numbers")
    return weight - rotate.T, rotate.T, bias
