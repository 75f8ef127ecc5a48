"""Forward passes inside `generate` that it does not announce are passes of their own, with a prompt of their own.

The kind of fault: classifier-free guidance's second branch, or a text that is scored in a logits processor, gets
another text's prompt length.
"""

import pytest
import torch
from torch import nn

from actsteer import ActsteerError, PositionsError, ProjectionAbove, Steerer, SteeringVector
from tests.kinds.by_hand import added, every_backend, right_or_refused
from tests.zoo import gpt2, llama

transformers = pytest.importorskip("transformers")

SITE = "model.layers.0"
BIG = 1e6  # so large that what was steered shows in every number
V = SteeringVector({SITE: torch.full((16,), BIG).double()})
schedules = pytest.mark.parametrize("backend", ["auto", "tap", "hook"])  # a buffer has no room for one
PROMPT = torch.tensor([[5, 9, 4, 22, 7]])
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return llama(eos_token_id=None)


def flags(model, run, **options):
    """For every pass of the block which of its tokens were steered, by rows."""
    seen = []

    def listen(module, args, kwargs):
        h = args[0] if args else kwargs["hidden_states"]
        seen.append(h.abs().amax(-1).gt(BIG / 2).int().tolist())

    with torch.no_grad(), Steerer(model, V, **options):
        handle = model.model.layers[1].register_forward_pre_hook(listen, with_kwargs=True)
        try:
            run()
        finally:
            handle.remove()
    return [row for flag in seen for row in flag]


def at(positions, prompt, begin, end):
    """Which of the tokens from `begin` to `end` of a text with this prompt are steered."""
    inside = {
        None: lambda i: True,
        "prompt": lambda i: i < prompt,
        "generated": lambda i: i >= prompt,
        "last": lambda i: i == prompt - 1,
        0: lambda i: i == 0,
        "after": lambda i: i >= 2,
    }[positions if not isinstance(positions, slice) else "after"]
    return [int(inside(i)) for i in range(begin, end)]


def passes(positions, prompt, new):
    """The passes of a generation with a cache."""
    return [at(positions, prompt, 0, prompt), *[at(positions, prompt, i, i + 1) for i in range(prompt, prompt + new)]]


PLACES = pytest.mark.parametrize(
    "positions", [None, "prompt", "generated", "last", 0, slice(2, None)], ids=["all", *"pgl", "first", "slice"]
)


# --- classifier-free guidance ----------------------------------------------------------------------------------------
def taking_turns(*texts):
    return [one for turn in zip(*texts, strict=True) for one in turn]


@every_backend
@PLACES
def test_the_branch_without_the_prompt_begins_at_its_last_token(model, backend, positions):
    """transformers feeds the prompt's last token to the second branch: that is its prompt."""
    got = flags(
        model, lambda: model.generate(PROMPT, guidance_scale=2.0, **OPTIONS), positions=positions, backend=backend
    )
    assert got == taking_turns(passes(positions, 5, 3), passes(positions, 1, 3))


@every_backend
@PLACES
def test_a_negative_prompt_has_its_own_length(model, backend, positions):
    negative = {"negative_prompt_ids": torch.tensor([[3, 8, 6]]), "negative_prompt_attention_mask": torch.ones(1, 3)}
    got = flags(
        model,
        lambda: model.generate(PROMPT, guidance_scale=2.0, **negative, **OPTIONS),
        positions=positions,
        backend=backend,
    )
    assert got == taking_turns(passes(positions, 5, 3), passes(positions, 3, 3))


@every_backend
@PLACES
def test_guidance_without_a_cache(model, backend, positions):
    """The second branch computes its whole text anew each time, and nothing says where its prompt ended."""
    try:
        got = flags(
            model,
            lambda: model.generate(PROMPT, guidance_scale=2.0, use_cache=False, **OPTIONS),
            positions=positions,
            backend=backend,
        )
    except PositionsError:
        assert positions in ("prompt", "generated", "last")
        return
    mine, other = ([at(positions, n, 0, n + i) for i in range(4)] for n in (5, 1))
    assert got[::2] == mine
    if positions in (None, 0) or isinstance(positions, slice):
        assert got[1::2] == other


@every_backend
def test_a_guided_text_is_that_of_hooks(model, backend):
    """The tokens themselves: the truth adds by hand, by the number of the pass."""
    v = 3 * torch.linspace(-1, 1, 16).double()
    with added(model, SITE, lambda h, n: v * float(n >= 2)):  # both prompts come first
        want = model.generate(PROMPT, guidance_scale=1.5, **OPTIONS)
    with Steerer(model, SteeringVector({SITE: v}), positions="generated", backend=backend):
        assert torch.equal(model.generate(PROMPT, guidance_scale=1.5, **OPTIONS), want)


# --- other passes between those of a generation ----------------------------------------------------------------------
class Scored:
    """A logits processor that runs something between the passes."""

    def __init__(self, between):
        self.between = between

    def __call__(self, input_ids, scores):
        self.between(input_ids)
        return scores


def generate_with(model, between, **options):
    processors = transformers.LogitsProcessorList([Scored(between)])
    return model.generate(PROMPT, logits_processor=processors, **OPTIONS, **options)


TEXT = torch.tensor([[3, 8, 6, 9, 9, 4, 7]])


@every_backend
@PLACES
def test_a_text_that_is_scored_is_a_prompt(model, backend, positions):
    got = flags(
        model,
        lambda: generate_with(model, lambda _: model(TEXT, use_cache=False)),
        positions=positions,
        backend=backend,
    )
    assert got == taking_turns(passes(positions, 5, 3), [at(positions, 7, 0, 7)] * 4)


@every_backend
@pytest.mark.parametrize("positions", [None, "last"], ids=str)
def test_texts_that_are_scored_have_their_own_rows_and_pads(model, backend, positions):
    texts = torch.tensor([[3, 8, 6, 2], [3, 9, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    want = mask.tolist() if positions is None else [[0, 0, 1, 0], [0, 1, 0, 0]]
    got = flags(
        model,
        lambda: generate_with(model, lambda _: model(texts, attention_mask=mask, use_cache=False)),
        positions=positions,
        backend=backend,
    )
    assert [one for one in got if len(one) == 4] == want * 4
    assert [one for one in got if len(one) != 4] == passes(positions, 5, 3)


@every_backend
@PLACES
def test_the_same_length_is_another_text_all_the_same(model, backend, positions):
    """The scored text is as long as the next pass, or as the whole text so far."""
    for text in (TEXT[:, :1], TEXT[:, :5]):
        got = flags(
            model,
            lambda text=text: generate_with(model, lambda _: model(text, use_cache=False)),
            positions=positions,
            backend=backend,
        )
        n = text.shape[1]
        assert got == taking_turns(passes(positions, 5, 3), [at(positions, n, 0, n)] * 4)


@every_backend
def test_a_stopping_rule_that_runs_the_model_does_not_disturb(model, backend):
    class Judge(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            model(input_ids, use_cache=False)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    criteria = transformers.StoppingCriteriaList([Judge()])
    got = flags(
        model,
        lambda: model.generate(PROMPT, stopping_criteria=criteria, **OPTIONS),
        positions="generated",
        backend=backend,
    )
    judged = [[0] * n for n in range(6, 10)]  # a text of its own, all of it a prompt
    assert got == taking_turns(passes("generated", 5, 3), judged)


@schedules
def test_a_schedule_begins_anew_in_the_scored_text(model, backend):
    """c is 1 at step 0 alone: the prompt of the generation, and all of every scored text."""
    got = flags(
        model,
        lambda: generate_with(model, lambda _: model(TEXT, use_cache=False)),
        c=lambda step: float(step == 0),
        backend=backend,
    )
    assert got == taking_turns(passes("prompt", 5, 3), [[1] * 7] * 4)


@every_backend
def test_a_gate_decides_for_the_scored_text_and_for_the_generation(model, backend):
    """One of the two texts is above the threshold; each order, so that neither decision is that of the other."""
    w = SteeringVector({"model.embed_tokens": torch.linspace(-1, 1, 16).double()})
    mean = [(model.get_input_embeddings()(text).mean(1) @ w["model.embed_tokens"]).item() for text in (PROMPT, TEXT)]
    gate = ProjectionAbove(w, sum(mean) / 2 / w.norm().item())
    fires = [int(score > sum(mean) / 2) for score in mean]
    assert sorted(fires) == [0, 1]
    for outer, inner, (a, b) in ((PROMPT, TEXT, fires), (TEXT, PROMPT, fires[::-1])):

        def run(outer=outer, inner=inner):
            processors = transformers.LogitsProcessorList([Scored(lambda _: model(inner, use_cache=False))])
            model.generate(outer, logits_processor=processors, **OPTIONS)

        got = flags(model, run, gate=gate, backend=backend)
        n, k = outer.shape[1], inner.shape[1]
        assert got == taking_turns([[a] * n, [a], [a], [a]], [[b] * k] * 4)


@every_backend
def test_strengths_per_row_are_those_of_the_generation_and_other_rows_are_refused_or_apart(model, backend):
    """A scored text of one row among a generation of two: its strength cannot be told."""
    two = torch.cat([PROMPT, PROMPT + 1])
    c = torch.tensor([0.0, 1.0]).double()
    seen = []

    def between(_):
        try:
            model(TEXT, use_cache=False)
        except ActsteerError:
            seen.append("refused")

    v = SteeringVector({SITE: 3 * torch.linspace(-1, 1, 16).double()})
    with added(model, SITE, c[:, None, None] * v[SITE]):
        want = model.generate(two, **OPTIONS)
    processors = transformers.LogitsProcessorList([Scored(between)])
    with Steerer(model, v, c=c, backend=backend):
        assert torch.equal(model.generate(two, logits_processor=processors, **OPTIONS), want)
    assert seen == ["refused"] * 4


@every_backend
@pytest.mark.parametrize("positions", ["generated", "prompt", "last"])
def test_another_model_may_run_between(backend, positions):
    """A judge of another family, itself steered, between the passes of the one that writes."""
    writer, judge = llama(eos_token_id=None), gpt2(vocabulary=40)
    v, w = V, SteeringVector({"transformer.h.0": torch.ones(8).double()})
    want = flags(writer, lambda: writer.generate(PROMPT, **OPTIONS), positions=positions, backend=backend)
    with Steerer(judge, w, positions=positions, backend=backend, strict=False):
        expected = judge(TEXT, use_cache=False).logits
        outputs = []

        def between(_):
            outputs.append(judge(TEXT, use_cache=False).logits)

        got = flags(writer, lambda: generate_with(writer, between), positions=positions, backend=backend)
    assert got == want == passes(positions, 5, 3) and v.sites == (SITE,)
    assert all(torch.equal(one, expected) for one in outputs)


# --- at other places -------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("positions", ["prompt", "generated", "last", 0], ids=str)
def test_positions_hold_at_the_head_which_computes_the_last_logits_alone(model, backend, positions):
    """generate asks the head for the logits of the last token only."""
    v = SteeringVector({"lm_head": torch.linspace(-5, 5, 37).double()})
    steps = [at(positions, 5, 4, 5)[0], *[at(positions, 5, i, i + 1)[0] for i in (5, 6, 7)]]
    with added(model, "lm_head", lambda h, n: v["lm_head"] * steps[n]):
        want = model.generate(PROMPT, **OPTIONS)
    with Steerer(model, v, positions=positions, backend=backend):
        assert torch.equal(model.generate(PROMPT, **OPTIONS), want)


@schedules
def test_a_schedule_holds_at_the_head(model, backend):
    v, schedule = SteeringVector({"lm_head": torch.linspace(-5, 5, 37).double()}), [1.0, 0.0, -2.0, 0.5]
    with added(model, "lm_head", lambda h, n: v["lm_head"] * schedule[n]):
        want = model.generate(PROMPT, **OPTIONS)
    with Steerer(model, v, c=lambda step: schedule[step], backend=backend):
        assert torch.equal(model.generate(PROMPT, **OPTIONS), want)


@every_backend
@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_a_steerer_of_the_inner_model_works_or_says_what_to_do(model, backend, positions):
    v = 3 * torch.linspace(-1, 1, 16).double()
    flags_of = passes(positions, 5, 3)
    with added(model, SITE, lambda h, n: torch.tensor(flags_of[n]).double()[None, :, None] * v):
        want = model.generate(PROMPT, **OPTIONS)
    with Steerer(model.model, SteeringVector({"layers.0": v}), positions=positions, backend=backend, strict=False):
        right_or_refused(lambda: model.generate(PROMPT, **OPTIONS), want)


def test_a_module_that_has_a_generate_of_another_kind_is_left_alone():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(2, 2)

        def generate(self, seed, *, size=2):
            return torch.randn(size, 2, generator=torch.Generator().manual_seed(seed))

        def forward(self, x):
            return self.b(x) + self.generate(0)

    model = Noise()
    plain = model(torch.zeros(2, 2))
    with Steerer(model, SteeringVector({"b": torch.ones(2)})):
        torch.testing.assert_close(model(torch.zeros(2, 2)), plain + 1)
        assert torch.equal(model.generate(3), Noise().generate(3))
