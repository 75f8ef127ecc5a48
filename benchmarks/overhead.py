"""What a steered forward costs: `python -m benchmarks.overhead [--out FILE.json] [--repeats N] [--device D]`."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import actsteer
from benchmarks import decoding, interventions
from benchmarks.models import (
    BY_HAND,
    INLINE,
    MANY,
    NOISE_FLOOR,
    ONE,
    check_equal,
    compiled,
    compiled_variants,
    settings,
    variants,
)
from benchmarks.timing import SLOW, Ratio, Timing, compare, set_threads

THREADS = (1, 2)


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file too.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds; a slow model gets a fifth of them.")] = 50,
    device: Annotated[
        str, typer.Option(help="Where the models lie: cpu, or cuda, where compiled means graphs.")
    ] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models and runs: a check that it works.")] = False,
) -> None:
    """Time unhooked, hooked, steered and folded models, and compare the Steerer with a hand-written hook."""
    console = Console(width=174)
    timings: list[Timing] = []
    every = [setting.to(device) for setting in settings(quick=quick)]
    seconds = 0.001 if quick else 0.01
    for setting in every:  # before anything is compiled, for that changes what the Steerer does
        ways = variants(setting)
        check_equal(setting, ways)
        for count in THREADS if device == "cpu" else (1,):
            console.print(f"timing {setting.name}, {count} thread(s) ...", style="dim")
            timings.append(compare(setting, ways, threads=count, rounds=repeats, seconds=seconds))
    console.print(table(timings))
    others: list[Timing] = []
    for setting in every:
        console.print(f"timing interventions on {setting.name}, 1 thread ...", style="dim")
        made = interventions.ways(setting)
        interventions.check_equal(setting, made)
        others.append(compare(setting, made, threads=1, rounds=max(2, repeats // 2), seconds=seconds))
    console.print(table_of_interventions(others))
    console.print("timing greedy decoding, 1 thread ...", style="dim")
    decoded = [decoding.timed(quick=quick, device=device, rounds=SLOW * repeats, seconds=seconds)]
    compiler = "aot_eager" if quick else "inductor"
    options = {"backend": compiler} | ({} if device == "cpu" or quick else {"mode": "reduce-overhead"})
    for setting in every:
        # the compiler writes the number of threads into the code; and the variants of one model share a limit
        with set_threads(1), torch._dynamo.config.patch(recompile_limit=64):
            fast = compiled(setting, **options)
            console.print(f"timing {fast.name}, 1 thread ...", style="dim")
            ways = compiled_variants(setting, setting.model, **options)
            check_equal(fast, ways)
            timings.append(compare(fast, ways, threads=1, rounds=repeats, seconds=seconds))
        torch.compiler.reset()
    console.print(table(timings[-len(every) :]))
    console.print("timing greedy decoding, compiled, 1 thread ...", style="dim")
    found, recompiles = decoding.timed_compiled(
        quick=quick,
        device=device,
        rounds=SLOW * repeats,
        seconds=seconds,
        compiler="eager" if quick else compiler,
    )
    decoded.append(found)
    console.print(table_of_decoding(decoded, recompiles))
    conclusion = verdict(timings)
    console.print(conclusion)
    if out is not None:
        command = f"python -m benchmarks.overhead --repeats {repeats}"
        command += (f" --device {device}" if device != "cpu" else "") + (" --quick" if quick else "")
        out.write_text(
            json.dumps(
                described(command)
                | results(timings)
                | {
                    "interventions": [dataclasses.asdict(timing) for timing in others],
                    "decoding": [dataclasses.asdict(timing) for timing in decoded],
                    "recompiles": recompiles,
                    "conclusion": conclusion,
                },
                indent=2,
            )
            + "\n"
        )


def reference(timing: Timing) -> str:
    """What the Steerer is held against: the hook written by hand or, compiled, the add in the model's own code."""
    return BY_HAND if BY_HAND in timing.ratios else INLINE


def within_noise(timing: Timing, name: str) -> bool:
    """Whether this variant's median exceeds the hand-written one's by at most half its interquartile range."""
    by_hand = timing.ratios[reference(timing)]
    return timing.ratios[name].median - by_hand.median <= (by_hand.upper - by_hand.lower) / 2


def verdict(timings: list[Timing]) -> str:
    """One line, computed: does the Steerer cost no more than the hand-written edit within noise, and where does it?"""
    slower = [
        f"{name} on {timing.setting} with {timing.threads} thread(s): {timing.ratios[name].median:.3f} against "
        f"{shown(timing.ratios[reference(timing)])}"
        for timing in timings
        for name in (ONE, MANY)
        if not within_noise(timing, name)
    ]
    if not slower:
        return f"Steerer <= hand-written edit within noise: yes, in all {2 * len(timings)} comparisons."
    return (
        f"Steerer <= hand-written edit within noise: no, in {len(slower)} of {2 * len(timings)}: {'; '.join(slower)}."
    )


def shown(ratio: Ratio) -> str:
    """The median, with the quartiles."""
    return f"{ratio.median:.3f} ({ratio.lower:.3f}-{ratio.upper:.3f})"


def table(timings: list[Timing]) -> Table:
    """One row per variant, one column per model and number of threads."""
    made = Table(title="time / time of the unhooked run beside it: median (quartiles)")
    made.add_column("")
    for timing in timings:
        made.add_column(f"{timing.setting}, {timing.threads} thread(s)", justify="right")
    made.add_row("unhooked, µs", *(f"{timing.unhooked_microseconds:.1f}" for timing in timings), end_section=True)
    for name in dict.fromkeys(name for timing in timings for name in timing.ratios):
        cells = (shown(timing.ratios[name]) if name in timing.ratios else "" for timing in timings)
        made.add_row(name, *cells)
    return made


def table_of_interventions(timings: list[Timing]) -> Table:
    """One row per intervention, gate or choice of positions: its formula in a hook by hand, and the Steerer."""
    made = Table(title="time / time of the unhooked run beside it, 1 thread: formula in a hook by hand -> Steerer")
    made.add_column("")
    for timing in timings:
        made.add_column(timing.setting, justify="right")
    made.add_row("unhooked again", *(shown(timing.ratios[NOISE_FLOOR]) for timing in timings), end_section=True)
    for name in interventions.NAMES:
        made.add_row(
            name,
            *(
                f"{shown(t.ratios[name + interventions.BY_HAND])} -> {shown(t.ratios[name])}"
                if name in t.ratios
                else ""
                for t in timings
            ),
        )
    return made


def table_of_decoding(timings: list[Timing], recompiles: int) -> Table:
    """One row per way, as a share of the unsteered model's speed; the compiled one with what was compiled meanwhile."""
    made = Table(title=f"speed / unsteered speed beside it: median (quartiles); {recompiles} recompiles")
    made.add_column("")
    for timing in timings:
        made.add_column(timing.setting, justify="right")
    made.add_row("unsteered, ms", *(f"{t.unhooked_microseconds / 1e3:.1f}" for t in timings), end_section=True)
    for name in dict.fromkeys(name for timing in timings for name in timing.ratios):
        made.add_row(name, *(shown(t.ratios[name].inverse()) if name in t.ratios else "" for t in timings))
    return made


def results(timings: list[Timing]) -> dict[str, Any]:
    """The numbers, as plain values for JSON."""
    return {
        "timings": [
            dataclasses.asdict(timing) | {"within_noise": {name: within_noise(timing, name) for name in (ONE, MANY)}}
            for timing in timings
        ]
    }


def described(command: str) -> dict[str, Any]:
    """What ran where: the command, the versions, the processor."""
    packages = {"actsteer": actsteer.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "command": command,
        "versions": {"python": platform.python_version()} | packages,
        "cpu": {"name": processor(), "threads": list(THREADS), "default_threads": torch.get_num_threads()},
    } | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def processor() -> str:
    """The processor's name, from the system where it tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    typer.run(main)
