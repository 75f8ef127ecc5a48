"""Axes: where an activation has its features and its rows, checked against outputs of real modules."""

import pytest
import torch
from einops.layers.torch import Rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from actsteer import ShapeError, SiteNotFoundError, Steerer, SteeringVector, VectorBank, collect, fit, record
from actsteer.sites.axes import Layout, layout, layouts
from actsteer.sites.containers import get, locate
from actsteer.sites.features import known_size
from actsteer.sites.listen import listen
from actsteer.sites.place import Place
from actsteer.sites.resolve import resolve

D, T, N = 6, 5, 3  # features, positions, rows: all different, so that an axis shows in the shape
FLAT, SEQUENCE, LINE, IMAGE, VOLUME = (N, D), (N, T, D), (N, D, T), (N, D, T, T), (N, D, T, T, T)


def at(model, site):
    """The layout at a site."""
    return layout(model, resolve(model, [site])[site])


def axis_at(model, site):
    return at(model, site).axis


def lens() -> nn.Sequential:
    """As in TransformerLens: `hook_dict` names the hook points."""
    model = nn.Sequential(nn.Identity())
    model.hook_dict = {"hook_resid": model[0]}
    return model


KNOWN = [
    (nn.Linear(D, D), FLAT),
    (nn.Linear(D, D), SEQUENCE),
    (nn.LayerNorm(D), SEQUENCE),
    (nn.RMSNorm(D), SEQUENCE),
    (nn.GRU(D, D, batch_first=True), SEQUENCE),
    (nn.LSTM(D, D), SEQUENCE),
    (nn.RNN(D, D), SEQUENCE),
    (nn.BatchNorm1d(D), FLAT),
    (nn.BatchNorm1d(D), LINE),
    (nn.GroupNorm(2, D), FLAT),
    (nn.GroupNorm(2, D), IMAGE),
    (nn.LocalResponseNorm(2), IMAGE),
    (nn.Upsample(scale_factor=2), IMAGE),
    (nn.Conv1d(D, D, 1), LINE),
    (nn.Conv2d(D, D, 1), IMAGE),
    (nn.Conv3d(D, D, 1), VOLUME),
    (nn.ConvTranspose2d(D, D, 1), IMAGE),
    (nn.Conv2d(D, D, 1), (D, T, T)),
    (nn.Conv1d(D, D, 1), (D, T)),
    (nn.BatchNorm2d(D), IMAGE),
    (nn.BatchNorm3d(D), VOLUME),
    (nn.InstanceNorm1d(D), LINE),
    (nn.MaxPool2d(1), IMAGE),
    (nn.AvgPool3d(1), VOLUME),
    (nn.AdaptiveAvgPool2d(1), IMAGE),
    (nn.Dropout2d(), IMAGE),
    (nn.ZeroPad2d(1), IMAGE),
    (nn.CircularPad1d(1), LINE),
    (nn.Softmax2d(), IMAGE),
    (nn.Sequential(nn.Conv2d(D, D, 1), nn.ReLU()), IMAGE),
    (nn.Sequential(nn.Linear(D, D), nn.Sequential(nn.Dropout(), nn.GELU())), SEQUENCE),
]


@pytest.mark.parametrize(("module", "shape"), KNOWN, ids=lambda part: type(part).__name__)
def test_the_axis_that_the_class_tells_holds_the_features(module, shape):
    model = nn.Sequential(module)
    place = resolve(model, ["0"])["0"]
    output = module.eval()(torch.rand(shape))
    activation = get(output, locate(place, output))
    axis = layout(model, place).feature_axis(tuple(activation.shape), size=D, site="0")
    assert axis in range(activation.ndim)
    assert activation.shape[axis] == D


@pytest.mark.parametrize(("module", "shape"), KNOWN, ids=lambda part: type(part).__name__)
def test_inputs_have_the_axis_that_the_class_tells_too(module, shape):
    axis = at(nn.Sequential(module), "0:in").feature_axis(shape, size=D, site="0:in")
    assert shape[axis] == D


@pytest.mark.parametrize("module", [nn.Embedding(4, D), nn.EmbeddingBag(4, D)], ids=type)
def test_embeddings_have_their_features_last(module):
    tokens = torch.zeros(N, T, dtype=torch.int64)
    shape = tuple(module(tokens).shape)
    assert at(nn.Sequential(module), "0").feature_axis(shape, size=D, site="0") == len(shape) - 1


class Subclass(nn.Conv2d):
    """A user's own convolution."""


class LayerNorm2d(nn.LayerNorm):
    """A layer norm over channels, as torchvision's and timm's."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("module", [Subclass(1, 2, 1), LayerNorm2d(2)], ids=type)
def test_a_subclass_has_the_axis_of_its_class_or_of_its_name(module):
    assert axis_at(nn.Sequential(module), "0") == -3


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Identity(), nn.Dropout(), nn.Flatten()], ids=type)
def test_a_class_that_tells_nothing_has_no_axis(module):
    model = nn.Module()
    model.add_module("part", module)
    assert at(model, "part") == Layout(None)


@pytest.mark.parametrize("pointwise", [nn.ReLU, nn.GELU, nn.Identity, nn.Dropout, nn.Sigmoid])
@pytest.mark.parametrize(
    ("before", "shape"), [(nn.Conv2d(D, D, 1), IMAGE), (nn.Linear(D, D), SEQUENCE), (nn.BatchNorm1d(D), LINE)]
)
def test_a_pointwise_module_in_a_sequential_has_the_axis_of_what_runs_before(pointwise, before, shape):
    model = nn.Sequential(before, pointwise(), pointwise()).eval()
    for site in "12":
        assert model[: int(site) + 1](torch.rand(shape)).shape[axis_at(model, site)] == D
        assert axis_at(model, f"{site}:in") == axis_at(model, site)


def test_what_runs_later_does_not_count():
    assert axis_at(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1)), "0") is None


def test_a_flatten_ends_the_layout():
    model = nn.Sequential(nn.Conv2d(D, D, 1), nn.Flatten(), nn.ReLU())
    assert [axis_at(model, site) for site in ("0", "1:in", "1", "2:in", "2")] == [-3, -3, None, None, None]


def test_a_sequential_has_the_axis_of_its_last_member_that_tells_and_takes_that_of_its_first():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(D, D, 1), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.Linear(D, D)))
    assert [axis_at(model, site) for site in ("0", "0.1", "1.0", "1")] == [-3, -3, -3, -1]
    assert [axis_at(model, f"{site}:in") for site in ("0", "0.1", "1.0", "1", "1.1")] == [-3, -3, -3, -3, -1]


class Tokens(nn.Module):
    """(n, d, h, w) -> (n, h * w, d), as every vision transformer does after its patches."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("permute", [Tokens(), Rearrange("n d h w -> n (h w) d")], ids=type)
@pytest.mark.parametrize("after", [nn.Identity(), nn.TransformerEncoderLayer(D, 2, 8, batch_first=True)], ids=type)
def test_a_module_that_moves_the_axes_does_not_inherit_the_convolution_s(permute, after):
    model = nn.Sequential(nn.Conv2d(D, D, 1), permute, after).eval()
    for site in "12":
        shape = tuple(model[: int(site) + 1](torch.rand(IMAGE)).shape)
        assert at(model, site).feature_axis(shape, size=D, site=site) == 2


def test_hook_points_have_their_features_last():
    model = lens()
    assert axis_at(model, "hook_resid") == -1
    assert axis_at(model, "0") is None


# --- the axis of an activation ---------------------------------------------------------------------------------------
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@given(shapes, st.data())
def test_a_known_axis_is_counted_from_the_front(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    positive = Layout(axis).feature_axis(tuple(shape), size=shape[axis], site="2")
    assert positive == list(range(len(shape)))[axis]
    assert Layout(axis).feature_axis(tuple(shape), size=None, site="2") == positive


@given(shapes.filter(lambda shape: len(shape) <= 3))
def test_an_open_axis_is_the_last_one_of_rows_and_sequences(shape):
    assert Layout(None).feature_axis(tuple(shape), size=shape[-1], site="2") == len(shape) - 1


@given(shapes, st.data())
def test_another_size_is_refused(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    match = (
        rf"site '2': the activation has {shape[axis]} features \(axis {axis} of shape .*\), the vector 9; was it fitted"
    )
    with pytest.raises(ShapeError, match=match):
        Layout(axis).feature_axis(tuple(shape), size=9, site="2")


def test_an_open_axis_of_an_image_is_refused():
    match = (
        r"site '2': the activation has shape \(1, 2, 3, 4\), and its module does not tell which axis holds the "
        r"features; pass axis=\{'2': 1\}"
    )
    with pytest.raises(ShapeError, match=match):
        Layout(None).feature_axis((1, 2, 3, 4), size=4, site="2")


@pytest.mark.parametrize(("shape", "axis"), [((2,), 1), ((2, 3), -3), ((), None), ((), -1)])
def test_an_axis_that_the_activation_lacks_is_refused(shape, axis):
    with pytest.raises(ShapeError, match=r"site '2': expected an activation with a feature axis -?\d, got shape"):
        Layout(axis).feature_axis(shape, size=None, site="2")


@pytest.mark.parametrize(
    ("evidence", "shape", "axis"),
    [
        (((-3, 6), (-3, 8)), (2, 8, 5, 5), 1),
        (((-1, 8), (-1, 32)), (2, 5, 5, 8), 3),
        (((-3, 8), (-1, 8)), (2, 5, 5, 8), 3),
        (((-3, 8), (-1, 32)), (2, 8, 5, 5), 1),
        (((-2, 8),), (2, 8, 5), 1),
        (((-2, 8), (-1, 7)), (2, 5, 7), 2),
        (((-1, 6),), (2, 3, 6), 2),
        (((-3, 9),), (2, 5, 8), 2),
    ],
)
def test_an_open_axis_is_where_the_modules_within_have_as_many_features(evidence, shape, axis):
    assert Layout(None, evidence).feature_axis(shape, size=None, site="2") == axis


@pytest.mark.parametrize(
    ("evidence", "shape"),
    [(((-3, 8), (-1, 5)), (2, 8, 5, 5)), (((-3, 8), (-1, 32)), (2, 8, 8, 32)), (((-2, 8),), (2, 8, 8))],
)
@pytest.mark.case(21)
def test_an_open_axis_with_several_that_fit_is_refused(evidence, shape):
    with pytest.raises(ShapeError, match=r"axes \[1, \d\] would all do; pass axis="):
        Layout(None, evidence).feature_axis(shape, size=None, site="2")


# --- never along a wrong one -----------------------------------------------------------------------------------------
C = 4
V = torch.tensor([1.0, 2.0, 3.0, 4.0])


def zeroed(model):
    """Gives out zero at every site, so that what is added shows by itself."""
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model.eval()


class Block(nn.Module):
    """A user's block of a convolution; its class tells nothing."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        return functional.relu(self.convolution(x))


class Reshaped(nn.Sequential):
    """A Sequential whose own forward moves the axes."""

    def forward(self, x):
        return super().forward(x).flatten(2).transpose(1, 2)


class PatchEmbedding(nn.Conv2d):
    """A convolution whose own forward moves the axes."""

    def forward(self, x):
        return super().forward(x).flatten(2).transpose(1, 2)


class Between(nn.Module):
    """A function between a linear part and another; what it gives out has the axes of an image."""

    def __init__(self):
        super().__init__()
        self.image = nn.Unflatten(1, (C, C, C))
        self.head = nn.Linear(C**3, C)

    def forward(self, x):
        return self.head(self.image(x.flatten(1)).flatten(1)), self.image(x.flatten(1))


TRICKY = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(C, C, 1)), (C, C, C, C), "0", 1),
    "convolution alone": (lambda: nn.Sequential(nn.Conv2d(C, C, 1)), (C, C, C), "0", 0),
    "block of an image": (lambda: nn.Sequential(Block(nn.Conv2d(C, C, 1))), (C, C, C, C), "0", 1),
    "block of an image alone": (lambda: nn.Sequential(Block(nn.Conv2d(C, C, 1))), (C, C, C), "0", 0),
    "block of a line": (lambda: nn.Sequential(Block(nn.Conv1d(C, C, 1))), (C, C, C), "0", 1),
    "block of a line alone": (lambda: nn.Sequential(Block(nn.Conv1d(C, C, 1))), (C, C), "0", 0),
    "block of a volume": (lambda: nn.Sequential(Block(nn.Conv3d(C, C, 1))), (C,) * 5, "0", 1),
    "reshaping Sequential": (lambda: nn.Sequential(Reshaped(nn.Conv2d(C, C, 1))), (C, C, 2, 2), "0", 2),
    "after a reshaping Sequential": (
        lambda: nn.Sequential(Reshaped(nn.Conv2d(C, C, 1)), nn.ReLU()),
        (C, C, 2, 2),
        "1",
        2,
    ),
    "reshaping convolution": (lambda: nn.Sequential(PatchEmbedding(C, C, 1)), (C, C, 2, 2), "0", 2),
    "layer norm of an image": (
        lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.LayerNorm((C, C, C))),
        (C, C, C, C),
        "1",
        1,
    ),
    "tokens": (lambda: nn.Sequential(nn.Conv2d(C, C, 1), Tokens()), (C, C, 2, 2), "1", 2),
    "input of a convolution": (lambda: nn.Sequential(nn.Identity(), nn.Conv2d(C, C, 1)), (C, C, C, C), "1:in", 1),
    "input of a ReLU": (lambda: nn.Sequential(nn.Conv1d(C, C, 1), nn.ReLU()), (C, C, C), "1:in", 1),
}


CERTAIN = {"convolution", "convolution alone", "input of a convolution", "input of a ReLU"}  # refusing would be wrong


def first_row(model, x, site):
    """The activation at a site, after the steering."""
    name, _, side = site.partition(":")
    seen = []
    module = model.get_submodule(name)
    if side:
        remove = listen(resolve(model, [site])[site], lambda _, args, kwargs: seen.append(args[0].clone()))
    else:
        remove = module.register_forward_hook(lambda *given: seen.append(given[-1].clone())).remove
    model(x)
    remove()
    return seen[0]


@pytest.mark.parametrize("case", TRICKY)
@pytest.mark.case(21)
def test_where_every_axis_has_the_vector_s_size_the_features_are_steered_or_it_is_refused(case):
    build, shape, site, axis = TRICKY[case]
    model, x = zeroed(build()), torch.zeros(shape)
    try:
        with Steerer(model, SteeringVector({site: V})):
            found = first_row(model, x, site)
    except ShapeError:
        assert case not in CERTAIN
        return
    spread = [1] * found.ndim
    spread[axis] = C
    assert torch.equal(found, V.reshape(spread).expand(found.shape))


@pytest.mark.parametrize("case", TRICKY)
@pytest.mark.case(21)
def test_where_every_axis_has_one_size_the_features_are_recorded_or_it_is_refused(case):
    build, shape, site, axis = TRICKY[case]
    torch.manual_seed(0)
    model, x = build().eval(), torch.rand(shape)
    try:
        rows = record(model, [x], sites=site, progress=False)[site]
    except ShapeError:
        assert case not in CERTAIN
        return
    assert torch.equal(rows, first_row(model, x, site).movedim(axis, -1).reshape(-1, C))


def test_a_module_around_with_a_size_by_accident_decides_nothing():
    model, x = Between(), torch.rand(2, C**3)
    with pytest.raises(ShapeError, match=r"site 'image'.*pass axis="):
        record(model, x, sites="image", progress=False)


class Classifier(nn.Module):
    """A convolution, and a head on all that it gives."""

    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv1d(2, C, 1), nn.Linear(3 * C, 5)

    def forward(self, x):
        return self.head(self.convolution(x).flatten(1))


@pytest.mark.parametrize("rows", [2, C, 5, 7])
def test_what_a_classifier_gives_out_has_its_features_last_whatever_the_number_of_rows(rows):
    model, x = Classifier(), torch.rand(rows, 2, 3)
    assert record(model, x, sites="", progress=False)[""].shape == (rows, 5)
    plain = model(x)
    with Steerer(model, SteeringVector({"": torch.arange(5.0)})):
        assert torch.equal(model(x), plain + torch.arange(5.0))


@pytest.mark.parametrize("site", ["1", "4"])
def test_a_module_at_two_places_is_steered_along_the_features_at_both_or_refused(site):
    shared, seen = nn.ReLU(), []
    model = zeroed(nn.Sequential(nn.Conv1d(C, C, 1), shared, Rearrange("n d t -> n t d"), nn.Linear(C, C), shared))
    try:
        with Steerer(model, SteeringVector({site: V})):
            shared.register_forward_hook(lambda *given: seen.append(given[-1]))
            model(torch.zeros(2, C, C))
    except ShapeError:
        return
    assert torch.equal(seen[0], V[:, None].expand(2, C, C))
    assert torch.equal(seen[1], V.expand(2, C, C))


# --- an axis that is given -------------------------------------------------------------------------------------------
class Opaque(nn.Module):
    """Its class tells nothing."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("how", ["int", "site"])
@pytest.mark.case(21)
def test_a_given_axis_is_the_one_that_is_steered_and_collected(axis, how):
    model = nn.Sequential(Opaque(), Opaque())
    given = axis if how == "int" else {"1": axis}
    x = torch.arange(4.0**4).reshape(4, 4, 4, 4)
    spread = [1] * 4
    spread[axis] = 4
    with Steerer(model, SteeringVector({"1": V}), axis=given):
        assert torch.equal(model(x), x + V.reshape(spread))
    assert torch.equal(record(model, [x], sites="1", axis=given)["1"], x.movedim(axis, -1).reshape(-1, 4))
    mean = collect(model, [x], sites="1", axis=given)["1"].mean
    assert torch.equal(mean, x.double().movedim(axis, -1).reshape(-1, 4).mean(dim=0))


@pytest.mark.parametrize(
    ("model", "shape", "axis", "d"),
    [
        (nn.Sequential(nn.Linear(5, 5)), (2, 3, 5), 1, 3),
        (nn.Sequential(nn.Conv2d(3, 6, 1)), (2, 3, 4, 5), -1, 5),
        (nn.Sequential(nn.LayerNorm(5)), (2, 3, 5), -2, 3),
    ],
    ids=["mixing tokens", "columns of an image", "positions"],
)
def test_a_given_axis_wins_over_the_class(model, shape, axis, d):
    x, v = torch.rand(shape), torch.arange(float(d))
    plain, spread = model(x), [1] * len(shape)
    spread[axis] = d
    with Steerer(model, SteeringVector({"0": v}), axis={"0": axis}):
        assert torch.equal(model(x), plain + v.reshape(spread))


def test_an_axis_is_given_to_sites_in_use_as_a_number():
    model = nn.Sequential(Opaque())
    places = resolve(model, ["0"])
    with pytest.raises(SiteNotFoundError, match=r"axis names no site in use: '1'. There are: '0'"):
        layouts(model, places, axis={"1": 1})
    for wrong in (True, 1.0, "1", [1]):
        with pytest.raises(TypeError, match="axis: expected an int"):
            layouts(model, places, axis=wrong)
        with pytest.raises(TypeError, match="axis: expected an int for site '0'"):
            layouts(model, places, axis={"0": wrong})


def test_an_axis_that_is_given_is_the_layout_whatever_the_module_says():
    model = nn.Sequential(nn.Conv2d(1, 2, 1))
    assert layouts(model, resolve(model, ["0"]), axis=2)["0"] == Layout(2)
    assert layouts(model, resolve(model, ["0"]), axis=None)["0"] == Layout(-3)


# --- the vector remembers --------------------------------------------------------------------------------------------
SQUARE = torch.arange(64.0).reshape(4, 4, 4) / 8


@pytest.mark.parametrize("axis", [1, 2, -1, -2])
@pytest.mark.parametrize("model", [nn.Sequential(Opaque()), nn.Sequential(nn.Conv1d(4, 4, 1))], ids=["open", "known"])
@pytest.mark.case(21)
def test_a_vector_is_steered_along_the_axis_of_its_statistics(model, axis):
    model = model.eval()
    v = fit(model, positive=[SQUARE], negative=[SQUARE.flip(0) / 2], sites="0", axis=axis, progress=False)
    spread = [1] * 3
    spread[axis] = 4
    with torch.no_grad():
        plain = model(SQUARE)
        with Steerer(model, v):
            torch.testing.assert_close(model(SQUARE), plain + v["0"].reshape(spread).to(plain))
        other = axis % 3 % 2 + 1
        spread = [1] * 3
        spread[other] = 4
        with Steerer(model, v, axis=other):  # what is given now wins
            torch.testing.assert_close(model(SQUARE), plain + v["0"].reshape(spread).to(plain))


CHANGES = {
    "scaled": lambda v: 2 * v,
    "unit": lambda v: v.unit(),
    "sum": lambda v: v + v,
    "selected": lambda v: v.select("0"),
    "dtype": lambda v: v.to(dtype=torch.float64),
    "projected": lambda v: v.project(onto=SteeringVector({"0": V})),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_axis_survives_the_algebra_and_saving(change, tmp_path):
    model = nn.Sequential(Opaque())
    v = change(fit(model, positive=[2 * SQUARE], negative=[SQUARE], sites="0", axis=1, progress=False))
    v.save(tmp_path / "v.safetensors")
    with Steerer(model, SteeringVector.load(tmp_path / "v.safetensors")):
        assert torch.equal(model(torch.zeros(4, 4, 4)), v["0"].float()[:, None].expand(4, 4, 4))


def test_a_sum_of_vectors_at_two_sites_keeps_the_axis_of_each():
    model = nn.Sequential(Opaque(), Opaque())
    sides = {"positive": [2 * SQUARE], "negative": [SQUARE], "progress": False}
    v, w = fit(model, sites="0", axis=1, **sides), fit(model, sites="1", axis=2, **sides)
    total = v + w
    x = torch.zeros(4, 4, 4)
    with Steerer(model, total):
        assert torch.equal(model(x), v["0"].float()[:, None] + w["1"].float() + x)


def test_vectors_of_one_site_with_two_axes_are_refused_or_each_has_its_own():
    model = nn.Sequential(Opaque())
    one, other = (SteeringVector({"0": V}, metadata={"axis 0": axis}) for axis in "12")
    try:
        with Steerer(model, VectorBank({"one": one, "other": other})):
            out = model(torch.zeros(4, 4, 4))
    except ShapeError:
        return
    assert torch.equal(out, (V[:, None] + V).expand(4, 4, 4))


# --- rows ------------------------------------------------------------------------------------------------------------
def test_rows_come_first_unless_a_module_says_otherwise():
    model = nn.Sequential(nn.Linear(D, D), nn.LSTM(D, D), nn.LSTM(D, D, batch_first=True))
    assert [at(model, site).row_axis for site in ("0", "1", "2", "1:in", "2:in")] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(("batch_first", "axis"), [(False, 1), (True, 0)])
def test_a_module_around_decides_for_those_within(batch_first, axis):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 2, 8, batch_first=batch_first), 1, enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, 8, batch_first=batch_first), 1)
    model = nn.Sequential(encoder, decoder)
    for site in ("0", "0.layers.0", "0.layers.0.linear1", "0.layers.0.self_attn", "0:in", "1", "1.layers.0.norm1"):
        assert at(model, site).row_axis == axis


def test_the_model_itself_and_hook_names_count_too():
    model = lens()
    assert at(model, "hook_resid").row_axis == 0
    model.batch_first = False
    assert at(model, "hook_resid").row_axis == 1


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("side", ["", ":in"])
@pytest.mark.case(19, 52)
def test_each_row_has_its_own_strength_whichever_axis_the_rows_are_on(batch_first, kind, side):
    torch.manual_seed(0)
    model, c = kind(4, 4, batch_first=batch_first), torch.tensor([0.0, 1.0, -2.0])
    x = torch.rand(3, 5, 4) if batch_first else torch.rand(5, 3, 4)
    rows = 0 if batch_first else 1
    with Steerer(model, SteeringVector({side: V}), c=c):
        out = model(x)[0]
    for row in range(3):
        with Steerer(model, SteeringVector({side: V}), c=float(c[row])):
            alone = model(x.narrow(rows, row, 1))[0]
        torch.testing.assert_close(out.narrow(rows, row, 1), alone)


# --- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "taken", "given"),
    [
        (nn.Linear(2, 3), 2, 3),
        (nn.LayerNorm(3), 3, 3),
        (nn.RMSNorm(3), 3, 3),
        (nn.Embedding(5, 3), 3, 3),
        (nn.Conv1d(2, 3, 1), 2, 3),
        (nn.Conv2d(2, 3, 1), 2, 3),
        (nn.ConvTranspose3d(2, 3, 1), 2, 3),
        (nn.BatchNorm2d(3), 3, 3),
        (nn.GroupNorm(1, 3), 3, 3),
        (nn.ReLU(), None, None),
        (nn.Sequential(nn.Linear(2, 3)), None, None),
    ],
    ids=lambda part: type(part).__name__,
)
def test_known_size_is_the_number_of_features_taken_or_given(module, taken, given):
    assert known_size(Place("0", "0", module)) == given
    assert known_size(Place("0:in", "0", module, "in")) == taken
    assert known_size(Place("0:out.1", "0", module, "out", ("1",))) is None


@pytest.mark.parametrize(
    ("site", "size"), [("0", 3), ("0:in", 2), ("1", 3), ("1:in", 3), ("2", 4), ("2:in", 3), ("0:in.0", 2)]
)
def test_a_vector_of_another_size_is_refused_before_anything_runs(site, size):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Conv1d(3, 4, 1))
    with pytest.raises(ShapeError, match=f"site '{site}': the activation has {size} features, the vector 7"):
        Steerer(model, SteeringVector({site: torch.ones(7)}))
    Steerer(model, SteeringVector({site: torch.ones(size)}))
