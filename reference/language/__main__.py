"""`python -m reference.language`: run the experiments, print the tables, write JSON, figures and a report."""

from __future__ import annotations

import json
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reference.language.model import folder, load
from reference.language.report import TABLES, Results, sections, write_report
from reference.language.study import FULL, QUICK, Study
from reference.printed import console, table, versions
from reference.stored import ModelMissingError

Experiment = Literal["sentiment", "topic", "refusal", "low_rank", "prompt", "generations", "all"]


def main(
    experiment: Annotated[Experiment, typer.Argument(help="Which experiment.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Few texts and steps: whether it runs.")] = False,
    where: Annotated[bool, typer.Option("--where", help="Print where the model lies, for actsteer -m.")] = False,
    out: Annotated[Path, typer.Option(help="Where JSON, figures and report.html go.")] = Path("language-results"),
) -> None:
    """Steer SmolLM2-135M-Instruct in several ways, and measure what each does and what it costs."""
    try:
        if where:
            typer.echo(folder())
            return
        model, tokenizer = load()
    except ModelMissingError as error:
        typer.echo(error, err=True)
        raise typer.Exit(code=2) from None
    study = Study(model, tokenizer, QUICK if quick else FULL)
    results: Results = {}
    out.mkdir(parents=True, exist_ok=True)
    for name in TABLES if experiment == "all" else (experiment,):
        started, used = time.monotonic(), time.process_time()
        document: dict[str, Any] = import_module(f"reference.language.{name}").run(study)
        seconds = {"wall": time.monotonic() - started, "processor": time.process_time() - used}
        results[name] = {
            "experiment": name,
            **document,
            "quick": quick,
            "seconds": seconds,
            "versions": versions("actsteer", "torch", "transformers"),
        }
        (out / f"{name}.json").write_text(json.dumps(results[name], indent=2) + "\n")
        (section,) = sections({name: results[name]})
        texts = name == "generations"
        console.print(table(section["title"], section["columns"], section["rows"], texts=texts))
        console.print(f"{seconds['wall']:.0f} s, {seconds['processor']:.0f} s of processor time")
    console.print(f"JSON, figures and the report with its reading: {write_report(results, out)}")


if __name__ == "__main__":
    typer.run(main)
