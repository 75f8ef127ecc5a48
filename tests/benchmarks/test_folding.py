"""The benchmark of folding runs, and its table has every row; how long anything takes is not tested."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.extraction import language_model
from benchmarks.folding import cases, folded, main


@pytest.mark.slow
def test_every_row_is_printed_and_written(tmp_path):
    app, out = typer.Typer(), tmp_path / "folding.json"
    app.command()(main)
    result = CliRunner().invoke(app, ["--quick", "--repeats", "2", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(out.read_text())
    assert "--quick" in found["command"] and found["versions"]["torch"] == torch.__version__
    names = [row["name"] for row in found["rows"]]
    assert names == ["2 sites", "4 sites", "8 sites", "the whole stream", "8 sites, of 2 sites"]
    assert all(0 < row["found"]["lower"] <= row["found"]["median"] <= row["found"]["upper"] for row in found["rows"])
    assert all(name in result.output for name in names)


def test_what_is_timed_is_a_fold_at_these_sites():
    model, tokens = language_model(quick=True, tied=True), torch.arange(16)[None]
    before = dict(model.named_parameters())
    for sites in cases(model).values():
        after = dict(folded(model, sites, tokens).named_parameters())
        changed = [name for name, parameter in before.items() if not torch.equal(parameter, after[name])]
        assert len(changed) == len(sites) and all(any(name.startswith(site) for site in sites) for name in changed)
