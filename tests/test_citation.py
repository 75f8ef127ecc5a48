"""CITATION.cff says what pyproject says."""

import re
import tomllib
from pathlib import Path

import pytest

import actsteer

ROOT = Path(actsteer.__file__).parent.parent
TEXT = (ROOT / "CITATION.cff").read_text()


def test_it_cites_this_version():
    assert re.findall(r"^version: (.+)$", TEXT, re.MULTILINE) == [actsteer.__version__]


def test_it_is_yaml_and_says_what_pyproject_says():
    found = pytest.importorskip("yaml").safe_load(TEXT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["cff-version"] == "1.2.0" and found["type"] == "software" and found["message"]
    assert (found["title"], found["license"], found["keywords"], found["authors"], found["abstract"]) == (
        *(project[key] for key in ("name", "license", "keywords", "authors", "description")),
    )
