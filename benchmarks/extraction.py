"""How fast activations become statistics: `python -m benchmarks.extraction [--out FILE.json] [--pairs N] [--quick]`."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from actsteer import collect, record
from actsteer.integrations.transformers import fit_pairs, text_batches
from benchmarks.memory import peak
from benchmarks.overhead import described, shown
from benchmarks.timing import Ratio, set_threads

BODY, INFERENCE, BY_HAND = "the body alone", "the body in inference mode", "by hand"
SITES, BATCHES = 30, 40
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
}
TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
Run = Callable[[], Any]


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file too.")] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of texts, 16-40 tokens each.")] = 64,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds.")] = 6,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the processor.")] = 2,
    rows: Annotated[int, typer.Option(help="Rows up to which memory is measured.")] = 10_000,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model: a check that it works.")] = False,
) -> None:
    """Time collect against the model's body, without its head, over the same batches, and against bare hooks on a small
    model, where its own work shows; and measure the memory."""
    console = Console(width=140)
    model, texts = language_model(quick=quick), token_lists(2 * pairs)
    with set_threads(threads), torch.no_grad():
        timed = times(ways(model, texts), repeats=repeats)
        shared = times(prefix_ways(model, pairs), repeats=repeats)
        beyond = overhead(repeats=repeats)
    memory = {name: peak(prepared, name, 2 * pairs, quick, threads=threads) for name in ways(model, texts)}
    growth = {str(n): peak(grown, n, quick, threads=threads) for n in sizes(rows)}
    tokens = sum(map(len, texts))
    console.print(table(timed, memory, len(texts), tokens))
    console.print(
        f"memory of collect, every token a row: {', '.join(f'{n} rows {mb:.0f} MB' for n, mb in growth.items())}"
    )
    mode = Ratio.of(over(timed[BODY], timed[INFERENCE]))
    console.print(f"no_grad, in which collect runs: {shown(mode)} of the time in inference mode")
    for name, milliseconds in beyond.items():
        console.print(f"collect beyond bare hooks that sum, {SITES} sites, {name}: {shown(Ratio.of(milliseconds))} ms")
    sharing = Ratio.of(over(shared[SHARED], shared[PLAIN]))
    console.print(f"{SHARED}: {shown(sharing)} of {PLAIN} ({PREFIX} of {PREFIX + ENDING} tokens are shared)")
    if out is not None:
        command = (
            f"python -m benchmarks.extraction --pairs {pairs} --repeats {repeats} --threads {threads} --rows {rows}"
        )
        results = {name: {"seconds": seconds, "megabytes": memory[name]} for name, seconds in timed.items()}
        document = described(command) | {"texts": len(texts), "tokens": tokens, "ways": results}
        document |= {"megabytes by rows": growth, "shared prefix": vars(sharing)}
        document |= {"no_grad over inference mode": vars(mode), "milliseconds beyond bare hooks": beyond}
        out.write_text(json.dumps(document, indent=2) + "\n")


# --- what is timed ---------------------------------------------------------------------------------------------------
def language_model(*, quick: bool, tied: bool = False) -> nn.Module:
    """A Llama of the shape of SmolLM2-135M (30 blocks, d = 576, 49152 tokens), with random weights, tied or not."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config = LlamaConfig(
        vocab_size=512 if quick else 49_152,
        num_key_value_heads=3 if not quick else 4,
        tie_word_embeddings=tied,
        **(TINY if quick else SHAPE),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(config)
        return model.train(False).requires_grad_(False)


def token_lists(count: int) -> list[str]:
    """Texts of 16 to 40 letters, each of which is a token."""
    generator = random.Random(0)
    return ["".join(chr(97 + generator.randrange(26)) for _ in range(generator.randint(16, 40))) for _ in range(count)]


class Letters:
    """A tokenizer with a token for every letter."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def ways(model: nn.Module, texts: list[str]) -> dict[str, Run]:
    """What is compared, by name; each goes over all batches once."""
    batches = list(text_batches(Letters(), texts, batch_size=32))
    blocks = [f"model.layers.{index}" for index in range(blocks_of(model))]
    middle = blocks[len(blocks) // 2 - 1]
    cases = {f"block {len(blocks) // 2} of {len(blocks)}": [middle], f"all {len(blocks)} blocks": blocks}
    made: dict[str, Run] = {BODY: partial(body, model, batches), INFERENCE: partial(inferred, model, batches)}
    for name, sites in cases.items():
        made[f"{BY_HAND}, {name}"] = partial(by_hand, model, batches, sites)
        made[f"collect, {name}"] = partial(collect, model, batches, sites=sites, positions="last", progress=False)
    made[f"record, {name}"] = partial(record, model, batches, sites=blocks, positions="last", progress=False)
    return made


def blocks_of(model: Any) -> int:
    """The number of blocks."""
    return len(model.model.layers)


def body(model: Any, batches: list[dict[str, Tensor]]) -> None:
    """The model without its head, nothing kept."""
    for batch in batches:
        model.model(**batch, use_cache=False)


def inferred(model: Any, batches: list[dict[str, Tensor]]) -> None:
    """The same in inference mode."""
    with torch.inference_mode():
        body(model, batches)


def by_hand(model: nn.Module, batches: list[dict[str, Tensor]], sites: list[str]) -> dict[str, Tensor]:
    """The limit: hooks that sum the last tokens, the last of which ends the pass."""
    sums: dict[str, Tensor] = {}
    last = torch.zeros(0)

    class Enough(Exception):  # noqa: N818
        pass

    def hook(site: str, module: nn.Module, args: Any, output: Tensor) -> None:
        rows = output[torch.arange(len(output)), last].double()
        sums[site] = sums.get(site, 0) + rows.sum(dim=0)
        if site == sites[-1]:
            raise Enough

    handles = [model.get_submodule(site).register_forward_hook(partial(hook, site)) for site in sites]
    try:
        for batch in batches:
            last = batch["attention_mask"].sum(dim=1) - 1
            with suppress(Enough):
                model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {site: total / sum(len(b["input_ids"]) for b in batches) for site, total in sums.items()}


PREFIX, ENDING = 48, 8
PLAIN, SHARED = "fit_pairs", "fit_pairs, share_prefix=True"


def prefix_ways(model: nn.Module, pairs: int) -> dict[str, Run]:
    """Pairs of texts that begin alike, all of them with the same instruction, with and without sharing."""
    generator = random.Random(1)

    def letters(count: int) -> str:
        return "".join(chr(97 + generator.randrange(26)) for _ in range(count))

    beginning = letters(PREFIX)
    made = [(beginning + letters(ENDING), beginning + letters(ENDING)) for _ in range(pairs)]
    site = f"model.layers.{blocks_of(model) // 2 - 1}"
    run = partial(fit_pairs, model, Letters(), made, sites=site, progress=False)
    return {PLAIN: run, SHARED: partial(run, share_prefix=True)}


# --- how it is measured ----------------------------------------------------------------------------------------------
def times(
    runs: dict[str, Run], *, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """The seconds that each of them takes, once in every round, in rotating order."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    names = list(runs)
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            runs[name]()
            taken[name].append(clock() - start)
    return taken


def overhead(*, repeats: int) -> dict[str, list[float]]:
    """What `collect` takes beyond bare hooks that sum at the same sites, in milliseconds, round by round: "per batch",
    the difference of many batches and one, and "per call", of one batch."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(SITES))).train(False)
    sites, batch = [str(index) for index in range(SITES)], torch.randn(32, 64)
    ways: dict[str, Callable[[int], Any]] = {
        "collect": lambda count: collect(model, [batch] * count, sites=sites, stop=False, progress=False),
        BY_HAND: lambda count: _summed(model, [batch] * count),
    }
    found: dict[str, list[float]] = {"per batch": [], "per call": []}
    for turn in range(repeats + 1):
        taken: dict[tuple[str, int], float] = {}
        for name in sorted(ways, reverse=bool(turn % 2)):
            for count in (1, BATCHES + 1):
                start = time.perf_counter()
                ways[name](count)
                taken[name, count] = 1e3 * (time.perf_counter() - start)
        if turn:  # the first warms up
            beyond = {count: taken["collect", count] - taken[BY_HAND, count] for count in (1, BATCHES + 1)}
            found["per batch"].append((beyond[BATCHES + 1] - beyond[1]) / BATCHES)
            found["per call"].append(beyond[1])
    return found


def _summed(model: nn.Sequential, batches: list[Tensor]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def hook(site: str, module: nn.Module, args: Any, output: Tensor) -> None:
        total = output.sum(0, dtype=torch.float64)
        sums[site] = sums[site] + total if site in sums else total

    handles = [module.register_forward_hook(partial(hook, site)) for site, module in model.named_children()]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return sums


def over(seconds: list[float], base: list[float]) -> list[float]:
    """The ratios, round by round."""
    return [own / other for own, other in zip(seconds, base, strict=True)]


def prepared(name: str, texts: int, quick: bool) -> Run:
    """One of the ways, for a process of its own."""
    model = language_model(quick=quick)
    _without_gradients(ways(model, ["aa"])[name])  # what libraries allocate once
    return partial(_without_gradients, ways(model, token_lists(texts))[name])


def grown(rows: int, quick: bool) -> Run:
    """collect over so many rows, every token being one, on batches that are made as they are needed."""
    model = language_model(quick=quick)

    def batches() -> Iterator[dict[str, Tensor]]:
        for _ in range(rows // (32 * 32)):
            ids = torch.randint(97, 123, (32, 32))
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    middle = blocks_of(model) // 2 - 1
    collect(model, [{"input_ids": torch.full((1, 2), 97)}], sites=f"model.layers.{middle}", progress=False)
    return lambda: collect(model, batches(), sites=f"model.layers.{middle}", progress=False)


def sizes(rows: int) -> list[int]:
    """1024, and so on tenfold."""
    return [n for n in (1024, 10_240, 102_400) if n <= max(1024, rows * 1.1)]


def _without_gradients(run: Run) -> Any:
    with torch.no_grad():
        return run()


def table(timed: dict[str, list[float]], memory: dict[str, float], texts: int, tokens: int) -> Table:
    """One row per way; what collect takes is also held against the same thing by hand, its limit."""
    made = Table(title=f"{texts} texts, {tokens} tokens: time / time of the body in the same round, median (quartiles)")
    for column in ("", "ratio", "less the limit's", "texts/s", "peak MB"):
        made.add_column(column, justify="left" if not column else "right")
    for name, seconds in timed.items():
        ratios, limit = over(seconds, timed[BODY]), timed.get(name.replace("collect", BY_HAND))
        more = [own - least for own, least in zip(ratios, over(limit or seconds, timed[BODY]), strict=True)]
        above = shown(Ratio.of(more)) if limit and name.startswith("collect") else ""
        made.add_row(
            name, shown(Ratio.of(ratios)), above, f"{texts / statistics.median(seconds):.0f}", f"{memory[name]:.0f}"
        )
    return made


if __name__ == "__main__":
    typer.run(main)
