"""One file of a steering in every engine that is installed: the tokens of the hooked model."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.everywhere import ENGINES, STRENGTHS, Answer, NotHereError, compare, eager, main, tiny_llama, vllm

TOLERANCE = 1e-3  # of a log-probability, in float32


@pytest.fixture
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
def test_every_engine_that_is_here_writes_the_tokens_of_the_hooked_model(tmp_path):
    app, out = typer.Typer(), tmp_path / "everywhere.json"
    app.command()(main)
    result = CliRunner().invoke(app, ["--tiny", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads(out.read_text())["models"]["tiny Llama"]
    assert [row["engine"] for row in rows] == list(ENGINES)
    assert all(name in result.output for name in ENGINES)
    here = [row for row in rows if row["not_here"] is None]
    assert len(here) >= 6
    for row in here:
        assert row["equal"] == row["answers"] == 4 * len(STRENGTHS), row
        assert row["furthest"] < TOLERANCE, row


def test_another_steering_is_not_equal_and_what_is_absent_has_no_number(monkeypatch):
    def flipped(own):
        answers = eager(own)
        return answers[len(own.prompts) :] + answers[: len(own.prompts)]

    def short(own):
        return [Answer(answer.tokens, [logprob - 0.5 for logprob in answer.logprobs]) for answer in eager(own)]

    def absent(own):
        raise NotHereError("needs a thing")

    monkeypatch.setattr("benchmarks.everywhere.ENGINES", {"own": eager, "x": flipped, "y": short, "z": absent})
    with tiny_llama() as own:
        first, other, less, gone = compare(own)
        with pytest.raises(NotHereError, match="--vllm-python"):
            vllm(own)
    assert first.equal == first.answers and first.furthest == 0 and first.lost is None
    assert other.equal < other.answers and other.lost > 0
    assert less.equal == less.answers and less.furthest == pytest.approx(0.5)
    assert gone.not_here == "needs a thing" and gone.furthest is None
