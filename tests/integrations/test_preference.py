"""Pairs of answers: the labels are those of the answers, and a vector trained on them works in both directions."""

import pytest
import torch

from actsteer import BatchError, Steerer, SteeringVector, optimize, preference, preference_shift
from actsteer.integrations.transformers import preference_batches
from reference.language.model import cache, load, packaged
from tests.integrations.test_transformers import causal, site, tokenizer

ANSWERS = [
    ("we said that it was", "very good", "bad"),
    ("the film", "we loved", "hated so very"),
    ("a movie and it was good", "one", "so bad"),
]


def test_the_labels_of_a_row_are_its_answer_and_nothing_else():
    made = tokenizer()
    batches, targets = preference_batches(made, ANSWERS, batch_size=2)
    batches = list(batches)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2] and len(targets) == 2
    rows = [row for batch in batches for row in batch["input_ids"].chunk(2)]
    masks = [row for batch in batches for row in batch["attention_mask"].chunk(2)]
    labels = [side for target in targets for side in target]
    texts = [[f"{p} {a}" for p, a, _ in ANSWERS[:2]], [f"{p} {r}" for p, _, r in ANSWERS[:2]]]
    texts += [[f"{p} {a}" for p, a, _ in ANSWERS[2:]], [f"{p} {r}" for p, _, r in ANSWERS[2:]]]
    answers = [["very good", "we loved"], ["bad", "hated so very"], ["one"], ["so bad"]]
    for ids, mask, own, text, answer in zip(rows, masks, labels, texts, answers, strict=True):
        assert own.shape == ids.shape
        for index in range(len(text)):
            assert made.decode(ids[index][mask[index].bool()]) == text[index]
            assert made.decode(own[index][own[index] != -100]) == answer[index]
            assert torch.equal(own[index][own[index] != -100], ids[index][own[index] != -100])


def test_the_likelihoods_are_those_of_transformers():
    """Whose loss is the mean over the labels of a row."""
    model, v = causal("llama"), SteeringVector({site("llama"): torch.ones(16)})
    batches, targets = preference_batches(tokenizer(), ANSWERS)
    (batch,), (target,) = list(batches), targets
    labels = torch.cat(target)

    def likelihoods():
        rows = [{name: own[row][None] for name, own in batch.items()} for row in range(len(labels))]
        each = [
            model(**row, labels=own[None]).loss * -(own != -100).sum() for row, own in zip(rows, labels, strict=True)
        ]
        return torch.stack(each).chunk(2)

    with torch.no_grad():
        plain, (likely, unlikely) = model(**batch), likelihoods()
        with Steerer(model, v):
            steered, (first, second) = model(**batch), likelihoods()
    margin = 0.5 * ((first - likely) - (second - unlikely))
    found = preference_shift(steered, target, c=1.0, plain=plain, beta=0.5)
    expected = torch.nn.functional.softplus(-margin).mean()
    torch.testing.assert_close(found.float(), expected)  # theirs computes it in float32


@pytest.mark.parametrize("loss", [preference, preference_shift])
def test_a_small_language_model_is_moved_both_ways(loss):
    model = causal("llama")
    batches, targets = preference_batches(tokenizer(), ANSWERS, batch_size=2)
    options = {"sites": site("llama"), "loss": loss, "targets": targets, "steps": 40, "lr": 0.3, "progress": False}
    v = optimize(model, batches, c=[-1, 1], generator=torch.Generator().manual_seed(0), **options)
    (up, down), plain = (preferred(model, v, ANSWERS, c) for c in (1, -1)), preferred(model, v, ANSWERS, 0)
    assert up > plain + 0.3 and down < plain - 0.3  # its random weights let no vector do much more


def preferred(model, v, answers, c, made=None):
    """How much likelier the chosen answers are than the rejected ones, in nats, the mean over pairs."""
    options = {} if made is None else {"chat": True}
    batches, targets = preference_batches(made or tokenizer(), answers, batch_size=len(answers), **options)
    (batch,), (target,) = list(batches), targets
    with torch.no_grad(), Steerer(model, v, c=c):
        logits = model(**batch).logits.log_softmax(dim=-1)[:, :-1]
    labels = torch.cat(target)[:, 1:]
    chosen = logits.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    high, low = chosen.sum(dim=1).chunk(2)
    return float((high - low).mean())


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "expected one or more of"),
        ([("a", "good")], "expected one or more of"),
        (["abc"], "expected one or more of"),
        ([("a", "good", "")], "'' has no tokens"),
        ([("", "good", "bad")], "'' has no tokens"),
    ],
)
def test_what_is_no_pair_of_answers_is_refused(answers, message):
    with pytest.raises(BatchError, match=message):
        preference_batches(tokenizer(), answers)


def test_a_batch_has_a_pair_at_least():
    with pytest.raises(BatchError, match="batch_size: expected 1 or more, got 0"):
        preference_batches(tokenizer(), ANSWERS, batch_size=0)


CHEERFUL = [
    (
        "How was your day?",
        " It was a wonderful day, and I laughed a lot.",
        " It was a dreadful day, and I cried a lot.",
    ),
    ("What do you think of the film?", " I loved every minute of it.", " I hated every minute of it."),
    ("Tell me about the weather.", " The sun shines and the air is sweet.", " It rains and the air is cold."),
    ("How is the food here?", " Delicious, the best I ever had.", " Terrible, the worst I ever had."),
    ("How do you feel?", " I am happy and full of hope.", " I am sad and without hope."),
    ("What is your new house like?", " Bright, warm and lovely.", " Dark, cold and ugly."),
]
HELD_OUT = [
    ("How was the concert?", " It was a joy from start to end.", " It was a pain from start to end."),
    ("What are your neighbours like?", " They are kind and friendly.", " They are rude and noisy."),
    ("How was the journey?", " Pleasant and beautiful.", " Long and miserable."),
    ("What do you think of this town?", " It is a great place to live.", " It is an awful place to live."),
]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not (cache().exists() or packaged()), reason="SmolLM2 is not installed")
def test_smollm_prefers_cheerful_answers_at_c_and_gloomy_ones_at_minus_c():
    """To prompts that it was not trained on."""
    model, made = load()
    batches, targets = preference_batches(made, CHEERFUL, batch_size=3, chat=True)
    options = {"sites": "model.layers.12", "max_norm": 15.0, "steps": 16, "lr": 0.5, "progress": False}
    generator = torch.Generator().manual_seed(0)
    v = optimize(model, batches, targets=targets, loss=preference_shift, c=[-1, 1], generator=generator, **options)
    up, plain, down = (preferred(model, v, HELD_OUT, c, made) for c in (1, 0, -1))
    assert up > plain + 2 and down < plain - 1
