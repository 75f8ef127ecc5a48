"""Statistics of several processes, started by torchrun as in the README."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.collecting.distributed_worker import CHECKS

WORKER = Path(__file__).parent / "distributed_worker.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each process says of each check: nothing, or what went wrong."""
    results = tmp_path_factory.mktemp("distributed") / "results"
    own = {"PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param), str(WORKER)]
    done = subprocess.run(
        [sys.executable, *command, str(results)],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    files = [results.with_suffix(f".{rank}") for rank in range(request.param)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("check", CHECKS)
def test_on_every_process(check: str, said: list[dict[str, str]]) -> None:
    for rank, own in enumerate(said):
        assert own.get(check, "it did not get there") == "", f"rank {rank}: {own.get(check)}"
