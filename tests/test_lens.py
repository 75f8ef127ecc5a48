"""TransformerLens: hook points are sites by their names, and are steered and read as its own users see them."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import actsteer
from actsteer import (
    OutputError,
    ProjectionAbove,
    SiteNotFoundError,
    Steerer,
    SteeringNotApplied,
    SteeringVector,
    attention_sites,
    collect,
    find_sites,
    fit,
    optimize,
    record,
    residual_sites,
    residual_writers,
)
from tests.oracles import state
from tests.zoo import lens, normal

pytest.importorskip("transformer_lens")

TOKENS = torch.tensor([[1, 5, 9, 2], [3, 3, 16, 8], [7, 0, 4, 11]])
MIDDLE = "hook_mid"
V = SteeringVector({MIDDLE: torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)})


def bridge():
    """A TransformerBridge on a tiny GPT-2 with random weights: 2 blocks, 2 heads of 4 features."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": 17}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, pad_token_id=0, initializer_range=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().eval()
    return build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=config)


@pytest.fixture(scope="module")
def shared():
    """One bridge for all tests that leave it as it was."""
    return bridge()


@pytest.fixture(scope="module")
def cache(shared):
    with torch.no_grad():
        return shared.run_with_cache(TOKENS)[1]


def with_hooks(model, x, *hooks):
    """The output under TransformerLens's own hooks."""
    with torch.no_grad():
        return model.run_with_hooks(x, fwd_hooks=list(hooks))


def steered(model, x, vectors, **options):
    with Steerer(model, vectors, **options), torch.no_grad():
        return model(x)


@dataclass(frozen=True)
class Ablate:
    """h - c (h · u) u."""

    def __call__(self, activation, direction, c):
        unit = direction / direction.norm()
        return activation - c * (activation @ unit)[..., None] * unit


# --- HookedRootModule ------------------------------------------------------------------------------------------------
@pytest.mark.case(45, 29)
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
@pytest.mark.parametrize("site", ["hook_embed", "hook_mid"])
@pytest.mark.parametrize("shape", [(3, 3), (3, 5, 3)], ids=["rows", "sequences"])
def test_a_hook_point_is_steered_as_its_own_hooks_would(site, shape, backend):
    model, x, v = lens(), normal(*shape), normal(4, seed=2)
    expected = with_hooks(model, x, (site, lambda value, hook: value + 2 * v))
    before = state(model)
    assert torch.equal(steered(model, x, SteeringVector({site: v}), c=2, backend=backend), expected)
    assert state(model) == before
    assert not torch.equal(model(x), expected)


@pytest.mark.case(45)
def test_the_input_of_an_identity_is_not_changed_in_place():
    model, x = lens(), normal(2, 3)
    _, plain = model.run_with_cache(x)
    with Steerer(model, SteeringVector({"hook_mid": V[MIDDLE]})):
        _, cached = model.run_with_cache(x)
    assert torch.equal(cached["hook_embed"], plain["hook_embed"])


@pytest.mark.case(48)
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
def test_run_with_cache_inside_the_block_shows_the_steered_value(backend):
    model, x = lens(), normal(2, 3)
    _, plain = model.run_with_cache(x)
    with Steerer(model, V, c=3, backend=backend):
        output, cached = model.run_with_cache(x)
        assert torch.equal(output, model(x))
    assert torch.equal(cached[MIDDLE], plain[MIDDLE] + 3 * V[MIDDLE])
    assert torch.equal(cached["hook_out"], output)
    assert torch.equal(model.run_with_cache(x)[1][MIDDLE], plain[MIDDLE])


@pytest.mark.case(47)
@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_resetting_the_hooks_inside_the_block_leaves_the_steering(backend, permanent):
    model, x = lens(), normal(2, 3)
    plain = model(x)
    model.add_hook(MIDDLE, lambda value, hook: value * 2, is_permanent=True)
    with Steerer(model, V, backend=backend):
        both = model(x)
        model.reset_hooks(including_permanent=permanent)
        left = model(x)
    assert torch.equal(left, both) != permanent
    assert torch.equal(left, steered(model, x, V, backend=backend))  # with what hooks are left
    assert torch.equal(model(x), plain) == permanent


@pytest.mark.case(47)
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_leaving_the_block_removes_no_hook_of_theirs(inside, permanent, backend):
    model, x, seen = lens(), normal(2, 3), []

    def add():
        model.add_hook(MIDDLE, lambda value, hook: seen.append(hook.name), is_permanent=permanent)

    if not inside:
        add()
    with Steerer(model, V, backend=backend):
        if inside:
            add()
        model(x)
    assert seen == [MIDDLE]
    model(x)
    assert seen == [MIDDLE, MIDDLE]


@pytest.mark.case(47)
def test_their_hooks_run_after_the_steering():
    model, x = lens(), normal(2, 3)

    def double(value, hook):
        return value * 2

    def steer(value, hook):
        return value + V[MIDDLE]

    expected = with_hooks(model, x, (MIDDLE, steer), (MIDDLE, double))
    assert not torch.equal(with_hooks(model, x, (MIDDLE, double), (MIDDLE, steer)), expected)
    with model.hooks(fwd_hooks=[(MIDDLE, double)]):
        assert torch.equal(steered(model, x, V), expected)
    with Steerer(model, V):
        assert torch.equal(with_hooks(model, x, (MIDDLE, double)), expected)


class Switched(nn.Module):
    """A model whose hook point runs when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.on = lens(), False

    def forward(self, x):
        hidden = self.inner.embed(x)
        return self.inner.hook_embed(hidden) if self.on else hidden


@pytest.mark.case(16, 48)
def test_an_inactive_hook_point_is_not_steered_and_says_so():
    model, x = Switched(), normal(2, 3)
    v = SteeringVector({"inner.hook_embed": torch.ones(4, dtype=torch.float64)})
    with pytest.raises(SteeringNotApplied, match=r"inner\.hook_embed.*this HookPoint is inactive"), Steerer(model, v):
        model(x)
    model.on = True
    assert torch.equal(steered(model, x, v), model(x) + 1)


@pytest.mark.case(45)
def test_hook_points_have_the_names_of_hook_dict():
    model = lens()
    assert set(model.hook_dict) <= set(find_sites(model, list(model.hook_dict)))
    with pytest.raises(SiteNotFoundError, match="Close names: 'hook_mid'"):
        Steerer(model, SteeringVector({"hook_middle": torch.ones(4)}))


# --- TransformerBridge -----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.case(46)
def test_every_name_that_runs_is_steered_as_its_own_hooks_would(shared, cache):
    """Aliases, and hook points whose activation is seen through a conversion, among them."""
    wrong, tried = {}, 0
    plain = shared(TOKENS)
    for name in shared.hook_dict:
        if name not in cache or not cache[name].is_floating_point():
            continue
        v = normal(cache[name].shape[-1], seed=2)
        expected = with_hooks(shared, TOKENS, (name, lambda value, hook, v=v: value + 2 * v))
        try:
            output = steered(shared, TOKENS, SteeringVector({name: v}), c=2)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
            continue
        tried += 1
        if not torch.allclose(output, expected, rtol=1e-12, atol=1e-12):
            wrong[name] = "another result"
    assert wrong == {}
    assert tried > 70
    assert torch.equal(shared(TOKENS), plain)


@pytest.mark.case(46)
@pytest.mark.parametrize("site", ["blocks.0.attn.hook_q", "blocks.1.attn.hook_z", "blocks.0.hook_resid_post"])
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
def test_the_cache_of_a_bridge_has_the_steered_value(shared, cache, site, backend):
    v = normal(cache[site].shape[-1], seed=2)
    with Steerer(shared, SteeringVector({site: v}), c=2, backend=backend), torch.no_grad():
        _, inside = shared.run_with_cache(TOKENS)
    torch.testing.assert_close(inside[site], cache[site] + 2 * v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shared.run_with_cache(TOKENS)[1][site], cache[site], rtol=0, atol=0)


@pytest.mark.case(46, 52)
@pytest.mark.parametrize("site", ["blocks.0.attn.hook_q", "blocks.1.attn.hook_z", "blocks.0.hook_attn_out"])
def test_one_strength_per_row_of_a_bridge(shared, cache, site):
    v, c = normal(cache[site].shape[-1], seed=2), torch.tensor([0.0, 2.0, -1.0])
    rows = c.double().view(-1, *[1] * (cache[site].ndim - 1))
    expected = with_hooks(shared, TOKENS, (site, lambda value, hook: value + rows * v))
    torch.testing.assert_close(steered(shared, TOKENS, SteeringVector({site: v}), c=c), expected)


@pytest.mark.case(46)
@pytest.mark.parametrize("site", ["blocks.0.attn.hook_q", "blocks.0.hook_resid_mid"])
def test_an_intervention_sees_what_the_users_of_transformerlens_see(shared, cache, site):
    v = normal(cache[site].shape[-1], seed=2)
    expected = with_hooks(shared, TOKENS, (site, lambda value, hook: Ablate()(value, v, torch.tensor(1.0).double())))
    torch.testing.assert_close(steered(shared, TOKENS, SteeringVector({site: v}), intervention=Ablate()), expected)


@pytest.mark.case(46)
def test_a_gate_reads_what_the_users_of_transformerlens_see(shared, cache):
    site = "blocks.0.attn.hook_q"
    v = SteeringVector({site: normal(4, seed=2)})
    projections = (cache[site] @ v.unit()[site]).mean(dim=(1, 2))
    threshold = float(projections.sort().values[:2].mean())
    steers = (projections > threshold).double().view(-1, 1, 1, 1)
    assert 0 < steers.sum() < 3
    expected = with_hooks(shared, TOKENS, (site, lambda value, hook: value + steers * v[site]))
    torch.testing.assert_close(steered(shared, TOKENS, v, gate=ProjectionAbove(v, threshold)), expected)


@pytest.mark.case(46)
@pytest.mark.parametrize("site", ["blocks.0.attn.hook_q", "blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"])
def test_what_is_collected_is_what_the_cache_has(shared, cache, site):
    rows = cache[site].flatten(end_dim=-2)
    torch.testing.assert_close(record(shared, [TOKENS], sites=site, progress=False)[site], rows)
    moments = collect(shared, [TOKENS], sites=site, covariance=True, progress=False)[site]
    assert moments.count == len(rows)
    torch.testing.assert_close(moments.mean, rows.mean(dim=0))
    torch.testing.assert_close(moments.covariance, rows.T.cov())


@pytest.mark.case(46)
def test_fitting_and_steering_a_bridge_moves_one_side_to_the_other(shared):
    sites = "blocks.1.attn.hook_z"
    positive, negative = [TOKENS], [TOKENS.flip(0) // 2]
    v = fit(shared, positive=positive, negative=negative, sites=sites, progress=False)
    with Steerer(shared, v):
        moved = collect(shared, negative, sites=sites, progress=False)[sites].mean
    torch.testing.assert_close(moved, collect(shared, positive, sites=sites, progress=False)[sites].mean)


@pytest.mark.case(46)
@pytest.mark.parametrize("site", ["blocks.0.attn.hook_v", "blocks.0.hook_resid_post"])
def test_optimize_lowers_the_loss_of_a_bridge(shared, site):
    def loss(logits):
        return -logits.log_softmax(dim=-1)[..., 5].mean()

    before = state(shared.original_model)
    v = optimize(shared, [TOKENS], sites=site, loss=loss, lr=0.1, steps=10, progress=False)
    assert state(shared.original_model) == before
    with torch.no_grad():
        plain = loss(shared(TOKENS))
    assert loss(steered(shared, TOKENS, v)) < plain


@pytest.mark.case(46)
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.*.hook_resid_post", ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")),
        ("blocks.*.attn.hook_q", ("blocks.0.attn.hook_q", "blocks.1.attn.hook_q")),
        (r"re:blocks\.\d\.hook_mlp_out", ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")),
        (["blocks.1.hook_resid_pre"], ("blocks.1.hook_resid_pre",)),
    ],
)
def test_patterns_select_aliases(shared, pattern, expected):
    assert find_sites(shared, pattern) == expected


def test_the_usual_places_are_hook_points(shared):
    assert residual_sites(shared, -1) == ("blocks.1.hook_resid_post",)
    assert attention_sites(shared) == ("blocks.0.hook_attn_out", "blocks.1.hook_attn_out")
    assert residual_writers(shared, 0) == ("blocks.0.hook_attn_out", "blocks.0.hook_mlp_out")
    found = record(shared, TOKENS, sites=["blocks.0.hook_resid_pre", *residual_writers(shared)])
    torch.testing.assert_close(
        sum(found.values()), record(shared, TOKENS, sites=residual_sites(shared, -1))["blocks.1.hook_resid_post"]
    )


@pytest.mark.case(46)
def test_hook_points_that_hold_tokens_are_refused(shared):
    with pytest.raises(OutputError, match="expected floating activations, got torch"):
        steered(shared, TOKENS, SteeringVector({"embed.hook_in": torch.ones(4)}))
    assert torch.equal(shared(TOKENS), shared(TOKENS))


@pytest.mark.case(16, 46)
@pytest.mark.parametrize("site", ["blocks.0.attn.hook_result", "blocks.0.hook_mlp_in", "blocks.0.attn.hook_q_input"])
def test_an_inactive_hook_point_of_a_bridge_says_so(shared, cache, site):
    assert site not in cache
    v = SteeringVector({site: torch.ones(8)})
    with pytest.raises(SteeringNotApplied, match="this HookPoint is inactive"):
        steered(shared, TOKENS, v)


@pytest.mark.case(47)
@pytest.mark.parametrize("permanent", [False, True])
def test_resetting_the_hooks_of_a_bridge_leaves_the_steering(permanent):
    model = bridge()
    v = SteeringVector({"blocks.0.hook_resid_post": normal(8, seed=2)})
    with Steerer(model, v), torch.no_grad():
        expected = model(TOKENS)
        model.reset_hooks(including_permanent=permanent)
        assert torch.equal(model(TOKENS), expected)
    assert not torch.equal(model(TOKENS), expected)


@pytest.mark.case(46)
def test_generating_is_steered_step_by_step(shared):
    site = "blocks.0.hook_resid_post"
    v = SteeringVector({site: normal(8, seed=2)})
    tokens = TOKENS
    for _ in range(4):
        tokens = torch.cat([tokens, steered(shared, tokens, v, c=3)[:, -1:].argmax(dim=-1)], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": TOKENS * 0 + 1}
    plain = {cached: shared.original_model.generate(TOKENS, use_cache=cached, **options) for cached in (False, True)}
    keeps = torch.equal(plain[False], plain[True])  # TransformerLens 4.3 loses the cache of transformers 5.24
    with Steerer(shared, v, c=3), torch.no_grad():
        for cached in (False, True)[: 1 + keeps]:
            assert torch.equal(shared.original_model.generate(TOKENS, use_cache=cached, **options), tokens)


@pytest.mark.case(46)
def test_the_model_inside_a_bridge_is_steered_by_its_own_names(shared):
    """A bridge puts its components in the place of the model's blocks."""
    names = find_sites(shared.original_model, lambda name, module: name.endswith("h.0"))
    v = normal(8, seed=2)
    expected = with_hooks(shared, TOKENS, ("blocks.0.hook_out", lambda value, hook: value + v))
    with Steerer(shared.original_model, SteeringVector({names[0]: v})), torch.no_grad():
        torch.testing.assert_close(shared.original_model(TOKENS).logits, expected)
    assert not torch.allclose(shared(TOKENS), expected)


# --- without it ------------------------------------------------------------------------------------------------------
BLOCKED = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"transformer_lens", "transformers", "accelerate"}:
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocked())
import torch
from torch import nn

from actsteer import Steerer, collect, fit, optimize, record, sweep

model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.ones(4, 2)
v = fit(model, positive=[x], negative=[-x], sites="1", progress=False)
with Steerer(model, v, c=2) as steerer, torch.no_grad():
    assert torch.equal(model(x), model[2](model[1](model[0](x)) + 0))
    assert "tap" in steerer.explain()
optimize(model, [x], sites="1", loss=lambda output: output.square().mean(), steps=2, progress=False)
sweep(model, v, c=[0, 1], evaluate=lambda model: {"mean": model(x).mean()}, progress=False)
assert not {"transformer_lens", "transformers", "accelerate"} & set(sys.modules)
"""


@pytest.mark.slow
@pytest.mark.case(49)
def test_everything_works_where_transformerlens_and_transformers_are_absent():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.case(49)
def test_the_library_asks_the_package_of_transformerlens_for_nothing():
    """Its 4.x raises ImportError at `hasattr(transformer_lens, "HookedTransformer")`."""
    root = Path(actsteer.__file__).parent
    for path in root.rglob("*.py"):
        if "integrations" in path.parts:  # imported when asked for
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.id] if isinstance(node, ast.Name) else []
            assert not any("transformer_lens" in name for name in names), path
