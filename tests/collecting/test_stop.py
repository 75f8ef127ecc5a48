"""A forward pass ends after the last site only where nothing is lost by it."""

import importlib
import sys
from collections import deque

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tests.collecting.again_indirectly  # noqa: F401  (adds to AGAIN)
from actsteer import Steerer, SteeringVector, collect, record
from tests.collecting.again import AGAIN, Parts

X = torch.arange(8.0).reshape(4, 2) / 8


def resnet18():
    return pytest.importorskip("torchvision.models").resnet18()


def seen_in_full(model, x, site):
    """What a plain hook sees when nothing ends the pass: the calls' outputs, one after another."""
    rows = []
    handle = model.get_submodule(site).register_forward_hook(lambda m, args, output: rows.append(output.reshape(-1, 2)))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    return rows


@pytest.mark.parametrize("build", AGAIN, ids=lambda build: build.__name__)
def test_every_call_of_a_site_is_seen(build):
    torch.manual_seed(0)
    model = build().eval()
    assert len(seen_in_full(model, X, "a")) > 1
    for site in (name for name, part in model.named_children() if seen_in_full(model, X, name)):
        wanted = torch.cat(seen_in_full(model, X, site))
        assert torch.equal(record(model, [X], sites=site, progress=False)[site], wanted), site
        assert collect(model, X, sites=site, progress=False)[site].count == len(wanted)


WRAPPABLE = [build for build in AGAIN if issubclass(build, Parts) and build.__init__ is Parts.__init__]


@pytest.mark.parametrize("build", WRAPPABLE, ids=lambda build: build.__name__)
def test_a_site_inside_of_what_runs_again_is_seen_every_time(build):
    torch.manual_seed(0)
    model = build()
    model.a = nn.Sequential(nn.Identity(), model.a)
    wanted = seen_in_full(model.eval(), X, "a.1")
    assert torch.equal(record(model, [X], sites="a.1", progress=False)["a.1"], torch.cat(wanted))


# --- where it does end -----------------------------------------------------------------------------------------------
def runs_after(model, batch, sites):
    """The modules that were called while collecting, in the order in which they returned."""
    ran = []
    handles = [
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
        for name, module in model.named_modules()
    ]
    try:
        collect(model, [batch], sites=sites, progress=False)
    finally:
        for handle in handles:
            handle.remove()
    return ran


TINY = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
TOKENS = {"input_ids": torch.arange(8).reshape(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}


class Chain(Parts):
    def forward(self, x):
        x = torch.relu(self.a(x))
        x = self.b(x)
        return self.c(x)


@pytest.mark.parametrize(
    ("build", "batch", "site", "skipped"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), X, "1", "2"),
        (Chain, X, "b", "c"),
        (lambda: nn.Sequential(Chain(), Chain()), X, "0.b", "0.c"),
        (resnet18, torch.zeros(1, 3, 64, 64), "layer2.0.conv1", "layer2.0.bn1"),
        (resnet18, torch.zeros(1, 3, 64, 64), "layer2", "layer3.0.conv1"),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=3, n_head=2)),
            TOKENS,
            "transformer.h.1",
            "transformer.h.2.ln_1",
        ),
        (lambda: LlamaForCausalLM(LlamaConfig(**TINY)), TOKENS, "model.layers.1", "model.layers.2.input_layernorm"),
        (lambda: LlamaForCausalLM(LlamaConfig(**TINY)), TOKENS, "model.layers.*", "model.norm"),
        (lambda: LlamaForCausalLM(LlamaConfig(**TINY)), TOKENS, "model.layers.1.mlp.up_proj", "model.layers.1.mlp"),
        (lambda: BertModel(BertConfig(**TINY)), TOKENS, "encoder.layer.1", "encoder.layer.2.attention.self.query"),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3),
            torch.zeros(2, 3, 4),
            "layers.1",
            "layers.2.linear1",
        ),
    ],
)
def test_what_comes_after_the_deepest_site_does_not_run(build, batch, site, skipped):
    model = build().eval()
    assert skipped in dict(model.named_modules())
    ran = runs_after(model, batch, site)
    assert skipped not in ran and "" not in ran


def test_the_pass_goes_on_to_the_deepest_of_several_sites_in_any_order():
    model = Chain().eval()
    for sites in (["a", "b"], ["b", "a"]):
        assert runs_after(model, X, sites) == ["a", "b"]


def test_every_batch_is_ended_anew():
    model, ran = Chain().eval(), []
    model.c.register_forward_hook(lambda *_: ran.append("c"))
    stats = collect(model, [X, X, X], sites="b", progress=False)
    assert stats["b"].count == 12 and not ran


# --- what is left behind ---------------------------------------------------------------------------------------------
class InContexts(Parts):
    """Runs under contexts, which have to be left when the pass ends."""

    def forward(self, x):
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            try:
                x = self.b(self.a(x))
            finally:
                self.left = not torch.is_autocast_enabled("cpu") or True
            return self.c(x)


def test_the_contexts_of_the_model_are_left():
    model = InContexts().train()
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    collect(model, X, sites="b", progress=False)
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == before
    assert model.left and model.training and all(part.training for part in model.children())


def test_no_hook_stays():
    model = Chain()
    collect(model, X, sites=["a", "b"], progress=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Swallows(Parts):
    """Catches everything, as careless code does."""

    def forward(self, x):
        try:
            x = self.a(x)
        except BaseException:
            return x
        return self.b(x)


def test_code_that_catches_everything_loses_nothing():
    model = Swallows().eval()
    wanted = seen_in_full(model, X, "a")
    assert torch.equal(record(model, [X, X], sites="a", progress=False)["a"], torch.cat(wanted * 2))
    both = record(model, [X, X], sites=["a", "b"], progress=False)
    assert len(both["a"]) == len(both["b"]) == 8


def test_hooks_of_the_user_that_ran_before_the_site_ran():
    model, ran = Chain().eval(), []
    model.a.register_forward_hook(lambda *_: ran.append("a"))
    model.b.register_forward_hook(lambda *_: ran.append("b"))
    collect(model, X, sites="b", progress=False)
    assert ran == ["a", "b"]


def test_an_error_of_the_model_before_the_site_is_its_own():
    model = Chain().eval()
    with pytest.raises(RuntimeError, match="mat1"):
        collect(model, torch.zeros(3, 5), sites="b", progress=False)
    assert collect(model, X, sites="b", progress=False)["b"].count == 4


# --- models that keep state, that run themselves, or whose way to a site is hard to see -------------------------------
CASES: list = []


def seen_at(*sites, **attributes):
    """A case for each of these sites, "+" between several at once, of a model with this `forward` and these attributes,
    or what makes them."""

    def add(forward):
        class Model(Parts):
            def __init__(self):
                super().__init__()
                for name, value in attributes.items():
                    setattr(self, name, value() if callable(value) else value)

        Model.forward = forward
        CASES.extend(pytest.param(Model, site.split("+"), id=f"{forward.__name__}-{site}") for site in sites)
        return forward

    return add


def pair():
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


@seen_at("a", "b", state=0.0)
def keeps_its_state(self, x):
    hidden = self.a(x + self.state)
    self.state = hidden.mean(0)
    return self.b(hidden)


class Remembers(nn.Module):
    memory = 0.0

    def forward(self, x):
        self.memory = x.mean(0)
        return x


@seen_at("a", later=Remembers)
def has_a_later_part_that_keeps_state(self, x):
    return self.later(self.a(x + self.later.memory))


class CallsItself(Parts):
    def forward(self, x, times=2):
        x = self.a(x)
        return self(x, times - 1) if times else x


@seen_at("inner", "inner:in", "inner.a", "inner:in+inner.a", inner=CallsItself)
def has_a_part_that_runs_itself(self, x):
    return self.inner(x)


@seen_at("pair.0+pair:in", "pair:in", "pair.0", pair=pair)
def runs_a_part_and_then_the_whole(self, x):
    x = self.pair[0](x)
    return self.pair(x)


@seen_at("layers.0", "layers.1", "layers.2", layers=lambda: nn.ModuleList(nn.Linear(2, 2) for _ in range(3)))
def goes_over_neighbours(self, x):
    for one, two in zip(self.layers, self.layers[1:], strict=False):
        x = one(x) + two(x)
    return x


@seen_at("a")
def hooks_a_later_part_as_it_runs(self, x):
    handle = self.b.register_forward_hook(lambda module, args, output: self.a(output))
    x = self.b(self.a(x))
    handle.remove()
    return x


def hooked():
    """Its hook runs its first part before it does so itself."""
    made = pair()
    made.register_forward_pre_hook(lambda module, args: (module[0](args[0]),))
    return made


@seen_at("pair.0", pair=hooked)
def has_a_hook_that_runs_it_first(self, x):
    return self.pair(x)


HOLDERS = {
    "deque": lambda part: deque([part]),
    "frozenset": lambda part: frozenset([part]),
    "iterator": lambda part: iter([part]),
    "view": lambda part: {"it": part}.values(),
    "generator": lambda part: (step for step in (part, part)),
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_what_holds_a_site_may_run_it(holder):
    class Model(Parts):
        def forward(self, x):
            held = holder(self.a)
            x = self.a(x)
            for step in held:
                x = step(x)
            return x

    check_as_plain_hooks_see_it(Model, ["a"])


@pytest.mark.parametrize(("build", "sites"), CASES)
def test_all_batches_are_seen_as_plain_hooks_see_them(build, sites):
    check_as_plain_hooks_see_it(build, sites)


def check_as_plain_hooks_see_it(build, sites):
    def made():
        torch.manual_seed(0)
        return build().eval()

    batches = [X, X + 1, -X]
    wanted = {site: heard(made(), batches, site) for site in sites}
    rows = record(made(), batches, sites=sites, progress=False)
    stats = collect(made(), batches, sites=sites, progress=False)
    for site in sites:
        assert torch.equal(rows[site], wanted[site]), (site, len(rows[site]), len(wanted[site]))
        assert stats[site].count == len(wanted[site])
        torch.testing.assert_close(stats[site].mean, wanted[site].double().mean(0), rtol=1e-12, atol=1e-12)


def heard(model, batches, site):
    """What a plain hook sees of full passes: the outputs or, at `:in`, the inputs."""
    name, _, side = site.partition(":")
    module, rows = model.get_submodule(name), []
    if side:
        handle = module.register_forward_pre_hook(lambda m, args: rows.append(args[0].clone()))
    else:
        handle = module.register_forward_hook(lambda m, args, output: rows.append(output.clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(rows)


# --- what is not in the model -----------------------------------------------------------------------------------------
SOURCE = """
from tests.collecting.again import Parts
class Model(Parts):
    def forward(self, x):
        x = self.a(x)
        return self.{}(x)
"""


@pytest.mark.parametrize("loaded_again", [True, False])
def test_the_code_that_runs_counts_and_not_its_file(tmp_path, monkeypatch, loaded_again):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / f"edited_{loaded_again}.py"
    file.write_text(SOURCE.format("b" if loaded_again else "a"))
    module = importlib.import_module(file.stem)
    if loaded_again:
        assert collect(module.Model(), X, sites="a", progress=False)["a"].count == 4
    file.write_text(SOURCE.format("a" if loaded_again else "b"))
    module = importlib.reload(module) if loaded_again else module
    assert collect(module.Model(), X, sites="a", progress=False)["a"].count == 8


def test_a_hook_of_all_modules_may_run_a_site():
    model = Chain().eval()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: model.a(output) if module is model.b else None
    )
    try:
        assert collect(model, X, sites="a", progress=False)["a"].count == 8
    finally:
        handle.remove()


def test_what_the_source_of_the_batches_runs_is_not_seen():
    model = Chain().eval()
    source = (batch for batch in (X, -X) if model(batch + 1) is not None)
    assert torch.equal(record(model, source, sites="b", progress=False)["b"], heard(model, [X, -X], "b"))


def test_the_end_of_a_pass_is_no_error_of_the_model():
    class NotesErrors(Parts):
        failed = False

        def forward(self, x):
            try:
                return self.b(self.a(x))
            except BaseException:
                self.failed = True
                raise

    model = NotesErrors()
    collect(model, X, sites="a", progress=False)
    assert not model.failed


def test_steering_before_the_site_is_seen_and_steering_behind_it_is_not_missed():
    model = Chain().eval()
    with Steerer(model, SteeringVector({"c": torch.ones(2)}), c=1.0):
        assert torch.equal(record(model, [X], sites="b", progress=False)["b"], heard(model, [X], "b"))
    with Steerer(model, SteeringVector({"a": torch.ones(2)}), c=1.0):
        steered = record(model, [X], sites="b", progress=False)["b"]
    assert torch.equal(steered, model.b(torch.relu(model.a(X) + 1)).detach())
