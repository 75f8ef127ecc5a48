"""LowRank: an edit in the place of vectors."""

import pytest
import torch
from torch import nn

from actsteer import KeepNorm, LowRank, ShapeError, SiteNotFoundError, Steerer
from tests.oracles import state
from tests.zoo import bits

G = torch.Generator().manual_seed(0)
PARTS = tuple(torch.randn(*size, generator=G) for size in ((2, 4), (2, 4), (2,)))
EDIT = LowRank({"0": PARTS})
IDENTITY = nn.Sequential(nn.Identity())


def formula(h):
    reads, adds, offsets = PARTS
    return h + (h @ reads.T + offsets) @ adds


def steered(x, edit=EDIT, model=IDENTITY, **options):
    with Steerer(model, edit, **options), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (4,), (1, 4)])
def test_every_row_and_position_is_edited_by_the_formula(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(steered(x), formula(x))


def test_the_strength_scales_what_is_added():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(steered(x, c=-0.5), x - 0.5 * (formula(x) - x))
    doses = steered(x, c=torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(doses, x + torch.tensor([[0.0], [1.0], [2.0]]) * (formula(x) - x))
    assert torch.equal(bits(doses[0]), bits(x[0]))


def test_at_strength_zero_nothing_changes_bit_for_bit():
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0]])
    assert torch.equal(bits(steered(x, c=0.0)), bits(x))


def test_no_row_changes_another():
    x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(steered(x[order]), steered(x)[order])
    torch.testing.assert_close(torch.cat([steered(row[None]) for row in x]), steered(x))


def test_channels_are_edited_along_their_axis():
    conv = nn.Sequential(nn.Conv2d(1, 4, 1))
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = formula(conv(x).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(steered(x, model=conv), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_activation_keeps_its_dtype(dtype):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    seen = steered(x)
    assert seen.dtype is dtype
    torch.testing.assert_close(seen.double(), formula(x.float()).double(), rtol=1e-2, atol=1e-2)


def test_without_reading_it_is_plain_steering_by_its_constant():
    edit = LowRank({"0": (torch.zeros(2, 4), *PARTS[1:])})
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(steered(x, edit), steered(x, edit.constant))


def test_keep_norm_keeps_the_norm():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    seen = steered(x, KeepNorm(LowRank({"0": PARTS})))
    torch.testing.assert_close(seen.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(seen, formula(x) * (x.norm(dim=-1) / formula(x).norm(dim=-1))[:, None])


def test_compiled_it_is_the_same():
    torch.compiler.reset()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    with Steerer(IDENTITY, EDIT, c=2.0), torch.no_grad():
        expected = IDENTITY(x)
        compiled = torch.compile(IDENTITY, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), x)
    torch.compiler.reset()


def test_it_owns_its_tensors_and_leaves_the_model_alone():
    parts = tuple(part.clone() for part in PARTS)
    edit = LowRank({"0": parts}, concept="c")
    parts[0].zero_()
    edit["0"][1].zero_()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    before = state(IDENTITY)
    torch.testing.assert_close(steered(x, edit), formula(x))
    assert state(IDENTITY) == before and edit.concept == "c" and edit.rank == 2


@pytest.mark.parametrize(
    "parts",
    [
        (torch.ones(2, 4), torch.ones(2, 5), torch.ones(2)),
        (torch.ones(2, 4), torch.ones(2, 4), torch.ones(3)),
        (torch.ones(4), torch.ones(4), torch.ones(1)),
        (torch.ones(2, 4), torch.full((2, 4), float("nan")), torch.ones(2)),
        (torch.ones(2, 4).int(), torch.ones(2, 4), torch.ones(2)),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts):
    with pytest.raises(ShapeError, match="site '0'"):
        LowRank({"0": parts})


def test_another_size_or_site_is_refused_before_anything_is_attached():
    model = nn.Sequential(nn.Linear(4, 5))
    before = state(model)
    with pytest.raises(ShapeError, match="5 features, the vector 4"):
        Steerer(model, EDIT)
    with pytest.raises(SiteNotFoundError, match="no site '7'"):
        Steerer(model, LowRank({"7": PARTS}))
    with pytest.raises(TypeError, match="says itself how"):
        Steerer(IDENTITY, EDIT, intervention=EDIT)
    assert state(model) == before
