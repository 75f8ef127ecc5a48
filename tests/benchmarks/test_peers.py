"""The rows run here for the peers that are here, and nothing wrong is timed; how long it takes is not tested."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.peers import environments, timed
from benchmarks.peers.__main__ import in_process, main, notes
from benchmarks.peers.peer import PEERS, Cannot, peer_of
from benchmarks.peers.run import ROWS, found

HERE = ("by hand", "actsteer", "TransformerLens")  # the last is installed for the tests


def row(letter, peer):
    return ROWS[letter](peer, repeats=2, quick=True)


def peer(steer):
    return SimpleNamespace(steer=contextmanager(steer))


@pytest.fixture
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# --- the rows ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", HERE)
def test_a_steered_forward_is_timed_beside_the_unhooked_one_and_the_one_by_hand(name):
    cells = found(name, "a", repeats=2, quick=True)
    assert len(cells) == 2
    for cell in cells.values():
        assert cell.numbers["ratios"].keys() == {"unhooked again", "by hand", "peer"}, cell
        assert "by hand" in cell.evidence and cell.says.startswith(f"{cell.numbers['ratios']['peer']['median']:.3f}")


@pytest.mark.usefixtures("_fresh")
def test_the_edit_of_actsteer_arrives_in_compiled_decoding_and_that_of_a_plain_hook_where_torch_looks_for_hooks():
    ours, plain = (found(name, "b", repeats=2, quick=True) for name in ("actsteer", "by hand"))
    for cells in (ours, plain):
        assert list(cells) == ["eager", "compiled"]
        assert all("ratios" in cell.numbers for cell in cells.values()), cells
    lost, flag = "other tokens than by hand, eager", "skip_nnmodule_hook_guards = False: the edit arrives"
    assert lost not in ours["compiled"].evidence and flag not in ours["compiled"].evidence
    assert lost in plain["compiled"].evidence and flag in plain["compiled"].evidence


def test_another_output_is_not_timed():
    def halved(model, directions, c):
        with peer_of("by hand").steer(model, directions, c / 2) as steered:
            yield steered

    for cell in row("a", peer(halved)).values():
        assert cell.says == "cannot" and cell.numbers == {}
        assert "another one than by hand: a largest difference of" in cell.evidence


def test_what_a_peer_says_that_it_cannot_is_an_entry_and_so_is_its_failure():
    def refuses(model, directions, c):
        raise Cannot("its documentation says so")
        yield

    def breaks(model, directions, c):
        yield lambda x: x[5, 5, 5]

    assert {(cell.says, cell.evidence) for cell in row("a", peer(refuses)).values()} == {
        ("cannot", "its documentation says so")
    }
    assert {(cell.says, cell.evidence.partition(":")[0]) for cell in row("a", peer(breaks)).values()} == {
        ("fails", "IndexError")
    }


def test_a_model_is_as_it_was_after_its_twins_were_steered():
    own = timed._decoding(quick=True)
    before = own.model(own.x).logits
    cell = timed.tried(lambda: timed._eager(own, peer_of("actsteer"), repeats=2, quick=True))
    assert "ratios" in cell.numbers
    assert own.model(own.x).logits.equal(before)


# --- the environments --------------------------------------------------------------------------------------------
def test_every_peer_has_an_environment_of_exact_versions():
    for name in PEERS:
        requirements = environments.ENVIRONMENTS[environments.environment_of(name)]
        assert all(requirement.count("==") == 1 for requirement in requirements)
        if name not in ("by hand", "actsteer"):
            assert any(requirement.startswith(f"{package(name)}==") for requirement in requirements)


def package(name):
    return name.replace("TransformerLens", "transformer-lens")


def test_an_environment_is_made_once_for_the_same_requirements(monkeypatch, tmp_path):
    made = []

    def make(requirements, home):
        made.append(requirements)
        home.mkdir()

    monkeypatch.setenv("ACTSTEER_PEERS", str(tmp_path))
    monkeypatch.setattr(environments, "_make", make)
    first = environments.python_of("transformers-5")
    assert environments.python_of("transformers-5") == first and len(made) == 1
    assert first.parents[2] == tmp_path
    monkeypatch.setitem(environments.ENVIRONMENTS, "transformers-5", ("torch==2.13.0",))
    assert environments.python_of("transformers-5") != first and made[1] == ("torch==2.13.0",)


def test_an_environment_that_could_not_be_made_is_not_there(monkeypatch, tmp_path):
    def make(requirements, home):
        home.mkdir()
        raise RuntimeError("no network")

    monkeypatch.setenv("ACTSTEER_PEERS", str(tmp_path))
    monkeypatch.setattr(environments, "_make", make)
    with pytest.raises(RuntimeError, match="no network"):
        environments.python_of("transformers-5")
    assert list(tmp_path.iterdir()) == []


# --- the command -------------------------------------------------------------------------------------------------
def test_a_process_that_ends_otherwise_is_one_cell(tmp_path):
    ended = tmp_path / "ended"
    ended.write_text("#!/bin/sh\necho first >&2\necho the last line >&2\nexit 3\n")
    ended.chmod(0o755)
    result = in_process(ended, "nnsight", "a", repeats=2, quick=True)
    assert notes({"nnsight": result}) == ["nnsight, : the last line"]


@pytest.mark.slow
def test_the_command_prints_a_table_with_its_evidence_and_writes_both(tmp_path):
    app, out = typer.Typer(), tmp_path / "peers.json"
    app.command()(main)
    options = ["--here", "--quick", "--repeats", "2", "--rows", "a", "--peers", "by hand,actsteer", "--out", str(out)]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(out.read_text())
    assert written["command"] == "python -m benchmarks.peers --rows a --repeats 2 --quick --here"
    assert list(written["rows"]["a"]) == ["by hand", "actsteer"]
    for name, each in written["rows"]["a"].items():
        assert each["versions"]["torch"] == torch.__version__
        for cell in each["cells"].values():
            assert name in result.output and cell["says"] in result.output
