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


def wrapped_and_warm():
    model = wrapped()
    model(X)
    return model


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


def other_code():
    torch.compile(lambda x: x + 1, backend="eager")(X)
    return exact()


def reset():
    model = exact()
    torch.compile(model, backend="eager")(X)
    torch._dynamo.reset()
    return model


SITUATIONS = {
    "nothing compiled": (fresh, "hook", "nothing is compiled yet"),
    "the model is an OptimizedModule": (wrapped, "tap", "Sequential is compiled"),
    "and has run": (wrapped_and_warm, "tap", "Sequential is compiled"),
    "model.compile()": (in_place, "tap", "Sequential is compiled"),
    "the site's own compile()": (site_in_place, "tap", "Linear is compiled"),
    "a neighbour's compile(), not run": (neighbour_in_place, "hook", "nothing is compiled yet"),
    "other code in this process": (other_code, "tap", "code has been compiled in this process"),
    "after a reset": (reset, "hook", "nothing is compiled yet"),
}


@pytest.mark.parametrize(("build", "mechanism", "reason"), SITUATIONS.values(), ids=SITUATIONS)
@pytest.mark.parametrize("backend", ["auto", "buffer"])
def test_the_choice_and_its_reason(build, mechanism, reason, backend):
    model = build()
    choice = Steerer(model, V, backend=backend).choices()["2"]
    if backend == "buffer":
        assert choice.backend == "buffer"
        assert choice.mechanism == "tap"
    else:
        assert (choice.backend, choice.mechanism, choice.reason) == (mechanism, mechanism, reason)
    with Steerer(model, V, c=2, backend=backend):
        steered = model(X)
    twin = exact()
    torch._dynamo.reset()
    with Steerer(twin, V, c=2, backend="hook"):
        assert torch.equal(steered, twin(X))
    assert torch.equal(model(X), exact()(X))


@pytest.mark.parametrize("backend", ["tap", "fold"])
@pytest.mark.parametrize("build", [situation[0] for situation in SITUATIONS.values()], ids=SITUATIONS)
def test_what_is_asked_for_is_taken_everywhere(build, backend):
    choice = Steerer(build(), V, backend=backend).choices()["2"]
    assert (choice.backend, choice.mechanism, choice.reason) == (backend, backend, "as asked for")


def test_a_hook_is_taken_where_nothing_is_compiled_and_refused_elsewhere():
    assert Steerer(fresh(), V, backend="hook").choices()["2"].reason == "as asked for"
    for build, mechanism, reason in SITUATIONS.values():
        torch._dynamo.reset()
        if mechanism == "tap":
            message = rf"site '2': {reason}, and compiled code ignores hooks that come later; use backend='auto' or"
            with pytest.raises(UnsupportedModelError, match=message):
                Steerer(build(), V, backend="hook")


@pytest.mark.parametrize("options", [{"backend": "hook"}, {"scope": "context"}])
def test_a_hook_or_thread_asked_for_before_and_attached_after_a_compilation_is_refused_at_attaching(options):
    model = exact()
    steerer = Steerer(model, V, **options)
    torch.compile(model, backend="eager")(X)
    with pytest.raises(UnsupportedModelError, match="site '2': code has been compiled in this process"):
        steerer.attach()
    assert not steerer.attached
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    torch._dynamo.reset()
    with steerer:
        assert not torch.equal(model(X), exact()(X))


@pytest.mark.parametrize("build", [wrapped, in_place, other_code])
@pytest.mark.parametrize("backend", ["auto", "tap"])
def test_a_thread_is_refused_where_code_is_compiled(build, backend):
    with pytest.raises(UnsupportedModelError, match="compiled code knows no threads; use scope='process'"):
        Steerer(build(), V, scope="context", backend=backend)


@pytest.mark.parametrize("backend", ["buffer", "fold"])
def test_what_all_threads_read_is_not_for_one_thread(backend):
    with pytest.raises(ValueError, match=f"scope='thread' isolates hooks, and the {backend} backend changes what all"):
        Steerer(exact(), V, scope="context", backend=backend)


@pytest.mark.parametrize("backend", ["bias", "Hook", "", "inductor"])
def test_another_backend_names_those_that_there_are(backend):
    known = "'auto', 'hook', 'patch', 'buffer', 'fold'"
    with pytest.raises(ValueError, match=f"backend: expected one of {known}, got '{backend}'"):
        Steerer(exact(), V, backend=backend)


def test_another_scope_names_those_that_there_are():
    with pytest.raises(ValueError, match="scope: expected one of 'process', 'thread', got 'task'"):
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
