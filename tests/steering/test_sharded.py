"""Two gloo processes: data parallel, fully sharded and tensor parallel models are steered as the whole model is."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sharded_worker.py")
WAYS = (
    *(
        "ddp",
        "fsdp",
        "fsdp_at_the_root",
        "fsdp_first_version",
        "column_and_row",
        "column_to_dtensor",
        "column_gathered",
    ),
    *("row_to_dtensor", "row_scattered_by_positions", "sequence_parallel", "sequence_parallel_local"),
)
COMPARED = ("one_number", "rows", "gate", "ablation", "collect")
OTHERS = tuple(
    node.name
    for node in ast.parse(WORKER.read_text()).body
    if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "check" for d in node.decorator_list)
)
WITH_GRADIENTS = ("fsdp", "column_and_row", "column_to_dtensor", "column_gathered")
NAMES = (
    *(f"{way}_{kind}" for way in WAYS for kind in COMPARED),
    *(f"{way}_gradients" for way in WITH_GRADIENTS),
    *OTHERS,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.case(42),
    pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store needs a POSIX file system"),
]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of the two processes says of each check: nothing, or what went wrong."""
    folder = tmp_path_factory.mktemp("sharded")
    root = str(WORKER.parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(WORKER)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(folder / "results")],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = ["", ""]
    try:
        for rank, process in enumerate(processes):
            errors[rank] = process.communicate(timeout=150)[1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = [folder / f"results.{rank}" for rank in range(2)]
    assert all(result.exists() for result in results), errors
    return [json.loads(result.read_text()) for result in results]


@pytest.mark.parametrize("name", NAMES)
def test_both_processes_agree_with_the_whole_model(said: list[dict[str, str]], name: str) -> None:
    for rank, checks in enumerate(said):
        assert not checks[name], f"process {rank}: {checks[name]}"


def test_every_check_of_the_worker_is_a_test(said: list[dict[str, str]]) -> None:
    assert set(said[0]) == set(said[1]) == set(NAMES)
