"""Texts for transformers: the same answer for any batch size, padding side, and way to compute it."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from actsteer import (
    Affine,
    BatchError,
    Centroids,
    ConceptErasure,
    GaussianMap,
    LogisticDirection,
    LowRank,
    MeanDifference,
    PrincipalDirection,
    Steerer,
    UnsupportedModelError,
    WhitenedMeanDifference,
    collect,
    record,
)
from actsteer.integrations.transformers import fit_pairs, text_batches

VOCABULARY = "be good bad you are it was a the film movie and so very we said that loved hated one"
WORDS = ["[PAD]", *VOCABULARY.split(" ")]
IDS = {word: index for index, word in enumerate(WORDS)}
SIZE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
PAIRS = [
    ("we said that it was good", "we said that it was bad"),
    ("we said that the film was very good and loved it", "we said that the film was hated"),
    ("we said a", "we said that you are one"),
    ("loved", "hated it so"),
]


def tokenizer(**options):
    made = Tokenizer(models.WordLevel(IDS, unk_token="one"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, **options)


def causal(kind):
    """A small causal model in float64, where nothing is lost by computing in another order."""
    transformers.logging.set_verbosity_error()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match kind:
            case "gpt2":
                made = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2, **SPECIAL))
            case "llama":
                made = LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **SIZE, **SPECIAL))
            case "mistral":  # attention within a window of four tokens
                made = MistralForCausalLM(MistralConfig(num_key_value_heads=1, sliding_window=4, **SIZE, **SPECIAL))
            case "gemma2":
                config = Gemma2Config(num_key_value_heads=1, head_dim=8, sliding_window=4, **SIZE, **SPECIAL)
                made = Gemma2ForCausalLM(config)
    return made.eval().requires_grad_(False).to(torch.float32 if kind == "gemma2" else torch.float64)


def site(kind):
    return "transformer.h.2" if kind == "gpt2" else "model.layers.2"


@pytest.fixture(autouse=True)
def _double():
    """Vectors are as exact as the models are."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- batches ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"padding_side": "left", "pad_token": "[PAD]"}, {"padding_side": "right"}])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_batches_are_padded_on_the_right_in_the_order_of_the_texts(options, batch_size):
    texts = ["we said", "it", "you are very good", "a film"]
    batches = text_batches(tokenizer(**options), texts, batch_size=batch_size)
    assert len(batches) == len(list(batches)) == -(-4 // batch_size)
    found = [ids[: int(mask.sum())].tolist() for b in batches for ids, mask in zip(*b.values(), strict=True)]
    assert found == [[IDS[word] for word in text.split()] for text in texts]
    for batch in batches:
        assert bool((batch["attention_mask"].diff(dim=1) <= 0).all())


def test_chat_ends_where_the_model_is_to_answer():
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    made = tokenizer(chat_template=template + "{% if add_generation_prompt %}loved{% endif %}")
    one = IDS["one"]  # unknown words, the roles among them
    asked, answered = text_batches(
        made,
        ["good", [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}]],
        chat=True,
        batch_size=1,
    )
    assert asked["input_ids"].tolist() == [[one, IDS["good"], IDS["loved"]]]
    assert answered["input_ids"].tolist() == [[one, IDS["good"], one, IDS["bad"]]]


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ([], "one or more"),
        ("good", "expected a sequence"),
        (["good", ""], "has no tokens"),
        ([["good"]], "expected a string"),
    ],
)
def test_texts_that_cannot_be_fed_are_named(texts, match):
    with pytest.raises(BatchError, match=match):
        text_batches(tokenizer(), texts)


# --- pairs -----------------------------------------------------------------------------------------------------------
def by_hand(model, at):
    """One text at a time, without a pad anywhere."""
    last = [
        [record(model, [{"input_ids": torch.tensor([[IDS[w] for w in t.split()]])}], sites=at)[at][-1] for t in side]
        for side in zip(*PAIRS, strict=True)
    ]
    return (torch.stack(last[0]).mean(dim=0) - torch.stack(last[1]).mean(dim=0)).double()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("share_prefix", [False, True])
def test_pairs_give_the_same_vector_however_they_are_batched_and_computed(kind, batch_size, share_prefix):
    model, at = causal(kind), site(kind)
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if kind == "gemma2" else {"atol": 1e-12, "rtol": 1e-9}
    for side in ("left", "right"):
        options = {"batch_size": batch_size, "share_prefix": share_prefix}
        v = fit_pairs(model, tokenizer(padding_side=side), PAIRS, sites=at, concept="praise", **options)
        torch.testing.assert_close(v[at].double(), by_hand(model, at), **tolerance)
        assert v.concept == "praise" and v.metadata["positions"] == "last"


@pytest.mark.parametrize("estimator", [WhitenedMeanDifference(), MeanDifference(), PrincipalDirection()])
def test_a_shared_prefix_changes_no_estimator(estimator):
    model = causal("llama")
    found = [
        fit_pairs(model, tokenizer(), PAIRS, sites="model.layers.[13]", estimator=estimator, share_prefix=shared)
        for shared in (False, True)
    ]
    assert found[0].sites == found[1].sites == ("model.layers.1", "model.layers.3")
    assert found[0].allclose(found[1], rtol=1e-6, atol=1e-9)


class Own:
    """An estimator of the user's own, which gives an edit."""

    reads = "variances"

    def __call__(self, *, positive, negative):
        return Affine({site: (positive[site].variance.diag(), negative[site].mean) for site in positive})


@pytest.mark.parametrize("estimator", [Own(), GaussianMap(diagonal=True)], ids=["of the user", "ours"])
def test_a_shared_prefix_changes_no_edit(estimator):
    model, at = causal("llama"), site("llama")
    plain, shared = (
        fit_pairs(model, tokenizer(), PAIRS, sites=at, estimator=estimator, concept="praise", share_prefix=shares)
        for shares in (False, True)
    )
    assert isinstance(shared, Affine) and shared.concept == "praise" and shared.metadata == plain.metadata
    for one, other in zip(plain[at], shared[at], strict=True):
        torch.testing.assert_close(one, other)


def test_texts_that_all_begin_alike_run_that_beginning_once():
    model = causal("llama")
    shapes = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[:2])))
    pairs = [("we said that it was very good", "we said that it was very bad")] * 3
    fit_pairs(model, tokenizer(), pairs, sites="model.layers.0", share_prefix=True)
    assert shapes == [(1, 6), (6, 1)]


def test_inside_a_steerer_a_shared_prefix_is_steered_too():
    model, at = causal("llama"), site("llama")
    v = 4 * fit_pairs(model, tokenizer(), PAIRS, sites="model.layers.0")
    with Steerer(model, v):
        steered = [fit_pairs(model, tokenizer(), PAIRS, sites=at, share_prefix=shared) for shared in (False, True)]
    assert steered[0].allclose(steered[1], rtol=1e-9, atol=1e-12)
    assert not steered[0].allclose(fit_pairs(model, tokenizer(), PAIRS, sites=at), rtol=1e-3)


def test_an_encoder_s_tokens_are_averaged_without_the_pads():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(BertConfig(**SIZE)).eval().double()
    vectors = [
        fit_pairs(model, tokenizer(), PAIRS, sites="encoder.layer.1", positions="mean", batch_size=size)
        for size in (1, 3, 100)
    ]
    assert all(v.allclose(vectors[0], rtol=1e-9, atol=1e-12) for v in vectors)


def test_pairs_may_be_erased_probed_or_paired():
    model, at = causal("gpt2"), site("gpt2")
    assert isinstance(fit_pairs(model, tokenizer(), PAIRS, sites=at, estimator=ConceptErasure()), LowRank)
    for estimator in (LogisticDirection(), PrincipalDirection(paired=True)):
        assert fit_pairs(model, tokenizer(), PAIRS, sites=at, estimator=estimator).sites == (at,)


def test_texts_by_class_give_a_bank():
    texts, labels = ["it was good", "we loved it", "so bad", "hated"], ["praise", "praise", "blame", "blame"]
    batches = text_batches(tokenizer(), texts, batch_size=3)
    bank = Centroids()(collect(causal("llama"), batches, by=labels, sites="model.layers.2", positions="last"))
    assert bank.concepts == ("blame", "praise") and bank["praise"].allclose(-bank["blame"])


@pytest.mark.parametrize("pairs", [[], ["ab"], [("we", "said", "that")]])
def test_pairs_are_pairs(pairs):
    with pytest.raises(BatchError, match="pairs: expected one or more of"):
        fit_pairs(causal("gpt2"), tokenizer(), pairs, sites="transformer.h.2")


@pytest.mark.parametrize(
    "options",
    [{"positions": "all"}, {"estimator": LogisticDirection()}, {"estimator": PrincipalDirection(paired=True)}],
)
def test_what_a_shared_prefix_cannot_give_is_refused(options):
    with pytest.raises(ValueError, match="share_prefix: expected positions='last'"):
        fit_pairs(causal("gpt2"), tokenizer(), PAIRS, sites="transformer.h.2", share_prefix=True, **options)


def test_a_model_without_a_key_value_cache_is_refused():
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, **SPECIAL)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM takes no past_key_values"):
        fit_pairs(MambaForCausalLM(config), tokenizer(), PAIRS, sites="backbone.layers.1", share_prefix=True)


# --- batches that the user has padded ---------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_s_own_batches_count_real_tokens_alone(side):
    model = causal("llama")
    batch = tokenizer(padding_side=side, pad_token="[PAD]")(
        [text for text, _ in PAIRS], padding=True, return_tensors="pt", return_token_type_ids=False
    )
    alone = text_batches(tokenizer(), [text for text, _ in PAIRS], batch_size=1)
    for positions in ("all", "last", 0, -1, slice(0, 1), "mean"):
        own = record(model, [dict(batch)], sites="model.layers.2", positions=positions)["model.layers.2"]
        expected = record(model, alone, sites="model.layers.2", positions=positions)["model.layers.2"]
        torch.testing.assert_close(own, expected, atol=1e-9, rtol=1e-9)


def test_two_lists_are_no_pairs():
    positives, negatives = ["we said good", "loved it"], ["we said bad", "hated it"]
    with pytest.raises(BatchError, match=r"of two lists that is list\(zip\(positives, negatives\)\)"):
        fit_pairs(causal("llama"), tokenizer(), (positives, negatives), sites=site("llama"))
    fit_pairs(causal("llama"), tokenizer(), list(zip(positives, negatives, strict=True)), sites=site("llama"))
