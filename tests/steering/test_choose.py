"""auto's choice in each situation, its reason, and what is refused."""

import pytest
import torch
from torch import nn

from actsteer import Steerer, SteeringVector, UnsupportedModelError
from tests.zoo import exact

X = torch.ones(2, 4, dtype=torch.float64)
D = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
V = SteeringVector({"2": D})
# torch itself warns where a graph begins at a tensor in the middle of an autograd graph
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.compiler.set_stance("default")


def fresh():
    return exact()


def wrapped():
    return torch.compile(exact(), backend="eager")


def in_place():
    model = exact()
    model.compile(backend="eager")
    return model


def site_in_place():
    model = exact()
    model[2].compile(backend="eager")
    return model


def neighbour_in_place():
    model = exact()
    model[3].compile(backend="eager")
    return model


def lazy():
    model = exact()
    model[2] = nn.LazyLinear(4, dtype=torch.float64)
    return model


CALL = "a call of the module's forward"
SITUATIONS = {
    "nothing compiled": (fresh, "tap", CALL),
    "the model is an OptimizedModule": (wrapped, "tap", CALL),
    "model.compile()": (in_place, "tap", CALL),
    "the site's own compile()": (site_in_place, "tap", CALL),
    "a neighbour's compile(), not run": (neighbour_in_place, "tap", CALL),
    "lazy": (lazy, "hook", "it is lazy, and changes its class at its first call"),
}
COMPILED = {name: build for name, (build, _, _) in SITUATIONS.items() if "compile" in name or "Optimized" in name}
COMPILED = {name: build for name, build in COMPILED.items() if build not in (fresh, neighbour_in_place)}


@pytest.mark.parametrize(("build", "mechanism", "reason"), SITUATIONS.values(), ids=SITUATIONS)
@pytest.mark.parametrize("backend", ["auto", "buffer"])
def test_the_choice_and_its_reason(build, mechanism, reason, backend):
    model = build()
    choice = Steerer(model, V, backend=backend).choices()["2"]
    if backend == "buffer":
        assert (choice.backend, choice.mechanism) == ("buffer", mechanism)
    else:
        assert (choice.backend, choice.mechanism, choice.reason) == (mechanism, mechanism, reason)
    with Steerer(model, V, c=2, backend=backend):
        steered = model(X)
    if build is lazy:
        assert torch.equal(steered, model[4](model[3](model[2](model[1](model[0](X))) + 2 * D)))
        return
    with Steerer(exact(), V, c=2, backend="hook") as twin:
        assert torch.equal(steered, twin.model(X))
    assert torch.equal(model(X), exact()(X))


@pytest.mark.parametrize("backend", ["tap", "fold"])
@pytest.mark.parametrize("build", [fresh, *COMPILED.values()], ids=["plain", *COMPILED])
def test_what_is_asked_for_is_taken_everywhere(build, backend):
    choice = Steerer(build(), V, backend=backend).choices()["2"]
    assert (choice.backend, choice.mechanism, choice.reason) == (backend, backend, "as asked for")


def test_what_the_process_has_compiled_before_changes_no_choice():
    before = {backend: Steerer(exact(), V, backend=backend).choices() for backend in ("auto", "hook", "tap", "buffer")}
    torch.compile(lambda x: x + 1, backend="eager")(X)
    assert all(Steerer(exact(), V, backend=backend).choices() == choice for backend, choice in before.items())


@pytest.mark.parametrize("build", COMPILED.values(), ids=COMPILED)
def test_a_hook_is_refused_inside_of_what_is_compiled(build):
    with pytest.raises(UnsupportedModelError, match=r"site '2': .* is compiled, and compiled code ignores hooks"):
        Steerer(build(), V, backend="hook")


def test_a_hook_asked_for_before_a_compilation_is_refused_at_attaching():
    model = exact()
    steerer = Steerer(model, V, backend="hook")
    model.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="site '2': Sequential is compiled"):
        steerer.attach()
    assert not steerer.attached
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("old", [{"backend": "patch"}, {"scope": "thread"}])
def test_the_old_words_name_the_new(old):
    new = {"patch": "tap", "thread": "context"}[next(iter(old.values()))]
    with pytest.raises(ValueError, match=f"it is called '{new}' now"):
        Steerer(exact(), V, **old)


@pytest.mark.parametrize("backend", ["buffer", "fold"])
def test_what_all_contexts_read_is_not_for_one(backend):
    with pytest.raises(ValueError, match=f"and the {backend} backend changes what all threads read"):
        Steerer(exact(), V, scope="context", backend=backend)


@pytest.mark.parametrize("backend", ["bias", "Hook", "", "inductor"])
def test_another_backend_names_those_that_there_are(backend):
    known = "'auto', 'tap', 'hook', 'buffer', 'fold'"
    with pytest.raises(ValueError, match=f"backend: expected one of {known}, got '{backend}'"):
        Steerer(exact(), V, backend=backend)


def test_another_scope_names_those_that_there_are():
    with pytest.raises(ValueError, match="scope: expected one of 'process', 'context', got 'task'"):
        Steerer(exact(), V, scope="task")


@pytest.mark.case(15)
def test_a_scripted_model_is_refused():
    scripted = torch.jit.script(exact())
    with pytest.raises(UnsupportedModelError, match="is scripted and ignores hooks; steer the eager model"):
        Steerer(scripted, V)


def test_something_that_is_no_module_is_refused():
    model = exact()
    with pytest.raises(UnsupportedModelError, match="got function; steer the module that it was made from"):
        Steerer(torch.compile(lambda x: model(x), backend="eager"), V)


def test_modules_that_were_replaced_since_are_found_at_attaching():
    model = exact()
    steerer = Steerer(model, V, c=2)
    model[2] = nn.Identity()
    plain = model(X)
    with steerer:
        assert torch.equal(model(X), model[4](model[3](model[1](model[0](X)) + 2 * D)))
    assert torch.equal(model(X), plain)
