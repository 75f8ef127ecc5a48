"""Positions and strengths per token in a forward pass: the right tokens of the right rows, along the right axis."""

import pytest
import torch
from torch import nn

from actsteer import (
    Ablate,
    And,
    BatchError,
    Chain,
    Clamp,
    CosineAbove,
    LowRank,
    Not,
    Or,
    PositionsError,
    ProbeAbove,
    ProjectionAbove,
    ShapeError,
    Soft,
    Steerer,
    SteeringVector,
    StrengthError,
    VectorBank,
    record,
    sweep,
)
from tests.oracles import state
from tests.zoo import encoder, gpt2, identity, normal, recurrent

D = 4
V = SteeringVector({"0": normal(D, seed=2)})
X = normal(3, 5, D)
IDENTITY = identity(dtype=torch.float64)


def steered(model, x, vectors=V, **options):
    with torch.no_grad(), Steerer(model, vectors, **options):
        return model(**x) if isinstance(x, dict) else model(x)


def mask_of(*rows):
    return torch.tensor([[int(letter) for letter in row] for row in rows]).bool()


def gap(model, v, inputs, **options):
    """What steering adds to the activation at its site."""
    (site,) = v.sites
    module, seen = model.get_submodule(site), []

    def run():
        handle = module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        with torch.no_grad():
            model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        handle.remove()

    run()
    with Steerer(model, v, **options):
        run()
    return seen[1] - seen[0]


BLOCK = SteeringVector({"transformer.h.0": normal(8, seed=3)})
UNIT = V["0"] / V["0"].norm()
NONE, ALL = mask_of("00000"), mask_of("11111")
PLACES = {
    "all": ("all", ALL),
    "prompt": ("prompt", ALL),
    "generated": ("generated", NONE),
    "last": ("last", mask_of("00001")),
    "first": (0, mask_of("10000")),
    "negative": (-2, mask_of("00010")),
    "list": ([0, -1], mask_of("10001")),
    "tuple": ((1, 2), mask_of("01100")),
    "slice": (slice(1, 3), mask_of("01100")),
    "to the end": (slice(3, None), mask_of("00011")),
    "from the end": (slice(-2, None), mask_of("00011")),
    "every other": (slice(None, None, 2), mask_of("10101")),
    "empty": (slice(2, 2), NONE),
    "mask": (mask_of("01010"), mask_of("01010")),
    "mask of one": (mask_of("01010")[0], mask_of("01010")),
    "mask of integers": (mask_of("01010").long(), mask_of("01010")),
    "mask of bytes": (mask_of("11000", "00100", "00000").byte(), mask_of("11000", "00100", "00000")),
    "mask per row": (mask_of("11000", "00100", "00000"), mask_of("11000", "00100", "00000")),
}
every_place = pytest.mark.parametrize(("positions", "where"), PLACES.values(), ids=PLACES)


@every_place
@pytest.mark.filterwarnings("ignore:positions=.generated.")
def test_what_is_chosen_is_steered_and_nothing_else(positions, where):
    assert torch.equal(steered(IDENTITY, X, c=3, positions=positions), X + 3 * where[..., None] * V["0"])


@every_place
@pytest.mark.parametrize("intervention", [Ablate(), Clamp(2.0), Chain(Ablate(), Clamp(1.0))], ids=str)
@pytest.mark.filterwarnings("ignore:positions=.generated.")
def test_every_intervention_has_positions(positions, where, intervention):
    everywhere = steered(IDENTITY, X, c=0.75, intervention=intervention)
    found = steered(IDENTITY, X, c=0.75, intervention=intervention, positions=positions)
    assert torch.equal(found, torch.where(where[..., None], everywhere, X))


@every_place
@pytest.mark.filterwarnings("ignore:positions=.generated.")
def test_an_edit_has_positions(positions, where):
    parts = (normal(2, D, seed=5), normal(2, D, seed=6), normal(2, seed=7))
    edit = LowRank({"0": parts})
    assert torch.equal(
        steered(IDENTITY, X, edit, positions=positions), torch.where(where[..., None], steered(IDENTITY, X, edit), X)
    )


@every_place
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:positions=.generated.")
def test_positions_of_sequences_that_come_first_or_second(positions, where, batch_first):
    model = encoder(batch_first=batch_first)
    v = SteeringVector({"layers.0": normal(D, seed=3)})
    x = X if batch_first else X.transpose(0, 1)
    moved = gap(model, v, [x], positions=positions)
    where = where.expand(3, 5) if batch_first else where.expand(3, 5).T
    torch.testing.assert_close(moved, where[..., None] * v["layers.0"])


@every_place
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:positions=.generated.")
def test_positions_of_a_recurrent_network(positions, where, batch_first):
    model = recurrent(nn.GRU, batch_first=batch_first)
    site = next(name for name, module in model.named_modules() if isinstance(module, nn.GRU))
    rnn = model.get_submodule(site)
    v = SteeringVector({site: normal(rnn.hidden_size, seed=3)})
    x = normal(3, 5, rnn.input_size)
    x = x if batch_first else x.transpose(0, 1)
    where = where.expand(3, 5) if batch_first else where.expand(3, 5).T
    torch.testing.assert_close(gap(model, v, [x], positions=positions), where[..., None] * v[site])


# --- pads -------------------------------------------------------------------------------------------------------------
IDS = torch.tensor([[5, 9, 4, 0, 0], [7, 3, 12, 5, 0], [3, 8, 8, 13, 11]])
REAL = IDS > 0


@pytest.fixture(scope="module")
def language_model():
    return gpt2()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "positions", [None, "all", "prompt", "last", 0, -3, [1, -1], slice(1, 3), slice(-2, None)], ids=str
)
def test_pads_are_never_steered_and_do_not_count(language_model, side, positions):
    ids, real = (IDS, REAL) if side == "right" else (IDS.flip(1), REAL.flip(1))
    moved = gap(language_model, BLOCK, {"input_ids": ids, "attention_mask": real.long()}, positions=positions)
    for row, own in enumerate(real):
        tokens = int(own.sum())
        alone = gap(language_model, BLOCK, {"input_ids": ids[row : row + 1, own]}, positions=positions)
        torch.testing.assert_close(moved[row, own], alone[0], rtol=0, atol=1e-12)
        assert not moved[row, ~own].any() and alone.shape[1] == tokens and bool(alone.any())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [False, True])
def test_pads_of_torchs_own_encoder_are_not_steered(nested):
    layer = nn.TransformerEncoderLayer(D, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).double().eval()
    real = mask_of("11100", "11110", "11111")
    v = SteeringVector({"layers.0": normal(D, seed=3)})
    if not nested:
        moved = gap(model, v, {"src": X, "src_key_padding_mask": ~real})
        torch.testing.assert_close(moved, real[..., None] * v["layers.0"])
    with torch.no_grad(), Steerer(model, v):
        out = model(X, src_key_padding_mask=~real)
        dense = [model(row[None, own])[0] for row, own in zip(X, real, strict=True)]
    for row, own, alone in zip(out, real, dense, strict=True):
        torch.testing.assert_close(row[own], alone)


def test_a_pooled_activation_has_a_row_and_no_pads():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.pooled = nn.Identity(), nn.Identity()

        def forward(self, x, attention_mask=None):
            return self.pooled(self.tokens(x)[:, 0])

    v = SteeringVector({"pooled": normal(D)})
    inputs = {"x": X, "attention_mask": mask_of("01111", "11111", "10000")}
    assert torch.equal(steered(Pools(), inputs, v), X[:, 0] + v["pooled"])
    with pytest.raises(ShapeError, match=r"site 'pooled'.*\(3, 4\)"):
        steered(Pools(), inputs, v, positions="last")


def test_a_prompt_too_short_for_its_index_is_refused(language_model):
    inputs = {"input_ids": IDS, "attention_mask": REAL.long()}
    with pytest.raises(BatchError, match="row 0 of the batch has 3 tokens, and 4 are needed"):
        steered(language_model, inputs, BLOCK, positions=-4)


@pytest.mark.parametrize("flat", [(3, 5), (15,)])
def test_tokens_in_a_line_have_the_positions_of_their_rows(flat):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = nn.Identity()

        def forward(self, input_ids, attention_mask=None):
            x = input_ids.double()[..., None].expand(*input_ids.shape, D)
            return self.site(x.reshape(*flat, D)).reshape(*input_ids.shape, D)

    v = SteeringVector({"site": normal(D)})
    inputs = {"input_ids": IDS, "attention_mask": REAL.long()}
    last = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]])
    moved = steered(Flat(), inputs, v, positions="last") - Flat()(**inputs)
    torch.testing.assert_close(moved, last[..., None] * v["site"])
    torch.testing.assert_close(steered(Flat(), inputs, v) - Flat()(**inputs), REAL[..., None] * v["site"])


# --- strength ---------------------------------------------------------------------------------------------------------
def test_a_strength_per_row_and_position():
    c = torch.arange(15.0, dtype=torch.float64).view(3, 5) / 8
    assert torch.equal(steered(IDENTITY, X, c=c), X + c[..., None] * V["0"])
    where = mask_of("01101")
    assert torch.equal(steered(IDENTITY, X, c=c, positions=where), X + (c * where)[..., None] * V["0"])
    bank = VectorBank({"a": V, "b": -2 * V})
    torch.testing.assert_close(
        steered(IDENTITY, X, bank, c={"a": c, "b": torch.ones(3)}), X + (c[..., None] - 2.0) * V["0"]
    )


def test_a_strength_per_position_counts_in_columns_pads_included(language_model):
    c = torch.arange(15.0, dtype=torch.float64).view(3, 5) / 8
    moved = gap(language_model, BLOCK, {"input_ids": IDS, "attention_mask": REAL.long()}, c=c)
    torch.testing.assert_close(moved, (c * REAL)[..., None] * BLOCK["transformer.h.0"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("c", [torch.ones(2, 5), torch.ones(3, 4)], ids=["rows", "positions"])
def test_a_strength_for_other_tokens_is_refused(c):
    with pytest.raises(StrengthError, match=r"c has \d rows of \d positions, and the pass 3 rows"):
        steered(IDENTITY, X, c=c)


def test_a_sweep_in_one_batch_is_a_sweep_of_passes():
    strengths = [0.0, 0.5, -1.0, 3.0]
    one = X[:1].expand(4, 5, D)
    together = steered(IDENTITY, one, c=torch.tensor(strengths, dtype=torch.float64), positions=slice(1, None))
    for c, own in zip(strengths, together, strict=True):
        assert torch.equal(steered(IDENTITY, X[:1], c=c, positions=slice(1, None))[0], own)


def test_a_schedule_is_that_of_the_prompt_where_nothing_is_generated():
    assert torch.equal(steered(IDENTITY, X, c=lambda step: 2.0 + step), X + 2 * V["0"])
    rows = sweep(IDENTITY, V, c=[0.0, lambda step: 1.0], evaluate=lambda m: {"x": m(X)}, progress=False)
    assert torch.equal(rows[1]["x"], X + V["0"])


@pytest.mark.parametrize("bad", [float("nan"), "1", torch.ones(2), None])
def test_a_schedule_gives_one_finite_number(bad):
    with pytest.raises(StrengthError, match=r"c\(0\)"):
        Steerer(IDENTITY, V, c=lambda step: bad)


def test_a_schedule_takes_the_step_alone():
    with pytest.raises(StrengthError, match=r"c\(0\): expected a callable of the generation step alone"):
        Steerer(IDENTITY, V, c=lambda: 1.0)


def test_kinds_of_strength_follow_one_another_while_attached():
    before = state(IDENTITY)
    with Steerer(IDENTITY, V, c=1.0) as steerer:
        for c, expected in [
            (2.0, 2.0),
            (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)),
            (torch.ones(3, 5), 1.0),
            (lambda step: 4.0, 4.0),
            (0.5, 0.5),
        ]:
            steerer.c = c
            torch.testing.assert_close(IDENTITY(X), X + expected * V["0"])
        steerer.c = 0.0
        assert torch.equal(IDENTITY(X), X)
    assert state(IDENTITY) == before


@pytest.mark.parametrize(
    ("positions", "error"),
    [
        ("first", ValueError),
        ("mean", ValueError),
        (1.5, TypeError),
        (True, TypeError),
        ([], TypeError),
        (torch.tensor([0, 1]), ShapeError),  # which may be meant as indices
        (torch.tensor([[0, 2]]), ShapeError),
        (torch.tensor([[0.0, 1.0]]), ShapeError),
        (slice(None, None, -1), ValueError),
        ({"nobody": "last"}, LookupError),
        ({"vector": "first"}, ValueError),
    ],
)
def test_what_are_no_positions_is_refused_before_anything_is_attached(positions, error):
    before = state(IDENTITY)
    with pytest.raises(error):
        Steerer(IDENTITY, V, positions=positions)
    assert state(IDENTITY) == before


@pytest.mark.parametrize("mask", [torch.ones(4, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)])
def test_a_mask_of_another_shape_is_refused(mask):
    with pytest.raises(ShapeError, match=r"a mask of shape .* against 3 rows of 5 positions"):
        steered(IDENTITY, X, positions=mask)


# --- gates ------------------------------------------------------------------------------------------------------------
GATES = {
    "projection": (ProjectionAbove(V, 0.1), lambda h: h @ UNIT > 0.1),
    "cosine": (CosineAbove(V, 0.1), lambda h: torch.cosine_similarity(h, V["0"].expand_as(h), dim=-1) > 0.1),
    "probe": (ProbeAbove(V, offset=0.3, probability=0.6), lambda h: torch.sigmoid(h @ V["0"] + 0.3) > 0.6),
    "soft": (
        Soft(ProjectionAbove(V, 0.1), width=0.5),
        lambda h: torch.sigmoid(2 * (h @ UNIT - 0.1)),
    ),
    "not": (Not(ProjectionAbove(V, 0.1)), lambda h: h @ UNIT <= 0.1),
}


def per_token(gate):
    kinds = {ProjectionAbove: ("threshold",), CosineAbove: ("threshold",)}
    if isinstance(gate, Not):
        return Not(per_token(gate.gates[0]))
    if isinstance(gate, Soft):
        return Soft(per_token(gate.gate), width=gate.width)
    if isinstance(gate, ProbeAbove):
        return ProbeAbove(V, offset=0.3, probability=0.6, per="token")
    return type(gate)(V, *(getattr(gate, name) for name in kinds[type(gate)]), per="token")


@pytest.mark.parametrize(("gate", "weight"), GATES.values(), ids=GATES)
def test_a_gate_decides_per_row_or_per_token(gate, weight):
    for rows in (X[:, 0], X):
        mean = rows if rows.ndim == 2 else rows.mean(dim=1)
        by_row = weight(mean).to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
        assert len(by_row.unique()) > 1
        torch.testing.assert_close(steered(IDENTITY, rows, c=2, gate=gate), rows + 2 * by_row * V["0"])
    by_token = weight(X).to(X.dtype)[..., None]
    torch.testing.assert_close(steered(IDENTITY, X, c=2, gate=per_token(gate)), X + 2 * by_token * V["0"])


def test_gates_at_different_sites_combine():
    model = nn.Sequential(nn.Identity(), nn.Linear(D, D, bias=False), nn.Identity()).double()
    v, w = SteeringVector({"2": normal(D, seed=9)}), SteeringVector({"1": normal(D, seed=8)})
    early, late = ProjectionAbove(V, 0.0, per="token"), ProjectionAbove(w, 0.0)
    with torch.no_grad():
        h = model(X)
    a, b = (X @ V["0"] > 0).to(h.dtype), (h.mean(dim=1) @ w["1"] > 0).to(h.dtype)[:, None].expand(3, 5)
    for gate, weight in {
        And(early, late): a * b,
        Or(early, late): 1 - (1 - a) * (1 - b),
        And(early, Not(late)): a * (1 - b),
        Not(Or(early, Not(late))): (1 - a) * b,
    }.items():
        assert torch.equal(steered(model, X, v, gate=gate), h + weight[..., None] * v["2"])


@pytest.mark.parametrize("positions", [None, "last", slice(1, None)], ids=str)
def test_a_gate_does_not_read_pads(language_model, positions):
    site = "transformer.h.0"
    v = SteeringVector({site: normal(8, seed=3)})
    with torch.no_grad():
        rows = torch.stack(
            [
                record(language_model, IDS[r : r + 1, own], sites=site, progress=False)[site].mean(0)
                for r, own in enumerate(REAL)
            ]
        )
    scores = (rows @ v[site]).sort().values / v[site].norm()
    for threshold in ((scores[0] + scores[1]) / 2, (scores[1] + scores[2]) / 2):
        options = {"gate": ProjectionAbove(v, float(threshold)), "positions": positions}
        padded = steered(language_model, {"input_ids": IDS, "attention_mask": REAL.long()}, v, **options).logits
        for row, own in enumerate(REAL):
            alone = steered(language_model, {"input_ids": IDS[row : row + 1, own]}, v, **options).logits
            torch.testing.assert_close(padded[row, own], alone[0])


@pytest.mark.parametrize(
    "options", [{"positions": "last"}, {"c": torch.ones(3, 5)}, {"gate": ProjectionAbove(BLOCK, 0.0)}], ids=str
)
def test_a_part_that_takes_tokens_may_be_called_by_itself(language_model, options):
    part, inputs = language_model.transformer, {"input_ids": IDS, "attention_mask": REAL.long()}
    with torch.no_grad(), Steerer(language_model, BLOCK, **options):
        whole = language_model(**inputs).logits
        assert torch.equal(language_model.lm_head(part(**inputs).last_hidden_state), whole)
        assert torch.equal(language_model(**inputs).logits, whole)


@pytest.mark.parametrize(
    "options", [{"positions": "last"}, {"c": torch.ones(3, 5)}, {"gate": ProjectionAbove(BLOCK, 0.0)}], ids=str
)
def test_a_part_that_takes_none_has_no_positions_by_itself(language_model, options):
    """What the model is given, the mask among it, passes by the model that is steered."""
    block, inputs = language_model.transformer.h[0], {"input_ids": IDS, "attention_mask": REAL.long()}
    with torch.no_grad(), Steerer(language_model, BLOCK, **options):
        whole = language_model(**inputs).logits
        with pytest.raises(PositionsError, match="a part of the GPT2LMHeadModel was called"):
            block(normal(3, 5, 8))
        assert torch.equal(language_model(**inputs).logits, whole)


def test_an_index_past_the_end_is_refused_unless_the_text_may_go_on(language_model):
    for run in (lambda: steered(IDENTITY, X, positions=7), lambda: record(IDENTITY, X, sites="0", positions=7)):
        with pytest.raises(BatchError, match="row 0 of the batch has 5 tokens, and 8 are needed"):
            run()
    inputs = {"input_ids": IDS, "attention_mask": REAL.long()}
    assert not gap(language_model, BLOCK, inputs, positions=7).any()  # a cache may be handed on


def test_an_activation_without_positions_is_told_so_and_no_axis_is_offered():
    model = nn.Sequential(nn.Linear(4, 4))
    steerer = Steerer(model, SteeringVector({"0": torch.ones(4)}), positions="last", strict=False)
    said = r"got \(6, 4\), in which there are none; steer another site, or all positions"
    with steerer, pytest.raises(ShapeError, match=said):
        model(torch.zeros(6, 4))
