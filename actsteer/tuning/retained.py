"""Retained: what an unsteered model does on the data that is to stay as it is, and how far a steered one is from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, arguments, iterate
from actsteer.collecting.eval_mode import buffers_kept, eval_mode
from actsteer.collecting.moments import exact
from actsteer.collecting.observe import Observation, Step
from actsteer.collecting.resume import digest_of
from actsteer.collecting.texts import TextBatches
from actsteer.errors import OutputError, StatisticsError
from actsteer.sites.axes import Axes, sequence_first
from actsteer.sites.wrappers import unwrapped
from actsteer.steering.norms import norms, typical
from actsteer.tokens.inputs import Mask, signature_of, tokens_of
from actsteer.tokens.whose import Masks
from actsteer.tuning.doses import Doses


@final
class Retained:
    """One pass of the unsteered model over the data that is to stay as it is.

    Args:
        batches: as for `collect`.
        sites: where the activations are looked at.
        controls: how many random directions are drawn at every site.

    Attributes:
        owners: (m,), the row, or text, of which each number of `kl` is.
        norms: site -> the typical ‖h‖.
        drawn: site -> (controls, d), random directions with the covariance of h / ‖h‖: at norm 1, for the activations
            of a few tokens may be a hundred times as large as all others (Locantore et al. 1999, spherical covariance).
        digest: of the data.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        sites: Iterable[str],
        *,
        controls: int,
        where: Mapping[str, Any],
        mask: Masks | None,
        batch_size: int,
        generator: torch.Generator,
        keep_outputs: bool,
        progress: bool,
    ) -> None:
        self.batches, self.batch_size = [*iterate(batches, batch_size=batch_size, progress=False, label="")], batch_size
        self._model = model
        self._expected: list[Tensor] = []  # log-probabilities, (n, classes) for the n rows or tokens of a batch
        self._real: list[Tensor | None] = []  # which tokens count, (rows, tokens)
        self._row_axis: Axes | None = where.get("row_axis")
        self.digest = digest(batches, self.batches)
        owners: list[Tensor] = []
        sizes: dict[str, list[Tensor]] = {}
        sums: dict[str, _Draws] = {}
        said: Mask | None = None if isinstance(mask, Mapping) else mask
        signature = signature_of(model)

        def steps() -> Iterable[Step]:
            for batch in iterate(self.batches, batch_size=batch_size, progress=progress, label="retain"):
                epsilon: dict[int, Tensor] = {}  # one draw for a token, whatever the site

                def keep(site: str, rows: Tensor, _: Tensor, epsilon: dict[int, Tensor] = epsilon) -> None:
                    length = norms(rows)
                    sizes.setdefault(site, []).append(length[:, 0].cpu())
                    if controls:
                        count = len(rows)
                        if count not in epsilon:
                            epsilon[count] = torch.randn(controls, count, generator=generator, dtype=torch.float64)
                        unit = exact(rows) / exact(length).clamp(min=torch.finfo(torch.float64).tiny)
                        sums.setdefault(site, _Draws()).add(epsilon[count].to(unit.device), unit)

                def take(output: Any, batch: Any = batch) -> None:
                    named = signature.named(*arguments(batch))
                    tokens = tokens_of(named, prefix=signature.prefix(named), mask=said, strict=False, data=True)
                    logits = self._logits(output)
                    real = None if tokens is None or logits.ndim < 3 else tokens.real
                    if real is not None and real.shape != logits.shape[:2]:
                        raise OutputError(f"retain: logits of shape {tuple(logits.shape)}, mask {tuple(real.shape)}")
                    before = 0 if not owners else int(owners[-1].max()) + 1
                    rows = torch.arange(len(logits))[:, None].expand(logits.shape[:-1] if logits.ndim > 2 else (-1, 1))
                    self._real.append(real)
                    self._expected.append(_counted(logits, real).float().log_softmax(dim=-1))
                    owners.append(before + (rows.flatten() if real is None else rows[real.cpu()]))

                yield Step(batch, keep, take=take if keep_outputs else None)

        with buffers_kept(model):
            Observation(model, sites, **where, mask=mask, positions="all", stop=not keep_outputs).run(steps())
        self.owners: Int[Tensor, " m"] = torch.cat(owners) if owners else torch.zeros(0, dtype=torch.long)
        self.norms = {site: typical(own) for site, own in sizes.items()}
        if odd := [site for site, own in self.norms.items() if not math.isfinite(own)]:
            raise StatisticsError(f"retain: the activations at {odd} are not finite; look for inf or nan in the data")
        self.drawn = {site: own.directions() for site, own in sums.items()}

    def _logits(self, output: Any) -> Tensor:
        """The logits with the rows first.

        Raises:
            OutputError: it is not known on which axis they are.
        """
        found = logits_of(output)
        if found.ndim == 2:
            return found
        if self._row_axis not in (None, 0, 1) or (self._row_axis is None and sequence_first(unwrapped(self._model))):
            raise OutputError(
                f"retain: logits of shape {tuple(found.shape)}, and a module of the model has its positions on axis 0; "
                "pass row_axis=0 or row_axis=1, where the rows of the batch are"
            )
        return found.movedim(1, 0) if self._row_axis == 1 else found

    def kl(self, doses: Doses, strengths: list[float]) -> list[Float[Tensor, " m"]]:
        """KL(unsteered ‖ steered) in nats for every row, or token, at each of the strengths: Σ p log(p / q)."""
        found: list[list[Tensor]] = [[] for _ in strengths]
        with eval_mode(self._model), buffers_kept(self._model), torch.no_grad():
            for run in doses.runs(self.batches, strengths):
                expected, real = self._expected[run.number], self._real[run.number]
                for place, logits in zip(run.which, self._logits(run.output).chunk(len(run.which)), strict=True):
                    given = _counted(logits, real).float().log_softmax(dim=-1)
                    terms = (expected.exp() * (expected - given)).masked_fill(expected == -torch.inf, 0.0)
                    apart = terms.double().sum(dim=-1).nan_to_num(nan=torch.inf)
                    found[place].append(apart.clamp(min=0).cpu())
        return [torch.cat(parts) for parts in found]


@final
class _Draws:
    """Σ ε (u - mean u) over rows u, for many ε at once: normal with the covariance of the rows."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._weights: Tensor | float = 0.0
        self._total: Tensor | float = 0.0
        self._count = 0

    def add(self, epsilon: Float[Tensor, "k n"], rows: Float[Tensor, "n d"]) -> None:
        """Take in rows."""
        self._sum = self._sum + epsilon @ rows
        self._weights = self._weights + epsilon.sum(dim=1, keepdim=True)
        self._total = self._total + rows.sum(dim=0, keepdim=True)
        self._count += len(rows)

    def directions(self) -> Float[Tensor, "k d"]:
        """One direction for every ε."""
        found = self._sum - self._weights * (self._total / self._count)
        assert isinstance(found, Tensor)
        return found


def digest(batches: Batches, each: Iterable[Any]) -> str:
    """Of the data, however it is cut into batches where that is known: a tensor, or texts."""
    whole = isinstance(batches, Tensor | Mapping)
    return digest_of([batches] if whole else batches.ids if isinstance(batches, TextBatches) else each)


def logits_of(output: Any) -> Float[Tensor, "rows *tokens classes"]:
    """The logits that a model returns: a tensor (rows, classes) or (rows, tokens, classes), or what has one as .logits.

    Raises:
        OutputError: neither.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.ndim not in (2, 3) or not found.is_floating_point():
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise OutputError(
            "retain: expected logits, (rows, classes) or (rows, tokens, classes), or an output that has them as "
            f".logits, got {got}; have evaluate measure what is to stay, and name that in the budget: "
            "budget={'lost': 0.05}"
        )
    return found.detach()


def _counted(logits: Tensor, real: Tensor | None) -> Float[Tensor, "n classes"]:
    """The logits of every row, or of every token that is no pad."""
    return logits.flatten(0, -2) if real is None else logits[real]
