"""TransformerLens: temporary hooks on a bridge; on a model of another kind, with hook points written into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.sources import build_bridge_from_module

from benchmarks.peers.language import batches, last_tokens


@contextmanager
def steer(model: nn.Module, directions: dict[str, Tensor], c: float) -> Iterator[Any]:
    """`hook_resid_post` is the output of a block."""
    if hasattr(model, "generate"):
        lens: Any = bridge_of(model)
        names = {site: f"blocks.{site.rpartition('.')[2]}.hook_resid_post" for site in directions}
        made: Any = _Bridge(lens)
    else:
        lens = made = _WithHookPoints(model, list(directions))
        names = {site: f"model.{site}.1" for site in directions}
    with lens.hooks(fwd_hooks=[(names[site], _adding(c * v)) for site, v in directions.items()]):
        yield made


def extract(
    model: nn.Module, tokenizer: Any, positive: list[str], negative: list[str], sites: list[str]
) -> dict[str, Tensor]:
    """`run_with_cache` of these names, up to the last of their blocks."""
    bridge, blocks = bridge_of(model), {site: int(site.rpartition(".")[2]) for site in sites}
    names = {site: f"blocks.{block}.hook_resid_post" for site, block in blocks.items()}
    stop = max(blocks.values()) + 1
    options: dict[str, Any] = {"stop_at_layer": stop} if stop < bridge.cfg.n_layers else {}
    means = []
    for texts in (positive, negative):
        total = dict.fromkeys(sites, torch.zeros((), dtype=torch.float64))
        for batch in batches(tokenizer, texts):
            mask = batch["attention_mask"]
            _, cache = bridge.run_with_cache(
                batch["input_ids"], attention_mask=mask, names_filter=list(names.values()), **options
            )
            total = {site: total[site] + last_tokens(cache[names[site]], mask).double().sum(dim=0) for site in sites}
        means.append({site: total[site] / len(texts) for site in sites})
    return {site: means[0][site] - means[1][site] for site in sites}


def bridge_of(model: nn.Module) -> Any:
    """The bridge on this model, which puts its components in the place of the model's modules for good."""
    if model not in _BRIDGES:
        _BRIDGES[model] = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    return _BRIDGES[model]


_BRIDGES: dict[nn.Module, Any] = {}


class _Bridge:
    """What a bridge calls `generate` is a loop of its own, without transformers' options; those go to its model."""

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.bridge(*args, **kwargs)

    def generate(self, ids: Tensor, **options: Any) -> Any:
        if {"cache_implementation", "num_beams"} & options.keys():
            return self.bridge.original_model.generate(ids, **options)
        return self.bridge.generate(ids, stop_at_eos=False, verbose=False, **options)


class _WithHookPoints(HookedRootModule):
    def __init__(self, model: nn.Module, sites: list[str]) -> None:
        super().__init__()
        self.model = model
        for site in sites:
            parent, _, name = site.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Sequential(model.get_submodule(site), HookPoint()))
        self.setup()  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def _adding(delta: Tensor) -> Any:
    def hook(activation: Tensor, hook: Any) -> Tensor:
        return activation + delta

    return hook
