"""The native format: what is saved is loaded bit for bit, and nothing else is loaded at all."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from actsteer import FileFormatError, SteeringVector, VectorBank
from actsteer.files import sealed
from tests.strategies import STORED, stored_banks

BANK = VectorBank({"nine": SteeringVector({"2": torch.tensor([1.0, -2.0])}, concept="nine")})
ENTRY = {"sites": {"2": {}}, "metadata": {}}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A path for the examples of one test after the other."""
    return tmp_path_factory.mktemp("native") / "bank.safetensors"


def refuse(file: Path, content: bytes, match: str = ".") -> None:
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match=match):
        VectorBank.load(file)


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_seal(document: object, tensors: dict[str, torch.Tensor]) -> bytes:
    """A file with this document, whatever it says, and the digest that belongs to it."""
    text = document if isinstance(document, str) else json.dumps(document)
    return save(tensors, metadata={"actsteer": text, "sha256": sealed.digest(tensors, text)})


# --- identity ----------------------------------------------------------------------------------------------------
@given(bank=stored_banks())
def test_loading_a_saved_bank_is_the_identity_bit_for_bit(file, bank):
    bank.save(file)
    loaded = VectorBank.load(file)
    assert loaded.concepts == bank.concepts
    for concept, vector in bank.items():
        twin = loaded[concept]
        assert (twin.sites, twin.metadata) == (vector.sites, vector.metadata)
        assert all(twin[site].dtype is vector[site].dtype for site in vector)
        assert all(torch.equal(twin[site].view(torch.uint8), vector[site].view(torch.uint8)) for site in vector)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("concept", ["nine", "a/b", "100%", "a%2Fb", "層 é", None])
def test_a_vector_is_saved_under_its_concept(tmp_path, dtype, concept):
    v = SteeringVector({"layers/0": torch.tensor([0.5, -0.0], dtype=dtype)}, concept=concept, metadata={"a": "1"})
    v.save(tmp_path / "v.safetensors")
    assert VectorBank.load(tmp_path / "v.safetensors").concepts == (concept or "vector",)
    loaded = SteeringVector.load(tmp_path / "v.safetensors")
    assert loaded.equal(v)
    assert loaded.metadata == v.metadata
    assert loaded["layers/0"].signbit().tolist() == [False, True]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b/c"), ("a/b", "c")),
        (("a/b", "c"), ("a%2Fb", "c")),
        (("%", "c"), ("%25", "c")),
        (("", "a/b"), ("/a", "b")),
    ],
)
def test_names_with_slashes_and_percents_do_not_collide(tmp_path, one, other):
    numbers = {one: 1.0, other: 2.0}
    bank = VectorBank({c: SteeringVector({s: torch.tensor([x])}) for (c, s), x in numbers.items()})
    bank.save(tmp_path / "b.safetensors")
    loaded = VectorBank.load(tmp_path / "b.safetensors")
    assert {(c, s): float(loaded[c][s]) for c, s in numbers} == numbers


def test_a_file_of_several_vectors_is_not_one_vector(tmp_path):
    (BANK | VectorBank({"ten": BANK["nine"]})).save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"expected one vector, got \['nine', 'ten'\]; open it with VectorBank.load"):
        SteeringVector.load(tmp_path / "b.safetensors")


def test_it_is_a_plain_safetensors_file(file):
    BANK.save(file)
    assert {name: t.tolist() for name, t in load(file.read_bytes()).items()} == {"nine/2": [1.0, -2.0]}


def test_nothing_is_pickled(file, monkeypatch):
    def explode(*_args, **_kwargs):
        raise AssertionError("pickle was called")

    for module in (torch, pickle):
        for name in ("load", "save", "loads", "dump", "dumps", "Unpickler", "Pickler"):
            monkeypatch.setattr(module, name, explode, raising=False)
    BANK.save(file)
    assert VectorBank.load(file)["nine"].equal(BANK["nine"])


# --- atomicity ---------------------------------------------------------------------------------------------------
class Failing:
    """A file that takes half of what is written and then fails."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, payload):
        self.file.write(payload[: len(payload) // 2])
        raise OSError("no space left")


def fail(*_args, **_kwargs):
    raise OSError("no space left")


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_failure_in_the_middle_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, where):
    target = tmp_path / "bank.safetensors"
    BANK.save(target)
    before = target.read_bytes()
    open_really = Path.open
    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(Path, "open", lambda self, *mode: Failing(open_really(self, *mode)))
        elif where == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            VectorBank({}).save(target)
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == before


def test_saving_replaces_the_file_and_leaves_no_other(tmp_path):
    target = tmp_path / "bank.safetensors"
    for bank in (BANK, VectorBank({})):
        bank.save(target)
    assert VectorBank.load(target).concepts == ()
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "bank.safetensors", tmp_path / "latest.safetensors"
    link.symlink_to(target)
    BANK.save(link)
    assert link.is_symlink()
    assert VectorBank.load(target).concepts == ("nine",)


# --- damage ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("site", ["2", "層", "\x1f"], ids=ascii)
def test_every_single_flipped_bit_is_refused(file, site):
    VectorBank({"nine": SteeringVector({site: torch.tensor([1.0, -2.0])}, concept="nine")}).save(file)
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        refuse(file, bytes(damaged))


def test_every_truncation_and_extension_is_refused(file):
    BANK.save(file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        refuse(file, whole[:length])
    refuse(file, whole + b"\0")


def test_a_changed_number_and_a_changed_document_are_named(file):
    BANK.save(file)
    whole = file.read_bytes()
    refuse(file, whole[:-1] + b"\x3f", "the SHA-256 of 'nine' does not match; the file was altered")
    refuse(file, whole.replace(rb"\"add\"", rb"\"Add\""), "the SHA-256 does not match; the file was altered")
    refuse(file, whole[:-1], "not a readable safetensors file .* is it truncated")


# --- hostile files -----------------------------------------------------------------------------------------------
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(file, content):
    refuse(file, content)


@given(text=st.binary(max_size=60), data=st.binary(max_size=20))
def test_random_headers_are_refused(file, text, data):
    refuse(file, safetensors(text, data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(header=st.dictionaries(st.sampled_from(["__metadata__", "nine/2"]), json_values))
def test_headers_of_random_json_are_refused(file, header):
    refuse(file, safetensors(header, b"\0" * 8))


@given(document=json_values)
def test_documents_of_random_json_are_refused_even_with_a_valid_digest(file, document):
    refuse(file, with_seal(document, {"nine/2": torch.ones(2)}))


@given(
    concepts=json_values
    | st.dictionaries(st.just("nine"), json_values)
    | st.fixed_dictionaries({"nine": st.fixed_dictionaries({"sites": json_values, "metadata": json_values})})
)
def test_concepts_of_random_json_are_refused_even_with_a_valid_digest(file, concepts):
    refuse(file, with_seal({"format": 1, "kind": "bank", "concepts": concepts}, {"nine/2": torch.ones(2)}))


HOSTILE = {
    "empty": b"",
    "pickle": pickle.dumps({"nine/2": [1.0]}),
    "header length over the file's": struct.pack("<Q", 2**20) + b"{}",
    "header length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header length of 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "nested header": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "no header": safetensors({}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused(file, content):
    refuse(file, content)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E4M3", "C64", "U64", "BOOL", "X"])
@pytest.mark.parametrize(
    "shape", [[], [8], [0, 2**62], [0, 2**63], [2**32, 2**32], [0] * 200, [-1]], ids=lambda shape: str(shape)[:22]
)
def test_hostile_tensors_are_refused(file, dtype, shape):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0 if 0 in shape else 8]}
    metadata = {"actsteer": "{}", "sha256": ""}
    refuse(file, safetensors({"__metadata__": metadata, "nine/2": entry}, b"" if 0 in shape else b"\0" * 8))


@pytest.mark.parametrize("document", ["[" * 100_000, "", "{", "1" * 5000, "{'a': 1}"], ids=lambda text: text[:5])
def test_a_document_that_is_not_json_is_refused(file, document):
    refuse(file, with_seal(document, {}), "the header's document is not JSON")


def test_a_foreign_safetensors_file_is_refused(file):
    for metadata in (None, {"format": "pt"}, {"actsteer": "{}"}, {"sha256": ""}):
        save_file({"weight": torch.ones(2)}, file, metadata=metadata)
        with pytest.raises(FileFormatError, match="a safetensors file that actsteer did not write"):
            VectorBank.load(file)


def bank_document(**changes: object) -> dict[str, object]:
    return {"format": sealed.VERSION, "kind": "bank", "concepts": {"nine": ENTRY}} | changes


def test_the_document_that_the_hostile_ones_differ_from_is_accepted(file):
    file.write_bytes(with_seal(bank_document(), {"nine/2": torch.ones(2)}))
    assert VectorBank.load(file).concepts == ("nine",)


@pytest.mark.parametrize("version", [2, 3, 10**9])
def test_a_newer_version_asks_for_an_upgrade_whatever_its_digest(file, version):
    content = with_seal(bank_document(format=version), {"nine/2": torch.ones(2)})
    refuse(file, content, f"format {version}, this version reads up to 1; upgrade actsteer")
    refuse(file, content[:-1] + b"\0", "upgrade actsteer")


@pytest.mark.parametrize("version", [None, "1", "2", 0, -1, 1.5, float("inf")], ids=repr)
def test_a_version_that_was_never_written_is_refused(file, version):
    refuse(file, with_seal(bank_document(format=version), {"nine/2": torch.ones(2)}))


def test_a_document_without_a_version_is_refused(file):
    document = bank_document()
    del document["format"]
    refuse(file, with_seal(document, {"nine/2": torch.ones(2)}))


@pytest.mark.parametrize("document", [bank_document(kind="statistics"), bank_document(kind=None), [], None], ids=str)
def test_a_file_of_another_kind_is_refused(file, document):
    refuse(file, with_seal(document, {"nine/2": torch.ones(2)}))


def test_the_kind_that_was_expected_is_named(file):
    refuse(
        file, with_seal(bank_document(kind="statistics"), {}), "expected a file of kind 'bank'; it holds something else"
    )


@pytest.mark.parametrize("tensors", [{}, {"nine/3": torch.ones(2)}, {"ten/2": torch.ones(2)}], ids=str)
def test_a_missing_tensor_is_refused(file, tensors):
    refuse(file, with_seal(bank_document(), tensors), "the document does not describe the tensors .* write it again")


@pytest.mark.parametrize("extra", ["nine/3", "ten/2", "weight", ""])
def test_a_tensor_that_is_not_in_the_document_is_refused(file, extra):
    tensors = {"nine/2": torch.ones(2), extra: torch.zeros(2)}
    refuse(file, with_seal(bank_document(), tensors), r"tensors \['.*'\] are not in the document; write it again")


@pytest.mark.parametrize(
    "direction", [torch.ones(2, 2), torch.tensor(1.0), torch.ones(2, dtype=torch.int32), torch.tensor([float("nan")])]
)
def test_a_tensor_that_is_no_direction_is_refused(file, direction):
    refuse(file, with_seal(bank_document(), {"nine/2": direction}))


def test_vectors_that_disagree_on_a_site_are_refused(file):
    document = bank_document(concepts={"nine": ENTRY, "ten": ENTRY})
    refuse(file, with_seal(document, {"nine/2": torch.ones(2), "ten/2": torch.ones(3)}))


def test_a_site_that_is_no_name_is_refused(file):
    document = bank_document(concepts={"nine": {"sites": [2], "metadata": {}}})
    refuse(file, with_seal(document, {"nine/2": torch.ones(2)}))


# --- paths -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bank.ckpt", "bank", "bank.safetensors.bak", "bank.npz", "safetensors"])
def test_an_unknown_suffix_is_refused_both_ways(tmp_path, name):
    for act in (BANK.save, BANK["nine"].save, VectorBank.load, SteeringVector.load):
        with pytest.raises(FileFormatError, match=r"unknown format '.*'; name the file with .safetensors"):
            act(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_may_be_in_capitals(tmp_path):
    BANK.save(tmp_path / "BANK.SAFETENSORS")
    assert VectorBank.load(tmp_path / "BANK.SAFETENSORS").concepts == ("nine",)


def test_a_missing_file_and_folder_are_the_operating_system_s_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        VectorBank.load(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        BANK.save(tmp_path / "absent" / "bank.safetensors")


def test_a_side_that_is_not_the_site_s_is_refused(file):
    entry = ENTRY | {"sites": {"2": {"side": "input"}}}
    content = with_seal(bank_document(concepts={"nine": entry}), {"nine/2": torch.ones(2)})
    refuse(file, content, "concept 'nine': site '2' is not an input")
