"""Gates: the numbers with which they decide, and where they read as against where they were fitted."""

import re

import pytest
import torch
from torch import nn

from actsteer import (
    And,
    CosineAbove,
    Fitted,
    GateError,
    LogisticDirection,
    Not,
    Or,
    PreparedGate,
    ProbeAbove,
    ProjectionAbove,
    Soft,
    Steerer,
    SteeringVector,
    VectorBank,
    fit,
)
from tests.zoo import normal

D = 16
ROWS = normal(512, D)
DIRECTION = normal(D, seed=2)
ZERO = torch.zeros(2, D)


def vector(positions=None, **metadata):
    described = {} if positions is None else {"positions": positions}
    return SteeringVector({"0": DIRECTION}, metadata={"offset 0": "0.1"} | described | metadata)


KINDS = {
    "projection": lambda v, **options: ProjectionAbove(v, 0.1, **options),
    "cosine": lambda v, **options: CosineAbove(v, 0.02, **options),
    "probe": lambda v, **options: ProbeAbove(v, probability=0.6, **options),
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
steerings = pytest.mark.parametrize("soft", [False, True], ids=["step", "soft"])


def of_kind(make, v, *, soft, **options):
    gate = make(v, **options)
    return Soft(gate, width=0.3) if soft else gate


def steered(x, gate, **options):
    """Which rows or tokens are steered, and how much: what is added along a feature that nothing else has."""
    model = nn.Sequential(nn.Identity(), Wide())
    with Steerer(model, SteeringVector({"1": torch.ones(D)}), gate=gate, **options):
        return model(x) - x.double()


class Wide(nn.Module):
    def forward(self, x):
        return x.double()


# --- in float32 at least ---------------------------------------------------------------------------------------------
@dtypes
@kinds
@steerings
def test_a_gate_decides_as_on_the_same_rows_in_float32(make, dtype, soft):
    gate, rows = of_kind(make, vector(), soft=soft), ROWS.to(dtype)
    wide = rows if dtype is torch.float64 else rows.float()
    assert torch.equal(gate(rows), gate(wide))
    assert 0 < int((gate(rows) > 0.5).sum()) < len(rows)


@dtypes
@kinds
@steerings
@pytest.mark.parametrize("autocast", [False, True])
def test_in_a_steerer_it_decides_on_rows_in_float32(make, dtype, soft, autocast):
    gate, rows = of_kind(make, vector(), soft=soft), ROWS.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        weights = steered(rows, gate)[:, 0]
    expected = gate(rows if dtype is torch.float64 else rows.float()).double()
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


@dtypes
@kinds
def test_the_mean_over_a_prompt_is_not_rounded_before_it_is_read(make, dtype):
    texts = ROWS.reshape(64, 8, D).to(dtype)
    gate = make(vector())
    means = texts.double().mean(dim=1) if dtype is torch.float64 else texts.float().mean(dim=1)
    assert torch.equal(steered(texts, gate)[:, 0, 0] > 0.5, gate(means))


@dtypes
def test_nor_that_over_the_tokens_of_a_padded_prompt(dtype):
    texts, gate = ROWS.reshape(64, 8, D).to(dtype), ProjectionAbove(SteeringVector({"embed": DIRECTION}), 0.05)
    mask = (torch.arange(8) < 1 + torch.arange(64)[:, None] % 8).long()
    wide = texts if dtype is torch.float64 else texts.float()
    means = (wide * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    with Steerer(model := Texts(), SteeringVector({"block": torch.ones(D)}), gate=gate):
        fires = (model(texts, attention_mask=mask) - texts.double())[:, 0, 0] > 0.5
    assert torch.equal(fires, gate(means))


@dtypes
@kinds
def test_each_token_is_read_in_float32(make, dtype):
    texts, gate = ROWS.reshape(64, 8, D).to(dtype), make(vector(), per="token")
    wide = texts if dtype is torch.float64 else texts.float()
    assert torch.equal(steered(texts, gate)[..., 0].flatten() > 0.5, gate(wide.reshape(-1, D)))


class Own:
    """A gate of the user's own."""

    site, per = "0", "sequence"

    def __init__(self, function):
        self.function = function

    def __call__(self, rows):
        return self.function(rows)


@dtypes
@pytest.mark.parametrize("shape", [(4, D), (4, 3, D)], ids=str)
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_a_gate_of_the_users_own_gets_rows_in_float32(dtype, shape, per):
    seen, gate = [], Own(lambda rows: seen.append((rows.dtype, (rows @ rows.T).dtype)) or rows[:, 0] > 0)
    gate.per = per if len(shape) == 3 else "sequence"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steered(torch.ones(shape, dtype=dtype), gate)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert seen == [(wide, wide)]


# --- prepared --------------------------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threshold", [-0.3, 0.0, 0.3])
def test_prepared_it_decides_alike_also_after_a_change_of_the_threshold(make, dtype, threshold):
    gate, rows = make(vector()), torch.cat([ROWS, ZERO]).to(dtype)
    assert isinstance(gate, PreparedGate)
    decide = gate.prepare(rows[:0])
    assert torch.equal(decide(rows), gate(rows))
    gate.threshold = threshold
    assert torch.equal(decide(rows), gate(rows))
    assert decide(rows).dtype is torch.bool and decide(rows[:1]).shape == (1,)


@kinds
def test_what_is_kept_of_one_dtype_or_device_serves_no_other(make):
    gate = make(vector())
    for dtype in (torch.float32, torch.float64, torch.float32):
        assert torch.equal(gate(ROWS.to(dtype)), make(vector())(ROWS.to(dtype)))
        assert gate(ROWS.to("meta", dtype)).is_meta
    with torch.inference_mode():
        gate(ROWS.to(torch.float64))
    x = ROWS.clone().requires_grad_()
    gate.score(x).sum().backward()
    assert bool(x.grad.isfinite().all())


# --- weights that are no numbers -------------------------------------------------------------------------------------
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize(
    "combined", [lambda g: g, Not, lambda g: And(g, g), lambda g: Or(g, Own(lambda r: r[:, 0] > 0))]
)
def test_a_weight_that_is_not_finite_is_refused(bad, combined):
    gate = Own(lambda rows: torch.where(rows[:, 0] > 0, bad, 0.5))
    with pytest.raises(GateError, match=r"gate .*: expected finite weights, got \["):
        steered(ROWS[:6], combined(gate))


def test_a_combination_that_makes_nan_is_refused():
    class Quotient:
        gates = (Own(lambda rows: 0.0 * rows[:, 0]),)

        def combine(self, weights):
            return weights[0] / weights[0]

    with pytest.raises(GateError, match=r"Quotient.*expected finite weights, got \[nan"):
        steered(ROWS[:6], Quotient())


def test_a_soft_gate_on_an_activation_that_is_nan_is_refused():
    rows = ROWS[:4].clone()
    rows[2] = float("nan")
    with pytest.raises(GateError, match="is the activation that it reads finite"):
        steered(rows, Soft(KINDS["projection"](vector())))


def test_large_weights_whose_sum_overflows_are_finite():
    out = steered(ROWS[:4].float(), Own(lambda rows: torch.full((len(rows),), 3e38)))
    assert bool((out > 2e38).all())


def test_no_other_device_is_waited_for():
    gate = Own(lambda rows: rows[:, 0] * float("nan"))
    assert steered(torch.ones(2, D, device="meta"), gate).is_meta


# --- where a gate reads, and where it was fitted ---------------------------------------------------------------------
@kinds
@pytest.mark.parametrize(
    ("positions", "per"),
    [(None, "sequence"), ("mean", "sequence"), ("last", "last"), ("-1", "last"), ("[-1]", "last")],
)
def test_a_gate_reads_where_its_vector_was_fitted(make, positions, per):
    gate = make(vector(positions))
    assert isinstance(gate, Fitted)
    assert (gate.per, gate.metadata.get("positions")) == (per, positions)
    assert (Soft(gate).per, Soft(gate).metadata) == (per, gate.metadata)
    assert repr(gate).endswith("per='last')") == (per == "last")


@kinds
@pytest.mark.parametrize(
    ("positions", "per"),
    [(None, "last"), (None, "token"), ("last", "token"), ("3", "token"), ("slice(0, 2, None)", "token")],
)
def test_what_is_given_wins_and_single_tokens_may_be_read_one_by_one(make, positions, per):
    assert make(vector(positions), per=per).per == per


@kinds
@pytest.mark.parametrize(
    ("positions", "per", "reads"),
    [
        ("last", "sequence", "the mean over the prompt"),
        ("3", None, "the mean over the prompt"),
        ("slice(0, 2, None)", "sequence", "the mean over the prompt"),
        ("mean", "last", "the prompt's last token"),
        ("3", "last", "the prompt's last token"),
        ("mean", "token", "each token"),
    ],
)
def test_a_gate_that_reads_elsewhere_warns_when_it_is_made(make, positions, per, reads):
    message = f"gate at site '0': it reads {reads}, and its vector was fitted at positions '{positions}'; fit it"
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        gate = make(vector(positions), per=per)
    assert [warning.filename for warning in caught] == [__file__]
    assert gate.per == (per or "sequence")


@pytest.mark.parametrize("kind", [ProjectionAbove, CosineAbove])
def test_a_threshold_between_keeps_it(kind):
    sides = {"positive": DIRECTION + ROWS[:8] / 8, "negative": -DIRECTION + ROWS[:8] / 8}
    recorded = {side: {"0": rows} for side, rows in sides.items()}
    assert kind.between(vector("last"), **recorded).per == "last"
    assert kind.between(vector(), **recorded).per == "sequence"
    assert kind.between(vector("last"), **recorded, per="token").per == "token"
    with pytest.warns(UserWarning, match="fitted at positions 'last'") as caught:
        assert kind.between(vector("last"), **recorded, per="sequence").per == "sequence"
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("positions", "per"), [("all", "sequence"), ("mean", "sequence"), ("last", "last"), (-1, "last")]
)
def test_what_fit_makes_says_where_it_is_to_be_read(positions, per):
    model = nn.Sequential(nn.Identity())
    sides = {"positive": normal(8, 3, D, seed=3) + 1, "negative": normal(8, 3, D, seed=4) - 1}
    for estimator in (None, LogisticDirection()):
        options = {} if estimator is None else {"estimator": estimator}
        v = fit(model, **sides, sites="0", positions=positions, progress=False, **options)
        gates = [ProjectionAbove(v, 0.0), CosineAbove(2 * v, 0.0)] + ([ProbeAbove(v)] if estimator else [])
        assert {gate.per for gate in gates} == {per}


class Texts(nn.Module):
    """Rows of tokens with an attention mask."""

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Identity(), Wide()

    def forward(self, x, attention_mask=None):
        return self.block(self.embed(x))


@dtypes
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_of_every_prompt_is_read(dtype, side):
    texts, lengths = ROWS.reshape(64, 8, D).to(dtype), 1 + torch.arange(64) % 8
    places = torch.arange(8) if side == "right" else torch.arange(8).flip(0)
    mask = (places < lengths[:, None]).long()
    last = texts[torch.arange(64), lengths - 1 if side == "right" else -1]
    v = SteeringVector({"embed": DIRECTION}, metadata={"positions": "last"})
    gate = ProjectionAbove(v, 0.05)
    with Steerer(model := Texts(), SteeringVector({"block": torch.ones(D)}), gate=gate):
        added = (model(texts, attention_mask=mask) - texts.double()).amax(dim=(1, 2))
        alone = model(texts) - texts.double()
    fires = gate(last if dtype is torch.float64 else last.float())
    assert 0 < int(fires.sum()) < 64
    assert torch.equal(added > 0.5, fires)
    assert torch.equal(alone[:, 0, 0] > 0.5, gate(texts[:, -1]))


def test_explain_says_both():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    bank = VectorBank({name: SteeringVector({"1": DIRECTION}) for name in "ab"})
    gates = {
        "a": And(ProjectionAbove(vector("last"), 0.0), Not(CosineAbove(vector(), 0.0, per="token"))),
        "b": Own(len),
    }
    lines = Steerer(model, bank, gate=gates).explain().splitlines()
    read = [line.strip() for line in lines if "a gate reads" in line]
    assert read == [
        "a gate reads the prompt's last token at '0'; fitted at positions: last",
        "a gate reads each token at '0'; fitted at positions: all, or not known",
        "a gate reads the mean over the prompt at '0'; fitted at positions: not known",
    ]
