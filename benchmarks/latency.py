"""What all but the forward pass costs: `python -m benchmarks.latency [--out FILE.json] [--repeats N] [--quick]`."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from actsteer import Moments, Steerer, SteeringVector, VectorBank, collect, fit
from benchmarks.extraction import blocks_of, language_model
from benchmarks.memory import peak
from benchmarks.overhead import described
from benchmarks.timing import Ratio, no_collection, set_threads

CLOCKED = "import time, torch; start = time.process_time(); {}; print(time.process_time() - start)"
HELP = "import sys; sys.argv = ['actsteer', '--help']; from actsteer.cli.main import main; main()"
BATCHES = 100  # over which what `collect` takes per batch is averaged
Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A row of the table: how much, in which unit, and what it is held against."""

    name: str
    found: Ratio
    unit: str
    against: str
    bar: str = ""


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file too.")] = None,
    concepts: Annotated[int, typer.Option(min=2, help="Vectors in the large bank, of 30 sites each.")] = 10_000,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds; what takes seconds gets a tenth of them.")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the processor.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models: a check that it works.")] = False,
) -> None:
    """Time making, attaching and changing a steering beside plain torch, on a model of 30 blocks with d = 576."""
    few = max(2, repeats // 10)
    rows = starting(rounds=max(4, few))
    with set_threads(threads):
        model = language_model(quick=quick)
        sites = [f"model.layers.{index}" for index in range(blocks_of(model))]
        rows += few_concepts(model, sites, rounds=repeats)
        rows += many_concepts(model, sites, concepts, rounds=repeats, few=few)
        rows += collecting(sites, rounds=few)
    grown = memory(concepts, quick=quick, threads=threads)
    rows.append(Row("many concepts: memory of the first `c = 1`", Ratio.of([grown] * 2), "x", "the data", "1"))
    Console(width=150).print(table(rows, title=f"{len(sites)} sites, d = {width(model)}; many is {concepts}"))
    if out is not None:
        command = f"python -m benchmarks.latency --concepts {concepts} --repeats {repeats} --threads {threads}"
        document = described(command + (" --quick" if quick else "")) | {"rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(document, indent=2) + "\n")


# --- what is timed ---------------------------------------------------------------------------------------------------
def few_concepts(model: nn.Module, sites: list[str], *, rounds: int) -> list[Row]:
    """One vector with all the sites, against plain hooks and plain products."""
    v = vector(sites, width(model))
    positive, negative = torch.ones(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)
    fitted = fit(model, positive=positive, negative=negative, sites=sites, progress=False)
    steerer, directions = Steerer(model, v, c=1.0), [v[site] for site in sites]
    shifts = [torch.empty_like(direction) for direction in directions]
    strengths = [torch.tensor(1.0), torch.tensor(2.0)]
    turn = 0

    def steered() -> None:
        steerer.attach()
        steerer.detach()

    def set_c() -> None:
        nonlocal turn
        turn += 1
        steerer.c = float(turn)

    def multiplied() -> None:
        for direction, shift in zip(directions, shifts, strict=True):
            torch.mul(direction, strengths[turn % 2], out=shift)

    hooked = partial(register_and_remove, model, sites)
    registering, products = "register and remove hooks, by name", "one `torch.mul(out=)` per site"
    return [
        compare("construct", lambda: Steerer(model, v, c=1.0), hooked, registering, "15", rounds=rounds, times=10),
        compare(
            "construct, of a vector that knows its model",
            lambda: Steerer(model, fitted, c=1.0),
            lambda: Steerer(model, v, c=1.0),
            "of one that does not",
            rounds=rounds,
            times=10,
        ),
        compare("attach and detach", steered, hooked, registering, "8", rounds=rounds, times=10),
        compare("`c = x`", set_c, multiplied, products, "4", rounds=rounds, times=10),
    ]


def many_concepts(model: nn.Module, sites: list[str], count: int, *, rounds: int, few: int) -> list[Row]:
    """A bank of many concepts, all of which have all the sites; what a bank can do, at one site."""
    d = width(model)
    bank = large_bank(sites, count, d)
    again = (bank.select(*bank.concepts) for _ in range(few))  # a bank keeps what it has stacked
    constructed = [seconds(partial(Steerer, model, fresh, c=1.0)) for fresh in again]
    steerer = Steerer(model, bank, c=1.0)
    strengths = [torch.randn(count) for _ in range(8)]
    turn = 0

    def set_all() -> None:
        nonlocal turn
        turn += 1
        steerer.c = float(turn)

    def set_one() -> None:
        nonlocal turn
        turn += 1
        steerer.c = {bank.concepts[turn % count]: 1.0}

    rows = [bank.directions(site) for site in sites]

    def product() -> None:
        for directions in rows:
            strengths[turn % len(strengths)] @ directions

    found = [
        Row("many concepts: construct", Ratio.of(constructed), "s", "", "1.5"),
        compare("many concepts: `c = x`", set_all, product, "the products", "3", rounds=few),
        Row("many concepts: `c` naming one", milliseconds(set_one, rounds=few), "ms", "", "5"),
    ]
    tokens, firsts, others = torch.ones(1, 8, dtype=torch.long), [], []
    with torch.no_grad(), steerer:
        run = partial(model, tokens)
        run()
        for _ in range(few):
            set_all()
            firsts.append(seconds(run))
            others.append(statistics.median(seconds(run) for _ in range(3)))
    ratios = [first / other for first, other in zip(firsts, others, strict=True)]
    found.append(
        Row("many concepts: first forward pass after `c = x`", Ratio.of(ratios), "x", "a later one", "as any other")
    )
    return found + algebra(large_bank(sites[:1], count, d), sites[0], rounds=rounds, few=few)


def algebra(bank: VectorBank, site: str, *, rounds: int, few: int) -> list[Row]:
    """What a bank of one site computes, beside the product in it."""
    rows = bank.directions(site)
    c = torch.randn(len(bank))
    strengths = dict(zip(bank.concepts, c.tolist(), strict=True))
    combined = compare(
        "many concepts, one site: combine",
        lambda: bank.combine(strengths),
        lambda: c @ rows,
        "c @ V",
        rounds=rounds,
        times=10,
    )
    return [
        combined,
        compare("many concepts, one site: cosines", bank.cosines, lambda: rows @ rows.T, "V @ V.T", rounds=few),
    ]


def collecting(sites: list[str], *, rounds: int) -> list[Row]:
    """`collect` over many small batches, beyond hooks that sum; and over one."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in sites)).eval()
    names = [str(index) for index in range(len(sites))]
    batch = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    many = [batch] * BATCHES
    per_batch, per_call = [], []
    summed_by_hook(model, names, [batch])
    collect(model, [batch], sites=names, progress=False)
    for _ in range(rounds):
        ours, plain = (
            seconds(partial(collect, model, many, sites=names, progress=False)),
            seconds(partial(summed_by_hook, model, names, many)),
        )
        one = seconds(partial(collect, model, [batch], sites=names, progress=False))
        plain_one = seconds(partial(summed_by_hook, model, names, [batch]))
        per_batch.append(1e3 * ((ours - one) - (plain - plain_one)) / (BATCHES - 1))
        per_call.append(1e3 * (one - plain_one))
    against = "hooks that do `x.sum(0, dtype=float64)`"
    return [
        Row("`collect`, per batch", Ratio.of(per_batch), "ms beyond", against, "0.5"),
        Row("`collect`, per call, one batch", Ratio.of(per_call), "ms beyond", against, "10"),
        *(updating(*shape, rounds=rounds) for shape in ((1024, 4096), (32, 576))),
    ]


def updating(n: int, d: int, *, rounds: int) -> Row:
    """Taking rows into the moments of a mean, against their sum."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    moments, times = Moments.of(rows), max(1, 2**20 // rows.numel())
    name, against = f"`Moments.update`, rows ({n}, {d})", "`x.sum(0, dtype=float64)`"
    update, total = partial(moments.update, rows), partial(rows.sum, 0, dtype=torch.float64)
    return compare(name, update, total, against, "1.6", rounds=rounds, times=times)


def starting(*, rounds: int) -> list[Row]:
    """Processor seconds beyond those of importing torch; less than none where torch is not imported at all."""
    package, name, shown_help = [], [], []
    for _ in range(rounds + 1):
        package.append(float(launch(CLOCKED.format("import actsteer"))[0]))
        name.append(float(launch(CLOCKED.format("import actsteer; actsteer.Steerer"))[0]))
        shown_help.append(launch(HELP)[1] - launch("import torch")[1])
    against = "`import torch`"
    return [  # without the first round, in which bytecode may be written
        Row("`import actsteer`", Ratio.of(package[1:]), "s beyond", against, "0.08"),
        Row("`import actsteer`, and its first name", Ratio.of(name[1:]), "s beyond", against),
        Row("`actsteer --help`", Ratio.of(shown_help[1:]), "s beyond", against, "0.12"),
    ]


# --- how it is measured ----------------------------------------------------------------------------------------------
def compare(name: str, ours: Run, plain: Run, against: str, bar: str = "", *, rounds: int, times: int = 1) -> Row:
    """The ratio of the two, each run so many times, in turns, each beside the other."""
    ours(), plain()
    ratios = []
    with no_collection():
        for turn in range(rounds):
            if turn % 2:
                taken, beside = seconds(ours, times), seconds(plain, times)
            else:
                beside, taken = seconds(plain, times), seconds(ours, times)
            ratios.append(taken / beside)
    return Row(name, Ratio.of(ratios), "x", against, bar)


def milliseconds(run: Run, *, rounds: int) -> Ratio:
    """What one run takes."""
    run()
    with no_collection():
        return Ratio.of([1e3 * seconds(run) for _ in range(rounds)])


def launch(command: str) -> tuple[str, float]:
    """What a new interpreter prints for a command, and the processor seconds that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds(run: Run, times: int = 1) -> float:
    """The processor seconds that all threads of this process take: other processes do not count."""
    start = time.process_time()
    for _ in range(times):
        run()
    return time.process_time() - start


def memory(count: int, *, quick: bool, threads: int) -> float:
    """By how much a Steerer of a large bank grows the process at most, as a multiple of the directions' own size."""
    model = language_model(quick=quick)
    data = count * blocks_of(model) * width(model) * 4 / 1e6
    return peak(steer_many, count, quick, threads=threads) / data


def steer_many(count: int, quick: bool) -> Run:
    """The Steerer of a large bank, for a process of its own."""
    model = language_model(quick=quick)
    sites = [f"model.layers.{index}" for index in range(blocks_of(model))]
    bank = large_bank(sites, count, width(model))
    Steerer(model, bank.select(bank.concepts[0]), c=1.0)  # what libraries allocate once
    return lambda: Steerer(model, bank, c=1.0)


def register_and_remove(model: nn.Module, sites: list[str]) -> None:
    for handle in [model.get_submodule(site).register_forward_hook(_nothing) for site in sites]:
        handle.remove()


def summed_by_hook(model: nn.Module, names: list[str], batches: list[Tensor]) -> Mapping[str, Tensor]:
    """The sums at these sites, by plain hooks."""
    sums: dict[str, Tensor] = {}

    def hook(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        total = output.sum(0, dtype=torch.float64)
        sums[name] = sums[name] + total if name in sums else total

    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return sums


def width(model: Any) -> int:
    """The features of a block's output."""
    size: int = model.config.hidden_size
    return size


def vector(sites: list[str], d: int, *, seed: int = 0) -> SteeringVector:
    """A random vector with these sites."""
    rows = torch.randn(len(sites), d, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(dict(zip(sites, rows, strict=True)))


def large_bank(sites: list[str], count: int, d: int) -> VectorBank:
    """A bank of random vectors, each with all the sites."""
    return VectorBank({f"concept {index}": vector(sites, d, seed=index) for index in range(count)})


def table(rows: list[Row], *, title: str) -> Table:
    """One row per row."""
    made = Table(title=f"{title}: median (quartiles)")
    for column in ("", "found", "of", "to reach"):
        made.add_column(column, justify="left" if column in ("", "of") else "right")
    for row in rows:
        made.add_row(row.name, f"{shown(row.found)} {row.unit}", row.against, row.bar)
    return made


def shown(found: Ratio) -> str:
    """The median, with the quartiles, in three digits."""
    return f"{found.median:.3g} ({found.lower:.3g}-{found.upper:.3g})"


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    return None


if __name__ == "__main__":
    typer.run(main)
