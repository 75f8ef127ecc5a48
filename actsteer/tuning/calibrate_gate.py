"""calibrate_gate: the threshold at which a gate fires for as many of the rows that are to stay as is bearable."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Generic, TypeVar, final

import torch
from torch import nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.eval_mode import buffers_kept
from actsteer.collecting.observe import Observation, Step
from actsteer.errors import StatisticsError
from actsteer.sites.axes import Axes
from actsteer.steering.gates.gate import Per, ScoredGate, wide
from actsteer.tokens.positions import Positions
from actsteer.tokens.whose import Masks
from actsteer.tuning.intervals import Interval, Sample, halves

G = TypeVar("G", bound=ScoredGate)
_READS: dict[Per, Positions] = {"sequence": "mean", "last": "last", "token": "all"}


@final
@dataclass(frozen=True, kw_only=True)
class GateCalibration(Generic[G]):
    """A gate at a threshold, and how often it fires where it should not.

    Args:
        gate: the same gate with the threshold.
        threshold: chosen on one half of the rows.
        rate: the share of the rows of the other half for which it fires.
        interval: where 95 % of bootstrap draws of the rate lie.
        rows: how many rows, or tokens, there are in all.
    """

    gate: G
    threshold: float
    rate: float
    interval: Interval | None
    rows: int


def calibrate_gate(
    model: nn.Module,
    gate: G,
    *,
    retain: Batches,
    false_positive_rate: float = 0.01,
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> GateCalibration[G]:
    """The gate with the lowest threshold at which it fires for at most this share of `retain`.

    The threshold is the (1 - rate) quantile of the scores on one half of the rows, drawn by chance; what is reported is
    the rate on the other half. Of texts whole ones are drawn.

    Args:
        gate: one that compares a score with a threshold: `ProjectionAbove`, `CosineAbove`, `ProbeAbove`, or yours (see
            `ScoredGate`) with a threshold that can be set. It is copied.
        retain: inputs for which it should not fire, as for `collect`.
        false_positive_rate: of rows or, for a gate that decides per token, of tokens.

    Raises:
        TypeError: the gate has no score. `And` and the like have several: calibrate each.
        StatisticsError: too few rows to tell such a rate.

    >>> from actsteer import ProjectionAbove, SteeringVector
    >>> gate, x = ProjectionAbove(SteeringVector({"0": torch.tensor([1.0])}), 0.0), torch.arange(100.0)[:, None]
    >>> found = calibrate_gate(nn.Sequential(nn.Identity()), gate, retain=x, false_positive_rate=0.1)
    >>> 80 < found.threshold < 99, found.rate < 0.25, gate.threshold
    (True, True, 0.0)
    """
    if isinstance(gate, type) or not isinstance(gate, ScoredGate):
        raise TypeError(
            f"gate: expected one that compares a score with a threshold, such as ProjectionAbove, got "
            f"{getattr(gate, '__name__', type(gate).__name__)}; of a combination calibrate each gate"
        )
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"false_positive_rate: expected a share between 0 and 1, got {false_positive_rate!r}")
    scores: list[torch.Tensor] = []
    owners: list[torch.Tensor] = []
    before = 0

    def keep(site: str, rows: torch.Tensor, own: torch.Tensor) -> None:
        scores.append(gate.score(wide(rows)).detach().double().cpu())
        owners.append(own.cpu() + before)

    with buffers_kept(model):
        observation = Observation(
            model,
            [gate.site],
            axis=axis,
            row_axis=row_axis,
            token_axis=token_axis,
            mask=mask,
            positions=_READS[gate.per],
            stop=True,
        )
        for batch in iterate(retain, batch_size=batch_size, progress=progress, label="retain"):
            observation.run([Step(batch, keep)])
            before = 0 if not owners else int(owners[-1].max()) + 1
    score, owner = torch.cat(scores), torch.cat(owners)
    if not bool(score.isfinite().all()):
        raise StatisticsError(
            f"retain: {int((~score.isfinite()).sum())} of {len(score)} scores at site {gate.site!r} are not finite; "
            "look for inf or nan in the data"
        )
    count = int(owner.max()) + 1
    chooses, reports = halves(count, torch.Generator().manual_seed(0) if generator is None else generator)
    seen = score[chooses[owner]].sort().values
    place = math.ceil((1 - false_positive_rate) * len(seen)) - 1
    if count < 2 or place >= len(seen) - 1:
        raise StatisticsError(
            f"retain: {len(seen)} scores in the half that chooses do not tell a rate of {false_positive_rate}; "
            f"expected more than {2 * math.ceil(1 / false_positive_rate)} rows"
        )
    found = copy.copy(gate)
    found.threshold = float(seen[place])  # type: ignore[misc]  # which a ScoredGate need not allow; ours do
    fires = (score > found.threshold).double()
    sample = Sample(owner, reports, seed=0)
    return GateCalibration(
        gate=found,
        threshold=found.threshold,
        rate=sample.of(fires, "mean"),
        interval=sample.interval(fires, "mean"),
        rows=len(score),
    )
