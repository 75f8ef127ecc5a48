"""A head that shares its weights with the embedding gets its own, and a direction leaves the whole residual stream."""

import copy

import pytest
import torch
import transformers
from torch import nn

from actsteer import (
    Ablate,
    NotFoldable,
    Steerer,
    SteeringVector,
    UnsupportedModelError,
    fold,
    record,
    residual_sites,
    residual_writers,
    unfold,
)
from actsteer.sites.fingerprint import described
from reference.language.model import INSTALL, load, packaged
from tests.folding.test_export import IDS, logits, reloaded
from tests.folding.test_fold import direction
from tests.zoo import gpt2, llama

TIED = {
    "llama": lambda: llama(tie_word_embeddings=True).float(),
    "gpt2": lambda: gpt2().float(),
    "qwen2": lambda: llama(kind="Qwen2", tie_word_embeddings=True).float(),
}


@pytest.fixture(params=TIED)
def model(request):
    return TIED[request.param]()


def everywhere(model, sites=None):
    """One direction at what writes to the residual stream."""
    d = model.get_input_embeddings().embedding_dim
    return SteeringVector(dict.fromkeys(residual_writers(model) if sites is None else sites, direction(d)))


def ablated(model, **options):
    return fold(model, everywhere(model), 1.0, intervention=Ablate(), verify_on=IDS, untie=True, **options)


def state_of(model):
    """All that a fold could change, the names of a tensor that has several together."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    numbers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return sorted(names.values()), numbers, model.config.to_dict(), dict(model.all_tied_weights_keys)


def is_as(model, before):
    ties, numbers, *said = state_of(model)
    return [ties, *said] == [before[0], *before[2:]] and all(torch.equal(numbers[n], t) for n, t in before[1].items())


def test_an_edit_of_the_embedding_and_one_of_the_head_go_into_weights_of_their_own():
    model = TIED["llama"]()
    size = model.config.vocab_size
    vectors = SteeringVector({"model.embed_tokens": direction(16), "lm_head": direction(size, seed=2)})
    folded = fold(model, vectors, 1.0, intervention=Ablate(), verify_on=IDS, untie=True)
    with Steerer(model, vectors, intervention=Ablate()):
        assert torch.allclose(logits(folded), logits(model), atol=1e-4)
    embedded, given = folded.model.embed_tokens(IDS), logits(folded)
    assert (embedded @ vectors["model.embed_tokens"]).abs().max() < 1e-4
    assert (given @ vectors["lm_head"]).abs().max() < 1e-3


# --- the recipe --------------------------------------------------------------------------------------------------
def states(model):
    """Every state of the residual stream: before the first block, between attention and MLP, behind the blocks."""
    norm = "ln_2" if hasattr(model, "transformer") else "post_attention_layernorm"
    blocks = residual_sites(model)
    return [f"{blocks[0]}:in", *blocks, *(f"{block}.{norm}:in" for block in blocks)]


def test_a_direction_leaves_the_whole_residual_stream(model, tmp_path):
    v, plain = everywhere(model), logits(model)
    folded = fold(
        model, v, 1.0, intervention=Ablate(), sites=residual_writers(model), untie=True, verify_on={"input_ids": IDS}
    )
    along = direction(model.get_input_embeddings().embedding_dim)
    rows = {name: record(own, [IDS], sites=states(own), progress=False) for name, own in (("f", folded), ("m", model))}
    for site in states(model):
        assert (rows["f"][site] @ along).abs().max() < 1e-4 < 1e-2 < (rows["m"][site] @ along).abs().max()
    with Steerer(model, v, intervention=Ablate()):
        steered = logits(model)
    assert torch.allclose(logits(folded), steered, atol=1e-4) and not torch.allclose(plain, steered, atol=1e-2)
    assert not folded.config.tie_word_embeddings and model.config.tie_word_embeddings
    again = reloaded(folded, tmp_path)
    assert torch.equal(logits(again), logits(folded))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(again.get_input_embeddings().weight, model.lm_head.weight)
    again.tie_weights()
    folded.tie_weights()
    assert torch.equal(logits(again), logits(folded)) and torch.allclose(logits(folded), steered, atol=1e-4)


def test_an_edit_that_adds_goes_into_the_embedding_too(model):
    v = everywhere(model, [f"{residual_sites(model, 0)[0]}:in"])
    folded = fold(model, v, 0.5, verify_on=IDS, untie=True)
    with Steerer(model, v, c=0.5):
        assert torch.allclose(logits(folded), logits(model), atol=1e-4)


def test_the_head_itself_is_written_to():
    model = llama(tie_word_embeddings=True).float()
    v = SteeringVector({"model.norm": direction(16)})
    folded = fold(model, v, intervention=Ablate(), verify_on=IDS, untie=True)
    assert torch.equal(folded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    with Steerer(model, v, intervention=Ablate()):
        assert torch.allclose(logits(folded), logits(model), atol=1e-4)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(packaged() is None, reason=INSTALL)
def test_a_direction_leaves_the_residual_stream_of_a_real_model(tmp_path):
    model, tokenizer = load()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    fitted = record(model, [ids], sites=["model.layers.14"], progress=False)["model.layers.14"].mean(dim=0)
    writers = residual_writers(model)
    v = SteeringVector(dict.fromkeys(writers, fitted))
    folded = fold(model, v, 1.0, intervention=Ablate(), sites=writers, untie=True, verify_on=ids)
    along = fitted / fitted.norm()
    for site, rows in record(folded, [ids], sites=states(folded), progress=False).items():
        assert (rows @ along).abs().max() < 1e-4 * rows.norm(dim=-1).max(), site
    with Steerer(model, v, intervention=Ablate()):
        steered = logits(model, ids)
    assert torch.allclose(logits(folded, ids), steered, atol=1e-2) and not torch.allclose(logits(model, ids), steered)
    assert torch.equal(logits(reloaded(folded, tmp_path), ids), logits(folded, ids))


# --- only what stands in the way is parted -----------------------------------------------------------------------
def test_a_tie_that_is_not_in_the_way_stays(model):
    v = everywhere(model, residual_writers(model, slice(None)))
    folded = fold(model, v, 1.0, intervention=Ablate(), verify_on=IDS, untie=True)
    assert folded.lm_head.weight is folded.get_input_embeddings().weight and folded.config.tie_word_embeddings


def test_without_it_the_refusal_says_so(model):
    before = state_of(model)
    with pytest.raises(NotFoldable, match=r"are tied to lm_head.weight; with untie=True lm_head would get weights of"):
        fold(model, everywhere(model), intervention=Ablate(), verify_on=IDS, inplace=True)
    assert is_as(model, before)


# --- and back ----------------------------------------------------------------------------------------------------
def test_unfolding_ties_them_again_bit_for_bit(model):
    before, plain = state_of(model), logits(model)
    for _ in range(2):
        ablated(model, inplace=True)
        assert model.lm_head.weight is not model.get_input_embeddings().weight
        assert not model.config.tie_word_embeddings and not model.all_tied_weights_keys
        unfold(model)
        assert is_as(model, before) and torch.equal(logits(model), plain)


def test_an_error_on_the_way_leaves_the_model_as_it_was(model, monkeypatch):
    before, plain = state_of(model), logits(model)
    answers = iter([None, "the outputs differ"])
    monkeypatch.setattr("actsteer.folding.proof.Proof.failure", lambda *_: next(answers))
    with pytest.raises(NotFoldable, match="with what its config asks for now, the outputs differ"):
        ablated(model, inplace=True)
    assert is_as(model, before) and torch.equal(logits(model), plain)


def test_a_head_that_was_trained_since_is_not_tied_again():
    model = TIED["llama"]()
    ablated(model, inplace=True)
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(NotFoldable, match=r"lm_head\.weight was changed or replaced after the fold"):
        unfold(model)


def test_two_folds_are_undone_one_by_one():
    model = TIED["gpt2"]()
    plain = state_of(model)
    ablated(model, inplace=True)
    once = state_of(model)
    v = SteeringVector({"transformer.h.0:in": direction(8, seed=2)})
    fold(model, v, verify_on=IDS, inplace=True)  # they are not tied any more
    for before in (once, plain):
        unfold(model)
        assert is_as(model, before)


# --- any torch model ---------------------------------------------------------------------------------------------
class Tied(nn.Module):
    """Embeddings and heads that share one weight, in the order given."""

    def __init__(self, *names):
        super().__init__()
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(9, 4))
        for name in names:
            part = nn.Embedding(9, 4) if name.startswith("embed") else nn.Linear(4, 9, bias=False)
            part.weight = weight
            self.add_module(name, part)
        self.middle = nn.Linear(4, 4)

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(h + torch.tanh(self.middle(h)))


TOKENS = torch.tensor([[1, 2, 3], [5, 0, 8]])
AT = SteeringVector({"embed": direction(4)})


@pytest.mark.parametrize("names", [("embed", "head"), ("head", "embed"), ("embed", "head", "head_2")])
def test_any_torch_model_with_one_parameter_in_an_embedding_and_in_heads(names):
    model = Tied(*names)
    before, plain = copy.deepcopy(model.state_dict()), model(TOKENS)
    folded = fold(model, AT, intervention=Ablate(), verify_on=TOKENS, untie=True)
    with Steerer(model, AT, intervention=Ablate()):
        assert torch.allclose(folded(TOKENS), model(TOKENS), atol=1e-5)
    assert model.head.weight is model.embed.weight and torch.equal(folded.head.weight, model.head.weight)
    assert all(getattr(folded, name).weight is folded.head.weight for name in names[2:])
    assert folded.head.weight.requires_grad and isinstance(folded.head.weight, nn.Parameter)
    fold(model, AT, intervention=Ablate(), verify_on=TOKENS, untie=True, inplace=True)
    unfold(model)
    assert model.head.weight is model.embed.weight and torch.equal(model(TOKENS), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def other_tensor():
    model = Tied("embed", "head")
    model.head.weight = nn.Parameter(model.embed.weight.data)
    return model


def elsewhere():
    model = Tied("embed", "head")
    model.register_parameter("table", model.embed.weight)
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: Tied("embed", "embed_2", "head"), r"are tied to embed_2.weight, and untie=True parts embeddings from"),
        (other_tensor, r"are tied to head.weight;"),
        (elsewhere, r"are tied to table;"),
    ],
)
def test_other_ties_are_refused(model, why):
    model = model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotFoldable, match=why):
        fold(model, AT, intervention=Ablate(), verify_on=TOKENS, untie=True, inplace=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- an encoder and a decoder ------------------------------------------------------------------------------------
def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()


BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}


def test_embeddings_of_an_encoder_and_a_decoder_stay_tied():
    with pytest.raises(NotFoldable, match=r"are tied to shared.weight, and untie=True parts embeddings from heads"):
        fold(t5(), everywhere(t5(), ["encoder.embed_tokens"]), intervention=Ablate(), verify_on=BOTH, untie=True)


def test_what_from_pretrained_would_tie_again_is_not_saved(tmp_path):
    """A T5's config has no head with weights of its own."""
    model = t5()
    v = everywhere(model, ["lm_head:in"])
    folded = fold(model, v, intervention=Ablate(), verify_on=BOTH, untie=True)
    with torch.no_grad(), Steerer(model, v, intervention=Ablate()):
        assert torch.allclose(folded(**BOTH).logits, model(**BOTH).logits, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match=r"has lm_head.weight tied whatever that says, so that from_pre"):
        folded.save_pretrained(tmp_path / "t5")
    assert folded.config.to_dict() == model.config.to_dict()


# --- fingerprints ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("build", [*TIED.values(), lambda: Tied("embed", "head"), lambda: Tied("head", "embed")])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_is_still_the_one_that_a_vector_knows(build, inplace):
    model = build()
    known = described(model)
    if isinstance(model, Tied):
        folded = fold(model, AT, intervention=Ablate(), verify_on=TOKENS, untie=True, inplace=inplace)
    else:
        folded = ablated(model, inplace=inplace)
    assert described(folded) == known
    if inplace:
        unfold(model)
    assert described(model) == known
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert described(model) != known
