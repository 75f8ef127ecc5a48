"""Hugging Face transformers: texts as batches, and vectors from pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from actsteer.collecting.answering import Answering
from actsteer.collecting.texts import Text, TextBatches, input_device, text_batches
from actsteer.errors import BatchError
from actsteer.estimators.estimator import COVARIANCE, Estimator, Result, check_estimator
from actsteer.estimators.fit import estimated, fit
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.integrations.prefixes import collect_pairs_by_prefix
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites
from actsteer.tokens.positions import Positions
from actsteer.tokens.whose import Masks

__all__ = ["Answering", "Text", "TextBatches", "fit_pairs", "text_batches"]


def fit_pairs(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[Text, Text]],
    *,
    sites: Sites,
    estimator: Estimator[Result] | None = None,
    positions: Positions = "last",
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    concept: str | None = None,
    batch_size: int = 32,
    chat: bool = False,
    continue_final_message: bool | None = None,
    truncation: int | None = None,
    share_prefix: bool = False,
    stop: bool = True,
    progress: bool = True,
) -> Result:
    """The vector that points from the second texts of the pairs to the first, as `fit` finds it.

    The result depends on neither the batch size nor the side on which the tokenizer pads, but for rounding.

    Args:
        pairs: (positive text, negative text).
        sites: names, globs or a predicate, as for `find_sites`.
        estimator: `MeanDifference()` unless another is given.
        positions: which tokens count; the last of each text, as contrastive activation addition has it, unless others
            are asked for.
        axis, row_axis, token_axis, mask: as for `collect`.
        chat, continue_final_message, truncation: as for `text_batches`.
        share_prefix: compute the tokens with which both texts of a pair begin, and those with which all texts of a
            batch begin, once, in a key-value cache. The same result, but for rounding; for causal models with such a
            cache, estimators on statistics, and `positions="last"`.
        stop: whether passes end with the last site, as for `collect`.

    Raises:
        BatchError: no pairs, or texts without tokens; else as `fit`.

    Source: contrastive activation addition (CAA), Rimsky et al. 2023.
    """
    if not isinstance(model, nn.Module) and isinstance(tokenizer, nn.Module):
        raise TypeError("model and tokenizer are swapped: fit_pairs(model, tokenizer, pairs)")
    sides = isinstance(pairs, tuple) and len(pairs) == 2 and all(isinstance(side, list) for side in pairs)
    if sides or not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise BatchError(
            "pairs: expected one or more of (positive text, negative text); of two lists that is "
            "list(zip(positives, negatives))"
        )
    device = input_device(model)
    where: dict[str, Any] = {"axis": axis, "row_axis": row_axis, "token_axis": token_axis, "mask": mask}
    positive, negative = (
        text_batches(
            tokenizer,
            [pair[side] for pair in pairs],
            batch_size=batch_size,
            chat=chat,
            continue_final_message=continue_final_message,
            truncation=truncation,
            device=device,
        )
        for side in (0, 1)
    )
    if not share_prefix:
        return fit(
            model,
            positive=positive,
            negative=negative,
            sites=sites,
            estimator=estimator,
            concept=concept,
            positions=positions,
            **where,
            stop=stop,
            progress=progress,
        )
    chosen = cast("Estimator[Result]", MeanDifference() if estimator is None else estimator)
    check_estimator(chosen)
    if positions != "last" or chosen.reads not in COVARIANCE:
        raise ValueError(
            "share_prefix: expected positions='last' and an estimator on the statistics of two sides; the tokens that "
            "are shared are not seen on each side by itself"
        )
    toward, away = collect_pairs_by_prefix(
        model,
        positive.ids,
        negative.ids,
        sites=sites,
        covariance=COVARIANCE[chosen.reads],
        batch_size=batch_size,
        device=device,
        stop=stop,
        progress=progress,
        where=where,
    )
    return estimated(chosen, positive=toward, negative=away, concept=concept)
