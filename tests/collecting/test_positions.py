"""Positions: counted among the real tokens, wherever the pads are and however the activation lies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from actsteer import ActsteerError, BatchError, ShapeError, StatisticsError, collect, record
from tests.strategies import eighths
from tests.zoo import encoder, normal, recurrent, seeded

EIGHTHS = torch.arange(24.0).reshape(3, 4, 2) / 8
MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]])  # pads right, left, and in between
TOKENS = [row[own.bool()] for row, own in zip(EIGHTHS, MASK, strict=True)]


class Masked(nn.Module):
    """Takes a mask as language models do; "site" sees the sequence, "line" its tokens in a line."""

    def __init__(self):
        super().__init__()
        self.site, self.line, self.real, self.pooled = (nn.Identity() for _ in range(4))

    def forward(self, x, attention_mask=None):
        x = self.site(x)
        self.line(x.flatten(0, 1))
        self.real(x if attention_mask is None else x[attention_mask.bool()])
        return self.pooled(x[:, 0])


IDENTITY = nn.Sequential(nn.Identity())


def recorded(positions, *, site="site", model=None, batch=None):
    return record(model or Masked(), [(EIGHTHS, MASK) if batch is None else batch], sites=site, positions=positions)[
        site
    ]


def right_or_refused(run, expected):
    """Never silently wrong: the right answer, or an error of this library."""
    try:
        found = run()
    except ActsteerError:
        return
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


# --- among the real tokens -------------------------------------------------------------------------------------------
WANTED = {
    "all": ("all", lambda t: t),
    "last": ("last", lambda t: t[-1:]),
    "mean": ("mean", lambda t: t.mean(dim=0, keepdim=True)),
    "first": (0, lambda t: t[:1]),
    "second": (1, lambda t: t[1:2]),
    "last but one": (-2, lambda t: t[-2:-1]),
    "several in their order": ([-1, 0, 0], lambda t: t[[-1, 0, 0]]),
    "a tuple": ((1, 0), lambda t: t[[1, 0]]),
    "a slice": (slice(1, None), lambda t: t[1:]),
    "a slice from the end": (slice(-2, None), lambda t: t[-2:]),
    "every second": (slice(None, None, 2), lambda t: t[::2]),
    "an empty slice in some": (slice(2, 9), lambda t: t[2:9]),
}


@pytest.mark.parametrize(("positions", "wanted"), WANTED.values(), ids=WANTED.keys())
@pytest.mark.parametrize("site", ["site", "line"])
def test_positions_count_the_real_tokens_wherever_the_pads_are(positions, wanted, site):
    expected = torch.cat([wanted(own) for own in TOKENS])
    assert torch.allclose(recorded(positions, site=site), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("positions", "wanted"), WANTED.values(), ids=WANTED.keys())
def test_without_a_mask_every_token_is_real(positions, wanted):
    expected = torch.cat([wanted(row) for row in EIGHTHS])
    assert torch.equal(recorded(positions, batch=EIGHTHS), expected)


@given(st.data())
def test_it_does_not_matter_on_which_side_the_pads_are(data):
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    tokens = [data.draw(eighths(n, 2, dtype=torch.float32)) for n in lengths]
    positions = data.draw(st.sampled_from(["all", "last", "mean", 0, -1, [-1, 0], slice(0, 2), slice(-3, None)]))
    sides = []
    for left in (True, False):
        x, mask = torch.full((len(tokens), 5, 2), torch.nan), torch.zeros(len(tokens), 5, dtype=torch.int64)
        for row, own in enumerate(tokens):
            where = slice(5 - len(own), 5) if left else slice(len(own))
            x[row, where], mask[row, where] = own, 1
        sides.append(record(Masked(), [{"x": x, "attention_mask": mask}], sites="site", positions=positions)["site"])
    assert torch.equal(*sides)
    assert bool(sides[0].isfinite().all())


def test_pads_that_are_not_finite_do_not_count():
    x = torch.where(MASK[..., None].bool(), EIGHTHS, torch.inf)
    for positions in ("all", "mean", slice(None)):
        found = collect(Masked(), [(x, MASK)], sites="site", positions=positions, covariance=True)["site"]
        assert bool(found.covariance.isfinite().all())


MASKS = {
    "(S,)": torch.tensor([True, False, True, True]),
    "(B, S)": torch.tensor([[1, 0, 0, 1], [1, 1, 1, 0], [0, 0, 1, 1]]).bool(),
    "(B, S) of 0 and 1": torch.tensor([[1, 0, 0, 1], [1, 1, 1, 0], [0, 0, 1, 1]]),
    "(1, S) of 0 and 1": torch.tensor([[1, 0, 0, 1]], dtype=torch.uint8),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_a_mask_names_places_and_pads_are_still_left_out(mask):
    meant = mask.bool().expand(3, 4)
    both = meant & MASK.bool()
    assert torch.equal(recorded(mask), EIGHTHS[both])
    assert torch.equal(recorded(lambda batch: mask), EIGHTHS[both])
    assert torch.equal(recorded(mask, batch=EIGHTHS), EIGHTHS[meant])


def test_a_callable_sees_the_inputs_by_name():
    assert torch.equal(
        recorded(lambda inputs: inputs["x"][..., 0] >= 1, batch=(EIGHTHS,)), EIGHTHS[EIGHTHS[..., 0] >= 1]
    )


@pytest.mark.parametrize(
    "returned",
    [
        [True, False, True, False],
        torch.tensor([2, 1, 0]),
        torch.eye(3).long() * 2,
        torch.ones(3),
        "lsat",
        "generated",
        None,
        1.5,
    ],
)
def test_a_callable_that_makes_no_mask_is_refused(returned):
    square = torch.arange(18.0).reshape(3, 3, 2)
    with pytest.raises((TypeError, ValueError)):
        recorded(lambda batch: returned, batch=square)


@pytest.mark.parametrize("positions", [3, -4, [0, 3], [-4]])
def test_a_row_that_has_no_such_position_is_named(positions):
    with pytest.raises(BatchError, match=r"row 1 of the batch has 2 tokens|row 0 of the batch has 3"):
        recorded(positions)


@pytest.mark.parametrize("positions", ["last", "mean", 0])
def test_a_row_of_pads_alone_has_no_position_and_counts_nothing(positions):
    mask = MASK.clone()
    mask[2] = 0
    with pytest.raises(BatchError, match="row 2 of the batch has 0 tokens"):
        recorded(positions, batch=(EIGHTHS, mask))
    assert torch.equal(recorded("all", batch=(EIGHTHS, mask)), torch.cat(TOKENS[:2]))


def test_positions_that_no_row_has_are_refused():
    for run in (collect, record):
        with pytest.raises(StatisticsError, match="saw no rows"):
            run(Masked(), [EIGHTHS], sites="site", positions=slice(5, 9))


@pytest.mark.parametrize("positions", ["first", "generated", torch.tensor([0, 1]), True, [], [0.5], 1.5, [True]])
def test_what_is_no_position_is_refused_before_the_model_runs(positions):
    model = Masked()
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises((TypeError, ValueError)):
        recorded(positions, model=model)


def test_statistics_of_other_positions_do_not_merge():
    first, last = (collect(IDENTITY, EIGHTHS, sites="0", positions=own) for own in (0, -1))
    with pytest.raises(ValueError, match="in one way"):
        first.merge(last)


# --- however they lie ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("nested", "batch_first"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("site", ["layers.0", "layers.1", "layers.1.linear2", "layers.0.self_attn", ""])
@pytest.mark.filterwarnings("ignore")  # torch's, of nested tensors
def test_a_transformer_s_own_padding_mask_is_understood(nested, batch_first, site):
    model = encoder(batch_first=batch_first)
    model.enable_nested_tensor, model.use_nested_tensor = nested, nested
    pads = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    x = normal(3, 4, 4)
    batch = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": pads}
    alone = [row[None, ~own] if batch_first else row[~own, None] for row, own in zip(x, pads, strict=True)]
    rows = [record(model, [{"src": own}], sites=[site])[site] for own in alone]
    for positions, wanted in [("all", slice(None)), ("last", slice(-1, None)), (slice(0, 2), slice(0, 2))]:
        found = record(model, [batch], sites=[site], positions=positions)[site]
        assert torch.allclose(found, torch.cat([own[wanted] for own in rows]), atol=1e-12)
    by = collect(model, [batch], sites=[site], by=[["a", "b", "c"]])
    assert {label: own[site].count for label, own in by.items()} == {"a": 3, "b": 4, "c": 1}


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore")
def test_a_nested_batch_has_its_own_lengths(layout):
    nested = torch.nested.nested_tensor(TOKENS, layout=layout)
    model = nn.Sequential(nn.Identity())
    for positions, wanted in WANTED.values():
        found = record(model, [nested], sites="0", positions=positions)["0"]
        assert torch.allclose(found, torch.cat([wanted(own) for own in TOKENS]), rtol=1e-6, atol=0)


class Packing(nn.Module):
    """Packs its sequences: "rnn" and "head" see no pads."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[0].data)


def test_a_packed_sequence_has_the_rows_of_each_of_its_sequences():
    model, lengths = seeded(Packing), torch.tensor([2, 4, 1])
    batch = EIGHTHS.double(), lengths
    by = collect(model, [batch], sites=["rnn", "rnn:in.0"], by=[["a", "b", "c"]])
    for label, row, length in zip("abc", batch[0], lengths, strict=True):
        alone = collect(model, [(row[None, :length], length[None])], sites="rnn")["rnn"]
        assert by[label]["rnn"].count == by[label]["rnn:in.0"].count == length
        assert torch.allclose(by[label]["rnn"].mean, alone.mean)
        assert torch.allclose(by[label]["rnn:in.0"].mean, row[:length].mean(dim=0))
    for positions in ("last", "mean", 0, slice(1)):
        with pytest.raises(ShapeError, match="that is packed"):
            record(model, [batch], sites="rnn", positions=positions)


@pytest.mark.parametrize("positions", ["last", "mean"])
def test_a_head_on_packed_data_has_no_order(positions):
    with pytest.raises(ShapeError):
        record(seeded(Packing), [(EIGHTHS.double(), torch.tensor([2, 4, 1]))], sites="head", positions=positions)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_last_position_of_a_recurrent_network_is_its_last_step(kind, batch_first):
    model, x = recurrent(kind, batch_first=batch_first), normal(3, 5, 3)
    out = model.rnn(x)[0].detach()
    last = out[:, -1] if batch_first else out[-1]
    assert torch.equal(record(model, [x], sites="rnn", positions="last")["rnn"], last)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("positions", ["last", "mean"])
def test_a_head_after_a_recurrent_network_is_read_in_its_order_or_refused(batch_first, positions):
    model, x = recurrent(nn.GRU, batch_first=batch_first), normal(3, 5, 3)
    out = model(x).detach() if batch_first else model(x).detach().transpose(0, 1)
    expected = out[:, -1] if positions == "last" else out.mean(dim=1)

    def run():
        found = record(model, [x], sites="head", positions=positions)["head"]
        assert found.shape == expected.shape
        return found.sub(expected).abs().max() < 1e-12

    right_or_refused(run, True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_last_state_of_a_recurrent_network_is_read_by_rows_or_refused(batch_first):
    model, x = recurrent(nn.GRU, batch_first=batch_first), normal(4, 5, 3)
    rows = 4 if batch_first else 5
    labels = [["first", *["rest"] * (rows - 1)]]
    right_or_refused(
        lambda: [own["rnn:out.1"].count for own in collect(model, [x], sites="rnn:out.1", by=labels).values()],
        [1, rows - 1],
    )


# --- tokens in a line, pooled, images --------------------------------------------------------------------------------
def test_tokens_in_a_line_without_pads_are_all_counted_and_have_no_order():
    assert torch.equal(recorded("all", site="real"), torch.cat(TOKENS))
    for positions in ("last", 0, slice(1)):
        with pytest.raises(ShapeError, match="choose a site whose activation has the shape"):
            recorded(positions, site="real")


@pytest.mark.parametrize(("site", "batch"), [("line", EIGHTHS), ("real", (EIGHTHS, MASK))], ids=["no mask", "unpadded"])
def test_the_mean_of_tokens_in_a_line_is_that_of_their_rows_or_refused(site, batch):
    tokens = EIGHTHS if site == "line" else TOKENS
    expected = torch.stack([own.mean(dim=0) for own in tokens])
    right_or_refused(lambda: recorded("mean", site=site, batch=batch), expected)


def test_a_pooled_output_is_one_row_for_each_sequence():
    for batch in (EIGHTHS, (EIGHTHS, MASK)):
        assert torch.equal(recorded("all", site="pooled", batch=batch), EIGHTHS[:, 0])
        with pytest.raises(ShapeError, match=r"shape \(3, 2\)"):
            recorded("last", site="pooled", batch=batch)


def test_an_activation_of_another_length_than_the_mask_is_refused_where_there_are_pads():
    class Shorter(Masked):
        def forward(self, x, attention_mask):
            return self.site(x[:, ::2])

    with pytest.raises(ShapeError, match="it cannot be told which of its positions are pads"):
        recorded("all", model=Shorter())
    assert torch.equal(recorded("last", model=Shorter(), batch=(EIGHTHS, torch.ones_like(MASK))), EIGHTHS[:, 2])


def test_images_have_no_order_but_a_mean():
    x = torch.arange(48.0).reshape(2, 3, 2, 4) / 8
    model = nn.Sequential(nn.MaxPool2d(1))
    assert torch.equal(record(model, [x], sites="0", positions="mean")["0"], x.mean(dim=(2, 3)))
    assert torch.equal(record(model, [x], sites="0")["0"], x.movedim(1, -1).reshape(16, 3))
    for positions in ("last", 0, [0, 1], slice(1)):
        with pytest.raises(ShapeError, match=r"shape \(2, 2, 4, 3\)|shape \(2, 3, 2, 4\)"):
            record(model, [x], sites="0", positions=positions)


@pytest.mark.parametrize("mask", [torch.where(MASK.bool(), 0.0, -1e9), torch.where(MASK.bool(), 0.0, -torch.inf)])
def test_an_additive_mask_is_not_read_upside_down(mask):
    right_or_refused(lambda: recorded("all", batch=(EIGHTHS, mask)), torch.cat(TOKENS))


def test_a_mask_of_another_rank_is_refused():
    with pytest.raises(BatchError, match=r"attention_mask: expected shape \(B, S\), got \(3, 1, 4, 4\)"):
        recorded("all", batch=(EIGHTHS, MASK[:, None, None].expand(3, 1, 4, 4)))


# --- encoder and decoder ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 11, "d_model": 4, "d_kv": 2, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return seeded(lambda: T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)))


ENCODER = {"input_ids": torch.arange(1, 9).reshape(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
DECODER_MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
DECODER = {"decoder_input_ids": torch.arange(2, 10).reshape(2, 4), "decoder_attention_mask": DECODER_MASK}
CROSS = "decoder.block.0.layer.1.EncDecAttention"
SIDES = {
    "encoder.block.0": "encoder",
    "encoder": "encoder",
    "encoder:out.last_hidden_state": "encoder",
    "encoder.block.0.layer.0.SelfAttention.k": "encoder",
    f"{CROSS}.k": "encoder",
    "decoder.block.0": "decoder",
    "decoder": "decoder",
    "decoder:out.last_hidden_state": "decoder",
    "decoder.block.0:out.0": "decoder",
    "decoder.block.0.layer.0.SelfAttention.k": "decoder",
    f"{CROSS}.q": "decoder",
    "lm_head": "decoder",
    "lm_head:in": "decoder",
}


@pytest.mark.parametrize("length", [4, 3])
@pytest.mark.parametrize("without", [None, "attention_mask", "decoder_attention_mask"])
@pytest.mark.parametrize("site", SIDES)
def test_an_encoder_and_a_decoder_have_masks_of_their_own(t5, site, without, length):
    batch = {k: v for k, v in (ENCODER | {k: v[:, :length] for k, v in DECODER.items()}).items() if k != without}
    masks = {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
    mask = batch.get(masks[SIDES[site]], torch.ones(2, 4 if SIDES[site] == "encoder" else length))
    right_or_refused(lambda: collect(t5, [batch], sites=site)[site].count, int(mask.sum()))


@pytest.mark.parametrize("site", ["encoder.block.0", "decoder.block.0"])
def test_the_blocks_of_an_encoder_and_a_decoder_are_not_refused(t5, site):
    assert collect(t5, [ENCODER | DECODER], sites=site)[site].count == {"encoder": 6, "decoder": 7}[SIDES[site]]


@pytest.mark.parametrize("site", ["decoder.block.0", "lm_head"])
def test_a_decoder_that_is_fed_labels_does_not_take_the_encoder_s_mask(t5, site):
    batch = ENCODER | {"labels": torch.arange(2, 10).reshape(2, 4)}
    right_or_refused(lambda: collect(t5, [batch], sites=site)[site].count, 8)
