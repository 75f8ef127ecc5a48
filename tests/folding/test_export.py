"""What was folded leaves this process: checkpoints that transformers loads alone, exported programs, ONNX."""

import copy
import warnings

import onnxruntime
import pytest
import torch
import transformers
from torch import nn

from actsteer import Steerer, SteeringVector, UnsupportedModelError, fold, unfold
from tests.zoo import gpt2, llama

IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])


def direction(size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def reloaded(folded, folder):
    """What `from_pretrained` alone makes of what `save_pretrained` wrote, without a key too many or too few."""
    folded.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


# --- checkpoints -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("site", "flags"),
    [
        ("model.layers.1", (True, False)),
        ("model.layers.1.mlp", (True, False)),
        ("model.layers.0.self_attn:out.0", (False, True)),
        ("model.layers.1.input_layernorm", (False, True)),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_reloaded_as_it_was_folded(tmp_path, site, flags, tied):
    model, v = llama(tie_word_embeddings=tied).float(), SteeringVector({site: direction(16)})
    folded = fold(model, v, 2.0, verify_on=IDS)
    assert (folded.config.mlp_bias, folded.config.attention_bias) == flags
    assert not model.config.mlp_bias
    assert not model.config.attention_bias
    with Steerer(model, v, c=2.0):
        steered = logits(model)
    loaded = reloaded(folded, tmp_path)
    assert torch.equal(logits(loaded), logits(folded))
    assert torch.allclose(logits(loaded), steered, atol=1e-4)
    assert (logits(loaded) - logits(model)).abs().max() > 0.1
    with Steerer(model, v, c=2.0):
        tokens = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(IDS[:1], max_new_tokens=5, do_sample=False), tokens)


def test_sites_of_both_kinds_need_both_flags(tmp_path):
    model = llama().float()
    v = SteeringVector({"model.layers.1": direction(16), "model.layers.2.input_layernorm": direction(16, 2)})
    folded = fold(model, v, verify_on=IDS)
    assert folded.config.mlp_bias
    assert folded.config.attention_bias
    assert torch.equal(logits(reloaded(folded, tmp_path)), logits(folded))


@pytest.mark.parametrize(
    "site", ["transformer.h.0", "transformer.h.1.mlp", "transformer.h.0.attn:out.0", "transformer.ln_f"]
)
def test_gpt2_has_its_own_biases(tmp_path, site):
    model, v = gpt2().eval(), SteeringVector({site: direction(8)})
    folded = fold(model, v, verify_on=IDS) if site != "transformer.ln_f" else fold(model.float(), v, verify_on=IDS)
    assert list(folded.state_dict()) == list(model.state_dict())
    loaded = reloaded(folded.float(), tmp_path)
    with Steerer(model.float(), v):
        assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Phi3"])
def test_where_there_is_no_place_for_a_bias_it_says_so(tmp_path, kind):
    model, v = llama(kind=kind).float(), SteeringVector({"model.layers.1": direction(16)}, concept="calm")
    folded = fold(model, v, verify_on=IDS)
    with pytest.raises(
        UnsupportedModelError, match=r"has no place for the biases .*down_proj.bias.*v.save\('name.gguf'"
    ):
        folded.save_pretrained(tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
    v.save(tmp_path / "calm.gguf", model=model)  # as the error says
    again = copy.deepcopy(folded)
    with pytest.raises(UnsupportedModelError):
        again.save_pretrained(tmp_path / "folded")
    model.save_pretrained(tmp_path / "plain")
    fold(model, v, verify_on=IDS, inplace=True)
    with pytest.raises(UnsupportedModelError):
        model.save_pretrained(tmp_path / "folded")
    unfold(model)
    model.save_pretrained(tmp_path / "plain again")
    assert torch.equal(logits(reloaded(model, tmp_path / "plain again")), logits(model))


def test_unfolding_gives_the_config_back():
    model, v = llama().float(), SteeringVector({"model.layers.1": direction(16)})
    keys, before = list(model.state_dict()), logits(model)
    fold(model, v, verify_on=IDS, inplace=True)
    assert model.config.mlp_bias
    assert len(model.state_dict()) == len(keys) + 9
    unfold(model)
    assert not model.config.mlp_bias
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)


def test_an_ablation_needs_no_bias_at_all(tmp_path):
    from actsteer import Ablate

    model = llama(kind="Mistral", tie_word_embeddings=False).float()
    blocks = [f"model.layers.{n}" for n in range(3)]
    writers = ["model.embed_tokens", *(f"{b}.{w}" for b in blocks for w in ("self_attn.o_proj", "mlp.down_proj"))]
    v = SteeringVector(dict.fromkeys(writers, direction(16)))
    folded = fold(model, v, verify_on=IDS, intervention=Ablate())
    with Steerer(model, v, intervention=Ablate()):
        assert torch.allclose(logits(reloaded(folded, tmp_path)), logits(model), atol=1e-4)


# --- torch.export and ONNX ---------------------------------------------------------------------------------------
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


X, V = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)), SteeringVector({"1": direction(8)})


def onnx(model, path):
    """The model's output as onnxruntime gives it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(model, (X,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


@pytest.fixture
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch's own, before 2.13
@pytest.mark.parametrize("backend", ["buffer", "auto", "tap"])
def test_an_exported_program_keeps_the_steering(tmp_path, backend):
    model = mlp()
    steerer = Steerer(model, V, c=2.0, backend=backend)
    with steerer:
        steered = model(X).detach()
        program = torch.export.export(model, (X,))
        steerer.c = 3.0
        more = onnx(model, tmp_path / "m.onnx")
        expected = model(X).detach()
    plain = model(X).detach()
    assert torch.allclose(program.module()(X), steered, atol=1e-6)
    torch.export.save(program, tmp_path / "m.pt2")
    assert torch.allclose(torch.export.load(tmp_path / "m.pt2").module()(X), steered, atol=1e-6)
    assert torch.allclose(more, expected, atol=1e-5)
    assert (steered - plain).abs().max() > 0.1
    assert (expected - steered).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # that an edit ran
@pytest.mark.parametrize("strict", [True, False])
def test_interventions_and_gates_are_exported_from_a_buffer(strict):
    from actsteer import Ablate, ProjectionAbove

    model = mlp()
    for options in ({"intervention": Ablate()}, {"gate": ProjectionAbove(V, 0.1)}):
        with Steerer(model, V, backend="buffer", **options):
            steered = model(X).detach()
            program = torch.export.export(model, (X,), strict=strict)
        assert torch.allclose(program.module()(X), steered, atol=1e-6)
        assert not torch.allclose(model(X), steered)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
def test_a_folded_model_is_exported_like_any_other(tmp_path):
    model = mlp()
    folded = fold(model, V, 2.0, verify_on=X)
    with Steerer(model, V, c=2.0):
        steered = model(X).detach()
    assert torch.allclose(torch.export.export(folded, (X,)).module()(X), steered, atol=1e-6)
    assert torch.allclose(onnx(folded, tmp_path / "m.onnx"), steered, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
def test_the_fold_backend_is_in_an_onnx_file_made_inside_the_block(tmp_path):
    model, v = mlp(), SteeringVector({"2": direction(3)})
    with Steerer(model, v, backend="fold"):
        steered = model(X).detach()
        given = onnx(model, tmp_path / "m.onnx")
    assert torch.allclose(given, steered, atol=1e-5)
    assert not torch.allclose(model(X), steered)
