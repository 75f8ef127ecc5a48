"""SteeringVector: the laws of a vector space, and of a value."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from actsteer import ShapeError, SiteNotFoundError, SteeringVector, VectorBank, ZeroDirectionError
from actsteer.vectors.site_map import SiteMap
from tests.oracles import flat
from tests.strategies import FLOATS, SIZES, nonzero_scalars, nonzero_vectors, powers_of_two, scalars, vectors

ZERO = SteeringVector({})
ONE = SteeringVector({"2": torch.tensor([3.0, 4.0])}, concept="nine", metadata={"model": "m"})
double = nonzero_vectors(dtype=torch.float64)


# --- the group ---------------------------------------------------------------------------------------------------
@given(vectors(), vectors())
def test_addition_commutes(v, w):
    assert (v + w).equal(w + v)


@given(vectors(), vectors(), vectors())
def test_addition_associates(u, v, w):
    assert ((u + v) + w).equal(u + (v + w))


@given(vectors())
def test_the_empty_vector_is_the_neutral_element(v):
    assert (v + ZERO).equal(v)
    assert (ZERO + v).equal(v)
    assert (v + ZERO).sites == v.sites


@given(vectors())
def test_minus_v_is_the_inverse(v):
    assert (v + -v).equal(ZERO)
    assert (v - v).equal(ZERO)


@given(vectors(), vectors())
def test_subtraction_adds_the_inverse(v, w):
    assert (v - w).equal(v + -w)
    assert (v - w).equal(-(w - v))


@given(vectors(), vectors())
def test_a_sum_is_the_sum_of_the_numbers_and_a_missing_site_is_zero(v, w):
    assert np.array_equal(flat(v + w, SIZES), flat(v, SIZES) + flat(w, SIZES))
    assert (v + w).sites == tuple(dict.fromkeys((*v.sites, *w.sites)))


# --- the scalars -------------------------------------------------------------------------------------------------
@given(scalars, scalars, vectors())
def test_scalars_associate(a, b, v):
    assert (a * (b * v)).equal((a * b) * v)


@given(scalars, scalars, vectors(), vectors())
def test_scaling_distributes_over_both_sums(a, b, v, w):
    assert (a * (v + w)).equal(a * v + a * w)
    assert ((a + b) * v).equal(a * v + b * v)


@given(vectors())
def test_the_scalars_one_zero_and_minus_one(v):
    assert (1 * v).equal(v)
    assert (0 * v).equal(ZERO)
    assert (-1 * v).equal(-v)


@given(powers_of_two, vectors())
def test_division_undoes_scaling(c, v):
    assert ((c * v) / c).equal(v)
    assert (v / c).equal((1 / c) * v)


KINDS = [float, int, np.float64, np.float32, np.float16, np.int64, torch.tensor]


@pytest.mark.parametrize("kind", KINDS)
@given(v=vectors())
def test_every_kind_of_number_scales_from_both_sides(kind, v):
    assert (v * kind(3)).equal(v + v + v)
    assert (kind(3) * v).equal(v + v + v)
    assert (v / kind(2)).equal(v * 0.5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_scalar_does_not_change_the_dtype(dtype):
    v = ONE.to(dtype=dtype)
    assert {(v * c)["2"].dtype for c in (2, 2.0, np.float64(2), torch.tensor(2.0, dtype=torch.float64))} == {dtype}


def test_a_sum_of_two_dtypes_has_the_wider_one():
    assert (ONE + ONE.to(dtype=torch.float64))["2"].dtype is torch.float64
    assert (ONE @ ONE.to(dtype=torch.float64)).dtype is torch.float64


@pytest.mark.parametrize("foreign", ["2", None, [1.0], np.ones(2), torch.ones(2), torch.ones(2, 2), {"2": 1.0}])
@pytest.mark.parametrize("operate", ["__add__", "__sub__", "__mul__", "__rmul__", "__truediv__", "__matmul__"])
def test_foreign_types_are_left_to_the_other_side(operate, foreign):
    assert getattr(ONE, operate)(foreign) is NotImplemented


FAILING = {
    "v + 1": lambda v: v + 1,
    "1 + v": lambda v: 1 + v,
    "v - tensor": lambda v: v - torch.ones(2),
    "v * v": lambda v: v * v,
    "2 / v": lambda v: 2 / v,
    "v / v": lambda v: v / v,
    "array * v": lambda v: np.ones(2) * v,
    "tensor * v": lambda v: torch.ones(2) * v,
    "v @ tensor": lambda v: v @ torch.ones(2),
    "tensor @ v": lambda v: torch.ones(2) @ v,
}


@pytest.mark.parametrize("operate", FAILING.values(), ids=FAILING.keys())
def test_operators_with_foreign_types_raise_type_error(operate):
    with pytest.raises(TypeError, match="unsupported operand"):
        operate(ONE)


def test_division_by_zero_is_python_s_own_error():
    with pytest.raises(ZeroDivisionError, match=r"SteeringVector\(.* divided by zero"):
        ONE / 0


# --- the inner product -------------------------------------------------------------------------------------------
@given(vectors(), vectors(), vectors(), scalars)
def test_the_inner_product_is_bilinear_and_symmetric(u, v, w, c):
    assert torch.equal((u + v) @ w, u @ w + v @ w)
    assert torch.equal((c * v) @ w, c * (v @ w))
    assert torch.equal(v @ w, w @ v)


@given(vectors(), vectors())
def test_the_inner_product_is_that_of_the_numbers(v, w):
    assert float(v @ w) == flat(v, SIZES) @ flat(w, SIZES)
    assert (v @ w).shape == ()


@given(vectors())
def test_the_norm_is_euclidean(v):
    assert_allclose(float(v.norm()), np.linalg.norm(flat(v, SIZES)), rtol=1e-6)
    assert (float(v.norm()) == 0) == v.equal(ZERO)


@given(vectors(), vectors(), powers_of_two)
def test_the_norm_is_homogeneous_and_obeys_the_triangle(v, w, c):
    assert_allclose(float((c * v).norm()), abs(c) * float(v.norm()), rtol=1e-6)
    assert float((v + w).norm()) <= float(v.norm() + w.norm()) * (1 + 1e-6)


@pytest.mark.parametrize(("dtype", "entry"), [(torch.float16, 512.0), (torch.float32, 1e-30), (torch.float32, 1e30)])
def test_the_norm_neither_overflows_nor_vanishes_where_it_is_a_number_of_the_dtype(dtype, entry):
    v = SteeringVector({"2": torch.full((4,), entry, dtype=dtype)})
    assert_allclose(float(v.norm()), 2 * entry, rtol=1e-3)


# --- unit, cosine, project, reject -------------------------------------------------------------------------------
@given(double)
def test_unit_scales_every_site_to_norm_one_and_keeps_its_ray(v):
    v = v.select(*(site for site in v if v[site].any()))
    for site in v:
        assert_allclose(float(v.unit()[site].norm()), 1.0, rtol=1e-12)
        assert_allclose(v.unit()[site] * v[site].norm(), v[site], rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e38])
def test_unit_and_cosine_survive_extreme_scales(scale):
    v = SteeringVector({"2": torch.tensor([1.0, -1.0, 0.0]) * scale})
    assert_allclose(v.unit()["2"], [0.5**0.5, -(0.5**0.5), 0], rtol=1e-6)
    assert_allclose(float(v.cosine(v)), 1.0, rtol=1e-6)


@given(double, double, nonzero_scalars)
def test_the_cosine_is_bounded_symmetric_and_blind_to_scale(v, w, c):
    cosine = float(v.cosine(w))
    assert -1.0 <= cosine <= 1.0
    assert_allclose(cosine, float(w.cosine(v)), atol=1e-12)
    assert_allclose(cosine * float(v.norm() * w.norm()), float(v @ w), atol=1e-10)
    assert_allclose(float((c * v).cosine(w)), np.sign(c) * cosine, atol=1e-12)


@given(double, nonzero_scalars)
def test_the_cosine_with_a_multiple_is_plus_or_minus_one(v, c):
    assert_allclose(float(v.cosine(c * v)), np.sign(c), rtol=1e-12)


@given(vectors(dtype=torch.float64), double)
def test_projection_and_rejection_sum_to_the_vector(v, w):
    assert (v.project(onto=w) + v.reject(w)).allclose(v, atol=1e-12)


@given(vectors(dtype=torch.float64), double)
def test_the_rejection_is_orthogonal_and_the_projection_parallel(v, w):
    assert abs(float(v.reject(w) @ w)) < 1e-9
    along, onto = flat(v.project(onto=w), SIZES), flat(w, SIZES)
    assert_allclose(along, (flat(v, SIZES) @ onto) / (onto @ onto) * onto, atol=1e-12)


@given(vectors(dtype=torch.float64), double)
def test_projecting_and_rejecting_twice_is_once(v, w):
    assert v.project(w).project(w).allclose(v.project(w), atol=1e-12)
    assert v.reject(w).reject(w).allclose(v.reject(w), atol=1e-12)


@pytest.mark.parametrize("zero", [ZERO, 0 * ONE, SteeringVector({"2": torch.zeros(0)})])
def test_a_zero_vector_has_no_direction(zero):
    for fails in (zero.cosine, ONE.cosine):
        with pytest.raises(ZeroDirectionError, match="is zero, and a zero vector has no direction"):
            fails(zero)
    for fails in (ONE.project, ONE.reject):
        with pytest.raises(ZeroDirectionError, match="is zero, and a zero vector has no direction"):
            fails(zero)


def test_unit_names_the_site_that_is_zero():
    v = SteeringVector({"2": torch.ones(2), "5": torch.zeros(2)})
    with pytest.raises(ZeroDirectionError, match="site '5': the direction is zero"):
        v.unit()


# --- choosing, converting, comparing -----------------------------------------------------------------------------
@given(vectors(), st.data())
def test_select_keeps_the_named_sites_in_the_named_order(v, data):
    chosen = data.draw(st.lists(st.sampled_from(v.sites), unique=True)) if v.sites else []
    assert v.select(*chosen).sites == tuple(chosen)
    assert all(torch.equal(v.select(*chosen)[site], v[site]) for site in chosen)
    rest = [site for site in v if site not in chosen]
    assert (v.select(*chosen) + v.select(*rest)).equal(v)


@given(vectors(dtype=torch.float32))
def test_to_changes_the_dtype_alone(v):
    wide = v.to(dtype=torch.float64)
    assert not v.sites or not wide.equal(v)
    assert wide.allclose(v, rtol=0, atol=0)
    assert wide.to(dtype=torch.float32).equal(v)
    assert v.to(torch.float64).equal(wide)
    assert v.to(device="cpu").equal(v) and v.to("cpu").equal(v)


def test_to_takes_a_device_by_place_as_a_tensors_does():
    with pytest.raises(RuntimeError, match="nowhere"):
        ONE.to("nowhere")


@given(vectors(min_sites=1), st.data())
def test_equal_sees_one_changed_number(v, data):
    site = data.draw(st.sampled_from(v.sites))
    step = torch.zeros_like(v[site])
    step[data.draw(st.integers(0, len(step) - 1))] = 1 / 8
    changed = v + SteeringVector({site: step})
    assert v.equal(v * 1.0)
    assert not v.equal(changed)
    assert not v.allclose(changed, atol=1 / 16, rtol=0)
    assert v.allclose(changed, atol=1 / 8, rtol=0)


def test_vectors_of_different_sizes_are_not_equal():
    other = SteeringVector({"2": torch.ones(3)})
    assert not ONE.equal(other)
    assert not ONE.allclose(other)


def test_double_equals_is_identity():
    twin = copy.deepcopy(ONE)
    assert ONE == ONE
    assert twin != ONE
    assert ONE.equal(twin)
    assert len({ONE, twin, ONE}) == 2


# --- metadata ----------------------------------------------------------------------------------------------------
KEEPING = {
    "2 * v": lambda v: 2 * v,
    "v / 2": lambda v: v / 2,
    "-v": lambda v: -v,
    "unit": lambda v: v.unit(),
    "select": lambda v: v.select("2"),
    "to": lambda v: v.to(dtype=torch.float64),
    "project": lambda v: v.project(onto=v),
    "reject": lambda v: v.reject(v),
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("keep", KEEPING.values(), ids=KEEPING.keys())
def test_what_concerns_one_vector_keeps_its_metadata(keep):
    assert keep(ONE).metadata == {"model": "m", "concept": "nine"}
    assert keep(ONE).concept == "nine"


@given(vectors(), vectors())
def test_a_sum_keeps_the_metadata_that_both_sides_share(v, w):
    shared = {key: value for key, value in v.metadata.items() if w.metadata.get(key) == value}
    assert (v + w).metadata == (v - w).metadata == shared


def test_the_concept_is_metadata():
    assert SteeringVector({}, concept="nine", metadata={"concept": "eight"}).metadata == {"concept": "nine"}
    assert SteeringVector({}, metadata={"concept": "eight"}).concept == "eight"
    assert ZERO.concept is None


# --- a value -----------------------------------------------------------------------------------------------------
def test_what_comes_in_is_copied():
    direction, directions, metadata = torch.ones(2), {}, {"a": "1"}
    directions["2"] = direction
    v = SteeringVector(directions, metadata=metadata)
    direction += 1
    metadata["a"] = directions["5"] = "changed"
    assert v.sites == ("2",)
    assert torch.equal(v["2"], torch.ones(2))
    assert v.metadata == {"a": "1"}


def test_what_goes_out_is_copied():
    v = SteeringVector({"2": torch.ones(2)})
    v["2"].add_(1)
    v.metadata["a"] = "changed"
    assert torch.equal(v["2"], torch.ones(2))
    assert v.metadata == {}


@pytest.mark.parametrize("derive", [*KEEPING.values(), lambda v: v + ZERO, lambda v: ZERO + v, lambda v: 1 * v])
def test_nothing_derived_shares_memory(derive):
    derived = derive(ONE)
    assert derived is not ONE
    assert derived._directions["2"].data_ptr() != ONE._directions["2"].data_ptr()


def test_a_direction_forgets_autograd_and_strides():
    trained = torch.arange(6.0).reshape(3, 2).requires_grad_()
    v = SteeringVector({"2": trained[:, 0]})
    assert not v["2"].requires_grad
    assert v["2"].is_contiguous()
    assert v["2"].tolist() == [0.0, 2.0, 4.0]


@given(vectors())
def test_pickling_and_deep_copying_are_the_identity(v):
    for twin in (pickle.loads(pickle.dumps(v)), copy.deepcopy(v), copy.copy(v)):
        assert twin.equal(v)
        assert (twin.sites, twin.metadata) == (v.sites, v.metadata)


@given(vectors())
def test_it_reads_like_a_mapping(v):
    assert list(v) == list(v.sites)
    assert len(v) == len(v.sites)
    assert all(site in v for site in v.sites)
    assert "absent" not in v
    assert 2 not in v


def test_the_repr_tells_sizes_concept_and_norm():
    assert repr(ONE) == "SteeringVector({'2': 2}, concept='nine', norm=5)"


# --- errors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "direction",
    [torch.tensor(1.0), torch.ones(2, 2), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64)],
)
def test_a_direction_is_one_dimensional_and_floating(direction):
    with pytest.raises(ShapeError, match=r"site '2': expected a 1-D floating tensor of shape \(d,\), got torch\."):
        SteeringVector({"2": direction})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_direction_is_finite(number):
    with pytest.raises(ShapeError, match="site '2': the direction is not finite"):
        SteeringVector({"2": torch.tensor([0.0, number])})
    with pytest.raises(ShapeError, match="site '2': the direction is not finite"):
        ONE * number


def test_a_sum_that_overflows_is_refused():
    large = SteeringVector({"2": torch.full((2,), 6e4, dtype=torch.float16)})
    with pytest.raises(ShapeError, match="not finite"):
        large + large


def test_sites_and_metadata_have_their_types():
    with pytest.raises(TypeError, match="a site is a module's name, a str; got 2"):
        SteeringVector({2: torch.ones(2)})
    with pytest.raises(TypeError, match=r"site '2': expected a tensor of shape \(d,\), got list"):
        SteeringVector({"2": [1.0, 2.0]})
    with pytest.raises(TypeError, match="metadata maps str to str, got 'count': 3; convert the value"):
        SteeringVector({}, metadata={"count": 3})


def test_a_missing_site_is_named_with_its_neighbours():
    v = SteeringVector({"layers.4.mlp": torch.ones(2)})
    for fails in (v.__getitem__, v.select):
        with pytest.raises(
            SiteNotFoundError, match=r"no direction at site 'layers.4.mpl'. Close names: 'layers.4.mlp'"
        ):
            fails("layers.4.mpl")
    with pytest.raises(SiteNotFoundError, match="There are: none"):
        ZERO["2"]


@pytest.mark.parametrize("operate", [SteeringVector.__add__, SteeringVector.__sub__, SteeringVector.__matmul__])
def test_vectors_of_two_models_do_not_mix(operate):
    with pytest.raises(ShapeError, match="site '2': 2 features against 3; were they fitted on one model"):
        operate(ONE, SteeringVector({"2": torch.ones(3)}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_numbers_whose_sum_overflows_are_finite_and_one_that_is_not_is_refused_among_them(dtype, sign):
    rows = torch.full((64,), torch.finfo(dtype).max, dtype=dtype) * sign
    assert torch.equal(SteeringVector({"0": rows})["0"], rows)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ShapeError, match="the direction is not finite"):
            SteeringVector({"0": torch.cat([rows, torch.tensor([bad], dtype=dtype)])})


@pytest.mark.parametrize("number", [10**400, -(10**400)], ids=["large", "small"])
def test_an_integer_beyond_the_range_of_a_float_is_refused(number):
    v = SteeringVector({"0": torch.tensor([1.0, 0.0])})
    for make in (lambda: v * number, lambda: number * v, lambda: VectorBank({"a": v}).combine({"a": number})):
        with pytest.raises(ShapeError, match="the direction is not finite"):
            make()


# --- offsets: h · v + b ------------------------------------------------------------------------------------------
PROBE = SteeringVector(
    {"2": torch.tensor([3.0, 4.0]), "5": torch.tensor([2.0])}, metadata={"offset 2": "-1.5", "offset 5": "0.25"}
)
OTHER = SteeringVector({"2": torch.tensor([1.0, -2.0])}, metadata={"offset 2": "0.5"})


def read(vector, site, row):
    return float(row @ vector[site]) + float(vector.metadata[f"offset {site}"])


def test_an_offset_scales_and_adds_up_as_its_direction_does():
    row = torch.tensor([0.5, -2.0])
    one, two = (read(vector, "2", row) for vector in (PROBE, OTHER))
    assert read(-PROBE, "2", row) == -one
    assert read(PROBE * 4, "2", row) == 4 * one
    assert read(PROBE / 4, "2", row) == one / 4
    assert math.isclose(read(PROBE.unit(), "2", row), one / 5, rel_tol=1e-6)
    assert read(PROBE + OTHER, "2", row) == one + two
    assert read(OTHER - PROBE, "2", row) == two - one
    assert read(PROBE - OTHER, "5", torch.tensor([1.0])) == 2.25  # where the other has no site
    assert read(PROBE.select("5").to(dtype=torch.float64), "5", torch.tensor([1.0]).double()) == 2.25


def test_a_sum_with_what_has_no_offset_and_another_direction_have_none():
    plain = SteeringVector({"2": torch.tensor([1.0, 0.0])})
    assert set((PROBE + plain).metadata) == set((plain - PROBE).metadata) == {"offset 5"}
    same = PROBE.select("2")
    assert not same.project(plain).metadata.keys() & {"offset 2"}
    assert not same.reject(plain).metadata.keys() & {"offset 2"}
    orthogonal = VectorBank({"a": OTHER, "b": same}).orthogonalize()
    assert "offset 2" not in orthogonal["b"].metadata
    assert "offset 2" not in VectorBank({"a": same}).combine({"a": 2.0}).metadata
    assert "offset 2" not in same.transport(SiteMap({"2": ("2", torch.eye(2))})).metadata


def test_an_offset_that_is_no_number_is_named():
    told = SteeringVector({"2": torch.ones(2)}, metadata={"offset 2": "much", "offset of another site": "any text"})
    with pytest.raises(ValueError, match=r"expected a number as 'offset SITE', got \{'2': 'much'\}"):
        2 * told
