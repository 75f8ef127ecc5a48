"""show: what a file of vectors, or of a steering, holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Annotated

import typer

from actsteer.cli import banks, models, screen
from actsteer.cli.options import Concepts, MaybeModelName, TrustRemoteCode
from actsteer.steering.steering import Steering
from actsteer.tuning.evidence import Evidence, evidences

_PAIRS, _COMPARED = 20, 1000
_MODEL = ("name", "revision", "model")


def show(
    bank: Annotated[str, typer.Argument(help="Any file of vectors or of a steering, or a pattern.")],
    concept: Concepts = None,
    model: MaybeModelName = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the concepts of a file, their sites and norms, how they steer, and how far the concepts interfere.

    How they steer is said of a file that has more than vectors: strengths, interventions, gates, positions, sites; and
    what was measured, of one that calibrate has written. Interference is the cosine between two concepts over all their
    sites; the strongest pairs come first.
    """
    banks.check(bank)
    describe(banks.read(bank, models.names(model, trust_remote_code=trust_remote_code), concept))


def describe(steering: Steering) -> None:
    """Print a line for every direction, every concept's origin, how they steer, and every pair that interferes."""
    bank = steering.vectors
    rows = [
        (concept, site, len(vector[site]), f"{float(vector[site].norm()):.4g}")
        for concept, vector in bank.items()
        for site in vector
    ]
    screen.table("concept", "site", "features", "norm", rows=rows, numbers=["features", "norm"])
    origins = {concept: _origin(vector.metadata) for concept, vector in bank.items()}
    if told := [name for name in _origin({}) if any(own[name] for own in origins.values())]:
        screen.say("")
        screen.table("concept", *told, rows=[(concept, *map(own.get, told)) for concept, own in origins.items()])
    if not steering.is_plain:
        screen.say("")
        for line in _parts(steering):
            screen.say(line)
    for known, _ in evidences(steering):
        screen.say("")
        for line in _measured(known):
            screen.say(line)
    present = bank.select(*(concept for concept, vector in bank.items() if float(vector.norm()) > 0))
    if len(present) < 2:
        return
    screen.say("")
    if len(present) > _COMPARED:
        screen.say(f"interference: {len(present)} concepts are too many to compare; choose some with --concept")
        return
    cosines = present.cosines().tolist()
    pairs = [(one, other, cosines[i][j]) for (i, one), (j, other) in combinations(enumerate(present.concepts), 2)]
    pairs.sort(key=lambda pair: -abs(pair[2]))
    rows_ = [(one, other, f"{cosine:+.3f}") for one, other, cosine in pairs[:_PAIRS]]
    screen.table("interference", "with", "cosine", rows=rows_, numbers=["cosine"])
    if len(pairs) > _PAIRS:
        screen.say(f"and {len(pairs) - _PAIRS} pairs that interfere less")


def _measured(known: Evidence) -> Iterator[str]:
    """What was measured, in a few lines."""
    shown = {name: f"{own:.4g}" if isinstance(own, float) else own for name, own in known.steering.items()}
    how = ", ".join(f"{name} {own}" for name, own in shown.items() if own not in ("all", "None"))
    yield f"measured: {how}"
    yield f"effect: {known.effect}, unsteered {known.unsteered}, by {known.metric}"
    yield f"cost: {', '.join(f'{name} {own}' for name, own in known.costs.items())}"
    if known.percentile is not None:
        yield f"controls: percentile {known.percentile:.1f} of {known.controls}"
    yield f"model: {', '.join(f'{name} {known.model[name]}' for name in _MODEL if name in known.model)}"
    yield f"versions: {', '.join(f'{name} {own}' for name, own in known.versions.items())}"
    rows = [(f"{c:.4g}", "" if effect is None else f"{effect:.4g}", f"{cost:.4g}") for c, effect, cost in known.curve]
    if rows:
        yield "dose response: c, effect, cost"
        yield from ("    " + ", ".join(cell or "over the budget" for cell in row) for row in rows)


def _parts(steering: Steering) -> Iterator[str]:
    """A line for every part that is given, for all concepts or for one."""
    for name, part in steering.parts().items():
        each = part if isinstance(part, dict) else {} if part is None else {"": part}
        for concept, own in each.items():
            said = own if isinstance(own, str) else " ".join(repr(own).split())  # on one line
            yield f"{name}{concept and f' of {concept}'}: {said}"


def _origin(metadata: Mapping[str, str]) -> dict[str, str]:
    """How a vector was made; the model by its fingerprint, which says its class, or else by its type."""
    told = {name: metadata.get(name, "") for name in ("estimator", "intervention", "model")}
    return told | {"model": told["model"] or metadata.get("model_type", "")}
