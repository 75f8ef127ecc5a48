"""Compiled code: an edit is honoured there or refused, whoever compiled what, and whenever."""

import copy
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from actsteer import ProjectionAbove, ShapeError, Steerer, SteeringNotApplied, SteeringVector, StrengthError, VectorBank
from tests.oracles import state
from tests.zoo import bits, exact, normal

X = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.0, 1.0, -1.0, 0.5], [-1.0, 0.125, 3.0, 0.0]], dtype=torch.float64)
D = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
V = SteeringVector({"1": D, "2": -D})
CYCLES = (2.0, -1.0, 0.5)
pytestmark = [  # torch's own warnings
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.compile with fullgraph=True found no compiled frames:UserWarning"),  # 2.12
]
gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def nothing_compiled():
    """So that the compilations can be counted."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.compiler.set_stance("default")


def expected(shifts, x=X, build=exact):
    """A fresh model run member by member, each site's shift added to what it gives out."""
    for name, module in build().named_children():
        x = module(x + shifts.get(f"{name}:in", 0.0))
        x = x + shifts[name] if name in shifts else x
    return x


def add(vector, c):
    return {site: c * vector[site] for site in vector}


def agree(one, other):
    """The same numbers exactly, and the same shape."""
    return one.shape == other.shape and torch.equal(one, other)


# --- ways to compile -------------------------------------------------------------------------------------------------
def whole(model, **options):
    compiled = torch.compile(model, **options)
    return compiled, compiled


def whole_steered_inside(model, **options):
    return model, torch.compile(model, **options)


def in_place(model, **options):
    model.compile(**options)
    return model, model


def closure(model, **options):
    return model, torch.compile(lambda x: model(x), **options)


def bound(model, **options):
    return model, torch.compile(model.__call__, **options)


def forward_alone(model, **options):
    return model, torch.compile(model.forward, **options)


def every_block(model, **options):
    for block in model:
        block.compile(**options)
    return model, model


def leaf(model, **options):
    model[1] = torch.compile(model[1], **options)
    return model, model


def leaf_in_compiled(model, **options):
    model[1] = torch.compile(model[1], **options)
    return model, torch.compile(model, **options)


class Around(nn.Module):
    """Calls its part, which it calls "part"."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


WAYS = [whole, whole_steered_inside, in_place, closure, bound, forward_alone, every_block, leaf, leaf_in_compiled]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
whole_graphs = pytest.mark.parametrize(
    ("way", "fullgraph"),
    [(way, fullgraph) for way in WAYS for fullgraph in (False, True) if way is not bound or not fullgraph],
    ids=lambda part: getattr(part, "__name__", "fullgraph" if part else "breaks allowed"),
)  # torch refuses to compile a module's __call__ as one graph


@pytest.mark.case(1, 2, 3, 4, 6)
@pytest.mark.parametrize("backend", ["auto", "tap", "buffer"])
@whole_graphs
def test_warm_compiled_code_honours_every_entry_and_every_exit(way, backend, fullgraph):
    model, call = way(exact(), backend="eager", fullgraph=fullgraph)
    before = state(model)
    assert agree(call(X), expected({}))
    with Steerer(model, V, c=4, backend=backend):
        assert agree(call(X), expected(add(V, 4)))
    steerer = Steerer(model, V, backend=backend)
    for c in CYCLES:
        steerer.c = c
        with steerer:
            assert agree(call(X), expected(add(V, c)))
        assert agree(call(X), expected({}))
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.case(1, 2)
@ways
def test_warm_compiled_code_honours_an_edit_of_an_input(way):
    model, call = way(exact(), backend="eager")
    call(X)
    for c in CYCLES:
        with Steerer(model, SteeringVector({"1:in": D, "4:in": -D}), c=c):
            assert agree(call(X), expected({"1:in": c * D, "4:in": -c * D}))
        assert agree(call(X), expected({}))


@pytest.mark.case(1, 2, 4)
@ways
def test_a_fold_is_honoured_by_warm_compiled_code(way):
    v = SteeringVector({"2": D})
    model, call = way(exact(), backend="eager")
    before = state(model)
    call(X)
    for c in CYCLES:
        with Steerer(model, v, c=c, backend="fold"):
            assert agree(call(X), expected(add(v, c)))
        assert agree(call(X), expected({}))
    assert state(model) == before


@pytest.mark.case(1)
@pytest.mark.parametrize("way", [whole, in_place, closure, bound], ids=lambda way: way.__name__)
def test_the_root_is_a_site_in_compiled_code_too(way):
    model, call = way(exact(), backend="eager")
    call(X)
    with Steerer(model, SteeringVector({"": D}), c=2):
        assert agree(call(X), expected({"4": 2 * D}))
    assert agree(call(X), expected({}))


@pytest.mark.case(1, 4)
@ways
def test_an_edit_attached_before_the_first_compilation_stays_and_leaves(way):
    model, call = way(exact(), backend="eager")
    before = state(model)
    for c in CYCLES:
        with Steerer(model, V, c=c):
            assert agree(call(X), expected(add(V, c)))
            assert agree(call(X), expected(add(V, c)))
        assert agree(call(X), expected({}))
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.case(4)
@pytest.mark.parametrize("site", ["part.1", "part"])
def test_a_compiled_part_of_an_eager_model_is_steered_inside_and_at_its_end(site):
    model = Around(exact())
    model.part = torch.compile(model.part, backend="eager")
    model(X)
    for c in CYCLES:
        with Steerer(model, SteeringVector({site: D}), c=c):
            assert agree(model(X), expected({"1" if site == "part.1" else "4": c * D}))
        assert agree(model(X), expected({}))


@pytest.mark.case(4)
def test_a_module_compiled_between_two_blocks_is_steered_in_the_second():
    model = exact()
    steerer = Steerer(model, V)
    with steerer:
        assert agree(model(X), expected(add(V, 1)))
    model[1], model[2] = torch.compile(model[1], backend="eager"), torch.compile(model[2], backend="eager")
    model(X)
    with steerer:
        assert agree(model(X), expected(add(V, 1)))
    assert agree(model(X), expected({}))


# --- how often it compiles -------------------------------------------------------------------------------------------
ROWS = [torch.tensor([float(i), -1.0, 0.5 * i], dtype=torch.float64) for i in range(1, 21)]
NUMBERS = [0.25 * i for i in range(1, 21)]


class Push:
    """h + c · v as an intervention of the user's own."""

    def __call__(self, activation: Tensor, direction: Tensor, c: Tensor) -> Tensor:
        return activation + c * direction


class Times:
    """An intervention with a number of its own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, activation: Tensor, direction: Tensor, c: Tensor) -> Tensor:
        return activation + self.factor * c * direction


class Positive:
    """A gate: rows whose first feature at its site is positive."""

    site, per = "0", "sequence"

    def __call__(self, rows: Tensor) -> Tensor:
        return rows[:, 0] > 0


KINDS = {
    "numbers": (NUMBERS, {}),
    "rows": (ROWS, {}),
    "numbers, own intervention": (NUMBERS, {"intervention": Push()}),
    "rows, own intervention": (ROWS, {"intervention": Push()}),
    "numbers, gate": (NUMBERS, {"gate": Positive()}),
    "rows, gate": (ROWS, {"gate": Positive()}),
    "rows, gate and own intervention": (ROWS, {"gate": Positive(), "intervention": Push()}),
}
kinds = pytest.mark.parametrize(("strengths", "options"), KINDS.values(), ids=KINDS)


def truth(c, options):
    """What a Steerer of `V` gives at strength c, one row at a time."""
    outputs = []
    for index, row in enumerate(X):
        strength = float(c[index]) if isinstance(c, Tensor) else c
        if "gate" in options and exact()[0](row)[0] <= 0:
            strength = 0.0
        outputs.append(expected(add(V, strength), row[None]))
    return torch.cat(outputs)


@pytest.mark.slow
@pytest.mark.case(5, 6, 7)
@kinds
def test_new_strengths_and_new_steerers_compile_at_most_twice(strengths, options):
    counter = CompileCounter()
    model = exact()
    call = torch.compile(model, backend=counter, fullgraph=True)
    call(X)
    start = counter.frame_count
    for c in strengths:
        with Steerer(model, V, c=c, **options):
            assert agree(call(X), truth(c, options))
        assert agree(call(X), expected({}))
    assert counter.frame_count - start <= 2


@pytest.mark.slow
@pytest.mark.case(7)
@kinds
def test_new_strengths_inside_the_block_compile_at_most_twice(strengths, options):
    counter = CompileCounter()
    model = exact()
    call = torch.compile(model, backend=counter, fullgraph=True)
    call(X)
    start = counter.frame_count
    with Steerer(model, V, c=strengths[0], **options) as steerer:
        for c in strengths:
            steerer.c = c
            assert agree(call(X), truth(c, options))
    assert counter.frame_count - start <= 2
    assert agree(call(X), expected({}))


@pytest.mark.slow
@pytest.mark.case(5, 6)
@pytest.mark.parametrize("warm", [False, True], ids=["installed first", "compiled first"])
@kinds
def test_an_installed_buffer_never_compiles_again(strengths, options, warm):
    counter = CompileCounter()
    model = exact()
    call = torch.compile(model, backend=counter, fullgraph=True)
    if warm:
        call(X)
    before = state(model)
    steerer = Steerer(model, V, c=strengths[0], backend="buffer", **options).install()
    assert agree(call(X), expected({}))
    with steerer:
        call(X)
    start = counter.frame_count
    for c in strengths:
        steerer.c = c
        assert agree(call(X), expected({}))  # what is installed and not attached changes nothing
        with steerer:
            assert agree(call(X), truth(c, options))
        assert agree(call(X), expected({}))
    assert counter.frame_count == start
    steerer.uninstall()
    assert agree(call(X), expected({}))
    assert state(model) == before


@pytest.mark.case(5)
def test_eager_passes_between_compiled_ones_compile_nothing_in_an_installed_buffer():
    counter = CompileCounter()
    model = exact()
    steerer = Steerer(model, V, backend="buffer").install()
    call = torch.compile(model, backend=counter)
    with steerer:
        assert agree(model(X), expected(add(V, 1)))
        assert agree(call(X), expected(add(V, 1)))
    for c in NUMBERS:
        steerer.c = c
        with steerer:
            assert agree(model(X), expected(add(V, c)))
            assert agree(call(X), expected(add(V, c)))
            assert agree(model(X), expected(add(V, c)))
    assert counter.frame_count == 1
    steerer.uninstall()


@pytest.mark.slow
@pytest.mark.case(7)
def test_batches_of_new_sizes_are_steered_right():
    model = exact()
    call = torch.compile(model, backend="eager")
    with Steerer(model, V, c=2):
        for rows in (1, 2, 3, 1, 2):
            assert agree(call(X[:rows]), expected(add(V, 2), X[:rows]))
    with Steerer(model, V) as steerer:
        for rows in (2, 3, 2):
            steerer.c = ROWS[3][:rows]
            assert agree(call(X[:rows]), truth(ROWS[3], {})[:rows])
    assert agree(call(X), expected({}))


@pytest.mark.slow
@pytest.mark.case(10)
def test_past_the_recompile_limit_every_subset_of_sites_is_still_right():
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    v = SteeringVector(dict.fromkeys("01234", D))
    for subset in range(1, 32):
        sites = [site for i, site in enumerate("01234") if subset >> i & 1]
        with Steerer(model, v, c=2, sites=sites):
            assert agree(call(X), expected(add(v.select(*sites), 2)))
        assert agree(call(X), expected({}))


@pytest.mark.case(9)
def test_under_force_eager_the_edit_is_honoured():
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    with torch.compiler.set_stance("force_eager"), Steerer(model, V, c=2):
        assert agree(call(X), expected(add(V, 2)))
    assert agree(call(X), expected({}))


@pytest.mark.case(9)
@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "eager_then_compile", "default"])
@pytest.mark.parametrize("change", ["before the call", "on leaving"])
def test_a_change_of_stance_loses_nothing(stance, change):
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    steerer = Steerer(model, V, c=2)
    torch.compiler.set_stance(stance)
    steerer.attach()
    if change == "before the call":
        torch.compiler.set_stance("default")
    assert agree(call(X), expected(add(V, 2)))
    steerer.detach()
    torch.compiler.set_stance("default")
    assert agree(call(X), expected({}))


@pytest.mark.case(9)
def test_where_guards_are_not_evaluated_steering_is_refused():
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    with (
        torch.compiler.set_stance("default", skip_guard_eval_unsafe=True),
        pytest.raises(TypeError, match="skip_guard_eval_unsafe"),
        Steerer(model, V, c=2),
    ):
        call(X)
    assert agree(call(X), expected({}))


# --- what else changes between two calls -----------------------------------------------------------------------------
def test_after_a_reset_the_edit_is_honoured():
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    steerer = Steerer(model, V, c=2)
    with Steerer(model, V, c=2):
        call(X)
        torch._dynamo.reset()
        assert agree(call(X), expected(add(V, 2)))
    torch._dynamo.reset()
    for _ in range(2):
        with steerer:
            assert agree(call(X), expected(add(V, 2)))
        assert agree(call(X), expected({}))


@pytest.mark.case(2, 7)
def test_blocks_with_new_vectors_are_compiled_once_in_all_and_for_a_second_model_too():
    compiled = CompileCounter()
    models = exact(), exact()
    calls = [torch.compile(model, backend=compiled) for model in models]
    for cycle in range(4):
        v = SteeringVector({"1": (cycle + 1) * D, "2": -D})
        for model, call in zip(models, calls, strict=True):
            with Steerer(model, v, c=2):
                assert agree(call(X), expected(add(v, 2)))
    assert compiled.frame_count == 1
    for call in calls:
        assert agree(call(X), expected({}))
    assert compiled.frame_count == 2


@pytest.mark.parametrize("attached_first", [True, False], ids=["attached first", "compiled first"])
def test_two_models_of_one_class_do_not_serve_each_others_compiled_code(attached_first):
    steered, other = exact(), exact()
    calls = torch.compile(steered, backend="eager"), torch.compile(other, backend="eager")
    if not attached_first:
        calls[0](X)
    with Steerer(steered, V, c=2):
        for _ in range(2):
            assert agree(calls[1](X), expected({}))
            assert agree(calls[0](X), expected(add(V, 2)))
        with Steerer(other, V, c=3):
            assert agree(calls[1](X), expected(add(V, 3)))
            assert agree(calls[0](X), expected(add(V, 2)))
    assert agree(calls[0](X), expected({})) and agree(calls[1](X), expected({}))


def test_two_models_of_one_class_steered_before_they_are_compiled_keep_their_own_edits():
    one, other = exact(), exact()
    calls = torch.compile(one, backend="eager"), torch.compile(other, backend="eager")
    with Steerer(one, V, c=2), Steerer(other, SteeringVector({"1": D, "3": D}), c=3):
        for _ in range(2):
            assert agree(calls[0](X), expected(add(V, 2)))
            assert agree(calls[1](X), expected({"1": 3 * D, "3": 3 * D}))
    assert agree(calls[0](X), expected({})) and agree(calls[1](X), expected({}))


@pytest.mark.parametrize("leaves", [0, 1])
def test_one_of_two_steerers_may_leave_before_another_model_of_the_class_is_compiled(leaves):
    model, other = exact(), exact()
    both = [Steerer(model, V, c=2).attach(), Steerer(model, V, c=3).attach()]
    both.pop(leaves).detach()
    calls = torch.compile(other, backend="eager"), torch.compile(model, backend="eager")
    assert agree(calls[0](X), expected({}))
    assert agree(calls[1](X), expected(add(V, 2 if leaves else 3)))
    both[0].detach()
    assert agree(calls[1](X), expected({}))


@pytest.mark.slow
@pytest.mark.case(2)
def test_two_steerers_of_other_axes_interventions_and_directions_do_not_share_compiled_code():
    def build() -> nn.Module:
        return nn.Sequential(nn.Identity(), nn.Identity()).double()

    model, x = build(), normal(2, 4, 4)
    call = torch.compile(model, backend="eager", fullgraph=True)
    call(x)
    v = SteeringVector({"0": D})
    column, row = D[:, None], D[None, :]
    steerings = [
        ({"axis": 1}, 2 * column),
        ({"axis": 2}, 2 * row),
        ({"axis": 2, "intervention": Times(3.0)}, 6 * row),
        ({"axis": 2, "intervention": Times(5.0)}, 10 * row),
        ({"axis": 1, "intervention": Times(5.0)}, 10 * column),
        ({"axis": 2, "intervention": Push()}, 2 * row),
    ]
    for _ in range(2):
        for options, shift in steerings:
            with Steerer(model, v, c=2, **options):
                torch.testing.assert_close(call(x), x + shift)
            assert agree(call(x), x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a hyper-parameter", "a threshold"])
def test_what_an_intervention_or_a_gate_holds_is_not_baked_into_compiled_code(kind):
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    at = SteeringVector({"0": torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)})
    projections = exact()[0](X)[:, 0].detach()
    for value in (-100.0, float(projections.mean()), 100.0, -100.0):
        options = (
            {"intervention": Times(value)} if kind == "a hyper-parameter" else {"gate": ProjectionAbove(at, value)}
        )
        with Steerer(model, V, c=2, **options):
            if kind == "a hyper-parameter":
                assert agree(call(X), expected(add(V, 2 * value)))
            else:
                c = 2.0 * (projections > value).double()
                assert agree(call(X), truth(c, {}))
        assert agree(call(X), expected({}))


@pytest.mark.slow
def test_the_gates_decide_anew_in_every_compiled_pass():
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    with Steerer(model, V, c=2, gate=Positive()):
        for x in (X, -X, X[:2], X):
            c = 2.0 * (exact()[0](x)[:, 0] > 0).double()
            outputs = [expected(add(V, float(ci)), row[None]) for ci, row in zip(c, x, strict=True)]
            assert agree(call(x), torch.cat(outputs))


def test_vectors_of_other_dtypes_and_steered_models_of_another_dtype_are_steered():
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    with Steerer(model, V.to(dtype=torch.float32), c=2):
        assert agree(call(X), expected(add(V, 2)))
    model.to(torch.bfloat16)
    with Steerer(model, V, c=2):
        steered = call(X.bfloat16())
        assert steered.dtype is torch.bfloat16
        assert torch.equal(steered, model(X.bfloat16()))
    assert not torch.equal(call(X.bfloat16()), steered)


def test_modes_of_training_and_of_gradients_are_all_steered():
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    modes = [torch.no_grad, torch.enable_grad, torch.inference_mode]
    for training in (False, True):
        model.train(training)
        for mode in modes:
            with mode(), Steerer(model, V, c=2):
                assert agree(call(X), expected(add(V, 2)))
            with mode():
                assert agree(call(X), expected({}))


@pytest.mark.slow
def test_gradients_through_a_compiled_steered_model_are_those_of_the_eager_one():
    def gradients(call, model):
        model.zero_grad()
        x = X.clone().requires_grad_()
        with Steerer(model, V, c=0.5) as steerer:
            directions = steerer.requires_grad_()
            call(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in model.parameters()), *(d.grad for d in directions.values())]

    eager, model = exact(), exact()
    call = torch.compile(model, backend="aot_eager")
    call(X)
    for one, other in zip(gradients(call, model), gradients(eager, eager), strict=True):
        torch.testing.assert_close(one, other)
    assert agree(call(X), expected({}))


@pytest.mark.xfail(strict=True, reason="compiled code cannot look at who calls it; the README says so")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_compiled_block_left_before_its_backward_pass_is_warned_about(reentrant):
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    x = X.clone().requires_grad_()
    with pytest.warns(UserWarning, match="checkpointed"), Steerer(model, V, c=2):
        torch.utils.checkpoint.checkpoint(call, x, use_reentrant=reentrant).sum()


@pytest.mark.slow
def test_a_vector_of_another_size_raises_in_compiled_code():
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    with pytest.raises(ShapeError, match="4 features"), Steerer(model, SteeringVector({"1": torch.ones(3)})):
        call(X)
    with pytest.raises(StrengthError, match="one strength per row"), Steerer(model, V, c=torch.ones(2)):
        call(X)
    assert agree(call(X), expected({}))
    assert not any("forward" in vars(module) for module in model.modules())


class Fork(nn.Module):
    """Runs its site, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor, through: bool = True) -> Tensor:
        return self.site(x) if through else x * 1


@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_in_compiled_code_too_a_site_that_does_not_run_raises_every_time():
    model = Fork()
    call = torch.compile(model, backend="eager")
    call(X), call(X, False)
    v = SteeringVector({"site": D})
    for _ in range(3):
        with Steerer(model, v):
            assert agree(call(X), X + D)
        with pytest.raises(SteeringNotApplied, match="site"), Steerer(model, v):
            call(X, False)
        with Steerer(model, v):
            pass


@pytest.mark.parametrize("site", ["", "2"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_steered_compiled_model_that_is_run_without_its_wrapper_is_steered_too(site, warm):
    model = exact()
    compiled = torch.compile(model, backend="eager")
    if warm:
        compiled(X)
    with Steerer(compiled, SteeringVector({site: D}), c=2):
        assert agree(model(X), expected({site or "4": 2 * D}))
        assert agree(compiled(X), expected({site or "4": 2 * D}))
    assert agree(model(X), expected({})) and agree(compiled(X), expected({}))


@pytest.mark.case(17)
def test_a_forward_called_alone_is_honoured_in_warm_compiled_code():
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.site.forward(x)

    model = Direct()
    call = torch.compile(model, backend="eager")
    call(X)
    with Steerer(model, SteeringVector({"site": D}), c=2):
        assert agree(call(X), X + 2 * D)
    assert agree(call(X), X)


def test_graph_breaks_around_the_sites_change_nothing():
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x) * 2

    model = Breaks()
    call = torch.compile(model, backend="eager")
    call(X)
    for c in CYCLES:
        with Steerer(model, SteeringVector({"first": D, "second": D}), c=c):
            assert agree(call(X), 2 * (X + 2 * c * D))
        assert agree(call(X), 2 * X)


@pytest.mark.slow
def test_regions_that_are_compiled_once_for_all_layers_are_steered_one_by_one():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = nn.Identity()

        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return self.site(x) * 2

    model = nn.Sequential(Layer(), Layer(), Layer())
    call = torch.compile(model, backend="eager", fullgraph=True)
    assert agree(call(X), 8 * X)
    for sites in (["0.site"], ["0.site", "1.site"], ["2"], ["0.site", "1.site", "2.site"], ["1.site"], ["2.site"]):
        v = SteeringVector({site: D.roll(index) for index, site in enumerate(sites)})
        truth = 8 * X + sum({"0": 8, "1": 4, "2": 1 if site == "2" else 2}[site[0]] * v[site] for site in v)
        try:
            with Steerer(model, v):
                steered = call(X)
            assert agree(steered, truth)
        except SteeringNotApplied as error:  # torch takes the layer for one that it has compiled already
            assert sites[0] in str(error)  # noqa: PT017
        assert agree(call(X), 8 * X)


def test_a_module_shared_by_two_names_is_edited_at_both_calls_of_compiled_code():
    shared = nn.Identity()
    model = nn.Sequential(shared, shared)
    call = torch.compile(model, backend="eager")
    call(X)
    for c in CYCLES:
        with Steerer(model, SteeringVector({"0": D}), c=c):
            assert agree(call(X), X + 2 * c * D)


def test_a_copy_of_a_model_steered_in_compiled_code_is_the_plain_model():
    model = exact()
    call = torch.compile(model, backend="eager")
    call(X)
    with Steerer(model, V, c=2):
        twin = copy.deepcopy(model)
        assert agree(twin(X), expected({}))
        assert agree(torch.compile(twin, backend="eager")(X), expected({}))
        assert agree(call(X), expected(add(V, 2)))
    assert agree(call(X), expected({})) and agree(twin(X), expected({}))


@pytest.mark.case(44)
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("site", ["1", "2:in"])
def test_compiled_code_steers_the_context_that_attached_alone(site, fullgraph):
    v, model = SteeringVector({site: D}), exact()
    call = torch.compile(model, backend="eager", fullgraph=fullgraph)
    call(X)
    for c in (2, 3):
        with Steerer(model, v, c=c, scope="context"), ThreadPoolExecutor(1) as pool:
            for _ in range(2):
                assert agree(call(X), expected(add(v, c)))
                assert agree(pool.submit(call, X).result(), expected({}))
        assert agree(call(X), expected({}))


def test_a_model_compiled_inside_a_contexts_block_is_steered_and_left():
    model = exact()
    with Steerer(model, V, c=2, scope="context"):
        call = torch.compile(model, backend="eager")
        assert agree(call(X), expected(add(V, 2)))
    assert agree(call(X), expected({}))


# --- several at once -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_steerers_entered_around_a_compilation_leave_in_any_order(order):
    model = exact()
    call = torch.compile(model, backend="eager")
    before = state(model)
    steerers = [Steerer(model, V, c=2).attach()]
    assert agree(call(X), expected(add(V, 2)))
    steerers += [Steerer(model, SteeringVector({"2": D}), c=4).attach(), Steerer(model, V, c=-1).attach()]
    shifts = [add(V, 2), {"2": 4 * D}, add(V, -1)]
    left = {0, 1, 2}
    for index in order:
        total = {site: sum(shifts[i].get(site, 0 * D) for i in left) for site in "12"}
        assert agree(call(X), expected(total))
        steerers[index].detach()
        left.remove(index)
    assert agree(call(X), expected({}))
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.case(2, 10, 31)
@pytest.mark.parametrize("seed", range(8))
def test_any_walk_through_entering_leaving_compiling_and_calling_is_the_sum_of_what_is_attached(seed):
    choice = random.Random(seed)
    model = exact()
    calls = [model, torch.compile(model, backend="eager"), torch.compile(lambda x: model(x), backend="eager")]
    before = state(model)
    sites = ["0", "1", "2", "3", "4"]
    vectors = [SteeringVector({site: D.roll(i) for site in choice.sample(sites, 2)}) for i in range(5)]
    vectors[4] = SteeringVector({site: D.roll(4) for site in choice.sample(["0", "2", "4"], 2)})
    backends = ["auto", "auto", "tap", "buffer", "fold"]
    strengths = [1.0] * 5
    steerers = [Steerer(model, v, backend=b) for v, b in zip(vectors, backends, strict=True)]
    installed = False
    for _ in range(25):
        i = choice.randrange(5)
        match choice.choice(["toggle"] * 3 + ["c", "call", "call", "install"] + ["reset"] * (seed % 2)):
            case "toggle" if steerers[i].attached:
                steerers[i].detach()
            case "toggle":
                steerers[i].attach()
            case "c":
                strengths[i] = choice.choice([0.0, 0.5, -1.0, 2.0])
                steerers[i].c = strengths[i]
            case "install" if installed:
                steerers[3].uninstall()
                installed = False
            case "install" if not steerers[3].attached:
                steerers[3].install()
                installed = True
            case "reset":
                torch._dynamo.reset()
            case _:
                total: dict[str, Tensor] = {}
                for steerer, vector, c in zip(steerers, vectors, strengths, strict=True):
                    for site in vector if steerer.attached else ():
                        total[site] = total.get(site, 0.0) + c * vector[site]
                call = choice.choice(calls)
                assert agree(call(X), expected(total))
    for steerer in choice.sample(steerers, 5):
        steerer.detach()
    steerers[3].uninstall()
    for call in calls:
        assert agree(call(X), expected({}))
    assert state(model) == before


# --- zero ------------------------------------------------------------------------------------------------------------
@pytest.mark.case(28)
@pytest.mark.parametrize("backend", ["auto", "tap", "buffer", "fold"])
@pytest.mark.parametrize("c", [0.0, torch.zeros(3)], ids=["a number", "per row"])
def test_strength_zero_is_bit_for_bit_the_unsteered_compiled_model(backend, c):
    if backend == "fold" and isinstance(c, Tensor):
        pytest.skip("a bias has one strength")
    model = exact()
    call = torch.compile(model, backend="eager")
    x = torch.cat([X[:1], -0.0 * X[:1], torch.full((1, 4), torch.nan)])
    plain = call(x)
    with Steerer(model, SteeringVector({"2": D}), c=c, backend=backend):
        assert torch.equal(bits(call(x)), bits(plain))


# --- fused and unreachable code --------------------------------------------------------------------------------------
ENCODER_SITES = ["layers.0", "layers.0.linear2", "layers.1.norm2", "layers.1.self_attn", "layers.1.linear1:in"]


def fused_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.slow
@pytest.mark.case(12)
@pytest.mark.parametrize("site", ENCODER_SITES)
def test_a_warm_compiled_encoder_on_the_fast_path_is_steered_as_the_eager_slow_one(site):
    x, v = normal(2, 3, 4), SteeringVector({site: normal(4, seed=5)})
    slow, model = fused_encoder(), fused_encoder()
    with Steerer(slow, v, c=2):
        truth = slow(x).detach()
    call = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = call(x)
        for _ in range(2):
            with Steerer(model, v, c=2):
                torch.testing.assert_close(call(x), truth)
            torch.testing.assert_close(call(x), plain)
    assert not torch.allclose(truth, plain)


@pytest.mark.case(13)
def test_attention_in_compiled_code_is_steered_and_its_out_proj_raises():
    torch.manual_seed(0)
    attention = Around(Attention()).eval()
    x = normal(2, 3, 4)
    call = torch.compile(attention, backend="eager")
    with torch.no_grad():
        plain = call(x)
        with Steerer(attention, SteeringVector({"part.attention": D}), c=2):
            torch.testing.assert_close(call(x), plain + 2 * D)
        with (
            pytest.raises(SteeringNotApplied, match="MultiheadAttention reads its out_proj's weights"),
            Steerer(attention, SteeringVector({"part.attention.out_proj": D})),
        ):
            call(x)
        with Steerer(attention, SteeringVector({"part.attention.out_proj": D}), c=2, backend="fold"):
            torch.testing.assert_close(call(x), plain + 2 * D)
        assert agree(call(x), plain)


class Attention(nn.Module):
    """Self-attention that gives out only what it attends to."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


# --- inductor --------------------------------------------------------------------------------------------------------
@gxx
@pytest.mark.slow
@pytest.mark.case(1, 5)
def test_inductor_honours_tap_buffer_and_fold():
    model = exact()
    call = torch.compile(model)
    v = SteeringVector({"2": D})
    with torch.no_grad():
        call(X)
        for backend in ("auto", "buffer", "fold"):
            for c in CYCLES:
                with Steerer(model, v, c=c, backend=backend):
                    torch.testing.assert_close(call(X), expected(add(v, c)))
                torch.testing.assert_close(call(X), expected({}))


@gxx
@pytest.mark.slow
def test_gradients_through_inductor_are_those_of_the_eager_model():
    model, x = exact(), X.clone().requires_grad_()
    call = torch.compile(model)
    call(x)
    with Steerer(model, V, c=2) as steerer:
        directions = steerer.requires_grad_()
        call(x).square().sum().backward()
    twin, y = exact(), X.clone().requires_grad_()
    with Steerer(twin, V, c=2) as steerer:
        others = steerer.requires_grad_()
        twin(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for site in V:
        torch.testing.assert_close(directions[site].grad, others[site].grad)


@pytest.fixture
def freezing(monkeypatch):
    """Frozen weights for this test; afterwards nobody remembers."""
    import sys

    known = set(sys.modules)
    with torch._inductor.config.patch(freezing=True):
        yield
    for name in set(sys.modules) - known:
        if name.startswith("torch._inductor.freezing"):
            del sys.modules[name]


@gxx
@pytest.mark.slow
@pytest.mark.case(11)
def test_with_frozen_weights_a_tap_is_honoured_and_a_fold_refused(freezing):
    model = exact()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    call = torch.compile(model)
    with torch.no_grad():
        call(X)
        for c in CYCLES:
            with Steerer(model, V, c=c):
                torch.testing.assert_close(call(X), expected(add(V, c)))
            torch.testing.assert_close(call(X), expected({}))
    with pytest.raises(TypeError, match="site '2' cannot be folded: code in this process was compiled with frozen"):
        Steerer(model, SteeringVector({"2": D}), backend="fold")


@gxx
@pytest.mark.slow
@pytest.mark.case(11)
def test_weights_frozen_while_a_fold_is_attached_are_refused_or_warned_about(freezing):
    model = exact()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    steerer = Steerer(model, SteeringVector({"2": D}), backend="fold").attach()
    with torch.no_grad():
        call = torch.compile(model)
        call(X)
        with pytest.warns(UserWarning, match="frozen"):
            steerer.detach()


# --- generation ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, initializer_range=1.0, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def generate(model, *, compiled):
    """Ten tokens with a static cache, and the logits of each, the decoding steps compiled or not."""
    from transformers import CompileConfig

    options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    if compiled:
        config = CompileConfig(backend="eager", mode=None)
        config._compile_all_devices = True
        options |= {"compile_config": config, "disable_compile": False}
    tokens = torch.tensor([[1, 5, 9, 4]])
    mask = torch.ones_like(tokens)
    made = model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)
    return made.sequences, torch.stack(made.logits)


SITES = {
    "model.layers.0": torch.arange(8.0),
    "model.layers.1.mlp.down_proj": torch.ones(8),
    "lm_head:in": torch.ones(8),
}
SITES |= {"model.layers.1.self_attn": -torch.ones(8), "model.norm": torch.arange(8.0), "": torch.arange(32.0)}


@pytest.mark.slow
@pytest.mark.case(8)
@pytest.mark.parametrize("warm", [True, False], ids=["after an unsteered generate", "first of all"])
def test_compiled_decoding_with_a_static_cache_is_steered_as_the_eager_one(llama, warm):
    v = SteeringVector(SITES)
    tokens, logits = generate(llama, compiled=False)
    with Steerer(llama, v, c=2):
        steered_tokens, steered_logits = generate(llama, compiled=False)
    assert not any(torch.allclose(*pair) for pair in zip(steered_logits, logits, strict=True))
    if warm:
        assert torch.equal(generate(llama, compiled=True)[0], tokens)
        assert torch._dynamo.convert_frame.FRAME_COUNTER  # decoding is compiled indeed
    for _ in range(2):
        with Steerer(llama, v, c=2):
            got_tokens, got_logits = generate(llama, compiled=True)
        assert torch.equal(got_tokens, steered_tokens)
        torch.testing.assert_close(got_logits, steered_logits, rtol=1e-4, atol=1e-4)
        got_tokens, got_logits = generate(llama, compiled=True)
        assert torch.equal(got_tokens, tokens)
        torch.testing.assert_close(got_logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.case(8)
def test_compiled_decoding_under_a_gate_is_the_eager_one(llama):
    direction = SteeringVector({"model.layers.0": torch.arange(8.0)})
    gate = ProjectionAbove(direction, 0.0)
    v = SteeringVector({"model.layers.1": torch.arange(8.0)})
    with Steerer(llama, v, c=2, gate=gate, strict=False):
        tokens, logits = generate(llama, compiled=False)
    generate(llama, compiled=True)
    with Steerer(llama, v, c=2, gate=gate):
        got_tokens, got_logits = generate(llama, compiled=True)
    assert torch.equal(got_tokens, tokens)
    torch.testing.assert_close(got_logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.case(5, 8)
def test_two_concepts_swept_in_compiled_decoding_are_their_eager_sums(llama):
    bank = VectorBank({"a": SteeringVector({"model.layers.0": torch.arange(8.0)})})
    bank |= VectorBank({"b": SteeringVector({"model.layers.0": torch.ones(8), "model.layers.1": torch.ones(8)})})
    sweep = [{"a": 1.0}, {"b": -1.0}, {"a": 0.5, "b": 2.0}]
    truth = []
    for c in sweep:
        with Steerer(llama, bank, c=c):
            truth.append(generate(llama, compiled=False)[1])
    generate(llama, compiled=True)
    steerer = Steerer(llama, bank, backend="buffer").install()
    for c, logits in zip(sweep, truth, strict=True):
        steerer.c = c
        with steerer:
            torch.testing.assert_close(generate(llama, compiled=True)[1], logits, rtol=1e-4, atol=1e-4)
    steerer.uninstall()


@pytest.mark.case(6)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["auto", "tap", "buffer"])
def test_a_model_that_ran_steered_is_compiled_whole_in_the_same_block(backend, mode):
    model = exact()
    with mode(), Steerer(model, SteeringVector({"2": D}), c=2, backend=backend) as steerer:
        eager = model(X)
        call = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(call(X), eager)
        steerer.c = -1
        assert torch.equal(call(X), model(X))
