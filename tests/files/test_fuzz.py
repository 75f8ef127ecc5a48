"""Mutated files: each is read as it was written or refused, in memory that the file's size bounds."""

import json
import random
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actsteer import FileFormatError, SiteNotFoundError, SteeringVector, VectorBank
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


def refused_or_same(path: Path, bank: VectorBank, count: int, seed: int) -> tuple[int, int]:
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
                found = VectorBank.load(path)
            except FileFormatError:
                refused += 1
            else:
                assert same(found, bank), data
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
