"""Statistics and ClassStatistics: values that merge, are saved bit for bit, and never alias."""

import copy
import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn

from actsteer import (
    ClassStatistics,
    FileFormatError,
    Moments,
    SiteNotFoundError,
    Statistics,
    StatisticsError,
    VectorBank,
    collect,
)
from tests.strategies import eighths, names, stored
from tests.zoo import bits, normal

MODEL = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).double()
X = normal(7, 2)
LABELS = [3, 10, 3, -2, 10, 3, -2]
OWN = torch.tensor([[0.5, 2.0], [4.0, 2.0], [2.0, -1.0]])


def raw(moments):
    """All numbers of some moments, as bit patterns."""
    tensors = [moments.mean] if moments.count else []
    tensors += [moments.scatter, moments.fourth] if moments.kept is True else []
    tensors += [moments.variance] if moments.kept == "diagonal" and moments.count > 1 else []
    return moments.kept, moments.count, moments.d, [bits(tensor).tolist() for tensor in tensors]


def same(one, other):
    """Equal in every bit."""
    if isinstance(one, ClassStatistics):
        assert list(one) == list(other)
        assert [type(label) for label in one] == [type(label) for label in other]
        return all(same(one[label], other[label]) for label in one)
    assert one.sites == other.sites and one.metadata == other.metadata
    return {site: raw(one[site]) for site in one} == {site: raw(other[site]) for site in other}


def agree(one, other):
    assert one.count == other.count
    assert_allclose(one.mean, other.mean, atol=1e-12)
    assert_allclose(one.scatter, other.scatter, atol=1e-11)


@st.composite
def any_statistics(draw):
    """Any names of sites, any bits, with a scatter or without, grown in some way."""
    moments = {}
    for site in draw(st.lists(names, unique=True, max_size=3)):
        d = draw(st.integers(1, 3))
        rows = draw(stored(d * 4, torch.float32)).reshape(4, d)
        kept = draw(st.sampled_from([False, True, "diagonal"]))
        own = Moments.of(rows[:2], covariance=kept)
        more = Moments.of(rows[2:], covariance=kept)
        moments[site] = own.update(rows[2:]) if draw(st.booleans()) else own.merge(more)
    return Statistics(moments, metadata=draw(st.dictionaries(names, names, max_size=2)))


@pytest.fixture(scope="module")
def by_class():
    return collect(MODEL, X, sites="*", by=LABELS, covariance=True)


# --- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@given(any_statistics())
def test_what_is_saved_comes_back_bit_for_bit(tmp_path_factory, stats):
    path = tmp_path_factory.mktemp("saved") / "stats.safetensors"
    stats.save(path)
    assert same(Statistics.load(path), stats)
    assert same(pickle.loads(pickle.dumps(stats)), stats)


@given(st.data())
def test_classes_that_are_saved_come_back_bit_for_bit(tmp_path_factory, data):
    labels = data.draw(st.lists(st.integers(-(2**70), 2**70) | names, unique=True, min_size=1, max_size=4))
    classes = {
        label: Statistics({"ü/%": Moments.of(data.draw(eighths(2, 2)), covariance=True)}, metadata={"a": "b"})
        for label in labels
    }
    stats, path = ClassStatistics(classes), tmp_path_factory.mktemp("saved") / "stats.safetensors"
    stats.save(path)
    assert same(ClassStatistics.load(path), stats)
    assert same(pickle.loads(pickle.dumps(stats)), stats)


def test_loaded_statistics_go_on_bit_for_bit_as_if_they_had_not_been_saved(tmp_path, by_class):
    path = tmp_path / "stats.safetensors"
    for stats in (collect(MODEL, X, sites="*", covariance=True), by_class):
        stats.save(path)
        twin = type(stats).load(path)
        assert same(twin.merge(twin), stats.merge(stats))
        one, other = (s.total() if isinstance(s, ClassStatistics) else s for s in (stats, twin))
        assert same(-one, -other)
        grown = [s["0"].update(torch.ones(5, 3)) for s in (one, other)]
        assert raw(grown[0]) == raw(grown[1])


def test_the_negative_of_statistics_survives_saving(tmp_path):
    stats = -Statistics({"0": Moments.of(OWN, covariance=True)})
    stats.save(tmp_path / "stats.safetensors")
    assert same(Statistics.load(tmp_path / "stats.safetensors"), stats)


def test_every_altered_bit_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "stats.safetensors"
    Statistics({"0": Moments.of(OWN, covariance=True)}, metadata={"model": "m"}).save(path)
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << index % 8]) + whole[index + 1 :])
        with pytest.raises(FileFormatError):
            Statistics.load(path)
    for length in (0, 1, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            Statistics.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FileFormatError):
        Statistics.load(path)


def test_files_of_another_kind_are_refused(tmp_path, by_class):
    plain, classes, bank = (tmp_path / f"{name}.safetensors" for name in ("plain", "classes", "bank"))
    by_class.total().save(plain)
    by_class.save(classes)
    VectorBank({}).save(bank)
    for kind, path in [(Statistics, classes), (Statistics, bank), (ClassStatistics, plain), (ClassStatistics, bank)]:
        with pytest.raises(FileFormatError, match="expected a file of kind"):
            kind.load(path)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "missing.safetensors")


def test_a_foreign_safetensors_file_and_a_header_of_nonsense_are_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    from safetensors.torch import save_file

    save_file({"0/0/origin": torch.zeros(2)}, path)
    with pytest.raises(FileFormatError, match="actsteer did not write"):
        Statistics.load(path)
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(FileFormatError):
        Statistics.load(path)


@pytest.mark.parametrize("name", ["stats.pt", "stats", "stats.gguf", "stats.npz"])
def test_another_suffix_is_refused_and_writes_nothing(tmp_path, name, by_class):
    for stats in (by_class, by_class.total()):
        with pytest.raises(FileFormatError, match=r"name the file with \.safetensors"):
            stats.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(tmp_path, by_class):
    path = tmp_path / "stats.safetensors"
    by_class.total().save(path)
    by_class.save(path)
    assert same(ClassStatistics.load(path), by_class)
    assert list(tmp_path.iterdir()) == [path]


# --- values ----------------------------------------------------------------------------------------------------------
def test_what_is_taken_out_or_put_in_is_a_copy():
    own = Moments.of(OWN, covariance=True)
    stats = Statistics({"0": own}, metadata={"model": "m"})
    kept = copy.deepcopy(stats)
    taken = stats["0"]
    own.update(torch.ones(2, 2))
    assert same(stats, kept)
    taken.update(torch.ones(2, 2))
    assert same(stats, kept) and same(
        Statistics({"0": own}, metadata={"model": "m"}), Statistics({"0": taken}, metadata={"model": "m"})
    )
    stats["0"].update(torch.ones(2, 2)).mean.zero_()
    stats.metadata["model"] = "other"
    assert same(stats, kept)


def test_merged_and_negated_statistics_are_their_own():
    stats = Statistics({"0": Moments.of(OWN, covariance=True)})
    empty = Statistics({"0": Moments.empty(2, covariance=True)})
    kept = copy.deepcopy(stats)
    for other in (stats.merge(empty), empty.merge(stats), -stats, stats.merge(stats)):
        other["0"].update(OWN)
        before = raw(other["0"])
        taken = stats["0"].update(OWN)
        assert taken.count == 6
        assert raw(other["0"]) == before and same(stats, kept)


def test_a_class_that_is_taken_out_is_a_value(by_class):
    before = copy.deepcopy(by_class)
    for stats in (by_class[3], by_class.only(3), by_class.rest(3, 10), by_class.total()):
        stats["0"].update(torch.ones(2, 3)).scatter.zero_()
    assert same(by_class, before)
    assert same(by_class.only(3), by_class[3])


def test_the_mapping_that_was_given_is_copied():
    one = {"0": Moments.of(OWN)}
    classes = {1: Statistics(one)}
    stats = ClassStatistics(classes)
    one.clear()
    classes.clear()
    assert list(stats) == [1] and stats[1].sites == ("0",)


# --- classes ---------------------------------------------------------------------------------------------------------
def test_one_class_the_rest_and_all_of_them_are_those_of_the_rows(by_class):
    labels = torch.tensor(LABELS)
    hidden = MODEL[0](X).detach()
    for site, rows in {"0": hidden, "1": hidden.relu()}.items():
        agree(by_class.total()[site], Moments.of(rows, covariance=True))
        for label in (3, 10, -2):
            own = labels == label
            agree(by_class[label][site], Moments.of(rows[own], covariance=True))
            agree(by_class.rest(label)[site], Moments.of(rows[~own], covariance=True))
            agree(by_class.only(3, label)[site], Moments.of(rows[own | (labels == 3)], covariance=True))
            agree(by_class.only(label, label)[site], Moments.of(rows[own], covariance=True))


def test_classes_are_in_order_and_read_like_a_mapping(by_class):
    assert list(by_class) == [-2, 3, 10] and len(by_class) == 3
    assert 3 in by_class and "3" not in by_class and 4 not in by_class
    assert by_class.sites == ("0", "1") and by_class.metadata == by_class[3].metadata
    assert repr(by_class) == "ClassStatistics(labels=[-2, 3, 10], sites=('0', '1'))"
    mixed = ClassStatistics(dict.fromkeys(("b", 2, "a", 10, "10"), by_class[3]))
    assert list(mixed) == [2, 10, "10", "a", "b"]


@given(st.integers(1, 6))
def test_two_parts_merge_class_by_class_whatever_classes_they_have(cut):
    def part(rows, labels):
        return collect(MODEL, rows, sites="*", by=labels, covariance=True)

    whole = part(X, LABELS)
    one, other = part(X[:cut], LABELS[:cut]), part(X[cut:], LABELS[cut:])
    for merged in (one.merge(other), other.merge(one)):
        assert list(merged) == list(whole)
        for label in whole:
            agree(merged[label]["1"], whole[label]["1"])


def test_classes_that_are_not_there_are_named(by_class):
    for run in (by_class.__getitem__, by_class.only, by_class.rest):
        with pytest.raises(StatisticsError, match=r"no statistics for the class 4\. "):
            run(4)
    with pytest.raises(StatisticsError, match="name one class or more"):
        by_class.only()
    with pytest.raises(StatisticsError, match="no class is left"):
        by_class.rest(3, 10, -2)
    with pytest.raises(StatisticsError, match="expected statistics of one class or more"):
        ClassStatistics({})


def test_classes_of_other_sites_or_models_do_not_go_together(by_class):
    other_sites = collect(MODEL, X, sites="0", by=LABELS)
    with pytest.raises(StatisticsError, match="class 1"):
        ClassStatistics({0: by_class[3], 1: other_sites[3]})
    with pytest.raises((StatisticsError, SiteNotFoundError)):
        by_class.merge(other_sites)
    for labels in (LABELS, [7] * 7):
        other_model = collect(nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU()).double(), X, sites="*", by=labels)
        with pytest.raises(StatisticsError):
            by_class.merge(other_model)


def test_variances_go_wherever_covariances_go(tmp_path):
    whole = torch.var(MODEL(X), dim=0)
    plain, full = (collect(MODEL, X, sites="1", covariance=kept) for kept in ("diagonal", True))
    assert_allclose(plain["1"].variance, whole.detach(), rtol=1e-13)
    assert_allclose(full["1"].variance, plain["1"].variance, rtol=1e-13)
    classes = collect(MODEL, X, sites="1", by=LABELS, covariance="diagonal")
    classes.save(tmp_path / "classes.safetensors")
    loaded = ClassStatistics.load(tmp_path / "classes.safetensors")
    assert_allclose(loaded.total()["1"].variance, whole.detach(), rtol=1e-13)
    assert torch.equal((-plain)["1"].variance, plain["1"].variance)
    assert same(plain.all_reduce(), plain)


@pytest.mark.parametrize("kept", [False, True])
def test_parts_with_a_covariance_on_one_side_alone_do_not_merge(kept):
    one, other = (collect(MODEL, X, sites="*", covariance=covariance) for covariance in (kept, "diagonal"))
    for parts in ((one, other), (other, one)):
        with pytest.raises(StatisticsError, match="collect both alike"):
            parts[0].merge(parts[1])


def test_outside_of_a_process_group_reducing_changes_nothing(by_class):
    assert same(by_class.all_reduce(), by_class)
    assert same(by_class.total().all_reduce(), by_class.total())


# --- shares of nothing -----------------------------------------------------------------------------------------------
def test_a_share_of_nothing_changes_nothing_and_is_saved(tmp_path):
    stats = collect(MODEL, X, sites="*", covariance=True)
    nothing = Statistics({site: Moments.empty(0, covariance=True) for site in stats}, metadata=stats.metadata)
    nothing.save(tmp_path / "nothing.safetensors")
    for share in (nothing, Statistics.load(tmp_path / "nothing.safetensors")):
        assert same(share.merge(stats), stats) and same(stats.merge(share), stats)
        with pytest.raises(StatisticsError, match="the mean of no rows"):
            _ = share["0"].mean


def test_a_share_without_any_class_changes_nothing_and_is_saved(tmp_path, by_class):
    nothing = Statistics({site: Moments.empty(0) for site in by_class.sites}, metadata=by_class.metadata)
    ClassStatistics({}, nothing=nothing).save(tmp_path / "nothing.safetensors")
    for share in (ClassStatistics({}, nothing=nothing), ClassStatistics.load(tmp_path / "nothing.safetensors")):
        assert list(share) == [] and share.sites == by_class.sites
        assert same(share.merge(by_class), by_class) and same(by_class.merge(share), by_class)
        assert same(pickle.loads(pickle.dumps(share)).merge(by_class), by_class)


def test_a_share_of_nothing_lacks_the_axes_that_only_rows_tell():
    model, images = nn.Sequential(nn.MaxPool2d(1)), torch.zeros(2, 3, 4, 4)
    stats = collect(model, images, sites="0")
    nothing = Statistics({"0": Moments.empty(0)}, metadata={k: v for k, v in stats.metadata.items() if k != "axis 0"})
    assert same(nothing.merge(stats), stats) and same(stats.merge(nothing), stats)
