"""`python -m reference.mnist`: run the experiments, print the table, write JSON, figures and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from reference.mnist.data import DataMissingError, Source, load
from reference.mnist.figures import draw
from reference.mnist.report import sections, write_report
from reference.mnist.suite import EXPERIMENTS, Task, gather, run_tasks, tasks_for, write
from reference.printed import console, table

Experiment = Literal["cross", "self", "multi", "noise", "all"]


def main(
    experiment: Annotated[Experiment, typer.Argument(help="Which experiment.")] = "all",
    data: Annotated[Source, typer.Option(help="The bundled sample, or all of MNIST.")] = "bundled",
    data_root: Annotated[Path | None, typer.Option(help="Where full MNIST is, or is to be downloaded.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    out: Annotated[Path, typer.Option(help="Where JSON, figures and report.html go.")] = Path("mnist-results"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one per core unless given.")] = None,
) -> None:
    """Steer a network to recognise digits that it was never trained on, and measure what that costs."""
    experiments = EXPERIMENTS if experiment == "all" else (experiment,)
    try:
        load(data, data_root)  # before any work, and before the processes would each say so
    except DataMissingError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(code=2) from None
    tasks = tasks_for(experiments, range(seeds))
    done: dict[Task, dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train and steer", total=len(tasks))
        for task, result in run_tasks(tasks, source=data, data_root=data_root, budget=None, jobs=jobs):
            done[task] = result
            progress.update(bar, advance=1, description=f"{task.experiment}, seed {task.seed}")
    results = gather(experiments, range(seeds), done, source=data)
    write(results, out)
    figures = draw(results, done, out)
    write_report(results, figures, out)
    for section in sections(results):
        console.print(table(section["title"], section["columns"], section["rows"]))
    console.print(f"JSON, figures and the report with its reading: {out / 'report.html'}")


if __name__ == "__main__":
    typer.run(main)
