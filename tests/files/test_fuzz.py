"""Mutated files: each is read as it was written or refused, in memory that the file's size bounds."""

import copy
import json
import random
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from actsteer import (
    Ablate,
    And,
    Chain,
    Clamp,
    CosineAbove,
    FileFormatError,
    LowRank,
    Not,
    ProbeAbove,
    SiteNotFoundError,
    Soft,
    Steering,
    SteeringVector,
    VectorBank,
)
from actsteer.files import sealed
from tests.zoo import llama

MUTATIONS = 24_000
BANK = VectorBank(
    {
        "nine": SteeringVector({"2": torch.arange(6.0) / 8, "layers.0:in": torch.ones(2)}, concept="nine"),
        "a/b é": SteeringVector({"2": -torch.ones(6)}, metadata={"axis 2": "1", "intervention": "ablate"}),
    }
)
VECTOR = SteeringVector({f"model.layers.{n}": torch.arange(4.0) + n for n in (1, 2)}, concept="calm")
WORDS = (b"\0", b"\xff" * 8, b"\xff\xff\xff\x7f", b"{", b"}", b'"', b"[", b"F32", b"F16", b"0", b"9" * 12, b"nine/2")


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, words, numbers, cuts, repetitions, swaps."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 8, 32])
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[max(0, at - length) : at]
            case 4:
                word = rng.choice(WORDS)
                data[at : at + len(word)] = word
            case 5:
                data[at:at] = rng.choice(WORDS)
            case 6:
                other = rng.randrange(len(data) + 1)
                data[at : at + length], data[other : other + length] = (
                    data[other : other + length],
                    data[at : at + length],
                )
            case _:
                del data[at:]
        if not data:
            break
    return bytes(data)


def same(one: VectorBank, other: VectorBank) -> bool:
    return one.concepts == other.concepts and all(
        v.sites == other[c].sites and v.metadata == other[c].metadata and v.equal(other[c]) for c, v in one.items()
    )


def same_steering(one: Steering, other: Steering) -> bool:
    return same(one.vectors, other.vectors) and repr(one) == repr(other)


def refused_or_same(path: Path, whole, count: int, seed: int, *, load=VectorBank.load, same=same) -> tuple[int, int]:
    """How many of the mutated files were refused, and the most memory that Python took for one."""
    rng, content, refused, most = random.Random(seed), path.read_bytes(), 0, 0
    tracemalloc.start()
    try:
        for _ in range(count):
            data = mutated(content, rng)
            path.write_bytes(data)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                found = load(path)
            except FileFormatError:
                refused += 1
            else:
                assert same(found, whole), data
            most = max(most, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return refused, most


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_native_files(tmp_path, seed):
    path = tmp_path / "bank.safetensors"
    BANK.save(path)
    refused, most = refused_or_same(path, BANK, MUTATIONS // 4, seed)
    assert refused > 0.95 * MUTATIONS // 4
    assert most < 2**20  # the file has 1.5 kB, and claims any number


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_control_vectors(tmp_path, seed):
    path = tmp_path / "calm.gguf"
    VECTOR.save(path)
    refused, most = refused_or_same(path, VectorBank({"calm": VECTOR}), 3000, seed)
    assert refused > 0.8 * 3000
    assert most < 2**20


PROBE = ProbeAbove(SteeringVector({"2": torch.ones(6)}, metadata={"offset 2": "0.5"}), per="token")
STEERINGS = {
    "parts": Steering(
        BANK,
        c={"nine": torch.tensor([1.0, 2.0]), "a/b é": 1},
        intervention=Chain(Ablate(around=torch.ones(6)), Clamp(0.5)),
        gate={"nine": And(Soft(PROBE, width=2), Not(CosineAbove(BANK["a/b é"], 0.1))), "a/b é": PROBE},
        positions={"nine": slice(1, None), "a/b é": [0]},
        sites=["2"],
    ),
    "an edit": Steering(LowRank({"2": (torch.ones(1, 6), torch.ones(1, 6), torch.ones(1))}), c=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("steering", STEERINGS.values(), ids=STEERINGS)
def test_files_of_a_steering(tmp_path, steering):
    path = tmp_path / "steering.safetensors"
    steering.save(path)
    refused, most = refused_or_same(path, steering, 3000, 0, load=Steering.load, same=same_steering)
    assert refused > 0.95 * 3000
    assert most < 2**20


def changed(node, rng: random.Random):
    """A JSON document with one to three of its parts exchanged, renamed, left out, or put into one another."""
    places = []

    def walk(own):
        for key in list(own) if isinstance(own, dict) else range(len(own)):
            places.append((own, key))
            if isinstance(own[key], dict | list):
                walk(own[key])

    walk(node)
    for _ in range(rng.randint(1, 3)):
        own, key = rng.choice(places)
        if (isinstance(own, dict) and key not in own) or (isinstance(own, list) and key >= len(own)):
            continue
        other, name = rng.choice(places)
        there = (isinstance(other, dict) and name in other) or (isinstance(other, list) and name < len(other))
        found = json.loads(json.dumps(other[name])) if there else None
        odd = [None, True, -1, 10**30, 1.5, float("nan"), float("inf"), "", "tensor", "#1", [], {}, [[]], found]
        match rng.randrange(4):
            case 0:
                own[key] = rng.choice(odd)
            case 1:
                own[key] = found
            case 2 if isinstance(own, dict):
                own[rng.choice(["class", "arguments", "vector", "mapping", "tuple", "slice", "x"])] = own.pop(key)
            case _:
                del own[key]
    return node


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:gate at site")  # of a threshold for a mean, on single tokens
@pytest.mark.parametrize("steering", STEERINGS.values(), ids=STEERINGS)
def test_documents_with_a_right_seal_are_read_or_refused_in_words(tmp_path, steering):
    path, rng, refused = tmp_path / "steering.safetensors", random.Random(0), 0
    steering.save(path)
    tensors = {name: own.clone() for name, own in load_file(path).items()}  # for the file will be another
    with safe_open(path, framework="pt") as opened:
        whole = json.loads(opened.metadata()["actsteer"])
    for number in range(4000):
        said = copy.deepcopy(whole)
        concepts = {"concepts": said.pop("concepts")} if number % 4 else {}  # which most changes leave alone
        text = json.dumps(changed(said, rng) | concepts)
        seal = sealed.digest({name: own for name, own in tensors.items() if name.startswith("#")}, text)
        path.write_bytes(save(tensors, metadata={"actsteer": text, "sha256": seal}))
        try:
            loaded = Steering.load(path)
        except FileFormatError:
            refused += 1
        else:
            assert repr(loaded) and loaded.vectors.items() is not None
    assert 3000 < refused < 4000


A = torch.arange(6.0) / 8
FOREIGN = {
    "negative.pt": lambda path: torch.save({-1: A, -2: A}, path),
    "numpy.pt": lambda path: torch.save({1: A.numpy(), 2: A.numpy()[None]}, path),
    "vec_layer_1_x.pt": lambda path: torch.save(A, path),
    "concepts.pt": lambda path: torch.save({"x": {1: A}, "y": [A, A]}, path),
    "old.pt": lambda path: torch.save(torch.stack([A, A])[:, None], path, _use_new_zipfile_serialization=False),
    "v.svec": lambda path: path.write_text(json.dumps({"model_type": "llama", "directions": {"1": [1.0, 2.0]}})),
    "lite.safetensors": lambda path: save_file({"layer1.v": A}, path),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's, of tensors that a file claims to be sparse
@pytest.mark.parametrize(("name", "write"), FOREIGN.items(), ids=FOREIGN.keys())
def test_what_others_write_is_read_or_refused_in_words(tmp_path, name, write):
    """It has no seal, so a changed number is read; whatever is wrong with it is one of this library's errors."""
    path, model, rng, refused = tmp_path / name, llama(), random.Random(0), 0
    write(path)
    content = path.read_bytes()
    for _ in range(400):
        path.write_bytes(mutated(content, rng))
        try:
            bank = VectorBank.load(path, model)
        except (FileFormatError, SiteNotFoundError):
            refused += 1
        else:
            assert all(bool(v[site].isfinite().all()) for _, v in bank.items() for site in v)
    assert refused > 200
