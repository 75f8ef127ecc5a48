"""Steerer: phi_l(x) + c · v, for every kind of c, of vectors and of sites."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from actsteer import (
    ConceptNotFoundError,
    ProjectionAbove,
    ShapeError,
    SiteNotFoundError,
    Steerer,
    SteeringVector,
    StrengthError,
    UnsupportedModelError,
    VectorBank,
)
from tests.oracles import state
from tests.strategies import eighths, scalars
from tests.zoo import CASES, bits, cnn, exact, identity, mlp, normal, recurrent

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
directions = eighths(4)
X = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.0, 1.0, -1.0, 0.5], [-1.0, 0.125, 3.0, 0.0]], dtype=torch.float64)
V = SteeringVector({"1": torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)}, concept="nine")
W = SteeringVector({"1": torch.tensor([2.0, 0.5, 0.5, -1.0], dtype=torch.float64)}, concept="eight")
ELSEWHERE = SteeringVector({"3": torch.tensor([0.5, 1.0, -1.5, 1.0], dtype=torch.float64)})


def steered(model, x, vectors, **options):
    with Steerer(model, vectors, **options):
        return model(x)


def by_hand(model, x, shifts):
    """An `nn.Sequential` run member by member, each site's shift added to what it gives out."""
    for name, module in model.named_children():
        x = module.forward(x)
        x = x + shifts[name] if name in shifts else x
    return x


# --- what is added -----------------------------------------------------------------------------------------------
@cases
def test_steering_is_adding_by_hand(case):
    model, x, v = case.build(), case.inputs(), normal(case.d, seed=2)

    def add(module, args, output):
        tail = output[1:] if isinstance(output, tuple) else ()
        head = output[0] if isinstance(output, tuple) else output
        head = head + case.spread(2.5 * v, head.ndim)
        return (head, *tail) if isinstance(output, tuple) else head

    handle = model.get_submodule(case.site).register_forward_hook(add)
    expected = model(x)
    handle.remove()
    assert not torch.equal(model(x), expected)
    assert torch.equal(steered(model, x, SteeringVector({case.site: v}), c=2.5), expected)


@pytest.mark.case(52)
@cases
def test_one_strength_per_row_is_a_loop_over_the_rows(case):
    model, x, v = case.build(), case.inputs(), SteeringVector({case.site: normal(case.d, seed=2)})
    c = torch.arange(x.shape[case.rows], dtype=torch.float64) - 0.5
    alone = [steered(model, row, v, c=float(ci)) for row, ci in zip(x.split(1, dim=case.rows), c, strict=True)]
    torch.testing.assert_close(steered(model, x, v, c=c), torch.cat(alone, dim=case.rows), rtol=1e-9, atol=1e-9)


@given(directions, directions, scalars, scalars)
def test_two_concepts_are_their_combination(first, second, a, b):
    bank = VectorBank({"a": SteeringVector({"1": first, "3": second}), "b": SteeringVector({"3": first})})
    strengths = {"a": a, "b": b}
    expected = by_hand(exact(), X, {"1": a * first, "3": a * second + b * first})
    assert torch.equal(steered(exact(), X, bank, c=strengths), expected)
    assert torch.equal(steered(exact(), X, bank.combine(strengths)), expected)


@given(st.lists(directions, min_size=1, max_size=4), scalars)
def test_a_bank_is_the_sum_of_its_concepts(rows, c):
    bank = VectorBank({str(i): SteeringVector({"1": row}) for i, row in enumerate(rows)})
    assert torch.equal(steered(exact(), X, bank, c=c), by_hand(exact(), X, {"1": c * sum(rows)}))


@given(directions, directions, scalars, scalars)
def test_nested_steerers_sum(first, second, a, b):
    assume(a != b or not torch.equal(first, second))  # an equal one is warned about
    model = exact()
    with Steerer(model, SteeringVector({"1": first}), c=a), Steerer(model, SteeringVector({"1": second}), c=b):
        both = model(X)
    assert torch.equal(both, steered(model, X, SteeringVector({"1": a * first + b * second})))


@pytest.mark.case(31)
@pytest.mark.parametrize("outer_first", [True, False])
def test_nested_steerers_may_leave_in_any_order(outer_first):
    model = exact()
    first, second = Steerer(model, V, c=2).attach(), Steerer(model, W, c=-1).attach()
    model(X)
    leaves, stays, vector, c = (first, second, W, -1) if outer_first else (second, first, V, 2)
    leaves.detach()
    assert torch.equal(model(X), by_hand(exact(), X, {"1": c * vector["1"]}))
    stays.detach()
    assert torch.equal(model(X), by_hand(exact(), X, {}))


@pytest.mark.case(50)
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
@pytest.mark.parametrize("site", ["0", "0:in", "1", "1:in"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_module_that_is_called_twice_is_edited_twice(backend, site, gated):
    twice = nn.Identity()
    model = nn.Sequential(twice, twice)
    gate = ProjectionAbove(SteeringVector({site: torch.ones(2)}), 0.0) if gated else None
    v = SteeringVector({site: torch.tensor([1.0, 3.0])})
    out = steered(model, torch.ones(1, 2), v, gate=gate, backend=backend)
    assert torch.equal(out, torch.tensor([[3.0, 7.0]]))


@pytest.mark.case(50)
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
def test_a_gate_at_a_module_that_is_called_twice_decides_twice(backend):
    twice = nn.Identity()
    model = nn.Sequential(twice, twice)
    gate = ProjectionAbove(SteeringVector({"0": torch.tensor([1.0])}), 0.0)
    x = torch.tensor([[1.0], [9.0], [-1.0]])
    out = steered(model, x, SteeringVector({"0": torch.tensor([-4.0])}), gate=gate, backend=backend)
    assert torch.equal(out, torch.tensor([[-3.0], [1.0], [-1.0]]))


@pytest.mark.case(50)
def test_a_shared_parameter_folds_into_one_module_alone():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.bias = first.bias
    model = nn.Sequential(first, second).eval()
    with pytest.raises(UnsupportedModelError, match="its bias is shared with another module"):
        Steerer(model, SteeringVector({"0": torch.ones(2)}), backend="fold")
    twice = nn.Sequential(first, first).eval()
    x = torch.ones(1, 2)
    with torch.no_grad():
        expected = first(first(x) + 1) + 1
        torch.testing.assert_close(steered(twice, x, SteeringVector({"0": torch.ones(2)}), backend="fold"), expected)


def test_the_root_is_a_site_too():
    model = identity()
    assert torch.equal(
        steered(model, torch.zeros(1, 2), SteeringVector({"": torch.ones(2)}), c=3), torch.full((1, 2), 3.0)
    )


# --- strengths ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "c",
    [2, 2.0, torch.tensor(2.0), torch.tensor(2), {"nine": 2}, {"nine": torch.tensor(2.0)}, torch.full((3,), 2.0)],
    ids=repr,
)
def test_every_way_to_say_two_is_two(c):
    assert torch.equal(steered(exact(), X, V, c=c), by_hand(exact(), X, {"1": 2 * V["1"]}))


def test_the_strength_is_one_unless_it_is_given():
    assert torch.equal(steered(exact(), X, V), by_hand(exact(), X, {"1": V["1"]}))


def test_numbers_and_rows_mix_in_a_mapping_and_what_is_not_named_is_zero():
    bank = VectorBank({"a": V, "b": W, "c": V})
    rows = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    expected = by_hand(exact(), X, {"1": 3 * V["1"] + rows[:, None] * W["1"]})
    assert torch.equal(steered(exact(), X, bank, c={"a": 3, "b": rows}), expected)


def test_a_vector_without_a_name_is_the_concept_vector():
    assert torch.equal(steered(exact(), X, ELSEWHERE, c={"vector": 2}), by_hand(exact(), X, {"3": 2 * ELSEWHERE["3"]}))


def test_a_new_strength_takes_effect_at_the_next_forward():
    model = exact()
    with Steerer(model, V) as steerer:
        for c in (1.0, -2.0, 0.0, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), {"nine": 0.5}):
            steerer.c = c
            plain = c["nine"] if isinstance(c, dict) else c
            shift = plain[:, None] * V["1"] if isinstance(plain, torch.Tensor) else plain * V["1"]
            assert torch.equal(model(X), by_hand(exact(), X, {"1": shift}))
            assert torch.equal(steerer.c, c) if isinstance(c, torch.Tensor) else steerer.c == c


def test_a_strength_set_while_detached_is_used_later():
    steerer = Steerer(exact(), V)
    steerer.c = 3
    with steerer:
        assert torch.equal(steerer.model(X), by_hand(exact(), X, {"1": 3 * V["1"]}))


def test_a_refused_strength_changes_nothing():
    model = exact()
    with Steerer(model, V, c=2) as steerer:
        with pytest.raises(StrengthError, match="finite"):
            steerer.c = float("nan")
        assert steerer.c == 2
        assert torch.equal(model(X), by_hand(exact(), X, {"1": 2 * V["1"]}))


def test_a_tensor_of_strengths_is_copied():
    model, c = exact(), torch.ones(3, dtype=torch.float64)
    with Steerer(model, V, c=c):
        c.zero_()
        assert torch.equal(model(X), by_hand(exact(), X, {"1": V["1"]}))


@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_a_mapping_of_strengths_cannot_be_changed_without_effect():
    steerer = Steerer(exact(), V, c={"nine": 1.0})
    with steerer:
        try:
            steerer.c["nine"] = 3.0
        except TypeError:
            return  # refused, so nothing is lost
        assert torch.equal(steerer.model(X), by_hand(exact(), X, {"1": 3 * V["1"]}))


# --- zero --------------------------------------------------------------------------------------------------------
NEGATIVE_ZEROS = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, 5.0]])
SIGNS = SteeringVector({"0": torch.tensor([1.0, -1.0, 1.0])}, concept="a")
ALWAYS = ProjectionAbove(SteeringVector({"0": torch.ones(3)}), threshold=-1e9)
NEVER = ProjectionAbove(SteeringVector({"0": torch.ones(3)}), threshold=1e9)


@pytest.mark.case(28)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"c": 0},
        {"c": -0.0},
        {"c": {"a": 0}},
        {"c": {}},
        {"c": torch.zeros(2)},
        {"c": torch.tensor([0.0, -0.0])},
        {"c": 0, "gate": ALWAYS},
        {"c": 5, "gate": NEVER},
        {"c": torch.zeros(2), "gate": ALWAYS},
        {"c": {"a": torch.ones(2)}, "gate": {"a": NEVER}},
    ],
    ids=str,
)
def test_zero_is_the_identity_bit_for_bit(dtype, options):
    x = NEGATIVE_ZEROS.to(dtype)
    for vectors in (SIGNS, VectorBank({"a": SIGNS, "b": SIGNS})):
        out = steered(identity(), x, vectors, **options)
        assert torch.equal(bits(out), bits(x))
        assert out.dtype is dtype


@pytest.mark.case(28, 52)
def test_rows_of_strength_zero_are_left_bit_for_bit():
    out = steered(identity(), NEGATIVE_ZEROS, SIGNS, c=torch.tensor([0.0, 1.0]))
    assert torch.equal(bits(out[0]), bits(NEGATIVE_ZEROS[0]))
    assert torch.equal(out[1], torch.tensor([1.0, -1.0, 6.0]))


@pytest.mark.case(28)
def test_a_concept_of_strength_zero_leaves_its_own_site_bit_for_bit():
    bank = VectorBank({"a": SIGNS, "b": SteeringVector({"1": torch.zeros(3)})})
    assert torch.equal(bits(steered(identity(), NEGATIVE_ZEROS, bank.select("a"), c={"a": 0})), bits(NEGATIVE_ZEROS))
    with Steerer(identity(), bank, c={"a": 0, "b": 1}) as steerer:
        seen = []
        steerer.model[0].register_forward_hook(lambda module, args, output: seen.append(output))
        steerer.model(NEGATIVE_ZEROS)
    assert torch.equal(bits(seen[0]), bits(NEGATIVE_ZEROS))


@pytest.mark.case(28)
def test_zero_leaves_infinities_and_nan():
    x = torch.tensor([[float("inf"), float("-inf"), float("nan")]])
    assert torch.equal(bits(steered(identity(), x, SIGNS, c=0)), bits(x))


# --- sites -------------------------------------------------------------------------------------------------------
TWO = V + ELSEWHERE


@pytest.mark.parametrize(
    ("sites", "chosen"),
    [
        ("1", ["1"]),
        (["3"], ["3"]),
        ("[13]", ["1", "3"]),
        ("*", ["1", "3"]),
        (["3", "1"], ["1", "3"]),
        (lambda name, module: name > "1", ["3"]),
        (lambda name, module: isinstance(module, nn.ReLU), ["1", "3"]),
        (None, ["1", "3"]),
    ],
)
def test_sites_choose_among_the_vectors_sites(sites, chosen):
    steerer = Steerer(exact(), TWO, sites=sites)
    assert list(steerer.sites) == chosen
    with steerer:
        assert torch.equal(steerer.model(X), by_hand(exact(), X, {site: TWO[site] for site in chosen}))


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("0", "no site '0'"),
        ("x*", r"no site 'x\*'"),
        (lambda name, module: False, "predicate selects none"),
        ([], "no sites were named"),
    ],
)
def test_sites_that_select_nothing_are_refused(sites, message):
    with pytest.raises(SiteNotFoundError, match=message):
        Steerer(exact(), TWO, sites=sites)


def test_concepts_at_different_sites_are_each_at_their_own():
    bank = VectorBank({"a": V, "b": ELSEWHERE})
    expected = by_hand(exact(), X, {"1": 2 * V["1"], "3": -ELSEWHERE["3"]})
    assert torch.equal(steered(exact(), X, bank, c={"a": 2, "b": -1}), expected)


# --- refusals ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("vectors", "options", "error", "message"),
    [
        (
            {"1": torch.zeros(4)},
            {},
            TypeError,
            "or an edit such as LowRank, got dict",
        ),
        (SteeringVector({}), {}, SiteNotFoundError, "no sites, so there is nothing to add"),
        (VectorBank({}), {}, SiteNotFoundError, "no sites, so there is nothing to add"),
        (
            SteeringVector({"11": torch.zeros(4)}),
            {},
            SiteNotFoundError,
            "Sequential has no site '11'. Close names: '1'",
        ),
        (SteeringVector({"1": torch.zeros(4), "no": torch.zeros(4)}), {}, SiteNotFoundError, "no site 'no'"),
        (
            SteeringVector({"2": torch.zeros(5)}),
            {},
            ShapeError,
            "site '2': the activation has 4 features, the vector 5",
        ),
        (V, {"c": {"five": 1}}, ConceptNotFoundError, "c names no concept of the bank: 'five'. Close names: 'nine'"),
        (V, {"c": "3"}, StrengthError, "c: expected a number or a tensor"),
        (V, {"gate": {"five": ALWAYS}}, ConceptNotFoundError, "gate names no concept of the bank: 'five'"),
        (
            V,
            {"gate": ProjectionAbove(SteeringVector({"gone": torch.ones(4)}), 0.0)},
            SiteNotFoundError,
            "no site 'gone'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_attached(vectors, options, error, message):
    model = exact()
    before = state(model)
    with pytest.raises(error, match=message):
        Steerer(model, vectors, **options)
    assert state(model) == before


def test_a_gate_that_is_no_gate_is_refused_by_name():
    with pytest.raises(TypeError, match="gate"):
        Steerer(exact(), V, gate=lambda rows: rows[:, 0] > 0)


@pytest.mark.parametrize(
    ("build", "site", "size"),
    [(cnn, "0", 5), (cnn, "5", 4), (mlp, "1", 7), (lambda: nn.Sequential(nn.Embedding(3, 4)), "0", 5)],
)
def test_a_size_that_the_module_knows_is_checked_before_it_runs(build, site, size):
    with pytest.raises(ShapeError, match=f"site '{site}': .* the vector {size}; was it"):
        Steerer(build(), SteeringVector({site: torch.zeros(size)}))


@pytest.mark.parametrize(("site", "d"), [("2", 5), ("rnn", 3)])
def test_a_size_that_only_the_activation_knows_is_checked_as_it_runs(site, d):
    model = mlp() if site == "2" else recurrent(nn.LSTM, batch_first=True)
    x = normal(2, 12) if site == "2" else normal(2, 3, 3)
    with pytest.raises(ShapeError, match=f"site '{site}': the activation has . features .* the vector {d}; was it"):
        steered(model, x, SteeringVector({site: torch.zeros(d)}))


@pytest.mark.case(16)
@pytest.mark.parametrize("container", [nn.ModuleList, lambda inner: nn.ModuleDict({"0": inner[0]})])
def test_a_container_that_is_never_called_is_refused(container):
    model = nn.Sequential(nn.Identity())
    model.add_module("layers", container([nn.Linear(2, 2)]))
    with pytest.raises(SiteNotFoundError, match=r"is never called; name its members, .*'layers\.0'"):
        Steerer(model, SteeringVector({"layers": torch.ones(2)}))


@pytest.mark.case(15)
def test_a_scripted_model_is_refused():
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedModelError, match="is scripted and ignores hooks"):
        Steerer(model, SteeringVector({"0": torch.ones(2)}))


@pytest.fixture
def dynamo():
    """torch._dynamo with nothing compiled, before and after: the library asks whether anything is."""
    import torch._dynamo

    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@torch.no_grad()  # torch itself warns about the gradient of what a compiled part is given
def test_a_compiled_model_is_steered_whole_in_part_and_in_place(dynamo):
    def whole(model):
        return torch.compile(model, backend="eager")

    def in_part(model):
        return nn.Sequential(torch.compile(model[:2], backend="eager"), *model[2:])

    def in_place(model):
        model[1].compile(backend="eager")
        return model

    for compiled in (whole(exact()), in_place(exact())):
        for c in (1, -2):
            assert torch.equal(steered(compiled, X, V, c=c), by_hand(exact(), X, {"1": c * V["1"]}))
        assert torch.equal(compiled(X), exact()(X))
    compiled, v = in_part(exact()), SteeringVector({"0.1": V["1"]})
    assert torch.equal(steered(compiled, X, v), by_hand(exact(), X, {"1": V["1"]}))
    assert torch.equal(compiled(X), exact()(X))


@pytest.mark.parametrize("compiled_in", ["whole", "in place"])
def test_a_hook_is_refused_on_a_compiled_model(dynamo, compiled_in):
    model = exact()
    if compiled_in == "whole":
        model = torch.compile(model, backend="eager")
    else:
        model[1].compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="is compiled, and compiled code ignores hooks that come later"):
        Steerer(model, V, backend="hook")


def test_what_is_no_module_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module, got function"):
        Steerer(steered, V)


def test_a_steerer_shows_what_it_does():
    assert repr(Steerer(exact(), V, c=2)) == "Steerer(Sequential, concepts=('nine',), sites=('1',), c=2)"


def test_one_module_under_two_names_is_refused():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu)
    v = SteeringVector({"1": torch.ones(2), "3": torch.ones(2)})
    with pytest.raises(UnsupportedModelError, match="sites '1' and '3' are one module"):
        Steerer(model, v)
    x, plain = torch.zeros(1, 2), nn.functional.relu
    for steerer in (Steerer(model, v.select("3")), Steerer(model, v, sites="3")):
        with steerer:
            assert torch.equal(model(x), plain(model[2](plain(model[0](x)) + 1)) + 1)  # called twice, steered twice
