"""The fingerprint: the same for the same model however it is loaded or wrapped, another for another."""

import copy

import pytest
import torch
from torch import nn

from actsteer.sites.fingerprint import check, described, fingerprint, weights
from tests.zoo import llama


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 40), nn.BatchNorm1d(40), nn.Linear(40, 2))


def agree(one, other):
    """Whether two hashes of weights agree in the widest dtype that both know."""
    known, own = (dict(part.split(":") for part in text.split()) for text in (one, other))
    shared = [name for name in known if name in own]
    assert shared
    return known[shared[0]] == own[shared[0]]


def test_the_same_weights_agree_in_every_dtype():
    model = small().double()
    versions = [copy.deepcopy(model).float().to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert all(agree(weights(versions[0]), weights(version)) for version in versions)
    assert agree(weights(versions[1]), weights(copy.deepcopy(versions[1]).float()))
    assert set(weights(versions[1]).split()) <= set(weights(versions[0]).split())


def test_one_step_of_training_is_noticed():
    model = small()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert not agree(before, weights(model))


@pytest.mark.parametrize("name", ["0.weight", "1.bias", "2.bias"])
def test_a_change_of_any_one_parameter_is_noticed(name):
    model, other = small(), small()
    other.get_parameter(name).data += 0.5
    assert not agree(weights(model), weights(other))


def test_wrappers_shared_and_frozen_parameters_do_not_matter():
    model = small()
    assert described(torch.compile(model)) == described(model)
    assert described(copy.deepcopy(model).requires_grad_(False)) == described(model)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert fingerprint(tied).split(":")[1] == "15"


@pytest.mark.parametrize(
    "model", [nn.Sequential(), nn.Sequential(nn.ReLU()), small().to("meta"), nn.Sequential(nn.LazyLinear(3))]
)
def test_weights_that_cannot_be_known_are_not_compared(model):
    assert weights(model) is None


def test_half_precisions_of_different_kinds_are_not_compared():
    half, brain = small().half(), small().bfloat16()
    check(half, described(brain), what="it")  # no warning
    mixed = small().half()
    mixed[0].bfloat16()
    assert weights(mixed) is None


def test_a_hugging_face_model_has_a_type():
    assert described(llama())["model_type"] == "llama"
    assert "model_type" not in described(small())


@pytest.mark.parametrize("meant", [{}, {"model": "m"}, {"model": "A net of mine"}, {"model": "Sequential:1:xyz"}])
def test_what_is_no_fingerprint_is_not_checked(meant):
    check(small(), meant, what="it")


def test_of_a_quantised_model_only_the_class_is_compared():
    model = small()
    packed = nn.Sequential(nn.Linear(3, 3))
    packed.is_quantized = True
    check(packed, described(model), what="it")
