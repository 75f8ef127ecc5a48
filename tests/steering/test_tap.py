"""The tap and the hook: where each stands among what others put on a module, and what it leaves."""

import abc
import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from actsteer import Steerer, SteeringNotApplied, SteeringVector, UnsupportedModelError
from tests.oracles import state
from tests.zoo import exact

X = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)
D = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
V = SteeringVector({"1": D})


def steered(vectors, **options):
    model = exact()
    with Steerer(model, vectors, **options):
        return model(X)


@pytest.mark.case(29)
@pytest.mark.parametrize("site", ["", "0", "1", "1:in", "4"])
def test_a_tap_is_a_hook_bit_for_bit(site):
    v = SteeringVector({site: D})
    assert torch.equal(steered(v, c=2, backend="tap"), steered(v, c=2, backend="hook"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
@pytest.mark.parametrize("kinds", [("tap",) * 3, ("hook", "tap", "hook"), ("tap", "hook", "tap")])
def test_taps_and_hooks_on_one_module_leave_in_any_order(kinds, order):
    model = exact()
    before = state(model)
    strengths = [1.0, -2.0, 4.0]
    pairs = zip(strengths, kinds, strict=True)
    steerers = [Steerer(model, V, c=c, backend=kind).attach() for c, kind in pairs]
    remaining = sum(strengths)
    for index in order:
        assert torch.equal(model(X), steered(V, c=remaining))
        steerers[index].detach()
        remaining -= strengths[index]
    assert torch.equal(model(X), exact()(X))
    assert state(model) == before


@pytest.mark.parametrize("order", ["in", "out", "both"])
def test_an_input_and_an_output_of_one_module_are_both_tapped(order):
    sites = {"in": ["1:in"], "out": ["1"], "both": ["1:in", "1"]}[order]
    v = SteeringVector(dict.fromkeys(sites, D))
    model = exact()
    with Steerer(model, v, c=2, backend="tap"):
        steered = model(X)
    x = model[0](X)
    x = model[1](x + 2 * D if "1:in" in sites else x)
    assert torch.equal(steered, model[2:](x + 2 * D if "1" in sites else x))


def test_another_forward_that_was_there_is_called_and_put_back():
    model = exact()
    own = model[1].forward

    def doubled(x: Tensor) -> Tensor:
        return 2 * own(x)

    model[1].forward = doubled
    plain = model(X)
    with Steerer(model, V, backend="tap"):
        assert torch.equal(model(X), model[2:](2 * exact()[1](exact()[0](X)) + D))
    assert model[1].__dict__["forward"] is doubled
    assert torch.equal(model(X), plain)


def test_a_forward_that_covers_the_tap_is_left_where_it_is_and_warned_about():
    model = exact()
    steerer = Steerer(model, V, c=2, backend="tap").attach()
    covered = model[1].forward
    model[1].forward = lambda x: covered(x)
    assert torch.equal(model(X), steered(V, c=2))
    with pytest.warns(UserWarning, match="the forward of ReLU was replaced while it was steered"):
        steerer.detach()
    assert torch.equal(model(X), exact()(X))


class Direct(nn.Module):
    """Calls its site by `forward` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.site.forward(x)


@pytest.mark.case(17)
def test_a_forward_called_alone_is_tapped():
    model = Direct()
    with Steerer(model, SteeringVector({"site": D}), c=2, backend="tap"):
        assert torch.equal(model(X), X + 2 * D)
        assert torch.equal(model.site.forward(X), X + 2 * D)
    assert torch.equal(model(X), X)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_tapped_model_is_the_plain_model(clone):
    model = exact()
    with Steerer(model, V, c=2, backend="tap"):
        twin = clone(model)
        assert torch.equal(twin(X), exact()(X))
        assert torch.equal(model(X), steered(V, c=2))
    assert torch.equal(twin(X), exact()(X)) and torch.equal(model(X), exact()(X))
    assert state(twin) == state(exact())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_inside_the_block_leaves_nothing_behind(error):
    model = exact()
    before = state(model)

    def steer_and_fail() -> None:
        with Steerer(model, V, backend="tap"):
            raise error

    with pytest.raises(error):
        steer_and_fail()
    assert state(model) == before
    assert torch.equal(model(X), exact()(X))


def test_a_tapped_forward_raises_what_the_module_raises_and_stays_in_place():
    model = exact()
    with Steerer(model, V, c=2, backend="tap"):
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 3, dtype=torch.float64))
        assert torch.equal(model(X), steered(V, c=2))
    assert torch.equal(model(X), exact()(X))


@pytest.mark.parametrize("site", ["1", "1:in"])
def test_a_hook_is_registered_on_entering_and_removed_on_leaving(site):
    model = exact()
    before = state(model)
    with Steerer(model, SteeringVector({site: D}), backend="hook"):
        assert len(model[1]._forward_hooks) + len(model[1]._forward_pre_hooks) == 1
        model(X)
    assert state(model) == before


def test_a_hook_runs_after_the_users_own_and_before_those_that_come_later():
    model, seen = exact(), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with Steerer(model, V, c=2, backend="hook"):
        late = model[1].register_forward_hook(lambda module, args, output: seen.append(output))
        model(X)
        late.remove()
    assert torch.equal(seen[1], seen[0] + 2 * D)


def test_a_tap_runs_before_the_users_hooks_which_see_the_edit():
    model, seen = exact(), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    plain = model(X)
    with Steerer(model, V, c=2):
        assert not torch.equal(model(X), plain)
    assert torch.equal(seen[1], seen[0] + 2 * D)


@pytest.mark.case(17)
def test_a_hook_at_a_site_whose_forward_is_called_alone_raises():
    model = Direct()
    steerer = Steerer(model, SteeringVector({"site": D}), backend="hook")
    with pytest.raises(SteeringNotApplied, match=r"\{'site': 'Identity'\}.*called by its forward\(\) alone"), steerer:
        model(X)


@pytest.mark.case(17)
def test_a_hook_at_a_root_whose_forward_is_called_alone_raises():
    model = exact()
    with pytest.raises(SteeringNotApplied, match="Sequential"), Steerer(model, SteeringVector({"": D}), backend="hook"):
        model.forward(X)


# --- the class ---------------------------------------------------------------------------------------------------
class Registering(nn.Linear):
    """Its subclasses have to be named."""

    def __init_subclass__(cls, *, name: str) -> None:
        pass


class Last(nn.Linear):
    """Has no subclasses."""

    def __init_subclass__(cls, **options: object) -> None:
        raise TypeError("nothing comes after it")


class Meta(type):
    """A metaclass that makes its instances in another way."""

    def __call__(cls, *args: object, **options: object) -> object:
        made = super().__call__(*args, **options)
        made.made_by = cls.__name__
        return made


class WithMeta(nn.Linear, metaclass=Meta):
    """A class of it."""


class Slotted(nn.Linear):
    """Has a slot beside its attributes."""

    __slots__ = ("extra",)


class Virtual(nn.Linear, abc.ABC):
    """Is abstract by its metaclass."""


@pytest.mark.parametrize("site", ["0", "0:in"])
def test_a_lazy_module_is_refused_by_a_tap_and_served_by_auto(site):
    v = SteeringVector({site: D})
    with pytest.raises(UnsupportedModelError, match="it is lazy, and changes its class at its first call"):
        Steerer(nn.Sequential(nn.LazyLinear(4)), v, backend="tap")


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(kind, backend) for kind in (WithMeta, Slotted, Virtual) for backend in ("auto", "tap")]
    + [(nn.LazyLinear, "auto")],
)
@pytest.mark.parametrize("site", ["0", "0:in"])
def test_a_class_of_any_make_is_tapped_and_given_back(kind, backend, site):
    model = nn.Sequential(kind(4) if kind is nn.LazyLinear else kind(4, 4)).double()
    with Steerer(model, SteeringVector({site: D}), backend=backend):
        assert type(model[0]).__name__ in (kind.__name__, "Linear")
        assert isinstance(model[0], kind)
        got = model(X)
    assert torch.allclose(got, model(X) + D if site == "0" else model(X + D))
    assert type(model[0]) is (nn.Linear if kind is nn.LazyLinear else kind)


@pytest.mark.parametrize("kind", [Registering, Last])
@pytest.mark.parametrize("backend", ["tap", "hook", "buffer"])
def test_a_class_that_lets_no_subclass_be_made_is_refused_and_can_be_folded(kind, backend):
    model = nn.Sequential(kind(4, 4)).double().eval()
    before, v = state(model), SteeringVector({"0": D})
    steerer = Steerer(model, v, backend=backend)
    with pytest.raises(UnsupportedModelError, match=f"a {kind.__name__} is steered by a subclass.*backend='fold'"):
        steerer.attach()
    assert not steerer.attached
    assert state(model) == before
    with Steerer(model, v, backend="fold"):
        model(X)
    assert state(model) == before


class Doubles(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("site", ["2", "2:in"])
@pytest.mark.parametrize("when", ["before", "inside", "inside and off again"])
def test_torchs_parametrizations_come_before_and_inside_the_block(site, when):
    model, twin = exact(), exact()
    v = SteeringVector({site: D})
    if when != "inside and off again":
        parametrize.register_parametrization(twin[2], "weight", Doubles())
    expected, plain = [], twin(X)
    with Steerer(twin, v):
        expected.append(twin(X))
    if when == "before":
        parametrize.register_parametrization(model[2], "weight", Doubles())
    with Steerer(model, v):
        if when != "before":
            parametrize.register_parametrization(model[2], "weight", Doubles())
        if when == "inside and off again":
            parametrize.remove_parametrizations(model[2], "weight", leave_parametrized=False)
        assert torch.equal(model(X), expected[0])
    assert torch.equal(model(X), plain)
    with Steerer(model, v):
        assert torch.equal(model(X), expected[0])
    assert torch.equal(model(X), plain)


def test_a_graph_module_that_is_compiled_anew_inside_the_block_stays_steered():
    graph = torch.fx.symbolic_trace(exact())
    plain, kind = graph(X), type(graph)
    with Steerer(graph, SteeringVector({"": D, "1": D})):
        expected = graph(X)
        for node in list(graph.graph.nodes):
            if node.target == "4":
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
        graph.recompile()
        got = graph(X)
    assert torch.equal(exact()[4](got - D) + D, expected)
    assert torch.equal(exact()[4](graph(X)), plain)
    assert type(graph) is kind


# --- programs that are made of a tapped module -------------------------------------------------------------------
@pytest.mark.case(15)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_steered_module_is_not_scripted():
    model = nn.Sequential(Direct())
    with Steerer(model, SteeringVector({"0.site": D})):
        for part in (model, model[0].site):
            with pytest.raises(UnsupportedModelError, match=r"a steered .* cannot be scripted"):
                torch.jit.script(part)
        model(X)
    torch.jit.script(exact())


@pytest.mark.case(15)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of shapes, which a trace fixes
@pytest.mark.parametrize("site", ["", "1", "2:in"])
@pytest.mark.parametrize(
    "program",
    [lambda m: torch.jit.trace(m, X), lambda m: torch.export.export(m, (X,)).module()],
    ids=["trace", "export"],
)
def test_what_is_traced_or_exported_inside_the_block_keeps_the_steering(site, program):
    model = exact()
    with Steerer(model, SteeringVector({site: D})):
        expected = model(X)
        made = program(model)
    assert torch.equal(made(X), expected)
    assert torch.equal(model(X), exact()(X))
    with Steerer(model, SteeringVector({site: D}), c=3):
        assert torch.equal(made(X), expected)
        model(X)
