"""Tensors from a file are looked at before anything is computed with them."""

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actsteer import FileFormatError, ShapeError, SteeringVector, VectorBank
from tests.zoo import llama

A = torch.arange(16.0) / 8


# since torch 2.15 its weights_only refuses them
REFUSED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)
NESTED = "expected tensors, and nothing is unpickled" if REFUSED else "it is nested"
STRANGE = {
    "no memory": (lambda: A[:1].clone().expand(16), "expected a storage of 64 bytes for its shape .16,., it has 4"),
    "no strides": (lambda: torch.ones(1).expand(1000, 1000), "expected a storage of 4000000 bytes"),
    "sparse": (lambda: torch.eye(16).to_sparse(), "it is sparse_coo"),
    "sparse rows": (lambda: torch.eye(16).to_sparse_csr(), "it is sparse_csr"),
    "meta": (lambda: torch.empty(16, device="meta"), "expected a tensor with numbers, it is on meta"),
    "nested": (lambda: torch.nested.nested_tensor([A, A[:2]]), NESTED),
    "jagged": (lambda: torch.nested.nested_tensor([A, A[:2]], layout=torch.jagged), NESTED),
    "float8": (lambda: A.to(torch.float8_e4m3fn), "expected one of float16, .*, got float8_e4m3fn"),
    "complex": (lambda: A.to(torch.complex64), "expected one of float16, .*, got complex64"),
    "whole numbers": (lambda: A.long(), "expected one of float16, .*, got int64"),
    "no numbers": (lambda: torch.empty(10**12, 0), "it is empty"),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of what is in beta
@pytest.mark.parametrize(("make", "match"), STRANGE.values(), ids=STRANGE.keys())
@pytest.mark.parametrize("inside", ["alone", "layer", "concept", "list"])
def test_a_strange_tensor_is_refused_in_words(tmp_path, make, match, inside):
    strange = make()
    content = {"alone": strange, "layer": {1: strange}, "concept": {"a": {0: A, 1: strange}}, "list": [strange]}
    torch.save(content[inside], tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match=match):
        VectorBank.load(tmp_path / "v.pt", llama())


def test_the_same_in_a_file_that_is_named_after_its_layer(tmp_path):
    torch.save(A[:1].clone().expand(16), tmp_path / "vec_layer_1.pt")
    with pytest.raises(FileFormatError, match="expected a storage of 64 bytes"):
        VectorBank.load(tmp_path / "vec_layer_1.pt", llama())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool])
def test_a_strange_dtype_of_steering_lite_is_no_direction(tmp_path, dtype):
    save_file({"layer1.v": A.to(dtype)}, tmp_path / "v.safetensors")
    with pytest.raises(FileFormatError, match=r"v\.safetensors"):
        VectorBank.load(tmp_path / "v.safetensors", llama())


def test_views_of_one_tensor_are_directions(tmp_path):
    stack = torch.stack([A, -A, 2 * A])
    torch.save({"calm": {0: stack[0], 2: stack[2]}, "loud": {1: stack.T.contiguous().T[1]}}, tmp_path / "v.pt")
    bank = VectorBank.load(tmp_path / "v.pt", llama())
    assert torch.equal(bank["calm"]["model.layers.2"], 2 * A)
    assert torch.equal(bank["loud"]["model.layers.1"], -A)


def test_one_tensor_under_many_names_is_bounded_by_the_file_s_size(tmp_path):
    torch.save(dict.fromkeys(range(90), A), tmp_path / "v.pt")  # one vector at every layer
    assert len(SteeringVector.load(tmp_path / "v.pt", llama(num_hidden_layers=90))) == 90
    layers = dict.fromkeys(range(100), torch.ones(20_000))
    torch.save({f"c{i}": layers for i in range(100)}, tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match="its directions take over 1000 times the file's size"):
        VectorBank.load(tmp_path / "v.pt", llama())


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    torch.save(torch.zeros(3, 10**5), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "v.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    assert (tmp_path / "v.pt").stat().st_size < 10_000
    with pytest.raises(FileFormatError, match="its parts are larger than the file"):
        VectorBank.load(tmp_path / "v.pt", llama())


BOUNDED = """
    import resource, sys, torch
    from torch import nn
    from actsteer import FileFormatError, VectorBank

    model = nn.Module()
    model.layers = nn.ModuleList(nn.Identity() for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        VectorBank.load(sys.argv[1], model)
    except FileFormatError:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("shape", [(3, 300_000_000), (900_000_000,)], ids=str)
def test_a_small_file_takes_little_memory(tmp_path, shape):
    path = tmp_path / "vec_layer_1.pt"
    torch.save(torch.ones(1).expand(shape), path)
    assert path.stat().st_size < 2000
    command = [sys.executable, "-c", textwrap.dedent(BOUNDED), str(path)]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, check=True, capture_output=True, cwd=root, text=True, timeout=60)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 100 * 2**20


STRANGE_VALUES = {name: STRANGE[name] for name in ("sparse", "meta", "nested", "jagged", "float8", "complex")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "match"), STRANGE_VALUES.values(), ids=STRANGE_VALUES.keys())
def test_a_vector_is_not_made_of_them_either(make, match):
    with pytest.raises(ShapeError, match="site '2': "):
        SteeringVector({"2": make()})
