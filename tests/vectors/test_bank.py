"""VectorBank: an ordered map concept -> SteeringVector, and its linear algebra."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from actsteer import (
    ConceptNotFoundError,
    ShapeError,
    SiteNotFoundError,
    SteeringVector,
    VectorBank,
    ZeroDirectionError,
)
from actsteer.vectors.bank import stack_of
from tests.oracles import flat, gram_schmidt
from tests.strategies import SIZES, banks, independent_banks, scalars

EIGHT = SteeringVector({"2": torch.tensor([1.0, 0.0])}, concept="eight")
NINE = SteeringVector({"2": torch.tensor([1.0, 1.0]), "5": torch.tensor([2.0])}, concept="nine")
BANK = VectorBank({"eight": EIGHT, "nine": NINE})


def matrix(bank: VectorBank) -> np.ndarray:
    return np.array([flat(vector, SIZES) for _, vector in bank.items()]).reshape(len(bank), -1)


# --- the map -----------------------------------------------------------------------------------------------------
@given(banks())
def test_it_reads_like_an_ordered_mapping(bank):
    assert list(bank) == list(bank.concepts) == [concept for concept, _ in bank.items()]
    assert len(bank) == len(bank.concepts)
    assert all(concept in bank and bank[concept] is vector for concept, vector in bank.items())
    assert "absent" not in bank
    assert bank.sites == tuple(dict.fromkeys(site for concept in bank for site in bank[concept]))


@given(banks(), banks())
def test_a_union_is_that_of_dicts(left, right):
    union = left | right
    assert dict(union.items()) == dict(left.items()) | dict(right.items())
    assert union.concepts == tuple(dict.fromkeys((*left.concepts, *right.concepts)))


@given(banks(), st.data())
def test_select_keeps_the_named_concepts_in_the_named_order(bank, data):
    chosen = data.draw(st.lists(st.sampled_from(bank.concepts), unique=True)) if bank.concepts else []
    assert bank.select(*chosen).concepts == tuple(chosen)
    assert all(bank.select(*chosen)[concept] is bank[concept] for concept in chosen)


def test_the_mapping_that_came_in_is_copied():
    vectors = {"eight": EIGHT}
    bank = VectorBank(vectors)
    vectors["nine"] = NINE
    assert bank.concepts == ("eight",)


@given(banks())
def test_pickling_and_deep_copying_are_the_identity(bank):
    for twin in (pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank)):
        assert twin.concepts == bank.concepts
        assert all(twin[concept].equal(bank[concept]) for concept in bank)
        assert all(twin[concept].metadata == bank[concept].metadata for concept in bank)


def test_the_repr_tells_concepts_and_sites():
    assert repr(BANK) == "VectorBank(concepts=('eight', 'nine'), sites=('2', '5'))"


# --- combine -----------------------------------------------------------------------------------------------------
def strengths_for(bank: VectorBank) -> st.SearchStrategy[dict[str, float]]:
    return st.fixed_dictionaries({}, optional=dict.fromkeys(bank.concepts, scalars))


@given(banks(), st.data())
def test_a_combination_is_the_sum_of_the_scaled_vectors(bank, data):
    strengths = data.draw(strengths_for(bank))
    scaled = (c * bank[concept] for concept, c in strengths.items())
    assert bank.combine(strengths).equal(sum(scaled, start=SteeringVector({})))


@given(banks(), scalars, st.data())
def test_combining_is_linear_in_the_strengths(bank, a, data):
    c, d = data.draw(strengths_for(bank)), data.draw(strengths_for(bank))
    both = {concept: a * c.get(concept, 0) + d.get(concept, 0) for concept in bank}
    assert bank.combine(both).equal(a * bank.combine(c) + bank.combine(d))


def test_combining_one_concept_gives_its_vector():
    assert BANK.combine({"nine": 1}).equal(NINE)
    assert BANK.combine({"nine": torch.tensor(2.0)}).equal(2 * NINE)
    assert BANK.combine({}).sites == ()


# --- gram and cosines --------------------------------------------------------------------------------------------
@given(banks())
def test_the_gram_matrix_holds_the_pairwise_inner_products(bank):
    gram = bank.gram()
    assert gram.shape == (len(bank), len(bank))
    for i, (_, v) in enumerate(bank.items()):
        for j, (_, w) in enumerate(bank.items()):
            assert float(gram[i, j]) == float(v @ w)


@given(banks())
def test_the_gram_matrix_is_symmetric_and_positive_semi_definite(bank):
    gram = bank.gram().double()
    assert torch.equal(gram, gram.T)
    assert bool((torch.linalg.eigvalsh(gram) >= -1e-9 * gram.trace()).all())


@given(banks(nonzero=True))
def test_the_cosines_are_those_of_the_pairs(bank):
    expected = [[float(v.cosine(w)) for _, w in bank.items()] for _, v in bank.items()]
    assert_allclose(bank.cosines(), np.reshape(expected, (len(bank), len(bank))), atol=1e-6)
    assert bool((bank.cosines().abs() <= 1).all())


def test_the_cosines_survive_a_scale_whose_square_overflows():
    bank = VectorBank({"large": EIGHT * 1e30, "small": NINE * 1e-30})
    assert_allclose(bank.cosines(), [[1, 6**-0.5], [6**-0.5, 1]], rtol=1e-6)


def test_a_zero_vector_has_no_cosines():
    bank = VectorBank({"eight": EIGHT, "none": 0 * NINE})
    with pytest.raises(ZeroDirectionError, match="concept 'none' is zero, and a zero vector has no angle"):
        bank.cosines()


def test_a_vector_without_sites_has_no_cosines_either():
    with pytest.raises(ZeroDirectionError, match="concept 'none' is zero, and a zero vector has no angle"):
        VectorBank({"none": SteeringVector({})}).cosines()


def test_the_empty_bank_has_empty_matrices():
    empty = VectorBank({})
    assert empty.gram().shape == (0, 0)
    assert empty.orthogonalize().concepts == ()
    assert empty.cosines().shape == (0, 0)


# --- orthogonalize -----------------------------------------------------------------------------------------------
@given(independent_banks(dtype=torch.float64))
def test_orthogonalize_is_gram_schmidt_in_bank_order(bank):
    orthogonal = bank.orthogonalize()
    assert orthogonal.concepts == bank.concepts
    assert_allclose(matrix(orthogonal), gram_schmidt(matrix(bank)), atol=1e-12)


@given(independent_banks())
def test_orthogonalized_vectors_are_orthogonal_and_keep_their_dtype(bank):
    orthogonal = bank.orthogonalize()
    rows = matrix(orthogonal)
    gram = rows @ rows.T
    assert_allclose(gram, np.diag(gram.diagonal()), atol=1e-4 if bank.gram().dtype is torch.float32 else 1e-12)
    assert orthogonal.gram().dtype is bank.gram().dtype


@given(independent_banks(dtype=torch.float64))
def test_orthogonalize_keeps_every_leading_span(bank):
    before, after = matrix(bank), matrix(bank.orthogonalize())
    for k in range(1, len(bank) + 1):
        assert np.linalg.matrix_rank(np.concatenate([before[:k], after[:k]]), tol=1e-9) == k


@given(independent_banks(dtype=torch.float64))
def test_the_first_vector_stays_and_orthogonalizing_twice_is_once(bank):
    first, orthogonal = bank.concepts[0], bank.orthogonalize()
    assert orthogonal[first].allclose(bank[first], atol=1e-12)
    assert all(orthogonal.orthogonalize()[c].allclose(orthogonal[c], atol=1e-12) for c in bank)


def test_nearly_parallel_vectors_lose_no_digits():
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0 + 2**-16]])
    bank = VectorBank({name: SteeringVector({"0": row}) for name, row in zip("ab", rows, strict=True)})
    assert_allclose(bank.orthogonalize()["b"]["0"], gram_schmidt(rows.double().numpy())[1], rtol=1e-6)


@given(independent_banks())
def test_orthogonalize_keeps_the_metadata(bank):
    assert all(vector.concept == concept for concept, vector in bank.orthogonalize().items())


@pytest.mark.parametrize("last", [SteeringVector({}), 0 * EIGHT, 3 * EIGHT, EIGHT - 2 * NINE], ids=str)
def test_a_vector_in_the_span_of_the_earlier_ones_is_refused(last):
    bank = VectorBank({"eight": EIGHT, "nine": NINE, "last": last})
    with pytest.raises(
        ZeroDirectionError, match="concept 'last' is zero or lies in the span of the concepts before it"
    ):
        bank.orthogonalize()


def test_more_vectors_than_dimensions_are_refused():
    bank = VectorBank({name: SteeringVector({"2": torch.tensor([c])}) for name, c in (("a", 1.0), ("b", 2.0))})
    with pytest.raises(ZeroDirectionError, match="concept 'b'"):
        bank.orthogonalize()


# --- directions --------------------------------------------------------------------------------------------------
def test_directions_are_stacked_in_bank_order_with_zero_for_a_missing_site():
    assert torch.equal(BANK.directions("2"), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert torch.equal(BANK.directions("5"), torch.tensor([[0.0], [2.0]]))


def test_a_bank_stacks_the_directions_of_the_concepts_that_have_a_site_and_no_others():
    bank = VectorBank({str(i): SteeringVector({str(i): torch.ones(2), "all": torch.ones(3)}) for i in range(20)})
    assert sum(stack_of(bank, site).rows().numel() for site in bank.sites) == 20 * 2 + 20 * 3
    assert stack_of(bank, "7").concepts == [7] and stack_of(bank, "7").rows().shape == (1, 2)


@given(banks(), st.data())
def test_some_directions_are_those_of_the_vectors_whether_all_were_stacked_or_not(bank, data):
    for site in bank.sites:
        stack = stack_of(bank, site)
        which = data.draw(st.lists(st.sampled_from(range(len(stack.concepts))), unique=True, min_size=1))
        expected = torch.stack([bank[bank.concepts[stack.concepts[own]]][site] for own in sorted(which)])
        assert torch.equal(stack.rows(sorted(which)), expected)
        assert torch.equal(bank.directions(site)[stack.concepts], stack.rows())
        assert torch.equal(stack.rows(sorted(which)), expected)


def test_what_a_bank_gives_out_is_a_copy():
    before = BANK.directions("2")
    BANK.directions("2").zero_()
    BANK.combine({"eight": 1.0, "nine": 0.0})["2"].zero_()
    assert torch.equal(BANK.directions("2"), before)


def test_a_cosine_with_itself_is_one_and_neither_order_nor_scale_matters():
    bank = VectorBank({str(i): SteeringVector({"0": torch.randn(7)}) for i in range(5)})
    cosines = bank.cosines()
    assert torch.equal(cosines.diagonal(), torch.ones(5))
    assert torch.equal(VectorBank({c: 8 * v for c, v in bank.items()}).cosines(), cosines)
    half = VectorBank({c: v.to(dtype=torch.float16) for c, v in bank.items()}).cosines()
    assert half.dtype is torch.float16
    assert_allclose(half, cosines, atol=2e-3)


def test_combining_names_in_any_order_is_the_same():
    assert BANK.combine({"nine": 2.0, "eight": -1.0}).equal(BANK.combine({"eight": -1.0, "nine": 2.0}))


# --- errors ------------------------------------------------------------------------------------------------------
def test_a_missing_concept_is_named_with_its_neighbours():
    for fails in (BANK.__getitem__, BANK.select, lambda concept: BANK.combine({concept: 1})):
        with pytest.raises(ConceptNotFoundError, match=r"no concept 'nin' in the bank. Close names: 'nine'"):
            fails("nin")


def test_a_missing_site_is_named_with_its_neighbours():
    with pytest.raises(SiteNotFoundError, match=r"no concept has a direction at '7'. There are: '2', '5'"):
        BANK.directions("7")


def test_vectors_of_two_models_do_not_share_a_bank():
    with pytest.raises(ShapeError, match="site '2': 'eight' has 2 features on cpu, 'other' 3 on cpu"):
        VectorBank({"eight": EIGHT, "other": SteeringVector({"2": torch.ones(3)})})
    with pytest.raises(ShapeError, match="a bank holds vectors of one model"):
        BANK | VectorBank({"other": SteeringVector({"5": torch.ones(3)})})


@pytest.mark.parametrize("vectors", [{"a": torch.ones(2)}, {1: EIGHT}, {"a": {"2": torch.ones(2)}}])
def test_a_bank_maps_str_to_steering_vectors(vectors):
    with pytest.raises(TypeError, match="a bank maps str to SteeringVector, got"):
        VectorBank(vectors)


@pytest.mark.parametrize("foreign", [{}, EIGHT, None])
def test_a_union_with_a_foreign_type_is_a_type_error(foreign):
    with pytest.raises(TypeError, match="unsupported operand"):
        BANK | foreign
