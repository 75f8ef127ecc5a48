"""What processes that are left hear of one that failed, was killed or never came, whoever keeps the store."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = """
    import datetime, json, os, signal, sys, time
    import torch
    import torch.distributed as dist
    from torch import nn
    from actsteer import DistributedError, collect
    from actsteer.collecting import processes

    port, rank, how, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3, timeout=datetime.timedelta(seconds=4)
    )
    torch.set_num_threads(1)
    model, rows = nn.Sequential(nn.Linear(2, 2)), torch.zeros(4, 2)

    def batches():
        yield rows
        if how.startswith("fails") and rank == int(how[-1]):
            raise OSError("disk gone")
        if how.startswith("is killed") and rank == int(how[-1]):
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 2:
            time.sleep(1)  # long after the others have heard

    if how == "is lost on 1" and rank == 1:
        processes.dist.all_gather_object = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    try:
        share = collect(model, batches(), sites="0", progress=False)
        share.all_reduce()
        said = "nothing"
    except DistributedError as error:
        said = str(error)
    open(f"{out}.{rank}", "w").write(json.dumps(said))
"""


def run(tmp_path, how):
    """What each of three processes hears, None if it did not live to say; and their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, out = tmp_path / "script.py", tmp_path / "said"
    script.write_text(textwrap.dedent(SCRIPT))
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), str(rank), how, str(out)], env=env, stderr=subprocess.PIPE
        )
        for rank in range(3)
    ]
    errors = [process.communicate(timeout=60)[1].decode() for process in started]
    files = [out.with_suffix(f".{rank}") for rank in range(3)]
    return [json.loads(f.read_text()) if f.exists() else None for f in files], errors


def test_all_hear_the_reason_even_of_the_process_that_keeps_the_store(tmp_path):
    heard, errors = run(tmp_path, "fails on 0")
    assert "OSError: disk gone" in errors[0]
    assert heard == [None, *["rank 0 failed: OSError: disk gone"] * 2]


def test_who_was_killed_is_named(tmp_path):
    heard, errors = run(tmp_path, "is killed on 1")
    assert heard[1] is None
    for rank in (0, 2):
        assert heard[rank] is not None and "all_reduce: ranks [1] did not come" in heard[rank], errors[rank]


def test_a_store_that_was_killed_with_rank_0_is_named(tmp_path):
    heard, errors = run(tmp_path, "is killed on 0")
    assert heard[0] is None
    for rank in (1, 2):
        assert heard[rank] is not None and "rank 0, which keeps it, has left or was killed" in heard[rank], errors[rank]


def test_who_was_lost_in_the_middle_of_a_collective_call_is_named(tmp_path):
    heard, errors = run(tmp_path, "is lost on 1")
    assert heard[1] is None
    for rank in (0, 2):
        assert heard[rank] is not None and "ranks [1] were lost in the middle" in heard[rank], (heard, errors[rank])
