"""A prompt as an edit: pairs of conversations with and without it, matched where the same answer is written."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actsteer import BatchError, MeanDifference, PairedMap, Steerer, collect, record
from actsteer.integrations.transformers import Answering, fit_pairs, text_batches
from reference.language.model import cache, load, packaged

VOCABULARY = "and system user assistant shout what is the sea moon dog it old very loud"
WORDS = ["[PAD]", *VOCABULARY.split()]
IDS = {word: index for index, word in enumerate(WORDS)}
ASKS = [f"what is the {thing}" for thing in ("sea", "moon", "dog")]
REPLIES = ["the dog is old", "it is very very loud", "the sea and the moon", "old"]
D = 6


def tokenizer(marker="{% if add_generation_prompt %}and assistant {% endif %}"):
    made = Tokenizer(models.WordLevel(IDS, unk_token="it"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    each = "{% for m in messages %}and {{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=each + marker)


def chats(asks, replies, prompt="shout"):
    """Pairs of conversations with the prompt and without it."""
    talks = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
        for ask, reply in zip(asks, replies, strict=True)
    ]
    return [([{"role": "system", "content": prompt}, *talk], talk) for talk in talks]


ALL = chats(*zip(*itertools.product(ASKS, REPLIES), strict=True))


class Shouts(nn.Module):
    """After the word "shout" each token's activation moves along v, by an amount that is affine in it."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(len(WORDS), D).double()
        self.site, self.head = nn.Identity(), nn.Linear(D, len(WORDS)).double()
        self.embed.weight.data = torch.randn(len(WORDS), D, generator=g).double()
        self.head.weight.data = torch.randn(len(WORDS), D, generator=g).double()
        self.v, self.reads = torch.randn(2, D, generator=g).double()

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        told = (input_ids == IDS["shout"]).cumsum(dim=1) > 0
        return self.head(self.site(h + (told * (1 + h @ self.reads))[..., None] * self.v))


def divergence(model, pairs, edit, tokens, where, c=1.0):
    """KL of the plain model, steered, from the prompted one, over the tokens of the answers; in nats."""

    def answers(side, steered):
        found = []
        for batch in text_batches(tokens, [pair[side] for pair in pairs], chat=True, batch_size=8):
            meant = where(batch) & batch["attention_mask"].bool()
            with torch.no_grad(), Steerer(model, edit, c=c if steered else 0.0, positions=where):
                made = model(**batch)
            found.append(getattr(made, "logits", made)[meant].log_softmax(dim=-1))
        return torch.cat(found)

    prompted, plain = answers(0, steered=False), answers(1, steered=True)
    return float((prompted.exp() * (prompted - plain)).sum(dim=-1).mean())


@pytest.mark.parametrize("side", ["right", "left"])
def test_both_sides_of_a_pair_have_the_same_answering_tokens(side):
    where, tokens = Answering(tokenizer()), tokenizer()
    tokens.pad_token, tokens.padding_side = "[PAD]", side
    for pair in ALL:
        reply = [IDS[word] for word in ("assistant " + pair[1][-1]["content"]).split()]
        batch = tokens.apply_chat_template(list(pair), return_dict=True, return_tensors="pt", padding=True)
        for ids, meant in zip(batch["input_ids"], where(batch) & batch["attention_mask"].bool(), strict=True):
            assert ids[meant].tolist() == reply


def test_a_prompt_whose_effect_is_affine_along_one_direction_is_distilled_exactly():
    model, tokens = Shouts(), tokenizer()
    where = Answering(tokens)
    options = {"sites": "site", "chat": True, "positions": where, "batch_size": 4, "progress": False}
    train, held = ALL[:8], ALL[8:]
    constant = fit_pairs(model, tokens, train, estimator=MeanDifference(), **options)
    edit = fit_pairs(model, tokens, train, estimator=PairedMap(rank=1, ridge=1e-12), **options)
    assert divergence(model, held, edit, tokens, where) < 1e-9
    assert divergence(model, held, constant, tokens, where) > 0.1
    assert edit["site"][1].shape == (1, D)
    torch.testing.assert_close((edit["site"][1][0] @ model.v).abs(), model.v.norm())


def test_it_steers_what_is_generated_as_it_does_the_whole_text():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **shape, **special)).eval()
    tokens, site = tokenizer(), "model.layers.0"
    where = Answering(tokens)
    options = {"chat": True, "positions": where, "progress": False}
    edit = fit_pairs(model, tokens, ALL, sites=site, estimator=PairedMap(rank=1), **options)
    batch = next(iter(text_batches(tokens, [ASKS[0]], chat=True)))
    with Steerer(model, edit, c=40.0, positions=where):
        cached, whole = (
            model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=uses) for uses in (True, False)
        )
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, model.generate(**batch, max_new_tokens=5, do_sample=False))


def test_statistics_of_other_templates_are_told_apart_and_a_pass_goes_on(tmp_path):
    model, batches = Shouts(), text_batches(tokenizer(), [pair[0] for pair in ALL], chat=True, batch_size=4)
    where = Answering(tokenizer())
    options = {"sites": "site", "positions": where, "progress": False}
    stats = collect(model, batches, checkpoint=tmp_path / "pass.safetensors", **options)
    assert stats.metadata["positions"] == f"answering after [{IDS['and']}, {IDS['assistant']}]"
    assert stats["site"].count == len(record(model, batches, **options)["site"])
    again = collect(model, batches, checkpoint=tmp_path / "pass.safetensors", **options)
    assert torch.equal(again["site"].mean, stats["site"].mean)


def test_where_no_answer_begins_is_refused():
    with pytest.raises(BatchError, match="puts nothing before an answer"):
        Answering(tokenizer(marker=""))
    where = Answering(tokenizer())
    for ids in ([[IDS["assistant"], IDS["and"], IDS["sea"]]], [[IDS["and"]]]):
        with pytest.raises(BatchError, match="row 0 of the batch has no answer"):
            where({"input_ids": torch.tensor(ids, dtype=torch.long)})


THINGS = ["the sea", "bread", "a bicycle", "the moon", "coffee", "a library", "rain", "a bridge", "honey", "chess"]
FORMS = ["What is {} good for?", "Tell me about {}.", "Explain {} to a child."]
REAL = [pytest.mark.real, pytest.mark.skipif(not (cache().exists() or packaged()), reason="SmolLM2 is not installed")]


@pytest.mark.slow
class TestReal:
    pytestmark = REAL

    def test_a_prompt_is_distilled_better_than_by_a_constant_vector(self):
        """KL from the prompted model on the answers to questions that were not fitted on; the figures are printed."""
        model, tokens = load()
        asks = [form.format(thing) for thing in THINGS for form in FORMS]
        prompt = "You are a pirate. Answer every question in pirate speech."
        talks = [[{"role": "system", "content": prompt}, {"role": "user", "content": ask}] for ask in asks]
        tokens.padding_side = "left"
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
        batch = tokens.apply_chat_template(talks, **options)
        made = model.generate(**batch, max_new_tokens=24, do_sample=False)
        replies = tokens.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        pairs = chats(asks, replies, prompt)
        train, held = pairs[: -2 * len(FORMS)], pairs[-2 * len(FORMS) :]
        where, sites = Answering(tokens), [f"model.layers.{block}" for block in (2, 8, 14, 20)]
        options = {"sites": sites, "chat": True, "positions": where, "batch_size": 8, "progress": False}
        kinds = {"constant": MeanDifference(), "rank 1": PairedMap(rank=1)}
        edits = {name: fit_pairs(model, tokens, train, estimator=kind, **options) for name, kind in kinds.items()}
        found = {name: divergence(model, held, edit, tokens, where) for name, edit in edits.items()}
        found["unsteered"] = divergence(model, held, edits["constant"], tokens, where, c=0.0)
        print(found)
        assert found["rank 1"] < 0.9 * found["constant"] < 0.9 * found["unsteered"]
