"""Prefixes: the tokens that texts begin with alike, computed once and kept in a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from actsteer.collecting.batches import iterate
from actsteer.collecting.collect import described_axes
from actsteer.collecting.moments import Covariance, Moments, absorb
from actsteer.collecting.observe import Observation, Step
from actsteer.collecting.statistics import Statistics
from actsteer.errors import UnsupportedModelError
from actsteer.sites import fingerprint
from actsteer.sites.resolve import Sites, find_sites
from actsteer.sites.wrappers import unwrapped
from actsteer.tokens.inputs import signature_of
from actsteer.tokens.positions import described


def collect_pairs_by_prefix(
    model: nn.Module,
    positive: Sequence[Tensor],
    negative: Sequence[Tensor],
    *,
    sites: Sites,
    covariance: Covariance,
    batch_size: int,
    device: torch.device | None,
    stop: bool,
    progress: bool,
    where: Mapping[str, Any],
) -> tuple[Statistics, Statistics]:
    """The statistics of the last tokens of both sides, of texts given as token ids, pair by pair.

    In each batch the first k tokens, as far as both texts of every pair agree, run once for every distinct beginning;
    what follows them runs for every text on top of the cache. There are no pads between the two, so that windows of
    attention and positions are those of the whole text.

    Args:
        where: axis, row_axis, token_axis and mask, as for `collect`.

    Raises:
        UnsupportedModelError: a model that takes no `past_key_values`.
    """
    from transformers import DynamicCache

    key = _cache_argument(unwrapped(model))
    names = find_sites(model, sites)
    sums: list[dict[str, Moments]] = [{}, {}]

    def keep(site: str, rows: Tensor, owners: Tensor) -> None:
        for side, part in enumerate(rows.unflatten(0, (-1, 2)).unbind(dim=1)):
            absorb(sums[side], site, part, covariance=covariance)

    def steps() -> Iterator[Step]:
        config = getattr(unwrapped(model), "config", None)
        indices = torch.arange(len(positive))
        for chosen in iterate(indices, batch_size=max(1, batch_size // 2), progress=progress, label="collect pairs"):
            texts = [side[int(index)] for index in chosen for side in (positive, negative)]
            shared = min(_agreeing(one, other) for one, other in zip(texts[::2], texts[1::2], strict=True))
            rest = {"input_ids": _padded([text[shared:] for text in texts], device)}
            mask = _padded([torch.ones_like(text) for text in texts], device)
            cache: Any = None
            if shared:
                heads, owners = torch.stack([text[:shared] for text in texts]).unique(dim=0, return_inverse=True)
                cache = DynamicCache(config=config)
                inputs = {"input_ids": heads.to(device), "attention_mask": torch.ones_like(heads).to(device)}
                inputs |= {key: cache, "use_cache": True}
                yield Step(inputs, lambda site, rows, owners: None, fills_cache=True)
                cache.batch_select_indices(owners.to(device))
            inputs = rest | {"attention_mask": mask, key: cache, "use_cache": cache is not None}
            yield Step(inputs, keep, fills_cache=True)

    observation = Observation(model, names, **where, positions="last", stop=stop)
    observation.run(steps())
    metadata = fingerprint.described(model) | described("last") | described_axes(observation.axes, where.get("axis"))
    toward, away = (Statistics({site: own[site] for site in names}, metadata=metadata) for own in sums)
    return toward, away


def _cache_argument(model: nn.Module) -> str:
    """The name by which the model takes a cache of keys and values: it is `cache` since transformers 5.24."""
    names = signature_of(model).names
    name = next((name for name in ("cache", "past_key_values") if name in names), None)
    if name is None or getattr(model, "_is_stateful", False):  # whose cache is a state, in which pads would count
        raise UnsupportedModelError(f"{type(model).__name__} takes no past_key_values; pass share_prefix=False")
    return name


def _agreeing(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts begin with alike, at least one being left of each."""
    length = min(len(one), len(other)) - 1
    same = one[:length] == other[:length]
    return int(same.long().cumprod(dim=0).sum())


def _padded(rows: Sequence[Tensor], device: torch.device | None) -> Tensor:
    return pad_sequence(list(rows), batch_first=True).to(device)
