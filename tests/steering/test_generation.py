"""Generated text: positions, gates and schedules mean the same tokens, whatever a forward pass computes.

The truth is a loop of full passes, one row at a time without pads, with a hook that adds by a mask made by hand.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from actsteer import And, Not, PositionsError, ProjectionAbove, Soft, Steerer, SteeringVector, VectorBank
from tests.zoo import normal

pytest.importorskip("transformers")

SITE, D, NEW = "model.layers.0", 16, 6
V = SteeringVector({SITE: 2 * normal(D, seed=2)})
IDS = torch.tensor([[0, 0, 5, 9, 4, 22], [0, 7, 7, 3, 12, 5], [3, 8, 8, 20, 11, 30]])
MASK = (IDS > 0).long()
PLACES = (MASK.cumsum(1) - 1).clamp(min=0)
CHOSEN = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0]]).bool()


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).double().eval()


def generate(model, ids=IDS, mask=MASK, **options):
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)


@torch.no_grad()
def truth(model, amounts):
    """Greedy tokens of every row alone; `amounts(n, length, row)` is c at each of `length` tokens, n in the prompt."""
    rows = []
    for row, (ids, mask) in enumerate(zip(IDS, MASK, strict=True)):
        text = ids[mask.bool()][None]
        n = text.shape[1]
        for _ in range(NEW):
            c = torch.tensor([float(x) for x in amounts(n, text.shape[1], row)], dtype=torch.float64)
            handle = model.model.layers[0].register_forward_hook(
                lambda m, a, out, c=c: out + c[None, :, None] * V[SITE]
            )
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            handle.remove()
        rows.append(torch.cat([ids[~mask.bool()], text[0]]))
    return torch.stack(rows)


def at(function):
    """1 at the tokens i of a text with a prompt of n where `function(i, n)`."""
    return lambda n, length, row: [function(i, n) for i in range(length)]


POSITIONS = {
    "default": (None, at(lambda i, n: True)),
    "all": ("all", at(lambda i, n: True)),
    "prompt": ("prompt", at(lambda i, n: i < n)),
    "generated": ("generated", at(lambda i, n: i >= n)),
    "last": ("last", at(lambda i, n: i == n - 1)),
    "first": (0, at(lambda i, n: i == 0)),
    "negative": (-2, at(lambda i, n: i == n - 2)),
    "list": ([0, -1, 3], at(lambda i, n: i in (0, n - 1, 3))),
    "beyond the prompt": (7, at(lambda i, n: i == 7)),
    "first n": (slice(3), at(lambda i, n: i < 3)),
    "after n": (slice(2, None), at(lambda i, n: i >= 2)),
    "from the end": (slice(-2, None), at(lambda i, n: i >= n - 2)),
    "steps": (slice(1, 9, 3), at(lambda i, n: i in (1, 4, 7))),
    "mask": (CHOSEN, lambda n, length, row: [*CHOSEN[row][6 - n :].tolist(), *[False] * (length - n)]),
}
MODES = {
    "cache": {},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.case(39, 40)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("positions", "amounts"), POSITIONS.values(), ids=POSITIONS)
def test_positions_are_those_of_the_text(model, positions, amounts, mode):
    expected = truth(model, amounts)
    with Steerer(model, V, positions=positions):
        assert torch.equal(generate(model, **mode), expected)
    assert torch.equal(generate(model), truth(model, at(lambda i, n: False)))
    assert "generate" not in model.__dict__ and "prepare_inputs_for_generation" not in model.__dict__


@pytest.mark.case(39, 40)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_callable_sees_the_whole_text(model, mode):
    even = lambda batch: batch["input_ids"] % 2 == 0  # noqa: E731
    with Steerer(model, V, positions=even):
        if "prefill_chunk_size" in mode:
            with pytest.raises(PositionsError, match="chunks"):
                generate(model, **mode)
            return
        steered = generate(model, **mode)
    with Steerer(model, V, positions=lambda batch: torch.zeros_like(batch["input_ids"], dtype=torch.bool)):
        assert torch.equal(generate(model, **mode), truth(model, at(lambda i, n: False)))
    with Steerer(model, V, positions=even):
        assert torch.equal(generate(model, use_cache=False), steered)
    assert not torch.equal(steered, generate(model))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("where", [None, slice(1, None)], ids=["everywhere", "after one"])
def test_a_schedule_is_of_the_step_in_which_a_token_is_fed(model, mode, where):
    schedule = [1.5, 0.0, 2.0, -1.0, 0.5, 3.0]
    c = at(lambda i, n: schedule[max(0, i - n + 1)] * (where is None or i >= 1))
    expected = truth(model, c)
    with Steerer(model, V, c=lambda step: schedule[step], positions=where):
        assert torch.equal(generate(model, **mode), expected)


GATES = {
    "sequence": ProjectionAbove(V, 0.0),
    "token": ProjectionAbove(V, 0.0, per="token"),
    "soft": Soft(ProjectionAbove(V, 0.0, per="token"), width=2.0),
    "both": And(ProjectionAbove(V, -1.0), Not(ProjectionAbove(V, 1.0, per="token"))),
}


@pytest.mark.case(39, 40)
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("positions", ["all", "generated", "prompt"])
def test_every_row_decides_for_itself(model, gate, positions):
    """A gate gives each row of a padded batch, with beams or not, what it gives that row alone, cached or not."""
    with Steerer(model, V, gate=gate, positions=positions):
        for options in ({}, {"num_beams": 3}):
            together = generate(model, **options)
            assert torch.equal(generate(model, use_cache=False, **options), together)
            for ids, mask, own in zip(IDS, MASK.bool(), together, strict=True):
                alone = generate(model, ids[mask][None], mask[mask][None].long(), **options)
                assert torch.equal(alone[0], own[int((~mask).sum()) :])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("positions", [None, "last", "generated", CHOSEN], ids=["all", "last", "generated", "mask"])
def test_beams_have_the_positions_and_the_strength_of_their_row(model, options, positions):
    c = torch.tensor([0.0, 1.0, 1.5])
    with Steerer(model, V, c=c, positions=positions):
        together = generate(model, **options).view(3, -1, 6 + NEW)
    for row, own in enumerate(together):
        single = positions[row : row + 1] if isinstance(positions, torch.Tensor) else positions
        with Steerer(model, V, c=float(c[row]), positions=single):
            alone = generate(model, IDS[row : row + 1], MASK[row : row + 1], **options)
        assert torch.equal(alone, own)


@pytest.mark.parametrize("positions", [None, "prompt", "generated", "last", slice(7, 10)], ids=str)
def test_tokens_that_are_looked_up_count_as_generated(model, positions):
    ids = torch.tensor([[5, 9, 4, 5, 9, 4, 5, 9]])
    no_token = model.config.vocab_size  # transformers 5.9 looks for an end in the text
    with Steerer(model, V, positions=positions):
        plain = generate(model, ids, torch.ones_like(ids))
        looked_up = generate(model, ids, torch.ones_like(ids), prompt_lookup_num_tokens=3, eos_token_id=no_token)
    assert torch.equal(looked_up, plain)


@pytest.mark.parametrize("positions", [None, "prompt", "generated", "last"], ids=str)
def test_embeddings_may_be_the_prompt(model, positions):
    with Steerer(model, V, positions=positions):
        expected = generate(model)[:, IDS.shape[1] :]
        embeddings = model.get_input_embeddings()(IDS)
        options = {"max_new_tokens": NEW, "do_sample": False}
        assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=MASK, **options), expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mask", [None, torch.ones_like(IDS)], ids=["no mask", "ones"])
@pytest.mark.parametrize("positions", [None, "prompt", "generated", "last", 5, 6, 7, slice(2, 8)], ids=str)
def test_embeddings_without_pads_may_be_the_prompt(model, positions, mask, use_cache):
    """Then no mask tells how long it is, and no ids stand for it."""
    embeddings, options = model.get_input_embeddings()(IDS), {"max_new_tokens": NEW, "do_sample": False}
    options |= {"pad_token_id": 0, "use_cache": use_cache}
    for c in (1.0, lambda step: 1.0 + step):
        with Steerer(model, V, positions=positions, c=c):
            expected = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)[:, IDS.shape[1] :]
            assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("positions", ["all", "generated", "last", 0, slice(7, None)], ids=str)
def test_going_on_from_a_cache_is_a_longer_prompt(model, positions):
    """All that is there when `generate` is called is its prompt."""
    with Steerer(model, V, positions=positions):
        expected = generate(model)
    begun = positions if positions in ("all", 0) else slice(0, 0)
    with torch.no_grad(), Steerer(model, V, positions=begun):
        cache = model(IDS[:, :4], attention_mask=MASK[:, :4], position_ids=PLACES[:, :4]).past_key_values
    with Steerer(model, V, positions=positions):
        assert torch.equal(generate(model, past_key_values=cache), expected)


# --- where positions cannot be known ---------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("positions", ["prompt", "generated", "last", -1, slice(-2, None), CHOSEN[2:, :3]], ids=str)
def test_a_loop_by_hand_cannot_tell_where_the_prompt_ended(model, positions):
    with Steerer(model, V, positions=positions):
        cache = model(IDS[2:, :3]).past_key_values
        with pytest.raises(PositionsError, match=r"past_key_values.*generate"):
            model(IDS[2:, 3:], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, "all", 1, [0, 4], slice(2, 5)], ids=str)
def test_a_loop_by_hand_knows_positions_from_the_start(model, positions):
    with Steerer(model, V, positions=positions):
        whole = model(IDS, attention_mask=MASK, position_ids=PLACES).logits
        cache = model(IDS[:, :4], attention_mask=MASK[:, :4], position_ids=PLACES[:, :4]).past_key_values
        rest = model(IDS[:, 4:], attention_mask=MASK, position_ids=PLACES[:, 4:], past_key_values=cache).logits
    real = MASK.bool()[:, 4:]
    torch.testing.assert_close(rest[real], whole[:, 4:][real])


# --- what is left behind ---------------------------------------------------------------------------------------------
def test_a_failure_leaves_nothing_behind(model):
    def broken(step):
        if step == 3:
            raise RuntimeError("stop")
        return 1.0

    before = dict(model.__dict__)
    plain = generate(model)
    with pytest.raises(RuntimeError, match="stop"), Steerer(model, V, c=broken):
        generate(model)
    assert model.__dict__.keys() == before.keys()
    assert torch.equal(generate(model), plain)


@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_steerers_may_leave_in_any_order(model):
    plain = generate(model)
    first, second = Steerer(model, V, positions="generated"), Steerer(model, -1 * V, positions="prompt")
    first.attach()
    second.attach()
    both = generate(model)
    first.detach()
    with Steerer(model, -2 * V, positions="prompt"):
        pass
    second_alone = generate(model)
    second.detach()
    assert torch.equal(generate(model), plain)
    with Steerer(model, -1 * V, positions="prompt"):
        assert torch.equal(generate(model), second_alone)
        with Steerer(model, V, positions="generated"):
            assert torch.equal(generate(model), both)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_steered_model_generates_unsteered(model, copied):
    plain = generate(model)
    with Steerer(model, V, positions="generated"):
        twin = copied(model)
        assert not torch.equal(generate(model), plain)
        assert torch.equal(generate(twin), plain)
    assert torch.equal(generate(twin), plain) and "generate" not in twin.__dict__


def test_a_wrapped_model_generates_steered(model):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    v = SteeringVector({f"inner.{SITE}": V[SITE]})
    expected = truth(model, POSITIONS["generated"][1])
    with Steerer(Wrapper(model), v, positions="generated"):
        assert torch.equal(generate(model), expected)


def test_concepts_have_positions_of_their_own(model):
    bank = VectorBank({"a": V, "b": -1.5 * V, "c": 0.5 * V})
    positions = {"a": "prompt", "b": "generated"}
    expected = truth(model, at(lambda i, n: (1.0 if i < n else -1.5) + 0.5))
    with Steerer(model, bank, positions=positions):
        assert torch.equal(generate(model), expected)
