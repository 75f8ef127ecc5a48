"""SteeringNotApplied: an edit is never lost silently, and never reported lost when it was not."""

import pytest
import torch
from torch import Tensor, nn

from actsteer import Steerer, SteeringNotApplied, SteeringVector
from tests.zoo import normal

SITES = {"left": torch.ones(2), "right": torch.ones(2)}
V = SteeringVector(SITES)
X = normal(3, 2).float()


class Fork(nn.Module):
    """Runs "left", "right", or both; or calls "right" by its forward alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, path: str = "both") -> Tensor:
        if path == "error":
            raise RuntimeError("forward failed")
        x = self.left(x) if path in ("both", "left", "bypassed") else x
        return self.right.forward(x) if path == "bypassed" else self.right(x) if path in ("both", "right") else x


def steered(model, *paths, vector=V, **options):
    with Steerer(model, vector, **options) as steerer:
        for path in paths:
            model(X, path)
    return steerer


@pytest.mark.parametrize(
    ("paths", "silent"),
    [
        (["left"], r"\{'right': 'Linear'\}"),
        (["right", "right"], r"\{'left': 'Linear'\}"),
        (["bypassed"], r"\{'right': 'Linear'\}"),
        (["neither"], r"\{'left': 'Linear', 'right': 'Linear'\}"),
    ],
)
def test_a_site_that_did_not_run_is_named(paths, silent):
    model = Fork()
    with pytest.raises(SteeringNotApplied, match=f"the model ran, but these sites did not: {silent}.*strict=False"):
        steered(model, *paths)
    assert not model._forward_hooks
    assert not model.right._forward_hooks


def test_detach_reports_it_too():
    model = Fork()
    steerer = Steerer(model, V).attach()
    model(X, "left")
    with pytest.raises(SteeringNotApplied, match="right"):
        steerer.detach()
    assert not steerer.attached
    steerer.detach()  # once is enough


@pytest.mark.parametrize(
    ("paths", "options"),
    [
        ([], {}),
        (["both"], {}),
        (["left", "right"], {}),
        (["both", "left"], {}),
        (["left"], {"strict": False}),
        (["left"], {"sites": "left"}),
        (["neither"], {"strict": False}),
    ],
    ids=str,
)
def test_nothing_is_reported_where_nothing_was_lost_or_nobody_asks(paths, options):
    assert not steered(Fork(), *paths, **options).attached


def test_another_error_is_not_hidden():
    with pytest.raises(RuntimeError, match="forward failed"):
        steered(Fork(), "left", "error")


def test_a_forward_that_failed_is_no_forward():
    with Steerer(Fork(), V) as steerer, pytest.raises(RuntimeError, match="forward failed"):
        steerer.model(X, "error")
    assert not steerer.attached


def test_a_forward_that_failed_does_not_hide_one_that_ran():
    steerer = Steerer(Fork(), V).attach()
    with pytest.raises(RuntimeError, match="forward failed"):
        steerer.model(X, "error")
    steerer.model(X, "left")
    with pytest.raises(SteeringNotApplied, match="right"):
        steerer.detach()


def test_what_ran_in_an_earlier_block_does_not_count():
    model = Fork()
    steerer = steered(model, "both")
    with pytest.raises(SteeringNotApplied, match="right"), steerer:
        model(X, "left")


def test_strength_zero_counts_as_applied():
    assert not steered(Fork(), "both", c=0).attached


def test_an_inner_steerer_reports_its_own_sites_alone():
    model = Fork()
    with Steerer(model, V.select("left")):
        with pytest.raises(SteeringNotApplied, match=r"did not: \{'right': 'Linear'\}"):
            steered(model, "left", vector=V.select("right"))
        model(X, "left")


def test_the_projection_of_attention_is_never_called():
    attention, x = nn.MultiheadAttention(4, 2), torch.ones(3, 2, 4)
    steerer = Steerer(attention, SteeringVector({"out_proj": torch.ones(4)})).attach()
    attention(x, x, x)
    with pytest.raises(SteeringNotApplied, match=r"out_proj.*NonDynamicallyQuantizableLinear"):
        steerer.detach()
