"""What is released: one version everywhere, and a wheel that a user's type checker and a user's code accept."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import actsteer

ROOT = Path(__file__).parent.parent


def run(*command, cwd):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_changelog_begins_with_this_version():
    newest, date = re.findall(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == actsteer.__version__
    assert f"\ndate-released: {date}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_a_typed_client_of_the_wheel(tmp_path):
    """Built without isolation, installed beside the dependencies of this environment, and seen from elsewhere."""
    pytest.importorskip("hatch_fancy_pypi_readme")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT, cwd=tmp_path)
    venv.create(tmp_path / "venv", with_pip=False)
    (python,) = (tmp_path / "venv").glob("*/python")
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=tmp_path)
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    shutil.copy(ROOT / "tests/typed_client.py", tmp_path)
    run(sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "typed_client.py", cwd=tmp_path)
    run(python, "typed_client.py", cwd=tmp_path)
