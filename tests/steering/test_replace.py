"""Replace with values of single tokens: the truth is a hook that copies rows by hand, one text at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from actsteer import (
    BatchError,
    PositionsError,
    ProjectionAbove,
    Replace,
    ShapeError,
    Steerer,
    Steering,
    SteeringVector,
    record,
)
from tests.steering.test_generation import IDS, MASK, MODES, NEW, SITE, D, generate
from tests.zoo import CASES, bits, cnn, identity, llama, normal

LENGTHS = [int(own.sum()) for own in MASK]
LINE = identity(dtype=torch.float64)
OTHER = torch.tensor([[0, 0, 8, 2, 4, 9], [0, 3, 25, 3, 6, 6], [4, 8, 1, 20, 14, 2]])
SOURCE = {"input_ids": OTHER, "attention_mask": MASK}


@pytest.fixture(scope="module")
def model():
    return llama(vocab_size=31, num_hidden_layers=2, eos_token_id=None, pad_token_id=0).double()


# --- where values go -------------------------------------------------------------------------------------------------
@st.composite
def indices(draw, length, count, rows):
    """`count` different tokens of a text of this length, from either end: the same for all rows, or each row's."""
    several = st.lists(st.integers(0, length - 1), min_size=count, max_size=count, unique=True)
    signed = several.map(lambda own: [i - length if draw(st.booleans()) else i for i in own])
    return draw(signed | st.lists(signed, min_size=rows, max_size=rows))


@given(data=st.data())
@settings(max_examples=60)
def test_the_tokens_i_of_a_text_go_to_the_tokens_j_of_another_of_any_length(data):
    long, short, rows = data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6)), data.draw(st.integers(1, 3))
    count = data.draw(st.integers(1, min(long, short)))
    i, j = data.draw(indices(long, count, rows)), data.draw(indices(short, count, rows))
    source, target = normal(rows, long, 3, seed=1), normal(rows, short, 3, seed=2)
    expected = target.clone()
    for row in range(rows):
        own = [part if isinstance(part[0], int) else part[row] for part in (i, j)]
        for here, there in zip(*own, strict=True):
            expected[row, there] = source[row, here]
    with Steerer(LINE, Replace(record(LINE, source, sites="0", positions=i)), positions=j):
        assert torch.equal(LINE(target), expected)


@pytest.mark.parametrize("positions", ["all", "last", "prompt", 1, [1, 0], slice(1, 3), [[0], [1], [-1]]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_recorded_of_a_padded_batch_is_put_back_where_it_was(model, side, positions):
    ids, other, mask = (own if side == "left" else own.flip(1) for own in (IDS, OTHER, MASK))
    kept = record(model, [{"input_ids": other, "attention_mask": mask}], sites=SITE, positions=positions)
    batch = [{"input_ids": ids, "attention_mask": mask}]
    plain = record(model, batch, sites=SITE, keep_shape=True)[SITE]
    with Steerer(model, Replace(kept), positions=positions):
        steered = record(model, batch, sites=SITE, positions=positions)[SITE]
        whole = record(model, batch, sites=SITE, keep_shape=True)[SITE]
    assert torch.equal(steered, kept[SITE])
    assert int((whole != plain).any(dim=-1).sum()) == len(steered)  # and nothing else


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_activation_of_any_layout_takes_the_rows_that_were_recorded_there(case):
    net, x = case.build(), case.inputs()
    other = x.flip(0) * 2 - 1
    axes = {"row_axis": {case.site: case.rows}}
    for keep_shape in (False, True):
        kept = record(net, [other], sites=case.site, keep_shape=keep_shape, **axes)
        with Steerer(net, Replace(kept), **axes):
            again = record(net, [x], sites=case.site, keep_shape=keep_shape, **axes)
        assert torch.equal(again[case.site], kept[case.site])


def test_the_pixels_of_a_picture_are_rows():
    net, x = cnn(), normal(2, 3, 4, 4)
    kept = record(net, x.flip(0), sites="0")["0"]
    assert kept.ndim == 2 and len(kept) > 2
    with Steerer(net, Replace({"0": kept})), torch.no_grad():
        assert torch.equal(net(x), net(x.flip(0)))


class Line(nn.Module):
    """The tokens of all rows lie in a line at its site."""

    def __init__(self):
        super().__init__()
        self.site = nn.Identity()

    def forward(self, input_ids, attention_mask=None):
        x = input_ids.double()[..., None].expand(*input_ids.shape, 3)
        return self.site(x.flatten(0, 1)).reshape(x.shape)


def test_tokens_in_a_line_are_those_of_their_rows():
    net, batch = Line(), {"input_ids": IDS, "attention_mask": MASK}
    for positions in ("all", [1, -1], [[0], [2], [1]]):
        with Steerer(net, Replace(record(net, [SOURCE], sites="site", positions=positions)), positions=positions):
            again = record(net, [batch], sites="site", positions=positions)
        assert torch.equal(again["site"], record(net, [SOURCE], sites="site", positions=positions)["site"])
    with Steerer(net, Replace({"site": normal(3, 6, 3)})), pytest.raises(ShapeError, match=r"has shape \(18, 3\)"):
        net(**batch)


def test_compiled_it_is_the_same():
    net, other = Line(), OTHER[:, 1:]
    torch.compiler.reset()
    for source, target in (([1, -1], [2, 0]), ([[0], [2], [1]], [[1], [-1], [0]]), (slice(2), slice(-2, None))):
        kept = record(net, [{"input_ids": other}], sites="site", positions=source)
        with Steerer(net, Replace(kept), positions=target):
            compiled = torch.compile(net, backend="eager", fullgraph=True)
            assert torch.equal(compiled(IDS, MASK), net(IDS, MASK))
            assert not torch.equal(compiled(IDS, MASK), IDS[..., None].expand(3, 6, 3))
    torch.compiler.reset()


def test_compiled_another_number_of_values_is_in_no_wrong_place():
    torch.compiler.reset()
    x = normal(1, 4, 3)
    with Steerer(LINE, Replace({"0": normal(3, 3)}), positions=[0, 1]):
        found = torch.compile(LINE, backend="eager", fullgraph=True)(x)
        with pytest.raises(ShapeError, match="3 values for 2 rows"):
            LINE(x)
    assert bool(found[:, :2].isnan().all()) and torch.equal(found[:, 2:], x[:, 2:])
    torch.compiler.reset()


def test_texts_that_are_packed_into_a_row_have_indices_of_their_own(model):
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    other, ids = (packed | {"input_ids": own[2:]} for own in (OTHER, IDS))
    plain = record(model, [ids], sites=SITE)[SITE]
    kept = record(model, [other], sites=SITE, positions=[[0, 1], [2, 1]])[SITE]
    with Steerer(model, Replace({SITE: kept}), positions=[[-1, 0], [0, 1]]):
        seen = record(model, [ids], sites=SITE)[SITE]
    expected = plain.clone()
    expected[[2, 0, 3, 4]] = kept
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("positions", [[1, 4], [4, 1], [[1, 4], [4, 1], [4, 1]]], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_a_text_that_is_too_short_for_an_index_has_no_value_of_it(model, positions, packed):
    lengths, values = [3, 5, 6], normal(5, D)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    ids, batch = OTHER.flip(1), {"input_ids": OTHER.flip(1), "attention_mask": mask.long()}
    if packed:
        batch = {"input_ids": ids[mask][None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    plain = record(model, [batch], sites=SITE)[SITE]
    with Steerer(model, Replace({SITE: values}), positions=positions):
        found = record(model, [batch], sites=SITE)[SITE]
    expected, begins, several = plain.clone(), [0, 3, 8], isinstance(positions[0], list)
    wanted = [
        begins[row] + index
        for row in range(3)
        for index in (positions[row] if several else positions)
        if index < lengths[row]
    ]
    expected[wanted] = values
    assert torch.equal(found, expected)


def test_a_token_that_is_meant_twice_has_one_value():
    x, values = normal(1, 3, 3), normal(1, 3, seed=2)
    with Steerer(LINE, Replace({"0": values}), positions=[1, -2]):
        assert torch.equal(LINE(x)[:, 1], values)
    with (
        Steerer(LINE, Replace({"0": normal(2, 3)}), positions=[1, -2]),
        pytest.raises(ShapeError, match="2 values for 1"),
    ):
        LINE(x)


def test_heads_beside_the_tokens_are_rows_of_their_token():
    source, target = normal(2, 4, 3, 5, seed=1), normal(2, 3, 3, 5, seed=2)  # rows, tokens, heads, features
    where = {"axis": -1, "token_axis": 1}
    kept = record(LINE, source, sites="0", positions=[3, 1], **where)
    with Steerer(LINE, Replace(kept), positions=[0, 2], **where):
        seen = LINE(target)
    assert torch.equal(seen[:, [0, 2]], source[:, [3, 1]]) and torch.equal(seen[:, 1], target[:, 1])


def test_its_own_activations_change_nothing_and_strength_zero_nothing_at_all():
    x = normal(2, 4, 3)
    x[0, 1] = torch.tensor([0.0, -0.0, 1.0])
    kept = record(LINE, x, sites="0", positions=[[1, 2], [0, 3]])
    with Steerer(LINE, Replace(kept), positions=[[1, 2], [0, 3]]) as steerer:
        assert torch.equal(bits(LINE(x)), bits(x))
        steerer.c = 0.0
        assert torch.equal(bits(LINE(-x)), bits(-x))
        steerer.c = torch.tensor([0.5, 0.0])
        torch.testing.assert_close(LINE(-x)[0], torch.where(torch.tensor([0, 1, 1, 0])[:, None] > 0, 0, -x[0]))
        assert torch.equal(LINE(-x)[1], -x[1])


def test_a_gate_decides_which_rows_are_patched_and_no_value_moves():
    x, v = normal(2, 3, 3), SteeringVector({"0": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)})
    target = torch.stack([-x[0].abs(), x[1].abs()])
    with Steerer(LINE, Replace(record(LINE, x, sites="0", positions=[2])), positions=[0], gate=ProjectionAbove(v, 0.0)):
        seen = LINE(target)
    assert torch.equal(seen[0], target[0]) and torch.equal(seen[1, 0], x[1, 2])


# --- and then generate -----------------------------------------------------------------------------------------------
@torch.no_grad()
def truth(model, places):
    """Greedy tokens of every row alone, where `places(row)` of its prompt have the activations of the source's."""
    rows = []
    for row, (ids, mask, other) in enumerate(zip(IDS, MASK, OTHER, strict=True)):
        real, seen = mask.bool(), []
        handle = model.model.layers[0].register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0]))
        model(other[real][None], use_cache=False)
        handle.remove()
        text = ids[real][None]
        for _ in range(NEW):

            def put(module, args, out, source=seen[0], row=row):
                out = out.clone()
                for there, here in places(row):
                    out[0, there] = source[here]
                return out

            handle = model.model.layers[0].register_forward_hook(put)
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            handle.remove()
        rows.append(torch.cat([ids[~real], text[0]]))
    return torch.stack(rows)


PATCHED = {
    "prompt": ("prompt", "prompt", lambda row: [(k, k) for k in range(LENGTHS[row])]),
    "last": ("last", "last", lambda row: [(LENGTHS[row] - 1, LENGTHS[row] - 1)]),
    "elsewhere": ([2, -1], [-2, 0], lambda row: [(LENGTHS[row] - 2, 2), (0, LENGTHS[row] - 1)]),
    "each row": ([[1], [0], [-3]], [[3], [-1], [2]], lambda row: [((3, LENGTHS[row] - 1, 2)[row], (1, 0, 3)[row])]),
    "a slice": (slice(1, 3), slice(-2, None), lambda row: [(LENGTHS[row] - 2, 1), (LENGTHS[row] - 1, 2)]),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("here", "there", "places"), PATCHED.values(), ids=PATCHED)
def test_the_prompt_is_patched_and_what_follows_is_left_alone(model, here, there, places, mode):
    kept = record(model, [SOURCE], sites=SITE, positions=here)
    if isinstance(there, slice):  # which goes on into what is generated
        message = "go on into what is generated; give positions='prompt'"
        with Steerer(model, Replace(kept), positions=there), pytest.raises(ShapeError, match=message):
            generate(model, **mode)
        there = [-2, -1]
    with Steerer(model, Replace(kept), positions=there):
        patched = generate(model, **mode)
    assert torch.equal(patched, truth(model, places))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_values_in_the_shape_of_the_prompt_are_patched_and_then_it_generates(model, mode):
    kept = record(model, [SOURCE], sites=SITE, keep_shape=True)
    assert kept[SITE].shape == (3, 6, D)
    ends = lambda row: [(0, 0), (LENGTHS[row] - 1,) * 2]  # noqa: E731
    for positions, places in (("prompt", PATCHED["prompt"][2]), ([0, -1], ends)):
        with Steerer(model, Replace(kept), positions=positions):
            patched = generate(model, **mode)
        assert torch.equal(patched, truth(model, places))


def test_every_beam_of_a_row_has_its_values(model):
    kept = record(model, [SOURCE], sites=SITE, positions=[[1], [2], [0]])
    with Steerer(model, Replace(kept), positions=[[2], [0], [1]]):
        together = generate(model, num_beams=3)
    for row in range(3):
        one = Replace({SITE: kept[SITE][row]})
        with Steerer(model, one, positions=(2, 0, 1)[row]):
            alone = generate(model, IDS[row : row + 1], MASK[row : row + 1], num_beams=3)
        assert torch.equal(together[row], alone[0])
    assert not torch.equal(together, generate(model, num_beams=3))


def test_one_row_for_all_goes_on_as_long_as_its_positions_do(model):
    with Steerer(model, Replace({SITE: torch.zeros(D)})):
        generate(model)


# --- what is refused -------------------------------------------------------------------------------------------------
def test_other_numbers_of_values_than_of_tokens_are_refused(model):
    kept = record(model, [SOURCE], sites=SITE, positions=[0, 1])[SITE]
    for values, positions, message in (
        (kept, 1, f"site '{SITE}': 6 values for 3 rows of the activation at positions=1"),
        (kept, [-1, 3], "6 values for 5 rows"),  # one token of the first row twice
        (kept[None], "prompt", r"shape \(1, 6, 16\), and at the whole prompt the activation has shape \(3, 6, 16\)"),
    ):
        with Steerer(model, Replace({SITE: values}), positions=positions), pytest.raises(ShapeError, match=message):
            generate(model)
    for values in (normal(5, 3), normal(2, 4, 3), normal(2, 1, 3, 3)):
        with Steerer(LINE, Replace({"0": values})), pytest.raises(ShapeError, match="values of shape"):
            LINE(normal(2, 3, 3))


def test_values_of_all_tokens_do_not_reach_into_what_is_generated(model):
    for kept in (record(model, [SOURCE], sites=SITE), record(model, [SOURCE], sites=SITE, keep_shape=True)):
        with Steerer(model, Replace(kept)), pytest.raises(ShapeError, match=r"a prompt of 6, and positions='all'"):
            generate(model)


def test_in_a_loop_of_the_users_own_the_end_of_the_prompt_is_not_known(model):
    from transformers import DynamicCache

    for positions in ("prompt", 2, [3], slice(1, 9)):
        kept, cache = record(model, [{"input_ids": OTHER}], sites=SITE, positions=positions), DynamicCache()
        with Steerer(model, Replace(kept), positions=positions), torch.no_grad():
            model(input_ids=IDS, past_key_values=cache)
            if isinstance(positions, int | list):  # they are not among the tokens that follow
                model(input_ids=IDS[:, :1], past_key_values=cache)
                continue
            with pytest.raises(PositionsError, match="cannot be told where the prompt ended"):
                model(input_ids=IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ([[0], [1, 2]], ShapeError, "as many indices for each row"),
        ([[0], []], TypeError, "or one for each row"),
        ([[0], 1], TypeError, "or one for each row"),
        ([[0], [True]], TypeError, "or one for each row"),
        ([[0], [2**40]], ValueError, "indices of at most"),
    ],
)
def test_lists_that_are_no_indices_of_rows_are_refused_before_anything_is_attached(positions, error, message):
    with pytest.raises(error, match=message):
        Steerer(LINE, Replace({"0": torch.zeros(3)}), positions=positions)
    with pytest.raises(error, match=message):
        record(LINE, normal(2, 3, 3), sites="0", positions=positions)


def test_indices_of_rows_fit_the_rows_and_their_texts():
    x = normal(2, 3, 3)
    for bad, error, message in (
        ([[0]], ShapeError, "indices for 1 rows against 2 rows"),
        ([[0], [3]], BatchError, "row 1 of the batch has 3 tokens, and 4 are needed"),
        ([[0], [-4]], BatchError, "row 1 of the batch has 3 tokens, and 4 are needed"),
    ):
        with pytest.raises(error, match=message):
            record(LINE, x, sites="0", positions=bad)


def test_a_value_with_positions_of_each_row_owns_them():
    rows = [[0, 1], [2, 0]]
    steering = Steering(Replace({"0": normal(4, 3)}), positions=rows)
    rows[0][0] = 2
    assert steering.positions == ((0, 1), (2, 0))
