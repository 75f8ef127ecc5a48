"""The fingerprint: the same for the same model however it is loaded or wrapped, another for another."""

import copy
import json

import pytest
import torch
from torch import nn

from actsteer import ModelMismatchError, SiteNotFoundError, Steerer, SteeringVector, VectorBank
from actsteer.sites.fingerprint import check, described, fingerprint, weights
from tests.zoo import gpt2, llama


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


HEADS = {
    "another head": lambda: with_head("LlamaForSequenceClassification"),
    "a longer vocabulary": lambda: resized(llama(), 41),
    "a shorter vocabulary": lambda: resized(llama(), 5),
    "another vocabulary": lambda: llama(vocab_size=50),
    "tied to the head": lambda: llama(tie_word_embeddings=True),
    "both": lambda: resized(with_head("LlamaForTokenClassification"), 41),
}
BODIES = {
    "fewer blocks": lambda: llama(num_hidden_layers=2),
    "wider": lambda: llama(hidden_size=32),
    "another family": lambda: llama(kind="Mistral", sliding_window=None),
    "not by Hugging Face": small,
}


def with_head(kind):
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind)(llama().config).eval()


def resized(model, size):
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def saved(tmp_path):
    """A vector of a Llama, from a file."""
    v = SteeringVector({"model.layers.1": torch.ones(16)}, concept="c")
    v.save(tmp_path / "v.safetensors", model=llama())
    return tmp_path / "v.safetensors"


@pytest.mark.parametrize("other", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("when", ["load", "attach"])
def test_another_head_and_another_vocabulary_warn(tmp_path, other, when):
    path, model = saved(tmp_path), other()
    v = SteeringVector.load(path)
    with pytest.warns(UserWarning, match="the vector 'c' was made for a LlamaForCausalLM .* only the head or the voc"):
        _ = SteeringVector.load(path, model) if when == "load" else Steerer(model, v)


@pytest.mark.parametrize("other", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("when", ["load", "attach"])
def test_another_body_raises(tmp_path, other, when):
    path, model = saved(tmp_path), other()
    with pytest.raises((ModelMismatchError, SiteNotFoundError)):
        _ = SteeringVector.load(path, model) if when == "load" else Steerer(model, SteeringVector.load(path))


def test_of_a_file_that_does_not_tell_the_body_another_head_raises():
    made_for = {key: text for key, text in described(llama()).items() if key != "body"}
    with pytest.raises(ModelMismatchError):
        check(resized(llama(), 41), made_for, what="it")


def test_models_of_other_kinds_have_no_body():
    assert "body" not in described(small())
    assert described(gpt2())["body"].startswith("GPT2Model:")


def test_the_head_of_an_encoder_and_decoder_is_no_part_of_its_body():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    before = described(model)
    with pytest.warns(UserWarning, match="only the head or the vocabulary differ"):
        check(resized(model, 20), before, what="it")


@pytest.mark.parametrize("write", ["gguf", "svec"])
def test_another_type_warns_when_it_is_loaded_and_when_it_is_attached(tmp_path, write):
    """Where a file tells the model's type alone."""
    path, model = tmp_path / f"v.{write}", llama()
    if write == "gguf":
        SteeringVector({"model.layers.1": torch.ones(16)}, metadata={"model_type": "mistral"}).save(path)
    else:
        path.write_text(json.dumps({"model_type": "mistral", "directions": {"1": [1.0] * 16}}))
    match = "the vector 'v.*' was made for a mistral, the model is a llama"
    with pytest.warns(UserWarning, match=match):
        SteeringVector.load(path, model)
    v = SteeringVector.load(path)
    with pytest.warns(UserWarning, match=match):
        Steerer(model, v)
    with pytest.warns(UserWarning, match=match):
        Steerer(model, VectorBank.load(path))
    Steerer(llama(kind="Mistral", sliding_window=None), v)  # without one


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
