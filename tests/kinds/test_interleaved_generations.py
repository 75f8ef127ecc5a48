"""Generations in turns: each has its own prompt, pads, decisions and steps, whichever began last.

The kind of fault: of two streams in turns, the one begun last decides for both.
"""

import asyncio
import threading

import pytest
import torch
from torch import nn

from actsteer import ActsteerError, ProjectionAbove, Steerer, SteeringVector
from tests.kinds.by_hand import Text, every_backend, moved

BIG = 1000.0


class Cache:
    def __init__(self, n):
        self.n = n

    def get_seq_length(self):
        return self.n


class Writer(Text):
    """Gives, token for token, which of the tokens that it computes were steered."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        return self.b(self.a(self.e(input_ids)))

    def generate(self, input_ids, attention_mask=None, steps=3):
        return list(self.generate_stream(input_ids, attention_mask=attention_mask, steps=steps))

    def generate_stream(self, input_ids, attention_mask=None, steps=3):
        n, fed, mask = 0, input_ids, attention_mask
        for _ in range(steps):
            out = self(fed, attention_mask=mask, past_key_values=Cache(n) if n else None)
            yield moved(out, Text().e(fed))
            n, fed = n + fed.shape[1], input_ids[:, :1]
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


ONE, FOUR = torch.ones(1, 1, dtype=torch.long), torch.full((1, 4), 2)
V = SteeringVector({"b": torch.ones(2)})


def at(positions, prompt, length=3):
    """The passes of a stream with this prompt, of one row."""
    inside = {
        "prompt": lambda i: i < prompt,
        "generated": lambda i: i >= prompt,
        "last": lambda i: i == prompt - 1,
        0: lambda i: i == 0,
        None: lambda i: True,
    }[positions]
    steps = [range(prompt), *[range(i, i + 1) for i in range(prompt, prompt + length - 1)]]
    return [[[int(inside(i)) for i in step]] for step in steps]


PLACES = pytest.mark.parametrize("positions", [None, "prompt", "generated", "last", 0], ids=str)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def in_turns(*streams):
    """Each stream's passes, asked for one after the other."""
    return [list(passes) for passes in zip(*zip(*streams, strict=True), strict=True)]


@every_backend
@PLACES
@pytest.mark.parametrize("prompts", [(ONE, FOUR), (FOUR, ONE), (FOUR, FOUR[:, :2], ONE)], ids=["1 4", "4 1", "4 2 1"])
def test_streams_in_turns_have_each_its_own_prompt(backend, positions, prompts):
    model = Writer()
    with Steerer(model, V, positions=positions, backend=backend):
        got = in_turns(*[model.generate_stream(prompt) for prompt in prompts])
    assert got == [at(positions, prompt.shape[1]) for prompt in prompts]


@every_backend
@PLACES
def test_a_whole_generation_between_two_steps_of_a_stream(backend, positions):
    model = Writer()
    with Steerer(model, V, positions=positions, backend=backend):
        stream, got = model.generate_stream(ONE), []
        for passes in stream:
            got.append(passes)
            assert model.generate(FOUR) == at(positions, 4)
    assert got == at(positions, 1)


@every_backend
@PLACES
def test_a_plain_pass_between_two_steps_of_a_stream_is_a_prompt(backend, positions):
    model = Writer()
    with Steerer(model, V, positions=positions, backend=backend):
        got = []
        for passes in model.generate_stream(FOUR):
            got.append(passes)
            assert moved(model(FOUR), Text().e(FOUR)) == at(positions, 4)[0]
    assert got == at(positions, 4)


@every_backend
@PLACES
@pytest.mark.parametrize("left", ["closed", "dropped", "kept", "raised"])
def test_a_stream_that_is_left_early_leaves_nothing(backend, positions, left):
    model = Writer()
    with Steerer(model, V, positions=positions, backend=backend):
        stream = model.generate_stream(FOUR)
        next(stream), next(stream)
        if left == "closed":
            stream.close()
        elif left == "dropped":
            del stream
        elif left == "raised":
            with pytest.raises(RuntimeError, match="stop"):
                stream.throw(RuntimeError("stop"))
        assert moved(model(FOUR), Text().e(FOUR)) == at(positions, 4)[0]
        assert model.generate(ONE) == at(positions, 1)
        if left == "kept":
            assert next(stream) == at(positions, 4)[2]
    assert "generate_stream" not in vars(model) and "generate" not in vars(model)


@every_backend
def test_streams_have_each_their_own_rows_and_pads(backend):
    model = Writer()
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with Steerer(model, V, backend=backend):
        padded, whole = in_turns(model.generate_stream(ids, attention_mask=mask), model.generate_stream(ids))
    assert padded == [mask.tolist(), [[1], [1]], [[1], [1]]]
    assert whole == [[[1] * 3] * 2, [[1], [1]], [[1], [1]]]


@every_backend
def test_a_gate_decides_once_for_each_stream(backend):
    """From its prompt; the tokens that follow are those of the other side."""
    model = Writer()
    low, high = torch.tensor([[8, 0, 0, 0]]), torch.tensor([[0, 8, 8, 8]])  # each goes on with its first token
    scores = [model.e(text)[..., 0].mean().item() for text in (low, high)]
    gate = ProjectionAbove(SteeringVector({"e": torch.tensor([1.0, 0.0])}), sum(scores) / 2)
    with Steerer(model, V, gate=gate, backend=backend):
        for order in ((low, high), (high, low)):
            got = in_turns(*[model.generate_stream(text) for text in order])
            assert got == [[[[fires] * 4], [[fires]], [[fires]]] for fires in [int(text is high) for text in order]]


@pytest.mark.parametrize("backend", ["auto", "tap", "hook"])
def test_a_schedule_counts_the_steps_of_its_stream(backend):
    model = Writer()
    with Steerer(model, V, c=lambda step: float(step == 1), backend=backend):
        first = model.generate_stream(FOUR)
        got = [next(first), next(first)]
        second = model.generate_stream(ONE)
        others = [next(second)]
        got.append(next(first))
        others += list(second)
    assert got == [[[0] * 4], [[1]], [[0]]] and others == [[[0]], [[1]], [[0]]]


@every_backend
def test_strengths_per_row_are_those_of_each_stream_s_rows(backend):
    model, ids = Writer(), torch.ones(3, 2, dtype=torch.long)
    with Steerer(model, V, c=torch.tensor([0.0, 1.0, 2.0]), backend=backend):
        got = in_turns(model.generate_stream(ids), model.generate_stream(ids[:, :1]))
    assert got[0][0] == [[0, 0], [1, 1], [1, 1]] and got[1][0] == [[0], [1], [1]]
    assert got[0][1:] == got[1][1:] == [[[0], [1], [1]]] * 2


@every_backend
@pytest.mark.parametrize("positions", ["prompt", "generated"])
@pytest.mark.filterwarnings("ignore:positions=.generated.")
def test_a_stream_that_began_in_the_block_is_plain_after_it(backend, positions):
    model = Writer()
    with Steerer(model, V, positions=positions, backend=backend):
        stream = model.generate_stream(FOUR)
        assert next(stream) == at(positions, 4)[0]
    assert list(stream) == [[[0]], [[0]]]
    with Steerer(model, V, positions=positions, backend=backend):
        assert model.generate(ONE) == at(positions, 1)


@every_backend
@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_tasks_that_stream_in_turns(backend, positions):
    """As a server does: one coroutine a request."""
    model = Writer()

    async def request(prompt):
        found = []
        for passes in model.generate_stream(prompt):
            found.append(passes)
            await asyncio.sleep(0)
        return found

    async def main():
        return await asyncio.gather(request(ONE), request(FOUR), request(FOUR[:, :2]))

    with Steerer(model, V, positions=positions, backend=backend):
        assert asyncio.run(main()) == [at(positions, n) for n in (1, 4, 2)]


@every_backend
@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_a_stream_that_another_thread_carries_on(backend, positions):
    """A generator may be begun in one thread and asked for more in another."""
    model, got, refused = Writer(), [], []

    def carry_on(stream):
        with torch.no_grad():
            try:
                got.extend(stream)
            except ActsteerError:
                refused.append(True)

    with Steerer(model, V, positions=positions, backend=backend):
        stream = model.generate_stream(FOUR)
        first = next(stream)
        assert model.generate(ONE) == at(positions, 1)
        thread = threading.Thread(target=carry_on, args=(stream,))
        thread.start()
        thread.join(20)
    assert refused or [first, *got] == at(positions, 4)


# --- transformers ----------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_two_generations_of_transformers_whose_passes_take_turns(backend, positions):
    """A streamer that waits for the other thread's token; each thread makes its pass when it is its turn."""
    pytest.importorskip("transformers")
    from tests.zoo import llama

    model, turn = llama(eos_token_id=None), threading.Barrier(2, timeout=20)
    v = SteeringVector({"model.layers.0": 3 * torch.linspace(-1, 1, 16).double()})
    texts = [torch.tensor([[5, 9, 4, 22, 7]]), torch.tensor([[8, 3]])]

    class Turns:
        def put(self, value):
            turn.wait()

        def end(self):
            pass

    def run(text, streamer=None):
        return model.generate(text, max_new_tokens=4, do_sample=False, eos_token_id=None, streamer=streamer)

    with Steerer(model, v, positions=positions, backend=backend):
        want, got = [run(text) for text in texts], {}
        threads = [threading.Thread(target=lambda n=n: got.update({n: run(texts[n], Turns())})) for n in range(2)]
        [thread.start() for thread in threads]
        [thread.join(30) for thread in threads]
    assert all(torch.equal(got[n], want[n]) for n in range(2))
    assert not torch.equal(want[0], run(texts[0])) or not torch.equal(want[1], run(texts[1]))


@every_backend
@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_a_generation_in_a_streamer_of_another(backend, positions):
    """The streamer of one generation writes a text of its own, each time that it is given a token."""
    pytest.importorskip("transformers")
    from tests.zoo import llama

    model = llama(eos_token_id=None)
    v = SteeringVector({"model.layers.0": 3 * torch.linspace(-1, 1, 16).double()})
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    outer, inner = torch.tensor([[5, 9, 4, 22, 7]]), torch.tensor([[8, 3]])

    class Writes:
        def __init__(self):
            self.texts = []

        def put(self, value):
            self.texts.append(model.generate(inner, **options))

        def end(self):
            pass

    with Steerer(model, v, positions=positions, backend=backend):
        want, streamer = [model.generate(text, **options) for text in (outer, inner)], Writes()
        assert torch.equal(model.generate(outer, streamer=streamer, **options), want[0])
    assert len(streamer.texts) == 4 and all(torch.equal(text, want[1]) for text in streamer.texts)


def test_a_module_without_streams_is_not_given_one():
    model = nn.Sequential(nn.Linear(2, 2))
    with Steerer(model, SteeringVector({"0": torch.ones(2)})):
        assert not hasattr(model, "generate_stream")
        model(torch.ones(1, 2))
