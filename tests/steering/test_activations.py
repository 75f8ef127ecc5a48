"""What a site gives out: every layout, dtype, container and grad mode is steered, or refused."""

import copy
from collections import OrderedDict, namedtuple
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from actsteer import OutputError, ShapeError, Steerer, SteeringVector, StrengthError, VectorBank, collect, record
from tests.oracles import state
from tests.zoo import cnn, encoder, exact, identity, normal, recurrent

Pair = namedtuple("Pair", ["hidden", "extra"])
V = torch.tensor([1.0, 2.0, 3.0, 4.0])
EXTRA = object()


class Returns(nn.Module):
    """Gives out what a function makes of its input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


def steered(model, x, site, v=V, **options):
    with Steerer(model, SteeringVector({site: v}), **options):
        return model(x)


# --- containers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make",
    [lambda x: (x, EXTRA), lambda x: [x, EXTRA], lambda x: Pair(x, EXTRA), lambda x: (x,), lambda x: x.sort()],
    ids=["tuple", "list", "named tuple", "tuple of one", "torch's return type"],
)
@pytest.mark.parametrize("c", [2.0, torch.tensor([2.0, 2.0])], ids=["number", "rows"])
def test_the_first_member_is_steered_and_the_container_keeps_its_type(make, c):
    x = torch.arange(8.0).reshape(2, 4)
    plain, given = make(x), []

    def kept(x):
        given.append(make(x))
        return given[0]

    model = nn.Sequential(Returns(kept))
    out = steered(model, x, "0", c=c)
    assert type(out) is type(plain)
    assert torch.equal(out[0], plain[0] + 2 * V)
    assert list(out[1:]) == list(given[0][1:]) or all(
        torch.equal(a, b) for a, b in zip(out[1:], plain[1:], strict=True)
    )
    assert torch.equal(given[0][0], plain[0])  # what the module gave out is not changed


def test_packed_sequences_are_steered_at_every_real_position():
    packed = pack_sequence([torch.zeros(3, 4), torch.zeros(1, 4)])
    out = steered(nn.Sequential(Returns(lambda x: x)), packed, "0")
    assert type(out) is type(packed)
    assert torch.equal(out.data, V.expand(4, 4))
    assert torch.equal(out.batch_sizes, packed.batch_sizes)


def test_attention_gives_its_weights_out_unsteered():
    attention, x = nn.MultiheadAttention(4, 2), normal(3, 2, 4).float()
    out, weights = attention(x, x, x)
    with Steerer(attention, SteeringVector({"": V})):
        steered_out, steered_weights = attention(x, x, x)
    assert torch.equal(steered_out, out + V)
    assert torch.equal(steered_weights, weights)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda x: {"hidden": None, "count": 3},
            OutputError,
            "site '0': expected a floating tensor, or something that holds one, got a dict",
        ),
        (lambda x: ({"hidden": x},), OutputError, r"site '0': expected .* got a tuple \(0: dict\); .* one of \['0'\]"),
        (lambda x: (x, x + 1), OutputError, r"site '0': a tuple .* holds several .* one of \['0:out.0', '0:out.1'\]"),
        (lambda x: (), OutputError, "got .*tuple"),
        (lambda x: None, OutputError, "got .*None"),
        (lambda x: x.long(), OutputError, r"site '0': expected floating activations, got torch\.int64"),
        (lambda x: x.sum(), ShapeError, r"site '0': expected an activation with a feature axis -1, got shape \(\)"),
        (lambda x: x[:, :3], ShapeError, "site '0': the activation has 3 features"),
        (lambda x: x.reshape(1, 1, 2, 4), ShapeError, "does not tell which axis holds the features"),
    ],
)
def test_an_output_without_a_known_activation_is_refused(make, error, message):
    model = nn.Sequential(Returns(make))
    before = state(model)
    with pytest.raises(error, match=message):
        steered(model, torch.ones(2, 4), "0")
    assert state(model) == before


# --- recurrent cells -------------------------------------------------------------------------------------------------
RECURRENT = [nn.LSTM, nn.GRU, nn.RNN]


def packed_input():
    return pack_padded_sequence(normal(2, 3, 3), torch.tensor([3, 2]), batch_first=True)


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("site", ["", ":out.0"])
@pytest.mark.case(19)
def test_a_recurrent_cell_is_steered_at_its_output_and_its_states_stay(kind, site):
    model = recurrent(kind, batch_first=True).rnn
    x = normal(2, 3, 3)
    plain = model(x)
    out = steered(model, x, site)
    assert torch.equal(out[0], plain[0] + V)
    torch.testing.assert_close(out[1], plain[1], rtol=0, atol=0)
    assert type(out[1]) is type(plain[1])


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("site", ["", ":out.0", ":out.0.data"])
@pytest.mark.case(19)
def test_a_recurrent_cell_on_packed_input_is_steered_at_every_real_position(kind, site):
    model, packed = recurrent(kind, batch_first=True).rnn, packed_input()
    plain = model(packed)
    out = steered(model, packed, site, c=2)
    assert type(out[0]) is type(plain[0])
    assert torch.equal(out[0].data, plain[0].data + 2 * V)
    assert torch.equal(out[0].batch_sizes, plain[0].batch_sizes)
    torch.testing.assert_close(out[1], plain[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.case(19)
def test_packed_input_is_a_site_and_has_no_rows(kind):
    model, packed = recurrent(kind, batch_first=True).rnn, packed_input()
    v = V[:3].double()
    expected = model(packed._replace(data=packed.data + v))
    out = steered(model, packed, ":in", v)
    assert torch.equal(out[0].data, expected[0].data)
    with pytest.raises(StrengthError, match=r"2 rows of strength or gate .* whose rows are packed"):
        steered(model, packed, "", c=torch.ones(2))


@pytest.mark.parametrize(("site", "index"), [(":out.1.0", 0), (":out.1.1", 1)])
@pytest.mark.case(19)
def test_the_states_of_an_lstm_are_sites_by_their_keys(site, index):
    model, x = recurrent(nn.LSTM, batch_first=True).rnn, normal(2, 3, 3)
    plain, out = model(x), steered(model, x, site)
    assert torch.equal(out[0], plain[0])
    for state_index in (0, 1):
        shift = V if state_index == index else torch.zeros(4)
        assert torch.equal(out[1][state_index], plain[1][state_index] + shift)


@pytest.mark.case(19)
def test_the_states_of_an_lstm_are_asked_about_with_their_whole_keys():
    model = recurrent(nn.LSTM, batch_first=True).rnn
    with pytest.raises(OutputError, match=r"one of \[':out\.1\.0', ':out\.1\.1'\]"):
        steered(model, normal(2, 3, 3), ":out.1")


class OutputAlone(nn.LSTM):
    """A user's LSTM that gives its output alone."""

    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.case(19)
def test_a_recurrent_subclass_that_gives_a_tensor_is_steered():
    torch.manual_seed(0)
    model, x = nn.Sequential(OutputAlone(3, 4)), torch.rand(2, 2, 3)
    assert torch.equal(steered(model, x, "0"), model(x) + V)


# --- rebuilt as their own type ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Frozen:
    hidden: torch.Tensor
    loss: torch.Tensor | None = None
    extra: object = EXTRA


CONTAINERS = {
    "dict": (lambda x: {"hidden": x, "none": None}, ["0", "0:out.hidden"]),
    "ordered dict": (lambda x: OrderedDict(hidden=x, count=3), ["0", "0:out.hidden"]),
    "frozen dataclass": (lambda x: Frozen(x, x.sum()), ["0", "0:out.hidden"]),
    "loss first": (lambda x: {"loss": x.mean(), "hidden": x}, ["0", "0:out.hidden"]),
    "two tensors": (lambda x: {"hidden": x, "other": x + 1}, ["0:out.hidden"]),
    "nested": (lambda x: {"hidden": [x, (x + 1, None)]}, ["0:out.hidden.0"]),
    "named tuple": (lambda x: Pair(x, x + 1), ["0:out.0", "0:out.hidden"]),
}


@pytest.mark.parametrize(("make", "sites"), CONTAINERS.values(), ids=CONTAINERS.keys())
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.parametrize("c", [2.0, torch.tensor([2.0, 2.0])], ids=["number", "rows"])
@pytest.mark.case(18, 20)
def test_a_container_is_rebuilt_as_its_own_type_around_the_edited_member(make, sites, backend, c):
    x, model = torch.arange(8.0).reshape(2, 4), nn.Sequential(Returns(make))
    plain = make(x)

    def members(value):
        if isinstance(value, torch.Tensor):
            return [value]
        if isinstance(value, Frozen):
            return [value.hidden, value.loss]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
        return [leaf for part in parts for leaf in members(part)]

    for site in sites:
        out = steered(model, x, site, c=c, backend=backend)
        assert type(out) is type(plain)
        for one, other in zip(members(out), members(plain), strict=True):
            same = other.ndim == 0 or not torch.equal(other, x)
            assert torch.equal(one, other if same else x + 2 * V)


def test_one_strength_per_row_reaches_a_member_and_an_input():
    c, x = torch.tensor([0.0, 1.0, -2.0]), torch.ones(3, 4)
    model = nn.Sequential(Returns(lambda x: {"hidden": x, "loss": x.mean()}))
    for site in ("0", "0:in"):
        assert torch.equal(steered(model, x, site, c=c)["hidden"], x + c[:, None] * V)


# --- layouts -----------------------------------------------------------------------------------------------------
SQUARE = torch.zeros(4, 4, 4)  # (rows, features, positions), or (rows, positions, features)
ALONG_FEATURES_FIRST, ALONG_FEATURES_LAST = V[:, None].expand(4, 4, 4), V.expand(4, 4, 4)


def sites_of_one(*modules):
    """Layers on (4, 4, 4) that keep its shape, each with weights that give out zero."""
    model = nn.Sequential(*modules)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize(
    ("model", "site", "expected"),
    [
        (sites_of_one(nn.Conv1d(4, 4, 1)), "0", ALONG_FEATURES_FIRST),
        (sites_of_one(nn.Linear(4, 4)), "0", ALONG_FEATURES_LAST),
        (sites_of_one(nn.BatchNorm1d(4)).eval(), "0", ALONG_FEATURES_FIRST),
        (sites_of_one(nn.GroupNorm(2, 4)), "0", ALONG_FEATURES_FIRST),
        (sites_of_one(nn.InstanceNorm1d(4)), "0", ALONG_FEATURES_FIRST),
        (sites_of_one(nn.LayerNorm(4)), "0", ALONG_FEATURES_LAST),
        (sites_of_one(nn.Conv1d(4, 4, 1), nn.ReLU()), "1", ALONG_FEATURES_FIRST),
        (sites_of_one(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Dropout1d()).eval(), "2", ALONG_FEATURES_FIRST),
        (sites_of_one(nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU())), "0", ALONG_FEATURES_FIRST),
        (sites_of_one(nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU())), "0.1", ALONG_FEATURES_FIRST),
        (sites_of_one(nn.Sequential(nn.Conv1d(4, 4, 1)), nn.ReLU()), "1", ALONG_FEATURES_FIRST),
        (sites_of_one(nn.Conv1d(4, 4, 1), nn.Sequential(nn.ReLU())), "1.0", ALONG_FEATURES_FIRST),
        (sites_of_one(nn.ReLU()), "0", ALONG_FEATURES_LAST),
    ],
)
def test_the_direction_goes_along_the_features_where_every_axis_has_their_size(model, site, expected):
    assert torch.equal(steered(model, SQUARE, site), expected)


def test_behind_a_module_that_moves_the_axes_none_is_taken_from_before_it():
    model = sites_of_one(nn.Conv1d(4, 4, 1), Returns(lambda x: x.transpose(1, 2)), nn.ReLU())
    try:
        out = steered(model, SQUARE, "2")
    except ShapeError:
        return  # refused, so nothing is edited along a wrong axis
    assert torch.equal(out, ALONG_FEATURES_LAST)


def test_an_image_alone_is_steered_and_its_rows_are_refused():
    model, image = cnn()[:4], normal(3, 4, 4)
    plain = model[:1](image)
    assert torch.equal(steered(model[:1], image, "0"), plain + V[:, None, None])
    with pytest.raises(
        StrengthError, match=r"site '0': 4 rows of strength or gate against an activation of shape \(4, 4"
    ):
        steered(model[:1], image, "0", c=torch.ones(4))


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (
            identity(),
            torch.zeros(2, 4),
            r"3 rows .* of shape \(2, 4\) whose rows are on axis 0; give one strength per row",
        ),
        (identity(), torch.zeros(4), r"of shape \(4,\)"),
        (identity(), torch.zeros(4, 3, 4), r"of shape \(4, 3, 4\) whose rows are on axis 0"),
        (cnn()[:1], normal(4, 3, 4, 4), "whose rows are on axis 0"),
        (recurrent(nn.GRU, batch_first=False).rnn, normal(3, 2, 3), r"of shape \(3, 2, 4\) whose rows are on axis 1"),
    ],
)
def test_rows_that_do_not_agree_with_the_batch_are_refused(model, x, message):
    site = "" if isinstance(model, nn.GRU) else "0"
    with pytest.raises(StrengthError, match=message):
        steered(model, x, site, c=torch.ones(3))


# --- changing from one forward to the next -----------------------------------------------------------------------
@pytest.mark.parametrize("intervention", [None, lambda h, v, c: h + c * v], ids=["Add", "custom"])
def test_each_forward_may_have_its_own_shape_and_dtype(intervention):
    model = identity()
    with Steerer(model, SteeringVector({"0": V}), c=2, intervention=intervention):
        for shape in ((2, 4), (3, 4), (2, 4), (4,), (2, 3, 4), (0, 4), (2, 4)):
            for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
                out = model(torch.ones(shape, dtype=dtype))
                assert torch.equal(out, (1 + 2 * V).to(dtype).expand(shape))
                assert out.dtype is dtype


def test_a_model_may_change_its_dtype_between_forwards():
    model = exact().float()
    with Steerer(model, SteeringVector({"1": V})):
        single = model(torch.ones(2, 4))
        assert torch.equal(model.double()(torch.ones(2, 4, dtype=torch.float64)), single.double())


# --- dtypes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("c", [2, torch.tensor([2.0, 2.0])], ids=["number", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_float32_vector_leaves_the_models_dtype(dtype, c):
    model, x = exact().to(dtype), torch.ones(2, 4, dtype=dtype)
    expected = model[1](model[0](x)) + 2 * V.to(dtype)
    out = steered(model[:2], x, "1", c=c)
    assert out.dtype is dtype
    assert torch.equal(out, expected)


def test_a_low_precision_vector_is_scaled_at_full_precision():
    v = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    out = steered(identity(), torch.zeros(1, 2), "0", v, c=0.1)
    torch.testing.assert_close(out, torch.tensor([[0.1, 0.3]]), rtol=1e-6, atol=0)


def test_a_bank_of_mixed_dtypes_is_added_in_the_widest():
    bank = VectorBank({"a": SteeringVector({"0": V.bfloat16()}), "b": SteeringVector({"0": V.double()})})
    with Steerer(identity(), bank, c={"a": 1, "b": 2}) as steerer:
        assert torch.equal(steerer.model(torch.zeros(1, 4)), 3 * V[None])


@pytest.mark.parametrize("c", [2, torch.tensor([2.0, 2.0])], ids=["number", "rows"])
def test_autocast_keeps_its_dtype_at_the_site(c):
    model, x = exact().float()[:3], torch.ones(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model[2](model[1](model[0](x)) + 2 * V.bfloat16())
        out = steered(model, x, "1", c=c)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, expected)


def test_an_in_place_module_after_the_site_and_the_callers_input_are_safe():
    x = torch.full((2, 4), -1.0)
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    for _ in range(2):
        assert torch.equal(steered(model, x, "0", -V), torch.zeros(2, 4))
        assert torch.equal(x, torch.full((2, 4), -1.0))


# --- gradients ---------------------------------------------------------------------------------------------------
GRADED = {
    "number": {"c": 0.5},
    "rows": {"c": torch.tensor([0.5, -1.0])},
    "custom": {"intervention": lambda h, v, c: h * (1 + c * v)},
}


@pytest.mark.parametrize("options", GRADED.values(), ids=GRADED.keys())
def test_gradients_reach_the_input_and_the_parameters(options):
    model, x = encoder(batch_first=True), normal(2, 3, 4).requires_grad_()
    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    names = ["layers.0.linear1.weight", "layers.0.linear2.bias", "layers.1.self_attn.in_proj_weight"]

    def output(x, *chosen):
        replaced = parameters | dict(zip(names, chosen, strict=True))
        with Steerer(model, SteeringVector({"layers.0": V.double()}), **options):
            return functional_call(model, replaced, x)[:, 0]

    assert torch.autograd.gradcheck(output, (x, *(parameters[name] for name in names)), fast_mode=True)


def test_the_gradients_are_those_of_the_steered_model():
    model, x = exact(), normal(2, 4).requires_grad_()
    steered(model, x, "1", V.double()).sum().backward()
    hidden = torch.relu(x.detach() @ model[0].weight.T + model[0].bias) + V
    middle = hidden @ model[2].weight.T + model[2].bias
    back = (middle > 0) * (torch.ones_like(middle) @ model[4].weight)
    torch.testing.assert_close(model[2].weight.grad, back.T @ hidden.detach())
    through = (back @ model[2].weight) * (x @ model[0].weight.T + model[0].bias > 0)
    torch.testing.assert_close(x.grad, through @ model[0].weight)


@pytest.mark.parametrize("made", [nullcontext, torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("first", [nullcontext, torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("options", GRADED.values(), ids=GRADED.keys())
def test_gradients_flow_after_forwards_without_them(made, first, options):
    model, x = exact(), normal(2, 4).requires_grad_()
    expected = steered(model, x, "1", **options)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with made():
        steerer = Steerer(model, SteeringVector({"1": V}), **options)
    with steerer:
        with first():
            assert torch.equal(model(x), expected)
        model(x).sum().backward()
    assert torch.equal(x.grad, gradient)


# --- interventions of the user's own -----------------------------------------------------------------------------
class Scale:
    """h -> h · (1 + c v), element by element."""

    def __call__(self, activation, direction, c):
        return activation * (1 + c * direction)


@pytest.mark.parametrize("c", [0.5, torch.tensor(0.5), torch.tensor([0.0, 0.5, 2.0, -1.0])], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((4, 4), 1), ((4, 4, 4), 2)])
def test_an_intervention_gets_the_strength_of_each_row(c, shape, axis):
    x = normal(*shape).float()
    strength = c.reshape(-1, *[1] * (len(shape) - 1)) if isinstance(c, torch.Tensor) and c.ndim else c
    assert torch.equal(steered(identity(), x, "0", intervention=Scale(), c=c), x * (1 + strength * V))


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_intervention_sees_features_last_and_rows_first_or_second(batch_first):
    seen = []

    def intervention(activation, direction, c):
        seen.append((tuple(activation.shape), tuple(direction.shape), tuple(c.shape)))
        return activation

    model = recurrent(nn.LSTM, batch_first=batch_first)
    steered(model, normal(2, 2, 3), "rnn", intervention=intervention, c=torch.ones(2))
    steered(cnn(), normal(2, 3, 4, 4), "2", intervention=intervention, c=torch.ones(2))
    steered(cnn(), normal(2, 3, 4, 4), "2", intervention=intervention)
    recurrent_c = (2, 1, 1) if batch_first else (1, 2, 1)
    image = (2, 4, 4, 4)
    assert seen == [((2, 2, 4), (4,), recurrent_c), (image, (4,), (2, 1, 1, 1)), (image, (4,), ())]


def test_an_intervention_on_an_image_is_undone_into_its_layout():
    model, x, c = cnn(), normal(4, 3, 4, 4), torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    plain = model[:3](x)
    expected = plain * (1 + c.reshape(4, 1, 1, 1) * V.reshape(1, 4, 1, 1))
    assert torch.equal(steered(model[:3], x, "2", intervention=Scale(), c=c), expected)


def test_an_intervention_takes_the_concepts_in_the_banks_order():
    bank = VectorBank({"a": SteeringVector({"0": V}), "b": SteeringVector({"0": torch.ones(4)})})
    x = torch.ones(2, 4)
    with Steerer(identity(), bank, c={"a": 2, "b": 3}, intervention=lambda h, v, c: (h + v) * c) as steerer:
        assert torch.equal(steerer.model(x), ((x + V) * 2 + 1) * 3)


def test_an_intervention_never_sees_a_concept_where_it_has_no_direction():
    def unit(activation, direction, c):
        return activation + c * direction / direction.norm()

    bank = VectorBank({"a": SteeringVector({"0": V}), "b": SteeringVector({"1": V})})
    with Steerer(identity(), bank, intervention=unit) as steerer:
        out = steerer.model(torch.zeros(2, 4))
    torch.testing.assert_close(out, (2 * V / V.norm()).expand(2, 4))


# --- nested tensors --------------------------------------------------------------------------------------------------
nested_api = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
ROWS = [torch.arange(12.0).reshape(3, 4), torch.arange(4.0).reshape(1, 4)]


@nested_api
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@pytest.mark.parametrize("options", GRADED.values(), ids=GRADED.keys())
@pytest.mark.parametrize("site", ["0", "0:in"])
@pytest.mark.case(14, 52)
def test_a_nested_tensor_is_steered_as_each_of_its_members(layout, options, site):
    nested = torch.nested.nested_tensor(ROWS, layout=layout)
    out = steered(identity(), nested, site, **options)
    assert out.is_nested
    assert out.layout is layout
    c = options.get("c", torch.ones(2))
    for index, (one, row) in enumerate(zip(out.unbind(), ROWS, strict=True)):
        own = options | ({"c": float(c[index]) if isinstance(c, torch.Tensor) else c} if "c" in options else {})
        assert torch.equal(one, steered(identity(), row[None], "0", **own)[0])


@nested_api
@pytest.mark.case(14)
def test_shapes_of_nested_tensors_may_change_from_call_to_call():
    model = identity()
    with Steerer(model, SteeringVector({"0": V})):
        for rows in (ROWS, ROWS[::-1], ROWS[:1], ROWS):
            out = model(torch.nested.nested_tensor(rows))
            assert all(torch.equal(one, row + V) for one, row in zip(out.unbind(), rows, strict=True))
            assert torch.equal(model(torch.zeros(2, 4)), V.expand(2, 4))


def masked_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@nested_api
@pytest.mark.parametrize("site", ["layers.0", "layers.1", "layers.0.linear2", "layers.0.norm1", "layers.1:in", ""])
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.case(12, 14)
def test_an_encoder_with_a_padding_mask_is_steered_at_its_real_tokens_as_the_dense_one(site, backend):
    model, x = masked_encoder(), torch.rand(2, 3, 4)
    mask = torch.tensor([[False, False, False], [False, False, True]])
    dense = copy.deepcopy(model)
    dense.use_nested_tensor = False
    outputs = []
    for each in (model, dense):
        with Steerer(each, SteeringVector({site: V / 4}), backend=backend), torch.no_grad():
            outputs.append(each(x, src_key_padding_mask=mask))
    torch.testing.assert_close(outputs[0][~mask], outputs[1][~mask])
    with torch.no_grad():
        assert not torch.allclose(outputs[0][~mask], model(x, src_key_padding_mask=mask)[~mask])


@nested_api
@pytest.mark.case(14)
def test_activations_of_an_encoder_with_a_padding_mask_are_those_of_its_real_tokens():
    model, x = masked_encoder(), torch.rand(2, 3, 4)
    mask = torch.tensor([[False, False, False], [False, False, True]])
    batch = {"src": x, "src_key_padding_mask": mask}
    rows = record(model, [batch], sites="layers.1", progress=False)["layers.1"]
    with torch.no_grad():
        expected = model(**batch)[~mask]
    torch.testing.assert_close(rows, expected)
    assert collect(model, [batch], sites="layers.1", progress=False)["layers.1"].count == 5
