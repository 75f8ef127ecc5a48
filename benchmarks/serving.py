"""Tokens per second of vLLM with a bank: `python -m benchmarks.serving MODEL [--rounds N] [--compiled] [--out FILE]`.

In an environment that has vLLM (`.ci/vllm` makes one). Engines stand beside one another, each in a process of its own,
and work by turns; each run is divided by those of the plain engine beside it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from actsteer import ProjectionAbove, Steering, SteeringVector, VectorBank
from actsteer.integrations.vllm import steer
from benchmarks.latency import Row, table
from benchmarks.overhead import described
from benchmarks.timing import Ratio
from benchmarks.vllm_engine import ENVIRONMENT

REQUESTS, PROMPT, TOKENS, CONCEPTS = 16, 16, 16, 16
Asked = Callable[[int], Any]
"""The number of a request -> its extra arguments."""


def cases() -> dict[str, tuple[str, Asked]]:
    """What is timed -> which engine it is timed on, and what each request asks for."""
    names = [f"concept {number}" for number in range(CONCEPTS)]
    return {
        "plain engine, once more": ("plain", lambda number: None),
        "attached, unsteered": ("bank", lambda number: None),
        "1 concept": ("bank", lambda number: steer({names[0]: 1.0})),
        "16 concepts": ("bank", lambda number: steer(dict.fromkeys(names, 0.2))),
        "16 different requests": ("bank", lambda number: steer({names[number]: 0.1 * number + 0.1})),
        "generated": ("bank", lambda number: steer({names[number]: 1.0}, positions="generated")),
        "a gate per token": ("gated", lambda number: steer({names[0]: 1.0})),
    }


def main(
    model: Annotated[str, typer.Argument(help="A folder of a Llama, as SmolLM2.")],
    rounds: Annotated[int, typer.Option(min=2, help="Rounds.")] = 7,
    compiled: Annotated[bool, typer.Option("--compiled", help="As vLLM compiles by default, and not eager.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file too.")] = None,
) -> None:
    """Time 16 requests at once, with 16 tokens each to read and to write, with and without a bank at six sites."""
    ways = cases()
    with tempfile.TemporaryDirectory() as folder:
        banks = made(model, Path(folder))
        engines = {name: Engine(model, bank, compiled=compiled) for name, bank in banks.items()}
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            before = engines["plain"].run([None] * REQUESTS)
            for name in sorted(ways, reverse=bool(turn % 2)):
                where, asked = ways[name]
                own = engines[where].run([asked(number) for number in range(REQUESTS)])
                after = engines["plain"].run([None] * REQUESTS)
                if turn:  # the first warms up
                    ratios[name].append((before + after) / 2 / own)
                before = after
        for engine in engines.values():
            engine.close()
    rows = [Row(name, Ratio.of(own), "x", "the plain engine's tokens per second") for name, own in ratios.items()]
    title = f"vLLM, {'compiled' if compiled else 'eager'}, {REQUESTS} requests of {TOKENS} tokens"
    Console(width=150).print(table(rows, title=title))
    if out is not None:
        command = f"python -m benchmarks.serving MODEL --rounds {rounds}" + " --compiled" * compiled
        out.write_text(json.dumps(described(command) | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def made(model: str, folder: Path) -> dict[str, str | None]:
    """The files of the banks: none, one, and one with a gate."""
    config = json.loads((Path(model) / "config.json").read_text())
    size, count = config["hidden_size"], config["num_hidden_layers"]
    sites = [f"model.layers.{number * count // 6}" for number in range(6)]
    generator = torch.Generator().manual_seed(0)
    bank = VectorBank(
        {
            f"concept {number}": SteeringVector({site: torch.randn(size, generator=generator) for site in sites})
            for number in range(CONCEPTS)
        }
    )
    read = SteeringVector({sites[0]: torch.randn(size, generator=generator)})
    Steering(bank).save(folder / "bank.safetensors")
    Steering(bank, gate=ProjectionAbove(read, 0.0, per="token")).save(folder / "gated.safetensors")
    return {"plain": None, "bank": str(folder / "bank.safetensors"), "gated": str(folder / "gated.safetensors")}


class Engine:
    """An engine in a process of its own."""

    def __init__(self, model: str, bank: str | None, *, compiled: bool) -> None:
        spawn = get_context("spawn")
        self._here, there = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(there, model, bank, compiled), daemon=True)
        self._process.start()
        self._here.recv()  # it has started

    def run(self, extra: list[Any]) -> float:
        """The processor seconds in which it answers requests with these extra arguments."""
        self._here.send(extra)
        taken: float = self._here.recv()
        return taken

    def close(self) -> None:
        """End it."""
        self._here.send(None)
        self._process.join()


def _work(pipe: Any, model: str, bank: str | None, compiled: bool) -> None:
    os.environ.update(ENVIRONMENT | {"VLLM_CPU_CI_ENV": "0"})  # compiled as it is by default
    from vllm import LLM, SamplingParams

    given: Any = {} if bank is None else {"additional_config": {"actsteer": {"bank": bank}}}
    options = {"dtype": "float32", "max_model_len": 256, "enable_prefix_caching": False, "seed": 0}
    llm = LLM(model, skip_tokenizer_init=True, enforce_eager=not compiled, **options, **given)
    prompts = [{"prompt_token_ids": list(range(5 + own, 5 + own + PROMPT))} for own in range(REQUESTS)]
    pipe.send("started")
    while (extra := pipe.recv()) is not None:
        usual = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "detokenize": False}
        params = [SamplingParams(extra_args=own, **usual) for own in extra]
        start = time.process_time()  # of one thread, so that other processes do not count
        llm.generate(prompts, params, use_tqdm=False)
        pipe.send(time.process_time() - start)


if __name__ == "__main__":
    typer.run(main)
