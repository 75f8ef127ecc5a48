"""The suite: experiments and seeds spread over processes, and the results gathered into one JSON per experiment."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from reference.mnist.data import Source, load
from reference.mnist.noise import SIGMAS
from reference.mnist.scores import spread, summarize
from reference.mnist.study import BUDGETS, Budget
from reference.printed import versions

EXPERIMENTS = ("cross", "self", "multi", "noise")
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """One model to train and to steer in every way of one experiment."""

    experiment: str
    seed: int
    sigma: float = 0.0


def tasks_for(experiments: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """What has to run; noise at sigma 0 is the self experiment, and runs once for both."""
    wanted: dict[Task, None] = {}
    for experiment in experiments:
        for seed in seeds:
            sigmas = SIGMAS if experiment == "noise" else (0.0,)
            wanted |= dict.fromkeys(_task(experiment, seed, sigma) for sigma in sigmas)
    return list(wanted)


def run_tasks(
    tasks: Sequence[Task], *, source: Source, data_root: Path | None, budget: Budget | None, jobs: int | None
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Each task and its result as it finishes, one process per core and one thread in each."""
    jobs = jobs or min(len(tasks), os.cpu_count() or 1, 8)
    arguments = (source, data_root, budget or BUDGETS[source])
    if jobs == 1:
        for task in tasks:
            yield task, _run(task, *arguments)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        running = {pool.submit(_run, task, *arguments): task for task in tasks}
        for finished in as_completed(running):
            yield running[finished], finished.result()


def gather(
    experiments: Sequence[str], seeds: Sequence[int], done: dict[Task, dict[str, Any]], *, source: Source
) -> Results:
    """One document per experiment: the scores over seeds, as the JSON files hold them."""
    results: Results = {}
    for experiment in experiments:
        document: dict[str, Any] = {"experiment": experiment, "data": source, "seeds": list(seeds)}
        if experiment == "noise":
            document["sigma"] = {
                str(sigma): _summary([done[_task("noise", seed, sigma)] for seed in seeds]) for sigma in SIGMAS
            }
        else:
            document |= _summary([done[Task(experiment, seed)] for seed in seeds])
        results[experiment] = document | {"versions": versions("actsteer", "torch", "torchvision", "numpy")}
    return results


def write(results: Results, out: Path) -> None:
    """One `<experiment>.json` each."""
    out.mkdir(parents=True, exist_ok=True)
    for experiment, document in results.items():
        (out / f"{experiment}.json").write_text(json.dumps(document, indent=2) + "\n")


def _task(experiment: str, seed: int, sigma: float) -> Task:
    return Task("self" if experiment == "noise" and sigma == 0.0 else experiment, seed, sigma)


def _run(task: Task, source: Source, data_root: Path | None, budget: Budget) -> dict[str, Any]:
    run = import_module(f"reference.mnist.{task.experiment}").run
    sigma = {"sigma": task.sigma} if task.experiment == "noise" else {}
    result: dict[str, Any] = run(load(source, data_root), seed=task.seed, budget=budget, **sigma)
    return result


def _one_thread() -> None:
    torch.set_num_threads(1)


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "unsteered": summarize([run["unsteered"] for run in runs]),
        **({"ceiling": summarize([run["ceiling"] for run in runs])} if runs[0].get("ceiling") else {}),
        **({"dependence": spread([run["dependence"] for run in runs])} if "dependence" in runs[0] else {}),
        "methods": {name: summarize([run["methods"][name] for run in runs]) for name in runs[0]["methods"]},
    }
