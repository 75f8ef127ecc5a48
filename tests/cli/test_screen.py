"""Tables and help on a terminal of 80 columns, and of fewer; a row is a line where there is no terminal."""

import pytest
import torch
from rich.console import Console

from actsteer import SteeringVector, VectorBank
from actsteer.cli import screen
from tests.cli.test_commands import SITE, causal

COMMANDS = ("sites", "fit", "collect", "merge", "show", "generate", "convert", "fold", "verify")


@pytest.fixture
def terminal(monkeypatch):
    """A terminal that is so wide."""

    def of(width):
        monkeypatch.setattr(screen, "out", Console(width=width, force_terminal=True, color_system=None))

    return of


def columns(done):
    return max(map(len, done.out.splitlines()))


@pytest.fixture
def bank(folder):
    """Two concepts of the llama, with all that `fit` says of how they were made."""
    made = {"estimator": "WhitenedMeanDifference"}
    both = {name: SteeringVector({SITE: torch.ones(16)}, concept=name, metadata=made) for name in ("love", "calm")}
    VectorBank(both).save(folder / "bank.safetensors", model=causal(folder))
    return "bank.safetensors"


def test_the_tables_fit_80_columns(run, terminal, bank):
    terminal(80)
    command = ["collect", "-m", "llama", "--texts", "love.txt", "--sites", "model.layers.*", "-o", "s.safetensors"]
    for arguments in (["sites", "llama"], ["show", bank], command):
        done = run(*arguments)
        assert done.code == 0, done.err
        assert columns(done) <= 80


@pytest.mark.parametrize("width", [20, 37, 60])
def test_what_is_too_wide_for_a_terminal_goes_on_below(run, terminal, bank, width):
    wide = run("show", bank)
    terminal(width)
    narrow = run("show", bank)
    assert columns(narrow) <= width < columns(wide)
    assert sorted(narrow.out.replace("\n", "").replace(" ", "")) == sorted(wide.out.replace("\n", "").replace(" ", ""))


def test_without_a_terminal_a_row_is_a_line(run, monkeypatch, bank):
    monkeypatch.setenv("COLUMNS", "20")
    done = run("show", bank)
    origin = next(line for line in done.lines if line[:2] == ["love", "WhitenedMeanDifference"])
    assert origin[2].startswith("LlamaForCausalLM:")
    assert ["love", SITE, "16", "4"] in done.lines


def test_a_model_is_named_by_its_type_where_there_is_no_more(run, folder):
    for name, metadata in (("one", {"model_type": "llama"}), ("two", {})):
        SteeringVector({SITE: torch.ones(16)}, concept=name, metadata=metadata).save(folder / f"{name}.safetensors")
    assert run("show", "one.safetensors").lines[-2:] == [["concept", "model"], ["one", "llama"]]
    assert "model" not in run("show", "two.safetensors").lines[-2]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_80_columns(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    done = run(*([] if command is None else [command]), "--help")
    assert columns(done) <= 80
    assert "…" not in done.out
