"""`generate` inside `generate`: the inner one has its own prompt and decisions, and the outer one keeps its own.

The kind of fault: `generate` inside `generate` loses the outer gate's decision.
"""

import pytest
import torch

from actsteer import And, ProjectionAbove, Steerer, SteeringVector
from tests.kinds.by_hand import Text, added, every_backend, moved, right_or_refused
from tests.zoo import llama

transformers = pytest.importorskip("transformers")

SITE = "model.layers.1"
V = SteeringVector({SITE: 3 * torch.linspace(-1, 1, 16).double()})
PROMPT = torch.tensor([[5, 9, 4, 22, 7, 5, 9, 4]])
OPTIONS = {"max_new_tokens": 6, "do_sample": False}
ALWAYS, NEVER = ProjectionAbove(V, -1e9), ProjectionAbove(V, 1e9)
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers, of its own arguments


@pytest.fixture(scope="module")
def model():
    return llama(num_hidden_layers=4, eos_token_id=36)


@pytest.fixture(scope="module")
def small():
    return llama(num_hidden_layers=1, eos_token_id=36)


def by_hook(model, c=1.0, ids=PROMPT):
    """The same text by a plain hook, and without an assistant."""
    with added(model, SITE, c * V[SITE]):
        return model.generate(ids, **OPTIONS)


EXTRAS = {
    "early exit": lambda small: {"assistant_early_exit": 2},
    "an assistant": lambda small: {"assistant_model": small},
    "prompt lookup": lambda small: {"prompt_lookup_num_tokens": 2},
}
every_extra = pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)


# --- assisted decoding, which gives the same text as greedy decoding does ---------------------------------------------
@every_backend
@every_extra
@pytest.mark.parametrize(("gate", "c"), [(None, 1.0), (ALWAYS, 1.0), (NEVER, 0.0)], ids=["none", "always", "never"])
def test_a_gate_decides_once_for_the_text(model, small, backend, extra, gate, c):
    want = by_hook(model, c)
    with Steerer(model, V, gate=gate, backend=backend):
        assert torch.equal(model.generate(PROMPT, **extra(small), **OPTIONS), want)
        assert torch.equal(model.generate(PROMPT, **OPTIONS), want)
    assert not torch.equal(by_hook(model, 1.0), by_hook(model, 0.0))


@every_backend
@every_extra
@pytest.mark.parametrize("positions", ["prompt", "generated", "last", 0, slice(9, None)], ids=str)
def test_positions_are_those_of_the_text(model, small, backend, extra, positions):
    with Steerer(model, V, positions=positions, backend=backend):
        want = model.generate(PROMPT, use_cache=False, **OPTIONS)
        assert torch.equal(model.generate(PROMPT, **extra(small), **OPTIONS), want)


@every_backend
@every_extra
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1.0])
def test_a_gate_that_may_go_either_way(model, small, backend, extra, threshold):
    gate = And(ProjectionAbove(V, threshold), ProjectionAbove(V, -1e9, per="token"))
    with Steerer(model, V, gate=gate, backend=backend):
        want = model.generate(PROMPT, **OPTIONS)
        assert torch.equal(model.generate(PROMPT, **extra(small), **OPTIONS), want)
    assert torch.equal(want, by_hook(model, 1.0)) or torch.equal(want, by_hook(model, 0.0))


@pytest.mark.parametrize("backend", ["auto", "tap", "hook"])
@every_extra
def test_a_schedule_counts_the_tokens_of_the_text(model, small, backend, extra):
    with Steerer(model, V, c=lambda step: 1.0 / (1 + step), backend=backend):
        want = model.generate(PROMPT, use_cache=False, **OPTIONS)
        assert torch.equal(model.generate(PROMPT, **extra(small), **OPTIONS), want)


@every_backend
def test_a_steered_assistant_changes_nothing_in_the_text(model, small, backend):
    """It proposes other tokens, and its master decides."""
    w = SteeringVector({"model.layers.0": 30 * torch.linspace(-1, 1, 16).double()})
    gate = ProjectionAbove(w, -1e9)
    want = by_hook(model)
    proposes = Steerer(small, w, gate=gate, positions="generated", backend=backend, strict=False)
    with proposes, Steerer(model, V, gate=ALWAYS, backend=backend):
        right_or_refused(lambda: model.generate(PROMPT, assistant_model=small, **OPTIONS), want)


# --- generate between the passes of generate -------------------------------------------------------------------------
class Between:
    def __init__(self, run):
        self.run, self.got = run, []

    def __call__(self, input_ids, scores):
        self.got.append(self.run(input_ids))
        return scores


OTHER = torch.tensor([[3, 8, 6]])
GATES = {"sequence": ProjectionAbove(V, 0.0), "always": ALWAYS, "never": NEVER, "none": None}


@every_backend
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("positions", [None, "generated", "last"], ids=str)
def test_another_text_is_written_between_two_tokens(model, backend, gate, positions):
    with Steerer(model, V, gate=gate, positions=positions, backend=backend):
        want, other = (model.generate(ids, **OPTIONS) for ids in (PROMPT, OTHER))
        between = Between(lambda _: model.generate(OTHER, **OPTIONS))
        assert torch.equal(
            model.generate(PROMPT, logits_processor=transformers.LogitsProcessorList([between]), **OPTIONS), want
        )
    assert between.got and all(torch.equal(one, other) for one in between.got)


@every_backend
def test_another_number_of_rows_is_written_between(model, backend):
    """Each with its own pads."""
    ids = torch.tensor([[2, 2, 8], [3, 8, 6], [2, 9, 9]])
    mask = (ids != 2).long()
    with Steerer(model, V, gate=ProjectionAbove(V, 0.0), positions="last", backend=backend):
        want, other = model.generate(PROMPT, **OPTIONS), model.generate(ids, attention_mask=mask, **OPTIONS)
        between = Between(lambda _: model.generate(ids, attention_mask=mask, **OPTIONS))
        got = model.generate(PROMPT, logits_processor=transformers.LogitsProcessorList([between]), **OPTIONS)
        assert torch.equal(got, want) and all(torch.equal(one, other) for one in between.got)


@every_backend
def test_three_deep(model, backend):
    with Steerer(model, V, gate=ProjectionAbove(V, 0.0), positions="generated", backend=backend):
        want = [model.generate(ids, **OPTIONS) for ids in (PROMPT, OTHER, OTHER.flip(1))]
        inner = Between(lambda _: model.generate(OTHER.flip(1), **OPTIONS))
        processors = transformers.LogitsProcessorList
        middle = Between(lambda _: model.generate(OTHER, logits_processor=processors([inner]), **OPTIONS))
        got = model.generate(PROMPT, logits_processor=processors([middle]), **OPTIONS)
    assert torch.equal(got, want[0])
    assert all(torch.equal(one, want[1]) for one in middle.got) and all(torch.equal(one, want[2]) for one in inner.got)


@every_backend
def test_an_inner_generation_that_fails_leaves_the_outer_one_alone(model, backend):
    def fails(_):
        with pytest.raises(IndexError):
            model.generate(torch.tensor([[999, 3]]), **OPTIONS)

    with Steerer(model, V, gate=ProjectionAbove(V, 0.0), positions="generated", backend=backend):
        want = model.generate(PROMPT, **OPTIONS)
        processors = transformers.LogitsProcessorList([Between(fails)])
        assert torch.equal(model.generate(PROMPT, logits_processor=processors, **OPTIONS), want)


@every_backend
def test_strengths_per_row_are_those_of_the_outer_rows(model, backend):
    two, c = torch.cat([PROMPT, PROMPT + 1]), torch.tensor([0.0, 1.0]).double()
    with added(model, SITE, c[:, None, None] * V[SITE]):
        want = model.generate(two, **OPTIONS)
    between = Between(lambda _: model.generate(two.flip(0), **OPTIONS))
    with Steerer(model, V, c=c, backend=backend):
        got = model.generate(two, logits_processor=transformers.LogitsProcessorList([between]), **OPTIONS)
    assert torch.equal(got, want)


# --- a generation in the model itself --------------------------------------------------------------------------------
class Depth(Text):
    """Writes three codes after each of the outer tokens, as CSM's depth decoder."""

    def forward(self, input_ids, past_key_values=None):
        return self.b(self.a(self.e(input_ids)))

    def generate(self, input_ids):
        seen, n, fed = [], 0, input_ids
        for _ in range(3):
            out = self(fed, past_key_values=Cache(n) if n else None)
            seen.append(moved(out, Text().e(fed)))
            n, fed = n + fed.shape[1], fed[:, -1:]
        return seen


class Cache:
    def __init__(self, n):
        self.n = n

    def get_seq_length(self):
        return self.n


class Speech(Text):
    def __init__(self):
        super().__init__()
        self.depth = Depth()

    def forward(self, input_ids, past_key_values=None):
        return self.b(self.a(self.e(input_ids)))

    def generate(self, input_ids):
        seen, inner, n, fed = [], [], 0, input_ids
        for _ in range(3):
            out = self(fed, past_key_values=Cache(n) if n else None)
            seen.append(moved(out, Text().e(fed)))
            inner.append(self.depth.generate(fed[:, -2:]))
            n, fed = n + fed.shape[1], fed[:, -1:]
        return seen, inner


IDS = torch.tensor([[1, 2, 3, 4]])
STEPS = {
    None: ([[[1] * 4], [[1]], [[1]]], [[[1, 1]], [[1]], [[1]]], [[[1]], [[1]], [[1]]]),
    "prompt": ([[[1] * 4], [[0]], [[0]]], [[[1, 1]], [[0]], [[0]]], [[[1]], [[0]], [[0]]]),
    "generated": ([[[0] * 4], [[1]], [[1]]], [[[0, 0]], [[1]], [[1]]], [[[0]], [[1]], [[1]]]),
    "last": ([[[0, 0, 0, 1]], [[0]], [[0]]], [[[0, 1]], [[0]], [[0]]], [[[1]], [[0]], [[0]]]),
}


@every_backend
@pytest.mark.parametrize("positions", STEPS, ids=str)
def test_a_model_whose_steps_generate_by_a_model_in_it(backend, positions):
    """Both steered: the outer tokens count from the outer prompt, the inner ones each time anew."""
    model, v = Speech(), SteeringVector({"b": torch.ones(2), "depth.b": torch.ones(2)})
    outer, first, later = STEPS[positions]
    with torch.no_grad(), Steerer(model, v, positions=positions, backend=backend):
        assert model.generate(IDS) == (outer, [first, later, later])


@every_backend
@pytest.mark.parametrize("fires", [0, 1])
def test_the_outer_gate_keeps_its_decision(backend, fires):
    model, v = Speech(), SteeringVector({"b": torch.ones(2)})
    gate = ProjectionAbove(SteeringVector({"e": torch.ones(2)}), -1e9 if fires else 1e9)
    with torch.no_grad(), Steerer(model, v, gate=gate, backend=backend):
        seen, inner = model.generate(IDS)
    assert seen == [[[fires] * 4], [[fires]], [[fires]]]
    assert not torch.tensor(inner[1:]).any()


@every_backend
@pytest.mark.parametrize("positions", STEPS, ids=str)
def test_the_model_in_it_alone(backend, positions):
    model, v = Speech(), SteeringVector({"depth.b": torch.ones(2)})
    with torch.no_grad(), Steerer(model, v, positions=positions, backend=backend):
        seen, inner = model.generate(IDS)
    assert not any(torch.tensor(one).any() for one in seen) and inner == [
        *[STEPS[positions][1]],
        *[STEPS[positions][2]] * 2,
    ]
