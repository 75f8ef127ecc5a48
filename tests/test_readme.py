"""The README's code runs as it stands, block after block."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mktestdocs import check_md_file

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_s_code_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_md_file(README, memory=True)


def test_the_first_example_ends_in_an_assert():
    first = README.read_text().split("```python\n")[1].split("```")[0]
    assert first.strip().splitlines()[-1].startswith("assert ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torch.distributed.run needs gloo")
def test_the_distributed_example_runs_on_two_processes(tmp_path):
    script = next(
        block.split("```")[0] for block in README.read_text().split("```python\n")[1:] if "init_process_group" in block
    )
    (tmp_path / "share.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "share.py"]
    environment = os.environ | {"PYTHONPATH": str(README.parent), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
