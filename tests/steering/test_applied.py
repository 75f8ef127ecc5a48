"""SteeringNotApplied: an edit is never lost silently, and never reported lost when it was not."""

import warnings

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


EAGER = pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])


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
@EAGER
@pytest.mark.case(16)
def test_a_site_that_did_not_run_is_named(paths, silent, backend):
    if paths == ["bypassed"] and backend != "hook":
        return  # a tapped forward() is steered, whoever calls it: see below
    model = Fork()
    with pytest.raises(SteeringNotApplied, match=f"the model ran, but these sites did not: {silent}.*strict=False"):
        steered(model, *paths, backend=backend)
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
@EAGER
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_nothing_is_reported_where_nothing_was_lost_or_nobody_asks(paths, options, backend):
    assert not steered(Fork(), *paths, backend=backend, **options).attached


def test_another_error_is_not_hidden():
    with pytest.raises(RuntimeError, match="forward failed"):
        steered(Fork(), "left", "error")


@pytest.mark.filterwarnings("ignore:.* did not run in the block")
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


@EAGER
@pytest.mark.parametrize("installed", [False, True], ids=["", "installed"])
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_what_ran_in_an_earlier_block_or_between_blocks_does_not_count(backend, installed):
    model = Fork()
    steerer = Steerer(model, V, backend=backend)
    if installed and backend == "buffer":
        steerer.install()
    with steerer:
        model(X)
    model(X)
    with pytest.raises(SteeringNotApplied, match="right"), steerer:
        model(X, "left")
    with steerer:
        pass
    with steerer:
        model(X)
    steerer.uninstall()


def test_strength_zero_counts_as_applied():
    assert not steered(Fork(), "both", c=0).attached


def test_an_inner_steerer_reports_its_own_sites_alone():
    model = Fork()
    with Steerer(model, V.select("left")):
        with pytest.raises(SteeringNotApplied, match=r"did not: \{'right': 'Linear'\}"):
            steered(model, "left", vector=V.select("right"))
        model(X, "left")


# --- why ---------------------------------------------------------------------------------------------------------
def message(model, v, *args, **options):
    """What SteeringNotApplied says."""
    steerer = Steerer(model, v, **options).attach()
    model(*args)
    with pytest.raises(SteeringNotApplied) as caught:
        steerer.detach()
    return str(caught.value)


@pytest.mark.case(13)
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_the_projection_of_attention_is_never_called(backend):
    attention, x = nn.MultiheadAttention(4, 2), torch.ones(3, 2, 4)
    said = message(attention, SteeringVector({"out_proj": torch.ones(4)}), x, x, x, backend=backend)
    assert "{'out_proj': 'NonDynamicallyQuantizableLinear'}" in said
    assert "reads its out_proj's weights and never calls it; steer the MultiheadAttention itself" in said
    with Steerer(attention, SteeringVector({"": torch.ones(4)}), backend=backend):
        attention(x, x, x)


@pytest.mark.case(16)
def test_an_inactive_hook_point_is_told():
    class HookPoint(nn.Identity):
        """Is known by its name alone, so that TransformerLens need not be there."""

    class Lens(nn.Module):
        def __init__(self):
            super().__init__()
            self.on, self.off = HookPoint(), HookPoint()

        def forward(self, x):
            return self.on(x)

    said = message(Lens(), SteeringVector({"off": torch.ones(2)}), X)
    assert "'off': this HookPoint is inactive; switch it on in the model's configuration, or choose another" in said


@pytest.mark.case(16, 17)
@pytest.mark.parametrize("path", ["left", "bypassed"])
def test_an_unused_module_and_a_direct_call_of_forward_are_told(path):
    said = message(Fork(), V.select("right"), X, path, backend="hook")
    assert "'right': the module is unused on this path, called by its forward() alone, read for its weights, or" in said
    assert "choose another site. Or pass strict=False" in said


@pytest.mark.case(17)
@pytest.mark.parametrize("backend", ["tap", "buffer"])
def test_a_direct_call_of_forward_is_steered_by_a_tap(backend):
    model = Fork()
    with Steerer(model, V.select("right"), backend=backend):
        out = model(X, "bypassed")
    assert torch.equal(out, model(X, "both") + 1)


@pytest.mark.case(17)
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_a_direct_call_of_the_roots_forward_is_not_taken_for_a_lost_edit(backend):
    model = Fork()
    with Steerer(model, V, backend=backend):
        out = model.forward(X)
    with Steerer(model, V, backend=backend):
        assert torch.equal(model(X), out)


@pytest.mark.case(15)
def test_a_call_inside_an_fx_graph_is_steered_and_a_module_that_it_skips_is_told():
    graph = torch.fx.symbolic_trace(Fork(), concrete_args={"path": "both"})
    plain = graph(X)
    with Steerer(graph, V.select("right")):
        assert torch.equal(graph(X, "both"), plain + 1)


@pytest.mark.case(16)
def test_each_of_several_silent_sites_is_given_its_own_cause():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.unused = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    said = message(
        Both(), SteeringVector({"attention.out_proj": torch.ones(4), "unused": torch.ones(4)}), X.new_ones(3, 2, 4)
    )
    assert "'attention.out_proj': MultiheadAttention reads" in said
    assert "'unused': the module is unused" in said


# --- no false alarm ----------------------------------------------------------------------------------------------
@EAGER
def test_a_part_that_is_run_by_itself_raises_no_alarm(backend):
    model = Fork()
    with Steerer(model, V, backend=backend):
        model.left(X)
        model.right(X)
    with Steerer(model, V, backend=backend):
        model.left(X)


@EAGER
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_error_on_its_way_is_not_hidden_by_a_lost_edit(error, backend):
    steerer, raised = Steerer(Fork(), V, backend=backend).attach(), error()
    steerer.model(X, "left")
    assert not steerer.__exit__(error, raised, None)
    assert not steerer.attached


@EAGER
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("c", [0.0, 1.0, {}, torch.zeros(3)], ids=str)
def test_every_mode_and_every_strength_counts_as_applied(mode, c, backend):
    model = Fork()
    with mode(), Steerer(model, V, c=c, backend=backend):
        for _ in range(3):
            model(X)


def test_a_fold_cannot_prove_that_it_ran_and_says_nothing():
    steered(Fork().eval(), "left", backend="fold")


def test_the_report_is_an_error_and_no_warning():
    with warnings.catch_warnings(record=True) as caught, pytest.raises(SteeringNotApplied):
        steered(Fork(), "left")
    assert caught == []


# --- what stops being applied ------------------------------------------------------------------------------------
class Adapted(nn.Module):
    """As peft's layers: the layer, and what is merged into it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base, self.extra = layer, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.extra(x)

    def merged(self) -> nn.Linear:
        whole = nn.Linear(2, 2)
        with torch.no_grad():
            whole.weight.copy_(self.base.weight + self.extra.weight)
            whole.bias.copy_(self.base.bias + self.extra.bias)
        return whole


def replaced(model):
    model.right = nn.Linear(2, 2)


def merged(model):
    model.right = model.right.merged()


def taken_out(model):
    model.right = nn.Identity()


@EAGER
@pytest.mark.parametrize("change", [replaced, merged, taken_out])
@pytest.mark.parametrize("runs_again", [True, False])
def test_a_module_that_is_replaced_after_it_was_steered_is_told(change, runs_again, backend):
    model = Fork()
    model.right = Adapted(model.right)
    steerer = Steerer(model, V, backend=backend).attach()
    model(X)
    change(model)
    if runs_again:
        model(X)
    with pytest.raises(SteeringNotApplied, match=r"the modules at \['right'\] were replaced while they were steered"):
        steerer.detach()
    assert not steerer.attached
    with Steerer(model, V, backend=backend):
        model(X)
    with Steerer(model, V, backend=backend, strict=False):
        model(X)
        replaced(model)


@pytest.mark.case(26)
@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU, nn.Hardtanh, nn.ELU])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("drops", [True, False], ids=["dropped", "used"])
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
def test_an_in_place_module_is_steered_whether_its_caller_takes_the_result_or_not(kind, mode, drops, backend):
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(2, 2), kind(inplace=True), nn.Linear(2, 2)

        def forward(self, x):
            x = self.first(x)
            y = self.act(x)
            return self.last(x if drops else y)

    model, v = Caller(), SteeringVector({"act": torch.tensor([1.0, -2.0])})
    with mode(), Steerer(model, v, c=2, backend=backend):
        outputs = [model(X) for _ in range(3)]
    with mode():
        expected = model.last(model.act(model.first(X)) + 2 * v["act"])
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.case(26)
def test_the_gradients_of_an_in_place_module_whose_result_is_taken_are_right():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2))
    with Steerer(model, SteeringVector({"1": torch.ones(2)}), c=2):
        for _ in range(2):
            model.zero_grad()
            model(X).sum().backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model[2](model[0](X).relu() + 2).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(got, model.parameters(), strict=True))
