"""patching: how much of a behaviour each site and position carries: clean activations put into a corrupted run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from actsteer.collecting.batches import arguments, first_shape
from actsteer.collecting.eval_mode import buffers_kept
from actsteer.collecting.record import record
from actsteer.errors import BatchError
from actsteer.sites.axes import Axes, said_at
from actsteer.sites.blocks import residual_sites
from actsteer.sites.resolve import Sites
from actsteer.steering.interventions.replace import Replace
from actsteer.steering.steerer import Steerer
from actsteer.tokens.inputs import Mask
from actsteer.tokens.passes import Pass, pass_of
from actsteer.tokens.positions import Positions, check, chosen, described
from actsteer.tuning.metrics import OutputMetric, figures
from actsteer.tuning.patched import Patched


def patching(
    model: nn.Module,
    clean: Tensor | Mapping[str, Any] | tuple[Any, ...],
    corrupted: Tensor | Mapping[str, Any] | tuple[Any, ...],
    *,
    metric: Callable[[Any], Tensor],
    sites: Sites | None = None,
    positions: Sequence[Positions] | Mapping[str, Positions] | None = None,
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Mask | None = None,
    progress: bool = True,
) -> Patched:
    """A table of the share of a metric that each site and position recovers, by activation patching.

    The activations of the clean inputs are recorded in one pass. For each cell the corrupted inputs run once, with the
    clean activation at that site and position in the place of theirs; the share is

        (metric(patched) - metric(corrupted)) / (metric(clean) - metric(corrupted))

    of the means over the rows: 0 where the patch does nothing, 1 where it restores all. That is denoising, which finds
    what suffices; with `clean` and `corrupted` exchanged it is noising, which finds what is needed.

    Args:
        clean, corrupted: one call each, as for `collect`: a tensor, a tokenizer's mapping, or a tuple of arguments; of
            the same shape, with pads at the same places.
        metric: the model's output -> a number for every row, (rows,), as the score of an `OutputMetric`: the logit of
            the right answer less that of the wrong one, say.
        sites: the rows of the table; `residual_sites(model)` unless given.
        positions: the columns, each of them positions as for `Steerer`, or name -> positions: [3, slice(4, 6), "last"]
            patches token 3, then 4 and 5 together, then the last. Unless given, each token by itself where the call
            shows tokens (ids, or a mask), and otherwise the whole activation, "all".
        axis, row_axis, token_axis, mask: as for `Steerer`.

    Raises:
        BatchError: clean and corrupted differ in shape or in pads, or are no single call; texts of several lengths in a
            batch, without positions; positions that are not in the texts.
        ValueError: the metric is the same on both, so that there is nothing to recover, or it is not finite; two
            columns of one name.
        TypeError: the metric gives something else than a number for every row.
        UnsupportedModelError: no sites are given, and the model has no list of blocks.

    Source: causal tracing, Meng et al. 2022 (arXiv 2202.05262); the metrics and both directions, Zhang and Nanda 2023
    (arXiv 2309.16042).

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity(), nn.Linear(2, 1, bias=False))
    >>> _ = [nn.init.ones_(own) for own in model.parameters()]
    >>> clean, corrupted = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    >>> print(patching(model, clean, corrupted, metric=lambda y: y[:, 0], sites=["0", "1"]))
    site  all
    0     1.00
    1     1.00
    <BLANKLINE>
    a share of 1.00 of 6 (corrupted 0, clean 6) is recovered at '0', positions all
    """
    seen = _alike(model, clean, corrupted, mask)
    columns = _columns(positions, seen)
    where: dict[str, Any] = {"axis": axis, "row_axis": row_axis, "token_axis": token_axis, "mask": mask}
    measure = OutputMetric(inputs=[corrupted], score=metric)

    def measured(by: str) -> Tensor:
        return figures(measure(model), by=f"metric, {by}")["effect"]

    with buffers_kept(model):
        kept = record(
            model,
            [clean],
            sites=residual_sites(model) if sites is None else sites,
            keep_shape=True,
            progress=False,
            **where,
        )
        best = figures(OutputMetric(inputs=[clean], score=metric)(model), by="metric, clean")["effect"]
        worst = measured("corrupted")
        if best.mean() == worst.mean():
            raise ValueError(
                f"metric: {float(best.mean()):.4g} on clean and {float(worst.mean()):.4g} on corrupted; expected two "
                "numbers that differ, of which a share can be recovered; choose other inputs, or another metric"
            )
        found: dict[str, list[Tensor]] = {site: [] for site in kept}
        with tqdm(total=len(kept) * len(columns), desc="patching", disable=not progress, delay=2.0) as bar:
            for site, values in kept.items():
                edit = Replace({site: values})
                axes = {name: said_at(own, (site,)) for name, own in where.items()}
                for name, own in columns.items():
                    with Steerer(model, edit, positions=own, **axes):
                        found[site].append(measured(f"site {site!r}, positions {name}"))
                    bar.update()
    return Patched(
        sites=tuple(kept),
        positions=tuple(columns),
        clean=best,
        corrupted=worst,
        patched=torch.stack([torch.stack(cells) for cells in found.values()]),
    )


def _alike(model: nn.Module, clean: Any, corrupted: Any, mask: Mask | None) -> Pass:
    """What the clean call says of its tokens, which are the corrupted one's too.

    Raises:
        BatchError: they are not.
    """
    passes = []
    for name, batch in (("clean", clean), ("corrupted", corrupted)):
        if not isinstance(batch, Tensor | Mapping | tuple):
            raise BatchError(
                f"{name}: expected one call, a tensor, a mapping or a tuple of arguments, got {type(batch).__name__}"
            )
        passes.append(pass_of(model, *arguments(batch), mask=mask))
    if (first := first_shape(clean)) != (second := first_shape(corrupted)):
        raise BatchError(
            f"clean has the shape {first}, and corrupted {second}; expected the same, token for token. Between texts "
            "of different lengths Replace goes: record(positions=i), then Steerer(positions=j)"
        )
    pads = [torch.ones(()) if own.real is None else own.real for own in passes]
    if pads[0].shape != pads[1].shape or not torch.equal(*pads):
        raise BatchError("clean and corrupted have pads at other places, or texts of other lengths; expected the same")
    return passes[0]


def _columns(positions: Sequence[Positions] | Mapping[str, Positions] | None, seen: Pass) -> dict[str, Positions]:
    """Name -> positions, of each column of the table."""
    if positions is None:
        if seen.tokens is None:
            return {"all": "all"}
        lengths = torch.as_tensor(seen.tokens.prompt_lengths).flatten().tolist()
        if len(set(lengths)) > 1:
            raise BatchError(
                f"the texts have {min(lengths)} to {max(lengths)} tokens, and a column is one token of each; give "
                "positions=, counted from either end, as in [0, 1, -2, -1]"
            )
        return {str(place): place for place in range(lengths[0])}
    if isinstance(positions, Mapping):
        named = dict(positions)
    elif isinstance(positions, Sequence) and not isinstance(positions, str):
        named = {described(own).get("positions", str(own)): own for own in positions}
        if len(named) < len(positions):
            raise ValueError(f"positions: two columns have one name, of {list(named)}; give name -> positions")
    else:
        named = {}
    if not named:
        raise TypeError(f"positions: expected a column or more, as in [3, slice(4, 6), 'last'], got {positions!r}")
    for name, own in named.items():
        check(own, steers=True)
        if seen.tokens is not None and not bool(chosen(own, seen.tokens).any()):
            raise BatchError(f"positions {name}: no token of the inputs is meant by {own!r}; choose others")
    return named
