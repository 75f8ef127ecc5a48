"""What ran once in the first pass runs once in each: later passes end when every site has run, and lose nothing."""

from collections import deque

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tests.collecting.again_indirectly  # noqa: F401  (adds to AGAIN)
from actsteer import (
    BatchError,
    StatisticsError,
    Steerer,
    SteeringVector,
    collect,
    collect_differences,
    collect_pairs,
    fit,
    record,
)
from tests.collecting.again import AGAIN, Parts

X = torch.arange(8.0).reshape(4, 2) / 8
BATCHES = [X, X + 1, -X]


# --- collected is what plain hooks see, in three batches -------------------------------------------------------------
def heard(model, batches, site):
    """What a plain hook sees of full passes: the outputs or, at `:in`, the inputs, call after call."""
    name, _, side = site.partition(":")
    module, rows = model.get_submodule(name), []
    if side:
        handle = module.register_forward_pre_hook(lambda m, args: rows.append(args[0].reshape(-1, 2).clone()))
    else:
        handle = module.register_forward_hook(lambda m, args, output: rows.append(output.reshape(-1, 2).clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(rows) if rows else None


def check_as_plain_hooks_see_it(build, sites, **options):
    def made():
        torch.manual_seed(0)
        return build().eval()

    wanted = {site: heard(made(), BATCHES, site) for site in sites}
    rows = record(made(), BATCHES, sites=sites, progress=False, **options)
    stats = collect(made(), BATCHES, sites=sites, progress=False, **options)
    for site in sites:
        assert torch.equal(rows[site], wanted[site]), (site, len(rows[site]), len(wanted[site]))
        assert stats[site].count == len(wanted[site])
        torch.testing.assert_close(stats[site].mean, wanted[site].double().mean(0), rtol=1e-12, atol=1e-12)


def resnet18():
    return pytest.importorskip("torchvision.models").resnet18()


@pytest.mark.parametrize("build", AGAIN, ids=lambda build: build.__name__)
def test_every_call_of_a_site_that_runs_again_is_seen(build):
    sites = [name for name, _ in build().named_children() if heard(build().eval(), [X], name) is not None]
    assert "a" in sites
    for chosen in ([site] for site in sites):
        check_as_plain_hooks_see_it(build, chosen)
    check_as_plain_hooks_see_it(build, sites)


WRAPPABLE = [build for build in AGAIN if issubclass(build, Parts) and build.__init__ is Parts.__init__]


def test_a_site_inside_of_what_runs_again_is_seen_every_time():
    for build in WRAPPABLE:

        def wrapped(build=build):
            model = build()
            model.a = nn.Sequential(nn.Identity(), model.a)
            return model

        check_as_plain_hooks_see_it(wrapped, ["a.1"])


# --- where it does end -----------------------------------------------------------------------------------------------
def calls(model, batches, sites, run=collect, **options):
    """How often each module returned while collecting."""
    ran = dict.fromkeys(dict(model.named_modules()), 0)

    def count(name):
        def hook(*_):
            ran[name] += 1

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in model.named_modules()]
    try:
        run(model, batches, sites=sites, progress=False, **options)
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


class ByIndex(Parts):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.a, self.b, self.c])

    def forward(self, x):
        for i in range(len(self.blocks)):
            x = self.blocks[i](x)
        return x


class ByName(Parts):
    def forward(self, x):
        for letter in "abc":
            x = getattr(self, f"{letter}")(x)
        return x


class WithFinally(Parts):
    def forward(self, x):
        try:
            x = self.b(self.a(x))
        finally:
            self.left = True
        return self.c(x)


class Notes(Parts):
    def forward(self, x):
        x = self.b(self.a(x))
        self.last = x
        return self.c(x)


class Language(nn.Module):
    """A decoder as people write them by hand, with a loop over its layers and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 4), nn.Linear(4, 9)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True) for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


@pytest.mark.parametrize(
    ("build", "batch", "site", "skipped"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), X, "1", "2"),
        (Chain, X, "b", "c"),
        (ByIndex, X, "b", "c"),
        (ByName, X, "b", "c"),
        (WithFinally, X, "b", "c"),
        (Notes, X, "b", "c"),
        (lambda: nn.Sequential(Chain(), Chain()), X, "0.b", "0.c"),
        (resnet18, torch.zeros(1, 3, 64, 64), "layer2.0.conv1", "layer2.0.bn1"),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=3, n_head=2)),
            TOKENS,
            "transformer.h.1",
            "transformer.h.2.ln_1",
        ),
        (lambda: LlamaForCausalLM(LlamaConfig(**TINY)), TOKENS, "model.layers.*", "model.norm"),
        (lambda: LlamaForCausalLM(LlamaConfig(**TINY)), TOKENS, "model.layers.1.mlp.up_proj", "model.layers.1.mlp"),
        (lambda: BertModel(BertConfig(**TINY)), TOKENS, "encoder.layer.1", "encoder.layer.2.attention.self.query"),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3),
            torch.zeros(2, 3, 4),
            "layers.1",
            "layers.2.linear1",
        ),
        (Language, TOKENS, "layers.1", "head"),
    ],
)
def test_what_comes_after_the_deepest_site_runs_in_the_first_pass_alone(build, batch, site, skipped):
    ran = calls(build().eval(), [batch] * 3, site)
    assert ran[skipped] == ran[""] == 1
    ran = calls(build().eval(), [batch] * 3, site, stop=False)
    assert ran[skipped] == ran[""] == 3


def test_the_pass_goes_on_to_the_deepest_of_several_sites_in_any_order():
    for sites in (["a", "b"], ["b", "a"]):
        assert calls(Chain().eval(), BATCHES, sites) == {"": 1, "a": 3, "b": 3, "c": 1}


def test_every_32nd_pass_runs_whole():
    assert calls(Chain().eval(), [X] * 31, "b")["c"] == 1
    assert calls(Chain().eval(), [X] * 32, "b")["c"] == 2
    assert calls(Chain().eval(), [X] * 70, "b") == {"": 3, "a": 70, "b": 70, "c": 3}


RUNS = {
    "collect": collect,
    "record": record,
    "fit": lambda model, batches, **options: fit(model, positive=batches, negative=batches[:1], **options),
    "differences": lambda model, batches, **options: collect_differences(model, batches, batches, **options),
    "pairs": lambda model, batches, sites, **options: collect_pairs(
        model, Chain(), batches, sites={sites: "a"}, **options
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_rule_is_the_same_wherever_a_model_is_looked_at(name):
    passes = {"fit": 4, "differences": 6}.get(name, 3)
    whole = {"fit": 2}.get(name, 1)  # one for each side, which is collected by itself
    assert calls(Chain().eval(), BATCHES, "b", run=RUNS[name]) == {"": whole, "a": passes, "b": passes, "c": whole}
    ran = calls(Chain().eval(), BATCHES, "b", run=RUNS[name], stop=False)
    assert ran == {"": passes, "a": passes, "b": passes, "c": passes}


# --- where the rule does not hold ------------------------------------------------------------------------------------
class MoreLater(Parts):
    """Runs its first part once more from some batch on, before or behind the second."""

    def __init__(self, since, *, behind):
        super().__init__()
        self.since, self.behind, self.number = since, behind, 0

    def forward(self, x):
        self.number += 1
        more = self.number >= self.since
        x = self.b(self.a(self.a(x) if more and not self.behind else x))
        return self.a(x) if more and self.behind else x


def test_a_site_that_runs_more_often_later_is_noticed():
    for behind, batches in ((True, 32), (False, 2)):
        for sites in (["a"], ["a", "b"]) if behind else (["a", "b"],):
            with pytest.raises(StatisticsError, match=r"the sites \['a'\] ran more than once.*stop=False"):
                collect(MoreLater(2, behind=behind), [X] * batches, sites=sites, progress=False)
        found = collect(MoreLater(2, behind=behind), [X] * batches, sites="a", stop=False, progress=False)
        assert found["a"].count == 4 * (2 * batches - 1)


class Late(Parts):
    """Runs its second part from the second batch on."""

    seen = False

    def forward(self, x):
        x = self.b(self.a(x)) if self.seen else self.a(x)
        self.seen = True
        return x


def test_a_site_that_does_not_run_in_the_first_pass_keeps_all_passes_whole():
    check_as_plain_hooks_see_it(Late, ["a", "b"])


class Sometimes(Parts):
    """Runs its second part in the first batch alone."""

    seen = False

    def forward(self, x):
        x = self.a(x) if self.seen else self.b(self.a(x))
        self.seen = True
        return self.c(x)


def test_a_pass_in_which_a_site_does_not_run_goes_to_its_end():
    check_as_plain_hooks_see_it(Sometimes, ["a", "b"])


class Weighted(nn.Module):
    """Has weights of its own and parts, which what offloads it brings before its forward and takes away after it."""

    def __init__(self):
        super().__init__()
        self.scale, self.a, self.b = nn.Parameter(torch.ones(2)), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.b(self.a(self.scale * x))


def test_an_offloaded_model_is_left_offloaded():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(nn.Sequential(Weighted()), torch.device("cpu"))
    collect(model, BATCHES, sites="0.a", progress=False)
    assert all(parameter.is_meta for parameter in model.parameters())


# --- what is left behind ---------------------------------------------------------------------------------------------
class InContexts(Parts):
    """Runs under contexts, which have to be left when the pass ends."""

    def forward(self, x):
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return self.c(self.b(self.a(x)))


def test_the_contexts_of_the_model_are_left():
    model = InContexts().train()
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    found = collect(model, BATCHES, sites="b", progress=False)
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == before
    assert model.training and all(part.training for part in model.children()) and not found["b"].mean.requires_grad


def test_no_hook_stays():
    model = Chain()
    collect(model, BATCHES, sites=["a", "b"], progress=False)
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
    check_as_plain_hooks_see_it(Swallows, ["a"])
    check_as_plain_hooks_see_it(Swallows, ["a", "b"])


def test_hooks_of_the_user_that_ran_before_the_site_ran():
    model, ran = Chain().eval(), []
    model.a.register_forward_hook(lambda *_: ran.append("a"))
    model.b.register_forward_hook(lambda *_: ran.append("b"))
    collect(model, BATCHES, sites="b", progress=False)
    assert ran == ["a", "b"] * 3


def test_after_an_error_of_the_model_before_the_site_all_is_as_before():
    model = Chain().eval()
    with pytest.raises(BatchError, match=r"site 'a', a float32 Linear.* was given .* \(3, 5\): mat1"):
        collect(model, torch.zeros(3, 5), sites="b", progress=False)
    assert collect(model, X, sites="b", progress=False)["b"].count == 4


# --- models that keep state, that run themselves, or whose way to a site is hard to see -------------------------------
CASES: list = []


def seen_at(*sites, stop=True, **attributes):
    """A case for each of these sites, "+" between several at once, of a model with this `forward` and these attributes,
    or what makes them; its user declares what the model writes for its next batch, with `stop=False`."""

    def add(forward):
        class Model(Parts):
            def __init__(self):
                super().__init__()
                for name, value in attributes.items():
                    setattr(self, name, value() if callable(value) else value)

        Model.forward = forward
        CASES.extend(pytest.param(Model, site.split("+"), stop, id=f"{forward.__name__}-{site}") for site in sites)
        return forward

    return add


def pair():
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


@seen_at("a", "b", stop=False, state=0.0)
def keeps_its_state(self, x):
    hidden = self.a(x + self.state)
    self.state = hidden.mean(0)
    return self.b(hidden)


class Remembers(nn.Module):
    memory = 0.0

    def forward(self, x):
        self.memory = x.mean(0)
        return x


@seen_at("a", stop=False, later=Remembers)
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


@pytest.mark.parametrize(("build", "sites", "stop"), CASES)
def test_all_batches_are_seen_as_plain_hooks_see_them(build, sites, stop):
    check_as_plain_hooks_see_it(build, sites, stop=stop)


# --- what is not in the model -----------------------------------------------------------------------------------------
def test_a_hook_of_all_modules_may_run_a_site():
    model = Chain().eval()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: model.a(output) if module is model.b else None
    )
    try:
        assert collect(model, BATCHES, sites="a", progress=False)["a"].count == 24
    finally:
        handle.remove()


def test_what_the_source_of_the_batches_runs_is_not_seen():
    model = Chain().eval()
    source = (batch for batch in BATCHES if model(batch + 1) is not None)
    assert torch.equal(record(model, source, sites="b", progress=False)["b"], heard(model, BATCHES, "b"))


def test_steering_before_the_site_is_seen_and_steering_behind_it_is_not_missed():
    model = Chain().eval()
    with Steerer(model, SteeringVector({"c": torch.ones(2)}), c=1.0):
        assert torch.equal(record(model, BATCHES, sites="b", progress=False)["b"], heard(model, BATCHES, "b"))
    with Steerer(model, SteeringVector({"a": torch.ones(2)}), c=1.0):
        steered = record(model, BATCHES, sites="b", progress=False)["b"]
    assert torch.equal(steered, torch.cat([model.b(torch.relu(model.a(x) + 1)).detach() for x in BATCHES]))
