"""What is attached to a model can be listed and taken off, whoever lost the name; words that went say what came.

The kind of fault: a notebook cell that is run twice steers twice, and nothing tells or undoes it.
"""

import contextlib
import copy
import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import actsteer
from actsteer import Ablate, ProjectionAbove, Steerer, SteeringVector, VectorBank, detach_all, steerers
from tests.kinds.by_hand import BACKENDS, every_backend_and_fold

X = torch.linspace(-1, 1, 12).view(3, 4).sin()
V = SteeringVector({"1": torch.tensor([1.0, -2.0, 0.5, 4.0])})
W = SteeringVector({"1": torch.tensor([0.0, 1.0, 0.0, -1.0]), "2": torch.ones(4)})


def small():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).eval().requires_grad_(False)
    for n, parameter in enumerate(model.parameters()):
        parameter.copy_((torch.arange(parameter.numel()).view_as(parameter) * 5 % 11 - 5 + n) / 8)
    return model


def left(model):
    return [(type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def same(found, expected):
    return len(list(found)) == len(expected) and all(a is b for a, b in zip(found, expected, strict=True))


# --- the list --------------------------------------------------------------------------------------------------------
@every_backend_and_fold
def test_what_is_attached_is_listed_in_the_order_entered(backend):
    model = small()
    first, second = Steerer(model, V, backend=backend), Steerer(model, W, c=2.0, backend=backend)
    assert same(steerers(model), [])
    with first:
        assert same(steerers(model), [first])
        with second:
            assert same(steerers(model), [first, second])
            model(X)
        assert same(steerers(model), [first])
    assert same(steerers(model), [])


def test_what_leaves_in_another_order_is_gone_from_the_list():
    model = small()
    a, b, c = (Steerer(model, V, c=c).attach() for c in (1.0, 2.0, 3.0))
    b.detach()
    assert same(steerers(model), [a, c])
    a.detach()
    b.attach()
    assert same(steerers(model), [c, b])
    detach_all(model)


def test_a_model_s_list_is_its_own():
    model, other = small(), small()
    with Steerer(model, V) as steerer:
        assert same(steerers(other), []) and same(steerers(copy.deepcopy(model)), [])
        assert same(steerers(copy.copy(model)), []) or same(steerers(copy.copy(model)), [steerer])
        detach_all(other)
        assert same(steerers(model), [steerer])
        model(X)


@pytest.mark.parametrize(
    "options", [{"scope": "context"}, {"gate": ProjectionAbove(V, 0.0)}, {"intervention": Ablate()}]
)
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_every_kind_is_listed(options):
    model = small()
    with Steerer(model, V, **options) as steerer:
        assert same(steerers(model), [steerer])
        with ThreadPoolExecutor(1) as pool:
            assert same(pool.submit(steerers, model).result(), [steerer])


def test_a_block_that_raises_is_gone_from_the_list():
    model = small()
    with pytest.raises(RuntimeError, match="stop"), Steerer(model, V):
        raise RuntimeError("stop")
    assert same(steerers(model), [])


def test_the_list_is_a_copy():
    model = small()
    with Steerer(model, V) as steerer:
        found = steerers(model)
        with contextlib.suppress(AttributeError):
            found.clear()
        assert same(steerers(model), [steerer])
        model(X)


def test_a_model_that_is_gone_is_kept_by_no_list():
    import weakref

    model = small()
    Steerer(model, V).attach()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# --- taking off ------------------------------------------------------------------------------------------------------
@every_backend_and_fold
def test_detach_all_takes_off_what_has_lost_its_name(backend):
    model = small()
    before, plain, weights = left(model), model(X), copy.deepcopy(model.state_dict())
    Steerer(model, V, backend=backend).attach()
    Steerer(model, W, c=2.0, backend=backend).attach()
    gc.collect()
    assert not torch.equal(model(X), plain)
    detach_all(model)
    assert torch.equal(model(X), plain) and left(model) == before and same(steerers(model), [])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


@every_backend_and_fold
def test_a_steerer_that_was_taken_off_is_detached_and_may_be_attached_again(backend):
    model = small()
    plain = model(X)
    steerer = Steerer(model, V, backend=backend).attach()
    steered = model(X)
    detach_all(model)
    assert not steerer.attached and torch.equal(model(X), plain)
    steerer.detach()
    with steerer:
        assert torch.equal(model(X), steered)
    assert torch.equal(model(X), plain)


def test_inside_the_block_and_from_another_thread():
    model, plain = small(), small()(X)
    for scope in ("process", "context"):
        with Steerer(model, V, scope=scope):
            model(X)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(detach_all, model).result()
            assert torch.equal(model(X), plain)
    assert same(steerers(model), [])


def test_of_an_unsteered_model_nothing_is_taken_off():
    model = small()
    before = left(model)
    handle = model[1].register_forward_hook(lambda *_: None)
    detach_all(model)
    handle.remove()
    assert left(model) == before


def test_hooks_of_the_user_s_stay():
    model, calls = small(), []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    Steerer(model, V).attach()
    model[2].register_forward_hook(lambda *_: calls.append(2))
    detach_all(model)
    model(X)
    assert calls == [1, 2]


def test_a_site_that_did_not_fire_keeps_none_attached():
    """detach_all is for cleaning up: it takes everything off, whatever it has to say."""

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Idle()
    Steerer(model, SteeringVector({"idle": torch.ones(4)})).attach()
    Steerer(model, SteeringVector({"used": torch.ones(4)})).attach()
    model(X)
    with contextlib.suppress(actsteer.SteeringNotApplied):
        detach_all(model)
    assert same(steerers(model), []) and not any(m._forward_hooks for m in model.modules())


# --- a cell that is run twice ----------------------------------------------------------------------------------------
def cell(model, **options):
    """What a notebook's cell does: it makes everything anew."""
    v = SteeringVector({"1": torch.tensor([1.0, -2.0, 0.5, 4.0])})
    return Steerer(model, v, **({"c": 2.0} | options)).attach()


@pytest.mark.parametrize("backend", [*BACKENDS, "fold"])
def test_a_second_equal_steerer_warns(backend):
    model = small()
    plain = model(X)
    cell(model, backend=backend)
    once = model(X) - plain
    with pytest.warns(UserWarning, match="equal"):
        cell(model, backend=backend)
    torch.testing.assert_close(model(X) - plain, 2 * once)  # it is said, and done
    detach_all(model)
    assert torch.equal(model(X), plain)


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": ProjectionAbove(V, 0.0)}, {"positions": "last"}, {"intervention": Ablate()}, {"scope": "context"}],
    ids=str,
)
def test_equal_in_all_that_was_given(options):
    model = small()
    cell(model, **options)
    with pytest.warns(UserWarning, match="equal"):
        cell(model, **options)
    detach_all(model)


OTHERS = {
    "another direction": lambda m: Steerer(m, W, c=2.0),
    "another site": lambda m: Steerer(m, SteeringVector({"2": V["1"]}), c=2.0),
    "another sign": lambda m: Steerer(m, -1 * V, c=2.0),
    "another edit": lambda m: Steerer(m, V, c=2.0, intervention=Ablate()),
    "other concepts": lambda m: Steerer(m, VectorBank({"a": W}), c=2.0),
    "another model": lambda m: Steerer(small(), V, c=2.0),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_another_steerer_does_not_warn(make):
    model = small()
    with Steerer(model, V, c=2.0), make(model) as other:
        model(X)
        other.model(X)


def test_one_after_the_other_does_not_warn():
    model = small()
    for _ in range(3):
        with Steerer(model, V, c=2.0):
            model(X)
        cell(model).detach()


# --- words that went -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "word"), [({"scope": "thread"}, "context"), ({"backend": "patch"}, "tap")], ids=["thread", "patch"]
)
def test_an_old_word_names_the_new_one(options, word):
    model = small()
    before = left(model)
    with pytest.raises(ValueError, match=word):
        Steerer(model, V, **options)
    assert left(model) == before


@pytest.mark.parametrize("options", [{"scope": "task"}, {"backend": "Tap"}, {"scope": None}], ids=str)
def test_an_unknown_word_is_refused(options):
    with warnings.catch_warnings(), pytest.raises((ValueError, TypeError)):
        Steerer(small(), V, **options)


@pytest.mark.parametrize("options", [{"scope": "context"}, {"backend": "tap"}, {"scope": "process"}], ids=str)
def test_the_new_words_are_known(options):
    model = small()
    plain = model(X)
    with Steerer(model, V, **options):
        assert not torch.equal(model(X), plain)
    assert torch.equal(model(X), plain)


def test_the_names_are_public():
    assert {"steerers", "detach_all"} <= set(actsteer.__all__)
