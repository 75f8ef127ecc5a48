"""explain: what a Steerer would do, in words, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from actsteer.sites.wrappers import class_name
from actsteer.steering.backends.choose import Choice
from actsteer.steering.edit import SiteEdit
from actsteer.vectors.bank import VectorBank


def explain(
    model: nn.Module,
    bank: VectorBank,
    edits: Mapping[str, SiteEdit],
    choices: Mapping[str, Choice],
    strengths: Sequence[Tensor],
) -> str:
    """One paragraph per site: the activation, the axis, the backend and why, and each concept with its strength."""
    lines = [f"{class_name(model)}: {len(edits)} site{'s' * (len(edits) != 1)}, in this order"]
    for site, edit in edits.items():
        side = "input" if edit.place.side == "in" else "output"
        part = "".join(f".{key}" for key in edit.place.path)
        axis = "found at the first call" if edit.layout.axis is None else str(edit.layout.axis)
        choice = choices[site]
        via = "" if choice.mechanism == choice.backend else f" by {choice.mechanism}"
        lines += [
            f"{site!r}: the {side}{part} of {type(edit.place.module).__name__}, {edit.directions.shape[1]} features",
            f"    axis: {axis}",
            f"    backend: {choice.backend}{via} ({choice.reason})",
            f"    intervention: {type(edit.intervention).__name__}",
        ]
        for concept, strength in zip(bank.concepts, strengths, strict=True):
            if site in bank[concept]:
                norm = float(bank[concept].select(site).norm())
                c = f"{float(strength):g}" if strength.ndim == 0 else f"{len(strength)} rows"
                lines.append(f"    {concept}: c = {c}, norm {norm:.4g}{_gated(edit, bank, concept, site)}")
    return "\n".join(lines)


def _gated(edit: SiteEdit, bank: VectorBank, concept: str, site: str) -> str:
    own = [other for other in bank.concepts if site in bank[other]]
    reader = edit.gates[own.index(concept)]
    return "" if reader is None else f", gated by {reader.gate!r}"
