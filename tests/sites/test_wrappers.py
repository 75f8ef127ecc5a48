"""Wrappers: what holds another module changes no name, and names that a wrapper has prefixed are understood."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from actsteer import OutputError, SiteNotFoundError, Steerer, SteeringVector, collect, find_sites, fit, optimize, record
from actsteer.sites.axes import layout
from actsteer.sites.fingerprint import described, fingerprint
from actsteer.sites.resolve import named_sites, path_to, resolve
from actsteer.sites.wrappers import class_name, named_modules, slot, unwrapped, without_prefixes
from tests.oracles import state
from tests.zoo import data_parallel, llama

V = torch.tensor([1.0, -2.0, 4.0])
X = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, -3.0]])
NAMES = ("0", "0.0", "0.1", "1")


@pytest.fixture(autouse=True)
def nothing_compiled():
    """The backend depends on whether this process has compiled anything."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bare():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 2)).eval()


class FullyShardedDataParallel(nn.Module):
    """Of the name, and with the slot, of torch's first FSDP."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)


class DistributedDataParallel(nn.Module):
    """Of the name, and with the slot, of torch's."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class MyParallel(DistributedDataParallel):
    """A user's subclass."""


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "compiled": (compiled, "_orig_mod"),
    "DDP": (DistributedDataParallel, "module"),
    "a subclass of DDP": (MyParallel, "module"),
    "DataParallel": (data_parallel, "module"),
    "averaged": (AveragedModel, "module"),
    "checkpoint": (checkpoint_wrapper, "_checkpoint_wrapped_module"),
    "FSDP": (FullyShardedDataParallel, "_fsdp_wrapped_module"),
}
by_wrapper = pytest.mark.parametrize(("wrap", "key"), WRAPPERS.values(), ids=WRAPPERS.keys())


def wrapped_inside(wrap):
    """The wrapper around a part and not around the model."""
    model = bare()
    model[0] = wrap(model[0])
    return model


def wrapped_twice(wrap):
    model = bare()
    model[0][0] = wrap(model[0][0])
    return wrap(model)


SHAPES = {"outside": lambda wrap: wrap(bare()), "inside": wrapped_inside, "twice": wrapped_twice}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


# --- names -----------------------------------------------------------------------------------------------------------
@by_wrapper
@by_shape
def test_a_wrapper_changes_no_name(wrap, key, shape):
    model = shape(wrap)
    assert find_sites(model, lambda *_: True) == NAMES
    assert tuple(named_sites(model)) == ("", *NAMES)
    assert find_sites(model, lambda _, module: isinstance(unwrapped(module), nn.Linear)) == ("0.0", "1")


@by_wrapper
@by_shape
def test_a_wrapped_model_is_the_same_architecture(wrap, key, shape):
    model = shape(wrap)
    assert fingerprint(model) == fingerprint(bare())
    assert class_name(model) == "Sequential"


@by_wrapper
@by_shape
def test_a_wrapped_model_is_steered_as_the_bare_one(wrap, key, shape):
    model = shape(wrap).eval()
    v = SteeringVector({"0.0": V, "0:in": V[:2], "1": V[:2]})
    with Steerer(bare(), v, c=2) as steerer, torch.no_grad():
        expected = steerer.model(X)
    with torch.no_grad():
        plain = model(X)
        with Steerer(model, v, c=2) as steerer:
            torch.testing.assert_close(model(X), expected)
        assert torch.equal(model(X), plain)
    assert steerer.sites == v.sites


@by_wrapper
@by_shape
def test_a_wrapped_model_gives_the_statistics_of_the_bare_one(wrap, key, shape):
    model = shape(wrap)
    for site in ("0.0", "0", "0:in", "1:in", ""):
        torch.testing.assert_close(record(model, X, sites=site)[site], record(bare(), X, sites=site)[site])
    assert collect(model, X, sites="*").metadata == collect(bare(), X, sites="*").metadata


@by_wrapper
def test_a_vector_of_a_wrapped_model_steers_the_bare_one_and_the_other_way_round(wrap, key):
    model = wrap(bare()).eval()
    sides = {"positive": X, "negative": -X, "sites": ["0.1", "1:in"], "progress": False}
    ours, theirs = fit(model, **sides), fit(bare(), **sides)
    assert ours.allclose(theirs)
    assert ours.metadata == theirs.metadata


@by_wrapper
def test_names_with_the_wrapper_s_prefix_are_found_on_the_bare_and_on_the_wrapped_model(wrap, key):
    for name, _ in wrap(bare()).named_modules():
        if not name or name == key:
            continue
        own = name.removeprefix(f"{key}.")
        for model in (bare(), wrap(bare())):
            assert find_sites(model, name) == (own,)
            assert resolve(model, [name])[name].name == own
            assert find_sites(model, f"{name}:in") in ((f"{own}:in",), (f"{name}:in",))
            assert resolve(model, [f"{name}:in"])[f"{name}:in"].name == own


@by_wrapper
def test_a_vector_with_prefixed_names_steers_the_bare_model(wrap, key):
    model = bare()
    expected = {}
    for prefix in ("", f"{key}."):
        with Steerer(model, SteeringVector({f"{prefix}0.0": V})):
            expected[prefix] = model(X)
    assert torch.equal(*expected.values())


@by_wrapper
def test_a_prefixed_name_within_a_name_is_found(wrap, key):
    if key == "module":
        return  # a part of a model may well be called that, and only the outermost one is taken for a wrapper's
    for model in (bare(), wrapped_inside(wrap)):
        assert resolve(model, [f"0.{key}.1"])[f"0.{key}.1"].name == "0.1"


@by_wrapper
def test_globs_with_the_wrapper_s_prefix_select_what_they_do_without_it(wrap, key):
    for model in (bare(), wrap(bare())):
        assert find_sites(model, f"{key}.0.*") == ("0.0", "0.1")


@by_wrapper
def test_wrapped_modules_are_found_as_objects_from_inside_and_outside(wrap, key):
    model = wrapped_inside(wrap)
    assert find_sites(model, model[0]) == ("0",)
    assert find_sites(model, unwrapped(model[0])) == ("0",)
    assert find_sites(model, unwrapped(model[0])[1]) == ("0.1",)


class Holder(nn.Module):
    """A user's model with a part that is called as a wrapper's is."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, x):
        return self.module(x)


def test_a_part_that_is_called_module_keeps_its_name():
    model = Holder()
    assert find_sites(model, lambda *_: True) == ("module", "module.0", "module.1")
    assert resolve(model, ["module.1"])["module.1"].name == "module.1"
    assert find_sites(nn.DataParallel(model), "module.1") == ("module.1",)
    assert find_sites(nn.DataParallel(model), "module.module.1") == ("module.1",)


def test_a_wrong_name_in_a_wrapper_is_refused_with_the_bare_close_ones():
    with pytest.raises(SiteNotFoundError, match=r"Sequential has no site '0.7'. Close names: '0'|'0.0'"):
        find_sites(nn.DataParallel(bare()), "0.7")


prefixes = st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
words = st.text("abc_0123", min_size=1, max_size=6)


@given(st.lists(st.tuples(st.lists(prefixes, max_size=2), words), min_size=1, max_size=4), st.booleans())
def test_prefixes_fall_out_wherever_they_stand(parts, outermost):
    name = ".".join(key for own, word in parts for key in (*own, word))
    expected = ".".join(word for _, word in parts)
    assert without_prefixes(f"module.{name}" if outermost else name) == expected
    assert without_prefixes(expected) == expected


def test_a_name_that_only_begins_like_a_prefix_is_left():
    for name in ("_orig_model.0", "a._orig_mod_b", "modules.0", "module", "a.module.b"):
        assert without_prefixes(name) == name


# --- peft ------------------------------------------------------------------------------------------------------------
class BaseTunerLayer:
    """Of the name of peft's."""


class AddedLinear(nn.Module, BaseTunerLayer):
    """A layer with an adapter, as peft makes them."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 1, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(1, base_layer.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class BaseTuner(nn.Module):
    """Of the name, and with the slot, of peft's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


class LoraModel(BaseTuner):
    """What peft has for LoRA."""


class PeftModel(nn.Module):
    """Of the name, and with the slot, of peft's."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def with_lora(wrap=lambda model: model):
    model = bare()
    model[0][0] = AddedLinear(model[0][0])
    return wrap(PeftModel(LoraModel(model))).eval()


by_outer = pytest.mark.parametrize("wrap", [lambda model: model, DistributedDataParallel], ids=["alone", "in DDP"])


@by_outer
def test_a_model_with_adapters_has_the_names_and_the_fingerprint_of_the_bare_one(wrap):
    model = with_lora(wrap)
    assert find_sites(model, lambda _, module: True) == NAMES
    for sites in ("**", "re:.*"):
        with pytest.warns(UserWarning, match="some of them inside others"):
            assert find_sites(model, sites) == NAMES
    assert find_sites(model, "base_model.model.0.*") == ("0.0", "0.1")
    assert fingerprint(model) == fingerprint(bare())
    assert class_name(model) == "Sequential"
    assert described(model)["weights"] != described(bare())["weights"]


@by_outer
def test_what_an_adapter_is_made_of_is_found_by_its_exact_name(wrap):
    model = with_lora(wrap)
    assert find_sites(model, "0.0.lora_B.default") == ("0.0.lora_B.default",)
    assert find_sites(model, "0.0.base_layer") == ("0.0.base_layer",)


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.base_model.model.", "base_model.model._orig_mod."])
def test_peft_s_prefix_falls_out_on_the_bare_and_on_the_adapted_model(prefix):
    for model in (bare(), with_lora(), with_lora(DistributedDataParallel)):
        assert find_sites(model, f"{prefix}0.0") == ("0.0",)
        assert resolve(model, [f"{prefix}0.1:in"])[f"{prefix}0.1:in"].name == "0.1"


def test_a_part_that_is_called_base_model_keeps_its_name():
    model = nn.Sequential()
    model.add_module("base_model", nn.Sequential())
    model.base_model.add_module("model", bare())
    assert find_sites(model, "base_model.model.0") == ("base_model.model.0",)
    assert without_prefixes("a.base_model.model.0") == "a.base_model.model.0"


@by_outer
def test_a_model_with_adapters_is_steered_as_the_bare_one(wrap):
    model, plain = with_lora(wrap), bare()
    v = SteeringVector({"0.0": V, "0:in": V[:2], "1": V[:2]})
    with Steerer(plain, v, c=2), torch.no_grad():
        expected = plain(X)
    with Steerer(model, v, c=2), torch.no_grad():
        torch.testing.assert_close(model(X), expected)
    ours, theirs = collect(model, X, sites="*", progress=False), collect(plain, X, sites="*", progress=False)
    assert ours.sites == theirs.sites
    assert all(torch.equal(ours[site].mean, theirs[site].mean) for site in ours)


@pytest.mark.parametrize("name", ["BaseTuner", "PeftModel", "DataParallel", "BaseTunerLayer"])
def test_a_class_that_is_only_called_so_is_a_module_like_any_other(name):
    model = type(name, (nn.Sequential,), {})(nn.Linear(2, 3), nn.ReLU())
    assert find_sites(model, "*") == ("0", "1")
    assert slot(model) is None
    assert fingerprint(model).startswith(f"{name}:9:")


def test_a_vector_of_the_bare_model_is_known_on_the_adapted_one_as_of_other_weights(tmp_path):
    SteeringVector({"0.0": V}, concept="c").save(tmp_path / "v.safetensors", model=bare())
    v = SteeringVector.load(tmp_path / "v.safetensors")
    with pytest.warns(UserWarning, match="the vector 'c' was made for a Sequential .* with other weights"):
        Steerer(with_lora(), v)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_a_model_that_peft_has_made():
    peft = pytest.importorskip("peft")
    model, plain, ids = llama(), llama(), torch.tensor([[3, 1, 4, 1, 5]])
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).eval()
    assert find_sites(model, lambda *_: True) == find_sites(plain, lambda *_: True)
    assert fingerprint(model) == fingerprint(plain)
    v = SteeringVector({"model.layers.1": torch.arange(16.0) / 8, "model.layers.0.self_attn.q_proj": torch.ones(16)})
    with Steerer(plain, v), torch.no_grad():
        expected = plain(ids).logits
    for prefix in ("", "base_model.model."):
        with Steerer(model, SteeringVector({f"{prefix}{site}": v[site] for site in v})), torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected)


# --- structure -------------------------------------------------------------------------------------------------------
@by_wrapper
def test_unwrapping_ends_at_the_module_and_slots_are_the_wrappers_own(wrap, key):
    inner = nn.Linear(2, 3)
    model = wrap(inner)
    assert slot(model) == key
    assert slot(inner) is None
    assert type(unwrapped(model)) is nn.Linear
    assert [name for name, _ in named_modules(model)] == ["", ""]


@by_wrapper
@by_shape
def test_the_path_to_a_name_goes_through_every_wrapper(wrap, key, shape):
    model = shape(wrap)
    for name in NAMES:
        path = path_to(model, name)
        assert path[0] is model
        assert unwrapped(path[-1]) is unwrapped(named_sites(model)[name])
        for outer, inner in pairwise(path):
            assert any(inner is child for child in outer.children())
    assert path_to(model, "0.7")[-1] is path_to(model, "0")[-1]


@by_wrapper
@pytest.mark.parametrize("site", ["0", "0.0", "0.1", "1", "2", "0:in", "0.1:in", "1:in"])
def test_a_wrapped_member_of_a_sequential_has_the_axis_of_what_it_wraps(wrap, key, site):
    plain = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Identity(), nn.Dropout())
    model = copy.deepcopy(plain)
    model[0][0], model[1] = wrap(model[0][0]), wrap(model[1])
    model[0] = wrap(model[0])
    assert layout(model, resolve(model, [site])[site]) == layout(plain, resolve(plain, [site])[site])


@by_wrapper
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.case(19)
def test_a_wrapped_recurrent_module_is_steered_at_its_output(wrap, key, kind):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(kind(2, 3, batch_first=True))).eval()
    x = torch.rand(2, 4, 2)
    with torch.no_grad():  # torch.compile warns of any tensor with a history that comes out of a recurrent module
        plain = model(x)
        with Steerer(model, SteeringVector({"0": V})):
            out, rest = model(x)
    torch.testing.assert_close(out, plain[0] + V)
    torch.testing.assert_close(rest, plain[1])


class Two(nn.Module):
    def forward(self, hidden, other=None):
        return hidden


class Calls(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x, other=x)


@by_wrapper
@pytest.mark.parametrize("site", ["part:in.hidden", "part:in.0"])
@pytest.mark.case(23)
def test_the_arguments_of_a_wrapped_module_have_the_names_of_what_it_wraps(wrap, key, site):
    model = Calls(wrap(Two()))
    with Steerer(model, SteeringVector({site: V})):
        assert torch.equal(model(torch.zeros(1, 3)), V[None])


def test_the_arguments_that_a_wrapped_module_lacks_are_named():
    model = Calls(checkpoint_wrapper(Two()))
    with (
        pytest.raises(OutputError, match=r"site 'part:in.nope': the input .* has no part 'nope'"),
        Steerer(model, SteeringVector({"part:in.nope": V})),
    ):
        model(torch.zeros(1, 3))


# --- torch's own DDP -------------------------------------------------------------------------------------------------
@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_ddp_model_is_collected_fitted_trained_on_and_steered_and_still_trains():
    model = nn.parallel.DistributedDataParallel(bare())
    before = state(model)
    v = fit(model, positive=X, negative=-X, sites="0.1", progress=False)
    assert v.allclose(fit(bare(), positive=X, negative=-X, sites="0.1", progress=False))
    options = {"sites": "0.1", "loss": lambda output: (output - 1).square().mean(), "steps": 3, "progress": False}
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, other = (optimize(m, X, generator=g, **options) for m, g in zip((model, bare()), generators, strict=True))
    assert one.allclose(other)
    assert state(model) == before
    with Steerer(model, v), Steerer(model.module, v, c=2):
        steered = model(X)
        assert not torch.equal(steered, bare()(X))
        steered.sum().backward()
    model(X).sum().backward()
    assert model.module[1].weight.grad is not None
