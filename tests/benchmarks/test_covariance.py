"""The benchmark of covariances runs, and its error is that of what it times."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from actsteer import Moments
from benchmarks.covariance import data, main, relative_error, streamed


@pytest.mark.slow
def test_the_file_has_rates_error_and_memory(tmp_path):
    app, out = typer.Typer(), tmp_path / "covariance.json"
    app.command()(main)
    options = ["--d", "64", "--rows", "1024", "--repeats", "2", "--out", str(out)]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(out.read_text())
    assert all(0 < rate["lower"] <= rate["median"] <= rate["upper"] for rate in found["rates"].values())
    assert found["relative error"] < 1e-11 and found["matrices"] > 0
    assert f"{found['relative error']:.1e}" in result.output


def test_the_streamed_covariance_is_the_one_of_two_passes():
    x = data(300, 16)
    assert relative_error(streamed(x, 7).scatter, x.double()) < 1e-12


def test_a_wrong_covariance_has_an_error():
    x = data(300, 16)
    assert relative_error(streamed(x, 7).scatter * 1.001, x.double()) > 1e-4
    assert relative_error(Moments.of(x[1:], covariance=True).scatter, x.double()) > 1e-6


def test_the_rows_are_neither_centred_nor_uncorrelated():
    x = data(2048, 8).double()
    assert x.mean(dim=0).abs().max() > 0.5
    assert torch.corrcoef(x.T)[0, 1] > 0.5
