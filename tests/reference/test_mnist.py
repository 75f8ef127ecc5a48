"""The MNIST reference, end to end on a budget that learns little, and the pieces that its numbers rest on."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import reference.mnist
import reference.zoo
from actsteer import record
from reference.mnist import __main__ as command
from reference.mnist import data, multi, suite
from reference.mnist.data import DataMissingError, Split, load
from reference.mnist.model import SITES, mlp, train_classifier
from reference.mnist.sample import SIZES, stratified
from reference.mnist.scores import Judge, balance, summarize
from reference.mnist.self import probed
from reference.mnist.study import Budget, Edit, Study, steered
from reference.mnist.suite import SIGMAS, Task, tasks_for

FILES = [file for own in (reference.mnist, reference.zoo) for file in sorted(Path(own.__file__).parent.glob("*.py"))]
TINY = Budget(epochs=1, steps=20, last_site_steps=20, stage_steps=10, stages=1)


class Always(nn.Module):
    """A model that reads one digit in everything."""

    def __init__(self, digit: int) -> None:
        super().__init__()
        self.digit = digit

    def forward(self, x):
        return nn.functional.one_hot(torch.full((len(x),), self.digit), 10).float()


# --- the command -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every file that `python -m reference.mnist --seeds 2` writes, on the tiny budget and in this process."""
    out = tmp_path_factory.mktemp("mnist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suite.BUDGETS, "bundled", TINY)
        ran = CliRunner().invoke(app(), ["all", "--seeds", "2", "--jobs", "1", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    return out, ran.output


def app():
    import typer

    made = typer.Typer()
    made.command()(command.main)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["cross", "self", "multi"])
def test_the_json_holds_every_score_over_seeds(results, experiment):
    document = json.loads((results[0] / f"{experiment}.json").read_text())
    assert document["experiment"] == experiment and document["data"] == "bundled" and document["seeds"] == [0, 1]
    assert {"torch", "actsteer", "python"} <= document["versions"].keys()
    assert document["unsteered"]["retained"]["values"] == [1.0, 1.0]
    for scores in (document["unsteered"], *document["methods"].values()):
        for score in (scores["overall"], scores["retained"], scores["acquired"], *scores["acquired_by_digit"].values()):
            assert score["mean"] == pytest.approx(np.mean(score["values"]))
            assert score["std"] == pytest.approx(np.std(score["values"], ddof=1))


@pytest.mark.slow
def test_noise_reports_every_sigma_and_shares_sigma_zero_with_self(results):
    noise, alone = (json.loads((results[0] / f"{name}.json").read_text()) for name in ("noise", "self"))
    assert list(noise["sigma"]) == [str(sigma) for sigma in SIGMAS]
    assert noise["sigma"]["0.0"]["methods"] == alone["methods"]
    assert noise["sigma"]["0.5"]["methods"].keys() == alone["methods"].keys()
    assert noise["sigma"]["0.5"]["unsteered"] != alone["unsteered"]


@pytest.mark.slow
def test_the_report_is_self_contained_and_shows_every_figure_and_table(results):
    out, _ = results
    report = (out / "report.html").read_text()
    figures = list(out.glob("*.png"))
    assert len(figures) >= 2 * 16 and report.count("data:image/png;base64,") == len(figures)
    assert not re.findall(r'(?:src|srcset|href)="(?!data:)', report)
    assert report.count("<table>") == 4 and "{" not in re.sub(r"<style>.*</style>", "", report, flags=re.S)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["cross", "self", "multi", "noise"])
def test_every_method_of_the_results_has_a_line_in_the_report(results, experiment):
    out, _ = results
    document = json.loads((out / f"{experiment}.json").read_text())
    methods = document["sigma"]["0.5"]["methods"] if experiment == "noise" else document["methods"]
    section = (out / "report.html").read_text().split("<h2>")[1 + suite.EXPERIMENTS.index(experiment)]
    described = re.findall(r"<li><b>(.*?)</b>: \S", section)
    assert len(methods) > 5 and {"unsteered", *methods} <= set(described)


@pytest.mark.slow
def test_the_command_prints_a_table_per_experiment(results):
    assert all(f"{number}. " in results[1] for number in (1, 2, 3, 4)) and "gated_gradient" in results[1]


def test_full_data_that_are_not_there_are_a_clear_error(tmp_path):
    ran = CliRunner().invoke(app(), ["self", "--data", "full"])
    assert ran.exit_code == 2 and "--data-root" in ran.output
    with pytest.raises(DataMissingError, match="needs --data-root DIR"):
        load("full")


def test_data_that_cannot_be_downloaded_are_a_clear_error(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST", offline)
    with pytest.raises(DataMissingError, match=r"no MNIST in .*\(no network\); .* --data bundled"):
        load("full", tmp_path)


def test_a_missing_sample_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAMPLE", tmp_path / "none.npz")
    with pytest.raises(DataMissingError, match=r"none.npz is missing; make it with `python -m reference.mnist.sample"):
        data.load.__wrapped__("bundled")


def test_a_task_runs_once_even_if_two_experiments_need_it():
    assert tasks_for(["self", "noise"], [0]) == [
        Task("self", 0),
        *(Task("noise", 0, sigma) for sigma in SIGMAS if sigma),
    ]


# --- data ------------------------------------------------------------------------------------------------------------
def test_the_bundled_sample_is_stratified_and_split_without_overlap():
    data = load("bundled")
    assert len(data.train.y) + len(data.held_out.y) == SIZES["train"] and len(data.test.y) == SIZES["test"]
    assert data.train.x.shape[1] == 784
    for split in (data.train, data.held_out, data.test):
        shares = torch.bincount(split.y, minlength=10) / len(split.y)
        assert bool(((shares > 0.08) & (shares < 0.125)).all())
    seen = {row.numpy().tobytes() for row in data.train.x}
    assert sum(row.numpy().tobytes() in seen for row in data.held_out.x) == 0


def test_stratified_takes_each_class_with_its_share():
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10, dtype=np.uint8)
    chosen = stratified(labels, 25)
    assert np.bincount(labels[chosen]).tolist() in ([15, 8, 2], [15, 7, 3])
    assert len(set(chosen.tolist())) == 25 and np.all(np.diff(chosen) > 0)


# --- model and scores ------------------------------------------------------------------------------------------------
def test_the_network_is_the_published_one():
    assert sum(parameter.numel() for parameter in mlp().parameters()) == 110_210


def test_training_is_reproducible_and_leaves_the_global_generator_alone():
    data = load("bundled").test
    small = Split(data.x[:256], data.y[:256])
    state = torch.get_rng_state()
    one, again, other = (train_classifier(small, seed=seed, epochs=1, sigma=0.2) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one[0].weight, other[0].weight)


def test_the_scores_of_a_model_that_always_reads_one_digit():
    split = Split(torch.zeros(4, 784), torch.tensor([3, 3, 3, 9]))
    judge = Judge(Always(3), split, new=[9])
    assert judge(Always(3)) == {"overall": 0.75, "retained": 1.0, "acquired": 0.0, "acquired_by_digit": {"9": 0.0}}
    assert judge(Always(9)) == {"overall": 0.25, "retained": 0.0, "acquired": 1.0, "acquired_by_digit": {"9": 1.0}}
    assert balance(judge(Always(3))) == balance(judge(Always(9))) == 0.0


def test_the_summary_of_one_seed_has_no_spread():
    scores = {"overall": 0.5, "retained": 1.0, "acquired": 0.0, "acquired_by_digit": {"9": 0.0}}
    assert summarize([scores])["overall"] == {"mean": 0.5, "std": 0.0, "values": [0.5]}


# --- steering --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_each_digit_is_added_where_its_nine_probes_fire():
    sample = load("bundled")
    model = train_classifier(sample.train.of(*range(8)), seed=0, epochs=1)
    edit = multi._bank_of(probed, Study(model, sample, (8, 9), 0, TINY))
    assert list(edit.gate) == list(edit.c) == ["eight", "nine"]
    x = sample.test.x[:500]
    site, added = SITES[-1], torch.zeros(500, 1)
    for concept, gate in edit.gate.items():
        assert len(gate.gates) == 9
        rows = record(model, x, sites=gate.gates[0].site, progress=False)[gate.gates[0].site]
        fires = torch.stack([probe(rows) for probe in gate.gates]).all(dim=0)
        assert 0 < fires.sum() < 500
        added = added + fires[:, None] * edit.vectors[concept][site]
    with torch.no_grad(), steered(model, [edit]):
        found = model(x)
    handle = model.get_submodule(site).register_forward_hook(lambda module, args, output: output + added)
    with torch.no_grad():
        expected = model(x)
    handle.remove()
    torch.testing.assert_close(found, expected)


def test_the_weights_are_never_touched():
    data = load("bundled")
    model = train_classifier(data.train.of(*range(9)), seed=0, epochs=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    study = Study(model, data, (9,), 0, TINY)
    edits = study.cascade(data.train, on=[Edit(study.trained(data.train))], stages=1)
    with steered(model, edits):
        assert study.held_out(model) != study.held_out(Always(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert study.held_out(model)["retained"] == 1.0


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_reference_uses_public_names_alone_and_hooks_nothing_itself(path):
    tree = ast.parse(path.read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    assert not [module for module in imported if module.startswith("actsteer.")]
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [name for name in attributes if "hook" in name]
