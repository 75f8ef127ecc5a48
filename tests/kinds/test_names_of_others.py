"""Names that mean something to this library and something else to the user: they are the user's.

The kind of fault: unclear crashes for a user's class called as one of torch's wrappers, a foreign `hook_dict`, or lazy
modules.
"""

import pytest
import torch
from torch import nn

from actsteer import ActsteerError, Steerer, SteeringVector, collect, find_sites, record
from tests.kinds.by_hand import BACKENDS, added

X = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
V = torch.tensor([1.0, -0.5])
every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "fold"])


class Plain(nn.Module):
    """A site "a" and what the subclasses call theirs."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)

    def forward(self, x):
        return self.a(x)


def called(name, **attributes):
    """A module of a class with this name."""
    return type(name, (Plain,), attributes)()


def outer(name):
    """A module of a class with this name in another."""
    return nn.Sequential(nn.Linear(2, 2), called(name))


def having(**attributes):
    """A module on which these lie as attributes."""
    module = Plain()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def unready(self):
    raise RuntimeError("not ready")


def with_property(name):
    """A module with a property that cannot be read yet."""
    return called("Unready", **{name: property(unready)})


WRAPPERS = (
    *("ActivationWrapper", "CheckpointWrapper", "OptimizedModule", "DistributedDataParallel", "DataParallel"),
    *("FullyShardedDataParallel", "AveragedModel", "PeftModel", "BaseTuner", "BaseTunerLayer", "FSDPModule"),
    *("AuxiliaryTrainingWrapper", "ScriptModule", "GraphModule", "HookPoint", "HookedRootModule", "Replicate"),
    *("TransformerBridge", "LSTM", "TransformerEncoderLayer", "MultiheadAttention", "Conv2d", "LlamaForCausalLM"),
)
ATTRIBUTES = {
    "hook_dict None": lambda: having(hook_dict=None),
    "hook_dict a dict": lambda: having(hook_dict={"a": print}),
    "hook_dict a list": lambda: having(hook_dict=[1, 2]),
    "hook_dict a method": lambda: called("Mine", hook_dict=lambda self: {}),
    "hook_dict empty": lambda: having(hook_dict={}),
    "mod_dict": lambda: having(mod_dict={"a": 3}),
    "config a dict": lambda: having(config={"model_type": "llama", "is_encoder_decoder": True}),
    "config None": lambda: having(config=None),
    "config a string": lambda: having(config="llama"),
    "cfg": lambda: having(cfg={"n_layers": 2}),
    "generate a tensor": lambda: having(generate=torch.ones(2)),
    "generate a flag": lambda: having(generate=True),
    "generate_stream a string": lambda: having(generate_stream="out"),
    "prepare_inputs_for_generation None": lambda: having(prepare_inputs_for_generation=None),
    "get_encoder that needs an argument": lambda: called("Mine", get_encoder=lambda self, name: None),
    "is_encoder_decoder": lambda: having(is_encoder_decoder=True),
    "module a number": lambda: having(module=3),
    "base_layer a tensor": lambda: having(base_layer=torch.ones(2)),
    "_orig_mod": lambda: having(_orig_mod=None),
    "original_model a string": lambda: having(original_model="gpt2"),
    "original_component": lambda: having(original_component=None),
    "hook_conversion": lambda: having(hook_conversion=None),
    "batch_first": lambda: having(batch_first=False),
    "device_mesh": lambda: having(device_mesh=None),
    "_is_replica": lambda: having(_is_replica=False),
    "steerer": lambda: having(steerer=1, c=2, edits=[], attached=True),
    "a mask of the module": lambda: having(attention_mask=None, mask="yes"),
    "a property that raises": lambda: with_property("hook_dict"),
    "a generate that raises": lambda: with_property("generate"),
    "a config that raises": lambda: with_property("config"),
    "gradient_checkpointing": lambda: having(gradient_checkpointing="no"),
    "training of another type": lambda: having(dtype="float", device="cpu"),
}


def check(model, site, backend="auto", x=X):
    """Everything that touches a site does what a plain hook does, and leaves the model as it was."""
    model.eval()
    with torch.no_grad():
        plain = model(x)
        with added(model, site, V):
            want = model(x)
        before = sorted(vars(model.get_submodule(site)))
        with Steerer(model, SteeringVector({site: V}), backend=backend) as steerer:
            torch.testing.assert_close(model(x), want)
            assert steerer.sites == (site,)
        assert torch.equal(model(x), plain) and sorted(vars(model.get_submodule(site))) == before


@every_backend
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_class_of_the_user_s_may_be_called_as_one_of_others(backend, name):
    check(called(name), "a", backend)
    check(outer(name), "1.a", backend)


@pytest.mark.parametrize("name", WRAPPERS)
def test_it_is_a_site_itself_and_is_collected_and_found(name):
    model = outer(name).eval()
    want = model(X).detach()
    for site in ("1", "1.a"):
        assert site in find_sites(model, lambda *_: True)
        assert torch.equal(record(model, [X], sites=site, progress=False)[site], want)
        assert collect(model, [X], sites=site, progress=False)[site].count == 2
    check(model, "1")


@every_backend
@pytest.mark.parametrize("build", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_an_attribute_may_be_called_as_one_of_others(backend, build):
    check(build(), "a", backend)
    check(nn.Sequential(build()), "0.a", backend)


@pytest.mark.parametrize("build", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_such_models_are_collected(build):
    model = build().eval()
    want = model(X).detach()
    assert torch.equal(record(model, [X], sites="a", progress=False)["a"], want)
    torch.testing.assert_close(collect(model, [X], sites="a", progress=False)["a"].mean.float(), want.mean(0))


@pytest.mark.parametrize("name", ["module", "base_layer", "_orig_mod", "original_module", "base_model", "forward_"])
def test_a_child_may_be_called_as_a_wrapper_s_slot(name):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(2, 2))

        def forward(self, x):
            return self.get_submodule(name)(x)

    check(Holder(), name)


@pytest.mark.parametrize("name", ["in", "out", "hook_out", "0", "generate", "hook_dict", "c", "forward_hooks"])
def test_a_child_may_have_any_name(name):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(2, 2))

        def forward(self, x):
            return self._modules[name](x)

    check(Holder(), name)


# --- lazy modules ----------------------------------------------------------------------------------------------------
def lazy(*tail):
    return nn.Sequential(nn.LazyLinear(2), *tail)


def test_a_lazy_module_is_collected_at_its_first_call():
    model = lazy(nn.ReLU())
    got = record(model, [X], sites=["0", "1"], progress=False)
    assert torch.equal(got["0"], model[0](X).detach()) and torch.equal(got["1"], model(X).detach())
    assert type(model[0]) is nn.Linear
    assert collect(lazy(), [X], sites="0", progress=False)["0"].count == 2
    assert collect(nn.Sequential(nn.LazyBatchNorm1d()), [X], sites="0", progress=False)["0"].count == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lazy_module_is_steered_from_its_first_call_on(backend):
    model = lazy(nn.Identity())
    try:
        with torch.no_grad(), Steerer(model, SteeringVector({"0": V}), backend=backend):
            first, second = model(X), model(X)
    except ActsteerError:
        return
    plain = model(X)
    torch.testing.assert_close(first, plain + V)
    torch.testing.assert_close(second, plain + V)
    assert type(model[0]) is nn.Linear  # as torch makes it; nothing else is left in its place


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_after_a_lazy_module_is_steered(backend):
    model = lazy(nn.Linear(2, 2))
    with torch.no_grad(), Steerer(model, SteeringVector({"1": V}), backend=backend):
        got = model(X)
    torch.testing.assert_close(got, model(X) + V)


# --- foreign ways of being called ------------------------------------------------------------------------------------
class Slots(Plain):
    __slots__ = ()


class Getattr(Plain):
    """Gives something for every name, as proxies do."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return 7


class Called(Plain):
    """Overrides __call__."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 2


class Setattr(Plain):
    """Refuses attributes that it does not know."""

    def __setattr__(self, name, value):
        if not name.startswith("_") and name not in ("a", "training"):
            raise AttributeError(f"no attribute {name}")
        super().__setattr__(name, value)


class Meta(type):
    def __instancecheck__(cls, instance):
        return False


class OfMeta(Plain, metaclass=Meta):
    pass


@every_backend
@pytest.mark.parametrize("kind", [Slots, Getattr, Called, Setattr, OfMeta], ids=lambda kind: kind.__name__)
def test_classes_of_unusual_kinds(backend, kind):
    check(kind(), "a", backend)
    check(nn.Sequential(kind()), "0.a", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Slots, Getattr, Setattr, OfMeta], ids=lambda kind: kind.__name__)
def test_they_are_sites_too(backend, kind):
    model = nn.Sequential(kind())
    check(model, "0", backend)
    assert type(model[0]) is kind


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_that_a_class_overrides_is_steered_inside_or_around_it(backend):
    """A hook edits what `super().__call__` gives; after it, the class may do more."""
    model = nn.Sequential(Called())
    plain = model(X).detach()
    with torch.no_grad(), Steerer(model, SteeringVector({"0": V}), backend=backend):
        got = model(X)
    assert torch.allclose(got, plain + V) or torch.allclose(got, plain + 2 * V)
    assert type(model[0]) is Called and torch.equal(model(X), plain)
