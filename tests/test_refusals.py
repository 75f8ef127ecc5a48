"""What is not what it should be is refused when it is given, with what was expected and what to do."""

import numpy as np
import pytest
import torch
from torch import nn

from actsteer import (
    Ablate,
    Add,
    Affine,
    And,
    Chain,
    Clamp,
    CosineAbove,
    KeepNorm,
    LowRank,
    MeanDifference,
    Not,
    ProbeAbove,
    ProjectionAbove,
    Replace,
    Soft,
    Steerer,
    Steering,
    SteeringVector,
    StrengthError,
    VectorBank,
    collect,
    find_sites,
    fit,
    optimize,
    record,
    sweep,
)
from actsteer.integrations.transformers import fit_pairs, text_batches
from tests.oracles import state

MODEL = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
X = torch.linspace(-1, 1, 12).reshape(6, 2)
V = SteeringVector({"1": torch.ones(4)}, concept="a")
BANK = VectorBank({"a": V})
STATS = collect(MODEL, X, sites="1", progress=False)
ARRAY = np.ones(4)


class Tokenizer:
    def __call__(self, text):
        return {"input_ids": [1]}


def run(**options):
    return Steerer(MODEL, V, **options)


def set_strength():
    run().strength = 2


REFUSED = {
    "an intervention as a string": (lambda: run(intervention="ablate"), TypeError, "one such as Add.*got 'ablate'"),
    "an intervention as a class": (lambda: run(intervention=Add), TypeError, "got the class Add; call it first"),
    "one of a bank": (lambda: Steerer(MODEL, BANK, intervention={"a": Add}), TypeError, "of 'a': .*class Add; call"),
    "in KeepNorm": (lambda: KeepNorm(Add), TypeError, "got the class Add; call it first"),
    "in Chain": (lambda: Chain(Add(), "add"), TypeError, "one such as Add.*got 'add'"),
    "a gate as a string": (lambda: run(gate="cosine"), TypeError, "one such as ProjectionAbove.* got str"),
    "a gate as a class": (lambda: run(gate=CosineAbove), TypeError, "got the class CosineAbove; call it first"),
    "a gate as a vector": (lambda: run(gate=V), TypeError, "got SteeringVector, which has no site"),
    "in And": (lambda: And(ProjectionAbove(V, 0.0), CosineAbove), TypeError, "class CosineAbove; call it first"),
    "in Not": (lambda: Not("gate"), TypeError, "got str"),
    "in Soft": (lambda: Soft(CosineAbove), TypeError, "got the class CosineAbove; call it first"),
    "an estimator as a string": (
        lambda: fit(MODEL, positive=X, negative=-X, sites="1", estimator="mean"),
        TypeError,
        "an object with `reads`.* got str",
    ),
    "an estimator as a class": (
        lambda: fit(MODEL, positive=X, negative=-X, sites="1", estimator=MeanDifference),
        TypeError,
        "got the class MeanDifference; call it first",
    ),
    "tensors for an estimator": (
        lambda: MeanDifference()(positive=X, negative=STATS),
        TypeError,
        "positive: expected Statistics.* got Tensor; see fit",
    ),
    "sites as a number": (lambda: find_sites(MODEL, 1), TypeError, "sites: expected names.* got 1; .*called '1'"),
    "in collect": (lambda: collect(MODEL, X, sites=1), TypeError, "sites: expected names"),
    "in a Steerer": (lambda: run(sites=1), TypeError, "sites: expected names"),
    "c as a list": (lambda: run(c=[1, 2]), StrengthError, r"got \[1, 2\]; torch.tensor of it is one .* sweep\("),
    "c as an array": (lambda: run(c=ARRAY), StrengthError, "torch.tensor of it is one strength per row"),
    "c as a string": (lambda: run(c="2"), StrengthError, "got '2'\n"),
    "several c as one": (lambda: sweep(MODEL, V, c=2, evaluate=len), StrengthError, r"as in c=\[0, 1, 2\], got 2"),
    "a direction as an array": (lambda: SteeringVector({"1": ARRAY}), TypeError, "got ndarray; torch.as_tensor makes"),
    "a direction without a site": (lambda: SteeringVector(torch.ones(4)), TypeError, "mapping site -> direction"),
    "a bank as a list": (lambda: VectorBank([V]), TypeError, "mapping concept -> SteeringVector, got list"),
    "values as an array": (lambda: Replace({"1": ARRAY}), TypeError, "got ndarray; give torch.as_tensor"),
    "a map as an array": (lambda: Affine({"1": (ARRAY, ARRAY)}), TypeError, "W and b, got ndarray and ndarray"),
    "positions as an array": (lambda: run(positions=ARRAY > 0), TypeError, "got ndarray; give torch.as_tensor"),
    "positions in record": (lambda: record(MODEL, X, sites="1", positions=ARRAY), TypeError, "got ndarray"),
    "a flag as a string": (lambda: Add(relative="no"), TypeError, "relative: expected True or False, got 'no'"),
    "a flag as a number": (lambda: Ablate(one_sided=1), TypeError, "one_sided: expected True or False, got 1"),
    "a probability twice": (
        lambda: ProbeAbove(V, offset=0.0, probability=0.5, threshold=0.0),
        ValueError,
        "a threshold says the same, and both were given",
    ),
    "a path in the place of a steering": (lambda: Steering("s.safetensors"), TypeError, r"or Steering.load\(path\)"),
    "a target as a string": (lambda: Clamp("3"), TypeError, "target: expected a number, got '3'"),
    "an axis as a string": (lambda: run(axis="1"), TypeError, "axis: expected an int or a mapping.* got '1'"),
    "model and vectors swapped": (lambda: Steerer(V, MODEL), TypeError, r"are swapped: Steerer\(model, vectors\)"),
    "model and tokenizer swapped": (
        lambda: fit_pairs(Tokenizer(), MODEL, [("a", "b")], sites="1"),
        TypeError,
        r"are swapped: fit_pairs\(model, tokenizer, pairs\)",
    ),
    "a model for a tokenizer": (lambda: text_batches(MODEL, ["a"]), TypeError, "expected a tokenizer, got the model"),
    "a loss as a string": (
        lambda: optimize(MODEL, X, sites="1", loss="mse"),
        TypeError,
        "loss: expected a function of the output.* got 'mse'",
    ),
    "an edit as a class": (
        lambda: optimize(MODEL, X, sites="1", loss=torch.mean, train=LowRank),
        TypeError,
        r"an edit such as LowRank\(rank=4\), got",
    ),
    "strength for c": (set_strength, AttributeError, "did you mean c"),
}


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_when_it_is_given_and_the_model_is_as_it_was(given, error, message):
    before = state(MODEL)
    with pytest.raises(error, match=message):
        given()
    assert state(MODEL) == before


@pytest.mark.parametrize("c", [np.float32(2.0), np.int64(2), True])
def test_a_number_of_numpys_is_a_number(c):
    with Steerer(MODEL, V, c=c) as one:
        steered = MODEL(X)
    one.c = float(c)
    with one:
        assert torch.equal(MODEL(X), steered)


SAVES = {
    "a vector": lambda path: V.save(path / "v.safetensors"),
    "a bank": lambda path: BANK.save(path / "v.safetensors"),
    "a control vector": lambda path: SteeringVector({"model.layers.3": torch.ones(4)}).save(path / "v.gguf"),
    "statistics": lambda path: STATS.save(path / "v.safetensors"),
    "a checkpoint": lambda path: collect(MODEL, X, sites="1", checkpoint=path / "v.safetensors", progress=False),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_folder_that_is_missing_is_named_and_no_temporary_file(save, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'missing'}; make it first") as error:
        save(tmp_path / "missing")
    assert ".actsteer" not in str(error.value)


def test_a_missing_folder_for_a_checkpoint_is_named_before_the_model_runs(tmp_path):
    ran = []
    model = nn.Sequential(nn.Identity())
    model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        collect(model, X, sites="0", checkpoint=tmp_path / "missing" / "v.safetensors", progress=False)
    assert not ran
