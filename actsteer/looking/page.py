"""page: what was seen, put into the template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

import actsteer.html as html
from actsteer.looking import pictures
from actsteer.looking.numbers import document, median, rounded, shortened
from actsteer.looking.subjects import ROWS, Runs, SeenRows, SeenText
from actsteer.looking.words import words
from actsteer.sites.wrappers import class_name
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import Steering
from actsteer.tuning.calibration import Calibration

_BEST, _WRITTEN, _DRAWN, _LISTED = (
    3,
    4,
    64,
    4,
)  # classes that are shown, features that are written out, that are drawn, and sites


def check_extra() -> None:
    """Before any work.

    Raises:
        ImportError: a package of the extra is missing.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("look needs jinja2 and matplotlib; pip install 'actsteer[look]'") from error


def rendered(
    steerer: Steerer,
    steering: Steering,
    seen: list[SeenText] | SeenRows,
    images: Tensor | None,
    *,
    classes: Sequence[str] | None,
    calibration: Calibration | None,
    total: int,
) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "ensure_ascii": False}
    runs = [own.runs for own in seen] if isinstance(seen, list) else [seen.runs]
    sites, concepts = list(steerer.sites), list(steerer.bank.concepts)
    texts = [_text(own) for own in seen] if isinstance(seen, list) else []
    rows = [] if isinstance(seen, list) else _rows(seen, images, classes)
    points = [] if calibration is None else calibration.table
    explained = steerer.explain().splitlines()
    page: dict[str, Any] = {
        "model": class_name(steerer.model),
        "concepts": concepts,
        "sites": sites,
        "prefix": shortened(sites)[0],
        "facts": _facts(steering, sites),
        "numbers": document(runs, sites=sites, concepts=concepts),
        "texts": texts,
        "rows": rows,
        "kind": "token" if texts else "image" if images is not None else "row",
        "left_out": max(0, total - ROWS) if rows else 0,
        "changed": sum(row["changed"] for row in rows),
        "has_answers": bool(rows) and bool(rows[0]["answers"]),
        "norms": _norms(steerer, runs),
        "cosines": _cosines(steerer),
        "explained": html.outline(explained[1:]),
        "maps": pictures.calibration_maps(calibration) if calibration is not None and points else [],
        "verdict": "" if calibration is None else calibration.verdict,
        "points": [
            {**own, "sites": ", ".join(own["sites"]), "best": calibration is not None and own is calibration.chosen}
            for own in points
        ],
    }
    return environment.get_template("page.html.j2").render(page)


def _facts(steering: Steering, sites: Sequence[str]) -> list[tuple[str, str]]:
    """What is said of the steering, in a few words each."""
    said = {"c": "strength c", "intervention": "intervention", "gate": "gate", "positions": "positions"}
    found = []
    for name, part in steering.parts().items():
        if name not in said or part is None:
            continue
        each = part.items() if isinstance(part, dict) else [("", part)]
        found.append((said[name], ", ".join(f"{concept}{concept and ': '}{_shown(own)}" for concept, own in each)))
    places = ", ".join(sites) if len(sites) <= _LISTED else f"{len(sites)}, {sites[0]} to {sites[-1]}"
    return [*found, ("site" if len(sites) == 1 else "sites", places)]


def _shown(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"a tensor of shape {tuple(part.shape)}"
    if isinstance(part, FunctionType):
        return part.__name__
    return f"{part:g}" if isinstance(part, float) else part if isinstance(part, str) else repr(part)


def _text(seen: SeenText) -> dict[str, Any]:
    both = [seen.plain, seen.steered]
    first = next((place for place, token in enumerate(seen.steered) if token.differs), None)
    if first is None:
        first = next((place for place, token in enumerate(seen.plain) if token.differs), None)
    return {
        "prompt": words(seen.prompt),
        "answers": [("Unsteered", words(both[0])), ("Steered", words(both[1]))] if any(both) else [],
        "said": "the same" if first is None else f"differs from token {first + 1} on",
    }


def _rows(seen: SeenRows, images: Tensor | None, classes: Sequence[str] | None) -> list[dict[str, Any]]:
    found = []
    softmax = None if seen.answers is None else [own.softmax(dim=1) for own in seen.answers]
    for place, row in enumerate(seen.inputs):
        answers = [] if softmax is None else _answers(softmax[0][place], softmax[1][place], classes)
        tops = [] if softmax is None else [_name(int(own[place].argmax()), classes) for own in softmax]
        numbers = row.flatten()
        written = images is None and len(numbers) <= _WRITTEN
        found.append(
            {
                "image": None if images is None else pictures.image(images[place]),
                "said": ", ".join(f"{own:.3g}".replace("-", "−") for own in numbers.tolist()) if written else "",
                "features": _features(numbers) if images is None and _WRITTEN < len(numbers) <= _DRAWN else [],
                "answers": answers,
                "tops": tops,
                "changed": len(set(tops)) > 1,
            }
        )
    return found


def _answers(before: Tensor, after: Tensor, classes: Sequence[str] | None) -> list[tuple[str, float, float]]:
    """The classes that are likeliest before or after: name, and both probabilities."""
    best = torch.maximum(before, after).argsort(descending=True, stable=True)[:_BEST].tolist()
    return [(_name(own, classes), float(before[own]), float(after[own])) for own in sorted(best)]


def _name(place: int, classes: Sequence[str] | None) -> str:
    return str(place) if classes is None or place >= len(classes) else str(classes[place])


def _features(numbers: Tensor) -> list[tuple[float, float | None]]:
    """How large each is beside the largest, with its sign, and the number itself."""
    finite = numbers.double().nan_to_num()
    largest = float(finite.abs().max()) or 1.0
    return [(round(float(own) / largest, 2), rounded(float(own))) for own in finite]


def _norms(steerer: Steerer, runs: Sequence[Runs]) -> list[dict[str, Any]]:
    """Of every site: the norm of each direction, how large the activations are, and how far the edit moved them."""
    found = []
    for site, edit in steerer.edits.items():
        norms = dict(zip(edit.concepts, edit.directions.detach().double().norm(dim=1).tolist(), strict=True))
        sizes = torch.cat([plain[site].size for plain, _ in runs])
        addeds = [added for _, steered in runs if (added := steered[site].added) is not None]
        found.append(
            {
                "site": site,
                "norms": [rounded(norms[place]) if place in norms else None for place in range(len(steerer.bank))],
                "typical": median(sizes),
                "added": median(torch.cat(addeds)) if addeds else None,
            }
        )
    return found


def _cosines(steerer: Steerer) -> html.Markup | None:
    """How far the concepts interfere; None if fewer than two have a direction."""
    bank = steerer.bank
    present = bank.select(*(concept for concept, vector in bank.items() if float(vector.norm()) > 0))
    return html.matrix("", present.concepts, present.cosines().tolist()) if len(present) > 1 else None
