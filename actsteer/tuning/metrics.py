"""Metrics: what a steered model is worth, as a number or as one for every example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.batches import Batches
from actsteer.collecting.eval_mode import eval_mode
from actsteer.tuning.doses import Doses

Found: TypeAlias = float | Tensor | Mapping[str, float | Tensor]
"""What a metric gives: one number, a number for every example (n,), or name -> one of these."""
Metric: TypeAlias = Callable[[nn.Module], Found]
"""What makes numbers of a model that is being steered."""
Figures: TypeAlias = dict[str, Float[Tensor, " n"]]
"""Name -> a number for every example; (1,) where there is one for all of them."""


def figures(found: Any, *, by: str = "evaluate") -> Figures:
    """What a metric gives, by name; without a name it is called "effect".

    Raises:
        TypeError: something else.
        ValueError: a number that is not finite.
    """
    if not isinstance(found, Mapping):
        return {"effect": _row(found, by)}
    if not found:
        raise TypeError(f"{by}: expected a number, or a mapping name -> number, got an empty mapping")
    return {str(name): _row(own, f"{by}[{name!r}]") for name, own in found.items()}


def _row(found: Any, by: str) -> Tensor:
    row: Any = None
    if not isinstance(found, str | bytes):
        with suppress(TypeError, ValueError, RuntimeError):
            row = torch.as_tensor(found)
    if row is None or row.ndim > 1 or not row.numel() or row.is_complex():
        shape = "" if row is None else f" of shape {tuple(row.shape)}"
        raise TypeError(
            f"{by}: expected one number, or a tensor (n,) with a number for every example, got "
            f"{type(found).__name__}{shape}"
        )
    numbers: Tensor = row.detach().reshape(-1).double().cpu()
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{by}: expected finite numbers, got {float(numbers[~numbers.isfinite()][0])}")
    return numbers


@final
@dataclass(frozen=True, kw_only=True)
class OutputMetric:
    """A number for every row, made of the model's output on it: several strengths are measured in one forward pass.

    Args:
        inputs: as for `collect`.
        score: (output, targets) -> a number for every row of a batch, (rows,); without targets, (output).
        targets: (n, ...), what belongs to the rows of all inputs in their order.
        batch_size: how many rows of one tensor are fed at a time.

    >>> right = OutputMetric(
    ...     inputs=torch.eye(3),
    ...     targets=torch.tensor([0, 1, 0]),
    ...     score=lambda logits, digits: (logits.argmax(dim=1) == digits).double(),
    ... )
    >>> right(nn.Identity())
    tensor([1., 1., 0.], dtype=torch.float64)
    """

    inputs: Batches
    score: Callable[..., Tensor]
    targets: Tensor | None = None
    batch_size: int = 256

    def __call__(self, model: nn.Module) -> Float[Tensor, " n"]:
        """A number for every row."""
        return self.at(Doses(model, batch_size=self.batch_size), [0.0])[0]

    def at(self, doses: Doses, strengths: Sequence[float]) -> list[Float[Tensor, " n"]]:
        """The same at each of these strengths."""
        found: list[list[Tensor]] = [[] for _ in strengths]
        with eval_mode(doses.model), torch.no_grad():
            for run in doses.runs(self.inputs, strengths):
                rows = run.rows * len(run.which)
                own = () if self.targets is None else (self.targets[run.first : run.first + run.rows],)
                scores = self.score(run.output, *(torch.cat([part] * len(run.which)) for part in own))
                if not isinstance(scores, Tensor) or scores.shape != (rows,):
                    got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                    raise TypeError(f"OutputMetric.score: expected a number for every row, ({rows},), got {got}")
                for place, part in zip(run.which, scores.double().cpu().chunk(len(run.which)), strict=True):
                    found[place].append(part)
        return [torch.cat(parts) for parts in found]
