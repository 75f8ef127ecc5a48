"""explain: what a Steerer would do, in words, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

import actsteer.html as html
from actsteer.sites.wrappers import class_name
from actsteer.steering.attach import Steers
from actsteer.steering.choose import Choice
from actsteer.steering.edit import SiteEdit
from actsteer.steering.gates.gate import Fitted, Gate
from actsteer.steering.gates.gate_direction import READS
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.chain import Chain
from actsteer.steering.interventions.intervention import Intervention, PerSite
from actsteer.steering.interventions.keep_norm import KeepNorm
from actsteer.steering.reader import readers_in
from actsteer.steering.strength import PerConcept, Schedule
from actsteer.tokens.positions import Positions
from actsteer.vectors.bank import VectorBank


@final
class Explanation(str):
    """What a Steerer would do, in words; shown as it reads."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html.outline(self.splitlines())


@runtime_checkable
class Explains(Protocol):
    """A Steerer, to those that must not know the class."""

    bank: VectorBank

    def explain(self) -> Explanation:
        """What would be edited where."""
        ...


def as_html(steerer: Explains) -> str:
    """What `explain` says; of a bank too large to be read for it, the first vectors."""
    return (steerer.explain() if len(steerer.bank) <= html.SHOWN else steerer.bank)._repr_html_()


def explain(
    model: nn.Module,
    bank: VectorBank,
    edits: Mapping[str, SiteEdit],
    choices: Mapping[str, Choice],
    strengths: PerConcept,
    others: Mapping[str, Sequence[Steers]],
    norms: Mapping[str, float],
) -> Explanation:
    """One paragraph per site: the activation, the axis, the backend and why; each concept, in the order in which they
    edit, with its intervention, its strength and, where the typical ‖h‖ is known, what share of it ‖c·v‖ is; how far
    the concepts overlap, and which of them do not commute."""
    lines = [f"{class_name(model)}: {len(edits)} site{'s' * (len(edits) != 1)}, in this order"]
    for site, edit in edits.items():
        side = "input" if edit.place.side == "in" else "output"
        part = "".join(f".{key}" for key in edit.place.path)
        axis = "found at the first call" if edit.lens.layout.axis is None else str(edit.lens.layout.axis)
        choice = choices[site]
        via = "" if choice.mechanism == choice.backend else f" by {choice.mechanism}"
        lines += [
            f"{site!r}: the {side}{part} of {type(edit.place.module).__name__}, {edit.size} features",
            f"    axis: {axis}",
            f"    backend: {choice.backend}{via} ({choice.reason})",
        ]
        for own, index in enumerate(edit.concepts):
            norm, strength = float(edit.directions[own].norm()), strengths[index]
            c = _shown(strength)
            reader = edit.gates.get(own)
            gated = "" if reader is None else f", gated by {reader.gate!r}"
            kind = _named(edit.interventions[own])
            positions = edit.passes.positions.get(index)
            where = "" if positions is None else f", at {_where(positions)}"
            share = _share(edit.interventions[own], strength, norm, norms.get(site))
            lines.append(f"    {bank.concepts[index]}: {kind}, c = {c}, norm {norm:.4g}{share}{gated}{where}")
            lines += [] if reader is None else [_read(leaf.gate) for leaf in readers_in(reader)]
        lines += _overlaps(edit, [bank.concepts[index] for index in edit.concepts])
        lines += _others(edit, others[site])
    return Explanation("\n".join(lines))


def _share(
    intervention: Intervention | PerSite, strength: Tensor | Schedule, norm: float, typical: float | None
) -> str:
    """How large what is added is, beside the activation."""
    if not typical or not isinstance(strength, Tensor) or not isinstance(intervention, Add) or intervention.relative:
        return ""
    largest = float(strength.abs().max()) if strength.numel() else 0.0
    upto = "up to " if strength.ndim else ""
    return f", ‖c·v‖ {upto}{largest * norm / typical:.2g} of the typical ‖h‖ {typical:.3g}"


def _named(intervention: Intervention | PerSite) -> str:
    """The class's name and, in brackets, those of the interventions inside."""
    if isinstance(intervention, KeepNorm):
        return f"KeepNorm({_named(intervention.intervention)})"
    if isinstance(intervention, Chain):
        return f"Chain({', '.join(map(_named, intervention.interventions))})"
    return type(intervention).__name__


def _shown(strength: Tensor | Schedule) -> str:
    if not isinstance(strength, Tensor):
        return "by step"
    if strength.ndim == 0:
        return f"{float(strength):g}"
    return f"{' x '.join(map(str, strength.shape))} rows{' and positions' if strength.ndim == 2 else ''}"


def _where(positions: Positions) -> str:
    if isinstance(positions, Tensor):
        return f"a mask of shape {tuple(positions.shape)}"
    return f"positions {positions!r}"


def _read(gate: Gate) -> str:
    """Where a gate reads, and where its vector was fitted."""
    fitted = gate.metadata.get("positions", "all, or not known") if isinstance(gate, Fitted) else "not known"
    return f"        a gate reads {READS[gate.per]} at {gate.site!r}; fitted at positions: {fitted}"


def _overlaps(edit: SiteEdit, concepts: Sequence[str]) -> list[str]:
    """The cosines of each two directions at a site, and whether their edits commute."""
    lines = []
    for (i, one), (j, other) in combinations(enumerate(concepts), 2):
        v, w = edit.directions.detach()[[i, j]].double().cpu()
        cosine = float(v @ w / (v.norm() * w.norm()).clamp(min=1e-300))
        order = "" if commute(edit.interventions[i], v, edit.interventions[j], w) else "; they do not commute"
        lines.append(f"    {one} and {other}: cosine {cosine:.3f}{order}")
    return lines


def _others(edit: SiteEdit, others: Sequence[Steers]) -> list[str]:
    """The edits that other Steerers have put there."""
    theirs = [own for other in others for own in other.edits_at(edit.place.module, edit.place.side)]
    kinds = [", ".join(map(_named, own.interventions)) for own in theirs]
    return [f"    steered already, by another Steerer: {kind}" for kind in kinds]


def commute(one: Intervention, v: Tensor, other: Intervention, w: Tensor) -> bool:
    """Whether two edits give the same in either order, tried out on rows of many sizes at c = 1."""
    rows = torch.randn(16, len(v), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows *= torch.logspace(-2, 2, 16, dtype=torch.float64)[:, None] * max(float(v.norm()), float(w.norm()), 1e-6)
    c = torch.ones((), dtype=torch.float64)
    try:
        first, second = other(one(rows, v, c), w, c), one(other(rows, w, c), v, c)
    except Exception:  # one that is made for activations of a certain shape
        return False
    return torch.allclose(first, second, rtol=1e-9, atol=1e-9 * float(rows.abs().max()))
