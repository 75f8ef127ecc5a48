"""Parts of the features: what a Steerer does at one is what it does to that part of the whole activation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.rnn import pack_sequence

from actsteer import (
    Ablate,
    Add,
    Affine,
    And,
    Clamp,
    KeepNorm,
    LowRank,
    NotFoldable,
    ProjectionAbove,
    Replace,
    Rotate,
    Steerer,
    Steering,
    SteeringVector,
    UnsupportedModelError,
    VectorBank,
    collect,
    fit,
    fold,
    optimize,
    record,
    sweep,
    unfold,
)
from tests.oracles import state
from tests.strategies import eighths, scalars
from tests.zoo import CASES, bits, exact, identity, llama, normal

BACKENDS = ["tap", "hook", "buffer"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
sites = st.sampled_from(["0", "1", "1:in", "2:in", "3:out"])
X = normal(3, 4)


def steered(model, x, vectors, **options):
    with Steerer(model, vectors, **options):
        return model(x)


@st.composite
def parts(draw, size=4):
    """The bounds of a part of so many features."""
    start = draw(st.integers(0, size - 1))
    return start, draw(st.integers(start + 1, size))


def padded(direction, start, size):
    return torch.nn.functional.pad(direction, (start, size - start - len(direction)))


# --- Add is the vector with zeros around it --------------------------------------------------------------------------
@given(st.data(), sites, parts(), scalars, eighths(3, 4), st.sampled_from(BACKENDS))
def test_adding_to_a_part_is_adding_a_vector_that_is_zero_elsewhere(data, site, part, c, x, backend):
    start, stop = part
    v = data.draw(eighths(stop - start))
    out = steered(exact(), x, SteeringVector({f"{site}[{start}:{stop}]": v}), c=c, backend=backend)
    assert torch.equal(out, steered(exact(), x, SteeringVector({site: padded(v, start, 4)}), c=c))


@every_backend
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_wherever_the_features_lie(case, backend):
    model, x, v = case.build(), case.inputs(), normal(2)
    whole = SteeringVector({case.site: padded(v, 1, case.d)})
    before = state(model)
    for options in ({"c": 2.0}, {"c": normal(x.shape[case.rows])}):
        out = steered(model, x, SteeringVector({f"{case.site}[1:3]": v}), backend=backend, **options)
        assert torch.equal(out, steered(model, x, whole, **options))
        assert not torch.equal(out, model(x))
    assert state(model) == before


@every_backend
def test_strength_zero_changes_no_bit_and_what_is_not_meant_keeps_its_bits(backend):
    x = torch.tensor([[0.0, -0.0, torch.nan, torch.inf, -1.0]])
    for v, c in ((torch.ones(3), 0.0), (torch.ones(3), 1.0)):
        for options in ({}, {"intervention": Ablate()}):
            out = steered(identity(), x, SteeringVector({"0[2:5]": v}), c=c, backend=backend, **options)
            assert torch.equal(bits(out[:, :2]), bits(x[:, :2]))
            assert bool(c) != torch.equal(bits(out), bits(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_packed_and_nested_activations():
    model, v = identity(), SteeringVector({"0[1:2]": torch.tensor([5.0])})
    added = torch.tensor([0.0, 5.0, 0.0])
    packed = pack_sequence([torch.zeros(3, 3), torch.zeros(1, 3)])
    assert torch.equal(steered(model, packed, v).data, added.expand(4, 3))
    for layout in (torch.strided, torch.jagged):
        rows = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=layout)
        out = steered(model, rows, v)
        assert all(torch.equal(own, added.expand(len(own), 3)) for own in out.unbind())


def test_a_module_that_works_in_place_is_steered_in_place():
    model, x = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Identity()).double(), normal(2, 4)
    kept = []
    model[2].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad(), Steerer(model, SteeringVector({"1[0:1]": torch.ones(1).double()})):
        given_in = x.clone()
        out = model(given_in)
    assert torch.equal(out, x.relu() + padded(torch.ones(1), 0, 4).double())
    assert torch.equal(given_in, out)


# --- other edits are those of the part alone -------------------------------------------------------------------------
EDITS = {
    "Ablate": Ablate(),
    "relative": Add(relative=True),
    "Clamp": Clamp(3.0),
    "KeepNorm": KeepNorm(Add()),
    "Rotate": Rotate(0.5),
}


@every_backend
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("intervention", EDITS.values(), ids=EDITS)
def test_an_edit_of_a_part_is_that_of_an_activation_that_is_the_part(intervention, axis, backend):
    x, v = normal(2, 5, 5), normal(3)
    out = steered(
        identity(dtype=torch.float64),
        x,
        SteeringVector({"0[1:4]": v}),
        c=0.5,
        intervention=intervention,
        axis=axis,
        backend=backend,
    )
    expected = x.clone()
    own = expected.movedim(axis, -1)
    own[..., 1:4] = intervention(own[..., 1:4].clone(), v, torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(out, expected)
    assert torch.equal(out.movedim(axis, -1)[..., [0, 4]], x.movedim(axis, -1)[..., [0, 4]])


def test_ablating_a_part_is_a_projection_of_the_whole():
    x, v = normal(6, 5), normal(2)
    unit = padded(v / v.norm(), 2, 5)
    out = steered(identity(dtype=torch.float64), x, SteeringVector({"0[2:4]": v}), intervention=Ablate())
    torch.testing.assert_close(out, x - (x @ unit)[:, None] * unit)


def test_relative_strength_is_in_units_of_the_norm_of_the_part():
    x = torch.tensor([[100.0, 3.0, 4.0, 100.0]])
    out = steered(identity(), x, SteeringVector({"0[1:3]": torch.tensor([2.0, 0.0])}), intervention=Add(relative=True))
    assert torch.equal(out, torch.tensor([[100.0, 8.0, 4.0, 100.0]]))


def test_edits_of_many_numbers_have_those_of_the_part():
    x = normal(2, 3, 5)
    model = identity(dtype=torch.float64)
    values = record(model, x + 1, sites="0[1:3]", keep_shape=True)
    out = steered(model, x, Replace(values))
    assert torch.equal(out, torch.cat([x[..., :1], x[..., 1:3] + 1, x[..., 3:]], dim=-1))
    affine = Affine({"0[1:3]": (normal(2, 2), normal(2, seed=3))})
    edited = affine.at("0[1:3]")(x[..., 1:3], normal(2), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(steered(model, x, affine), torch.cat([x[..., :1], edited, x[..., 3:]], dim=-1))


# --- several parts ---------------------------------------------------------------------------------------------------
@every_backend
def test_parts_of_one_activation_are_edited_in_their_order(backend):
    x, v, w = normal(4, 4), normal(3), normal(3, seed=5)
    disjoint = VectorBank({"v": SteeringVector({"0[0:2]": v[:2], "0[2:4]": w[:2]})})
    out = steered(identity(dtype=torch.float64), x, disjoint, backend=backend)
    assert torch.equal(out, x + torch.cat([v[:2], w[:2]]))
    for first, second in (("0[0:3]", "0[1:4]"), ("0[1:4]", "0[0:3]")):
        expected = x.clone()
        for site, u in ((first, v), (second, w)):
            start = int(site[2])
            own, unit = expected[:, start : start + 3], u / u.norm()
            expected[:, start : start + 3] = own - (own @ unit)[:, None] * unit
        overlapping = SteeringVector({first: v, second: w})
        out = steered(identity(dtype=torch.float64), x, overlapping, intervention=Ablate(), backend=backend)
        torch.testing.assert_close(out, expected)


def test_a_part_and_the_whole_are_two_sites():
    x, v, w = normal(2, 3), normal(1), normal(3, seed=2)
    out = steered(identity(dtype=torch.float64), x, SteeringVector({"0": w, "0[1:2]": v}))
    assert torch.equal(out, x + w + padded(v, 1, 3))


# --- gates -----------------------------------------------------------------------------------------------------------
def above(site, direction):
    return ProjectionAbove(SteeringVector({site: direction}), 0.0)


@every_backend
@pytest.mark.parametrize("edited", ["0", "0[1:3]", "0[0:2]", "1", "1:in[2:4]"])
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_a_gate_reads_a_part(edited, per, backend):
    x, w = normal(4, 3, 4), normal(2)
    gate = ProjectionAbove(SteeringVector({"0[1:3]": w}), 0.1, per=per)
    start, stop = map(int, edited.partition("[")[2][:-1].split(":")) if "[" in edited else (0, 4)
    v = normal(stop - start, seed=3)
    with Steerer(
        identity(dtype=torch.float64), SteeringVector({edited: v}), gate=gate, backend=backend, strict=False
    ) as steerer:
        out = steerer.model(x)
    score = x[..., 1:3] @ (w / w.norm())
    fires = score > 0.1 if per == "token" else (score.mean(dim=1, keepdim=True) > 0.1).expand(4, 3)
    assert 0 < fires.sum() < 12
    assert torch.equal(out, torch.where(fires[..., None], x + padded(v, start, 4), x))


def test_a_gate_reads_what_is_there_before_any_part_is_edited():
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    bank = VectorBank(
        {"a": SteeringVector({"0[0:1]": torch.tensor([9.0])}), "b": SteeringVector({"0[0:2]": -torch.ones(2)})}
    )
    out = steered(identity(), x, bank, gate={"b": above("0[0:2]", torch.tensor([1.0, 0.0]))})
    assert torch.equal(out, torch.tensor([[9.0, 0.0], [8.0, 1.0]]))
    both = And(above("0[0:1]", torch.ones(1)), above("0[1:2]", torch.ones(1)))
    out = steered(identity(), x, SteeringVector({"0[0:1]": torch.tensor([9.0])}), gate=both)
    assert torch.equal(out, torch.tensor([[10.0, 1.0], [-1.0, 1.0]]))


# --- everything else takes such sites --------------------------------------------------------------------------------
def test_statistics_records_and_vectors_are_those_of_the_part():
    model, x = exact(), X
    whole = collect(model, x, sites="1:in", covariance=True)["1:in"]
    part = collect(model, x, sites="1:in[1:3]", covariance=True)["1:in[1:3]"]
    assert torch.equal(part.mean, whole.mean[1:3])
    assert torch.equal(part.covariance, whole.covariance[1:3, 1:3])
    v = fit(model, positive=X, negative=-X, sites=["1:in[1:3]", "1:in"])
    assert torch.equal(v["1:in[1:3]"], v["1:in"][1:3])


@given(parts(), st.sampled_from(["0", "2:in"]))
def test_what_is_recorded_is_the_part(part, site):
    start, stop = part
    kept = record(exact(), X, sites=[site, f"{site}[{start}:{stop}]"])
    assert torch.equal(kept[f"{site}[{start}:{stop}]"], kept[site][:, start:stop])


def test_positions_and_pads_are_those_of_the_whole():
    model = llama()
    batch = {
        "input_ids": torch.tensor([[2, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    }
    site = "model.layers.0.self_attn.o_proj:in"
    for positions in ("all", "last", "mean", slice(1, None)):
        kept = record(model, batch, sites=[site, f"{site}[8:16]"], positions=positions)
        assert torch.equal(kept[f"{site}[8:16]"], kept[site][:, 8:16])
    v = normal(8).float()
    for positions in ("last", slice(1), "prompt"):
        outs = []
        for vector in (SteeringVector({f"{site}[8:16]": v}), SteeringVector({site: padded(v, 8, 16)})):
            with Steerer(model, vector, positions=positions), torch.no_grad():
                outs.append(
                    model.generate(
                        **batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
                    ).logits
                )
        assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


def test_optimize_and_sweep_and_check_and_explain():
    model = exact()
    v = optimize(
        model,
        X,
        targets=torch.zeros(3, 4).double(),
        loss=nn.functional.mse_loss,
        sites=["1[1:3]"],
        steps=3,
        progress=False,
    )
    assert v["1[1:3]"].shape == (2,)
    low = optimize(
        model, X, loss=lambda out: out.square().mean(), sites="1[1:3]", steps=2, train=LowRank(rank=1), progress=False
    )
    assert low.sites == ("1[1:3]",)
    rows = sweep(model, v, c=[0, 1], evaluate=lambda m: m(X).sum().item(), progress=False)
    assert rows[0]["value"] == model(X).sum().item()
    assert rows[1]["value"] == steered(model, X, SteeringVector({"1": padded(v["1[1:3]"], 1, 4)})).sum().item()
    said = Steerer(model, v).check(X)
    typical = record(model, X, sites="1[1:3]")["1[1:3]"].norm(dim=1).median()
    assert "'1[1:3]': the output of ReLU, 2 features" in said
    assert f"of the typical ‖h‖ {typical:.3g}" in said


def test_files_keep_the_names(tmp_path):
    v = fit(exact(), positive=X, negative=-X, sites=["1:in[1:3]", "2:out[0:1]"], concept="right")
    steering = Steering(v, gate=above("1:in[0:2]", torch.ones(2)), c=2.0)
    steering.save(tmp_path / "part.safetensors")
    loaded = Steering.load(tmp_path / "part.safetensors")
    assert loaded.vectors["right"].sites == v.sites
    assert loaded.vectors["right"].equal(v)
    assert loaded.gate.site == "1:in[0:2]"
    assert torch.equal(steered(exact(), X, loaded), steered(exact(), X, steering))


# --- compiled --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["auto", "buffer"])
@pytest.mark.parametrize(
    "options",
    [{}, {"intervention": Ablate()}, {"gate": above("0[2:4]", torch.tensor([1.0, -1.0]))}],
    ids=["Add", "Ablate", "gate"],
)
def test_a_new_strength_compiles_nothing(options, backend):
    torch._dynamo.reset()
    model, counter = exact(), CompileCounter()
    v = SteeringVector({"0[1:3]": normal(2), "2:in[0:2]": normal(2, seed=4), "2:in[2:4]": normal(2, seed=5)})
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with Steerer(model, v, backend=backend, **options) as steerer:
        frames = []
        for c in (2.0, -1.0, 0.5, 3.0):
            steerer.c = c
            torch.testing.assert_close(compiled(X), steered(exact(), X, v, c=c, **options))
            frames.append(counter.frame_count)
    assert frames == frames[:1] * 4
    torch._dynamo.reset()


# --- folded ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "intervention", [Add(), Ablate(), Replace({"0[1:3]": normal(2, seed=7)})], ids=["Add", "Ablate", "Replace"]
)
@pytest.mark.parametrize("site", ["0[1:3]", "2:in[1:3]"])
def test_a_fold_writes_to_that_part_of_the_weights(site, intervention):
    model, x = exact(), X
    vectors = (
        Replace({site: normal(2, seed=7)}) if isinstance(intervention, Replace) else SteeringVector({site: normal(2)})
    )
    options = {} if isinstance(intervention, Replace) else {"intervention": intervention}
    before = state(model)
    folded = fold(model, vectors, 1.0, verify_on=x, **options)
    torch.testing.assert_close(folded(x), steered(model, x, vectors, **options))
    assert state(model) == before
    if site == "0[1:3]" and isinstance(intervention, Add):
        assert torch.equal(folded[0].bias[[0, 3]], model[0].bias[[0, 3]])
    fold(model, vectors, 1.0, verify_on=x, inplace=True, **options)
    unfold(model)
    assert state(model) == before


def test_parts_of_one_activation_fold_together():
    v = SteeringVector({"2:in[0:2]": normal(2), "2:in[1:4]": normal(3), "2[3:4]": normal(1)})
    torch.testing.assert_close(fold(exact(), v, 2.0, verify_on=X)(X), steered(exact(), X, v, c=2.0))


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(NotFoldable, match=r"site '1\[1:3\]': of how many features .* of a ReLU before it runs"):
        fold(exact(), SteeringVector({"1[1:3]": normal(2)}), 1.0, verify_on=X)
    with pytest.raises(UnsupportedModelError, match="it is not the whole output of its module"):
        Steerer(exact(), SteeringVector({"0[1:3]": normal(2)}), backend="fold").attach()
