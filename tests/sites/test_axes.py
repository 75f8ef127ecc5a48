"""Axes: where a module's output has its features and its rows, checked against outputs of real modules."""

import pytest
import torch
from einops.layers.torch import Rearrange
from torch import nn

from actsteer.sites.axes import feature_axis, known_size, row_axis
from actsteer.sites.outputs import read_activation

D, T, N = 6, 5, 3  # features, positions, rows: all different, so that an axis shows in the shape
FLAT, SEQUENCE, LINE, IMAGE, VOLUME = (N, D), (N, T, D), (N, D, T), (N, D, T, T), (N, D, T, T, T)


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
    (nn.InstanceNorm1d(D), LINE),
    (nn.MaxPool2d(1), IMAGE),
    (nn.AdaptiveAvgPool2d(1), IMAGE),
    (nn.Dropout2d(), IMAGE),
    (nn.ZeroPad2d(1), IMAGE),
    (nn.Sequential(nn.Conv2d(D, D, 1), nn.ReLU()), IMAGE),
    (nn.Sequential(nn.Linear(D, D), nn.Sequential(nn.Dropout(), nn.GELU())), SEQUENCE),
]


@pytest.mark.parametrize(("module", "shape"), KNOWN, ids=lambda part: type(part).__name__)
def test_the_axis_that_the_class_tells_holds_the_features(module, shape):
    output = read_activation(module.eval()(torch.rand(shape)), site="0")
    axis = feature_axis(nn.Sequential(module), "0", module)
    assert output.shape[axis] == D


@pytest.mark.parametrize("module", [nn.Embedding(4, D), nn.EmbeddingBag(4, D)], ids=type)
def test_embeddings_have_their_features_last(module):
    tokens = torch.zeros(N, T, dtype=torch.int64)
    axis = feature_axis(nn.Sequential(module), "0", module)
    assert module(tokens).shape[-1 if axis is None else axis] == D


class Subclass(nn.Conv2d):
    """A user's own convolution."""


def test_a_subclass_has_the_axis_of_its_class():
    assert feature_axis(nn.Sequential(Subclass(1, 2, 1)), "0", Subclass(1, 2, 1)) == -3


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Identity(), nn.Dropout(), nn.Flatten()], ids=type)
def test_a_class_that_tells_nothing_has_no_axis(module):
    model = nn.Module()
    model.add_module("part", module)
    assert feature_axis(model, "part", module) is None


@pytest.mark.parametrize("pointwise", [nn.ReLU, nn.GELU, nn.Identity, nn.Dropout, nn.Sigmoid])
@pytest.mark.parametrize(
    ("before", "shape"), [(nn.Conv2d(D, D, 1), IMAGE), (nn.Linear(D, D), SEQUENCE), (nn.BatchNorm1d(D), LINE)]
)
def test_a_pointwise_module_in_a_sequential_has_the_axis_of_what_runs_before(pointwise, before, shape):
    model = nn.Sequential(before, pointwise(), pointwise()).eval()
    for site in "12":
        axis = feature_axis(model, site, model[int(site)])
        assert model[: int(site) + 1](torch.rand(shape)).shape[axis] == D


def test_what_runs_later_does_not_count():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1))
    assert feature_axis(model, "0", model[0]) is None


def test_a_flatten_ends_the_layout():
    model = nn.Sequential(nn.Conv2d(D, D, 1), nn.Flatten(), nn.ReLU())
    assert [feature_axis(model, site, model[int(site)]) for site in "012"] == [-3, None, None]


def test_a_sequential_has_the_axis_of_its_last_member_that_tells():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(D, D, 1), nn.ReLU()), nn.ReLU())
    assert [feature_axis(model, site, model.get_submodule(site)) for site in ("0", "0.1", "1")] == [-3, -3, -3]


class Tokens(nn.Module):
    """(n, d, h, w) -> (n, h * w, d), as every vision transformer does after its patches."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("permute", [Tokens(), Rearrange("n d h w -> n (h w) d")], ids=type)
@pytest.mark.parametrize("after", [nn.Identity(), nn.TransformerEncoderLayer(D, 2, 8, batch_first=True)], ids=type)
def test_a_module_that_moves_the_axes_does_not_inherit_the_convolution_s(permute, after):
    model = nn.Sequential(nn.Conv2d(D, D, 1), permute, after).eval()
    for site in "12":
        axis = feature_axis(model, site, model[int(site)])
        assert model[: int(site) + 1](torch.rand(IMAGE)).shape[-1 if axis is None else axis] == D


def test_hook_points_have_their_features_last():
    model = lens()
    assert feature_axis(model, "hook_resid", model[0]) == -1
    assert feature_axis(model, "0", model[0]) is None


# --- rows --------------------------------------------------------------------------------------------------------
def test_rows_come_first_unless_a_module_says_otherwise():
    model = nn.Sequential(nn.Linear(D, D), nn.LSTM(D, D), nn.LSTM(D, D, batch_first=True))
    assert [row_axis(model, site, model[int(site)]) for site in "012"] == [0, 1, 0]


@pytest.mark.parametrize(("batch_first", "axis"), [(False, 1), (True, 0)])
def test_a_module_around_decides_for_those_within(batch_first, axis):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 2, 8, batch_first=batch_first), 1, enable_nested_tensor=False
    )
    model = nn.Sequential(encoder)
    for site in ("0.layers.0", "0.layers.0.linear1", "0.layers.0.self_attn"):
        assert row_axis(model, site, model.get_submodule(site)) == axis


def test_the_model_itself_and_hook_names_count_too():
    model = lens()
    assert row_axis(model, "hook_resid", model[0]) == 0
    model.batch_first = False
    assert row_axis(model, "hook_resid", model[0]) == 1


# --- sizes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Linear(2, 3), 3),
        (nn.LayerNorm((4, 3)), 3),
        (nn.Embedding(5, 3), 3),
        (nn.Conv1d(2, 3, 1), 3),
        (nn.Conv2d(2, 3, 1), 3),
        (nn.ConvTranspose3d(2, 3, 1), 3),
        (nn.ReLU(), None),
        (nn.Sequential(nn.Linear(2, 3)), None),
    ],
    ids=lambda part: type(part).__name__,
)
def test_known_size_is_the_number_of_features_put_out(module, size):
    assert known_size(module) == size
