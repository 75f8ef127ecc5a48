"""The benchmark of latency runs, and its table has every row; how long anything takes is not tested."""

import json

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from actsteer import collect
from benchmarks.latency import large_bank, main, summed_by_hook, table, vector


@pytest.mark.slow
def test_every_row_is_printed_and_written(tmp_path):
    app, out = typer.Typer(), tmp_path / "latency.json"
    app.command()(main)
    options = ["--quick", "--concepts", "20", "--repeats", "2", "--out", str(out)]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(out.read_text())
    assert "--concepts 20" in found["command"] and found["versions"]["torch"] == torch.__version__
    names = [row["name"] for row in found["rows"]]
    assert len(set(names)) == len(names) == 18
    assert all(row["found"]["lower"] <= row["found"]["median"] <= row["found"]["upper"] for row in found["rows"])
    assert all(name.split(",")[0] in result.output for name in names)
    assert table([], title="").row_count == 0


def test_what_plain_hooks_sum_is_what_collect_finds():
    model, batches = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), [torch.randn(4, 3) for _ in range(2)]
    sums, found = summed_by_hook(model, ["0", "1"], batches), collect(model, batches, sites=["0", "1"], progress=False)
    for site, total in sums.items():
        torch.testing.assert_close(total / 8, found[site].mean)


def test_the_large_bank_has_every_site_for_every_concept():
    bank = large_bank(["a", "b"], 3, 4)
    assert bank.sites == ("a", "b") and bank.directions("b").shape == (3, 4)
    assert bank["concept 2"].equal(vector(["a", "b"], 4, seed=2))
