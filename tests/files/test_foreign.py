"""The files of other projects, each into a bank with sites named for the model at hand; none of them is executed."""

import json
import pickle
import sys
from collections import OrderedDict
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from actsteer import FileFormatError, SiteNotFoundError, Steerer, SteeringVector, VectorBank, collect
from actsteer.integrations.steering_vectors import from_steering_vectors, to_steering_vectors
from tests.zoo import gpt2, llama

A, B = torch.arange(16.0) / 8, -torch.ones(16)
IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module")
def model():
    return llama()


def mean(model, site, v=None):
    """What is at a site, of the steered model or of the plain one."""
    if v is None:
        return collect(model, IDS, sites=site, progress=False)[site].mean
    with Steerer(model, v):
        return collect(model, IDS, sites=site, progress=False)[site].mean


# --- CAST ----------------------------------------------------------------------------------------------------------
def svec(path, **changes):
    content = {
        "model_type": "llama",
        "directions": {"1": A.tolist(), "2": B.tolist()},
        "explained_variances": {"1": 0.5},
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_a_svec_is_applied_at_the_input_of_its_block(tmp_path, model):
    bank = VectorBank.load(svec(tmp_path / "refusal.svec"), model)
    assert bank.concepts == ("refusal",)
    assert bank.sites == ("model.layers.1:in", "model.layers.2:in")
    assert torch.equal(bank["refusal"]["model.layers.2:in"], B)
    assert bank["refusal"].metadata["explained_variance 1"] == "0.5"
    one = bank["refusal"].select("model.layers.1:in")
    change = mean(model, "model.layers.0", None), mean(model, "model.layers.1:in", one)
    assert torch.allclose(change[1] - change[0], A.double(), atol=1e-5)


def test_a_svec_s_type_names_the_sites_where_there_is_no_model(tmp_path):
    assert SteeringVector.load(svec(tmp_path / "v.svec", model_type="gpt2")).sites[0] == "transformer.h.1:in"
    with pytest.raises(FileFormatError, match="it numbers the blocks of a mine; name them with model="):
        SteeringVector.load(svec(tmp_path / "v.svec", model_type="mine"))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff", b'{"directions": []}', b'{"directions": {"x": [1]}}', b"[" * 100_000),
        b'{"directions": {"1": ["a"]}}',
        b'{"directions": {"1": [1], "1": [2]}}',
        b'{"directions": {"01": [1]}}',
        b'{"directions": {"1_0": [1]}}',
        b'{"directions": {}}',
        b'{"directions": {"1": [[1]]}}',
        b'{"directions": {"1": [1e999]}}',
    ],
    ids=lambda content: content[:28],
)
def test_what_is_no_svec_is_refused(tmp_path, content):
    (tmp_path / "v.svec").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"v\.svec"):
        VectorBank.load(tmp_path / "v.svec", llama())


# --- steering-lite -------------------------------------------------------------------------------------------------
def test_steering_lite_s_keys_are_concepts(tmp_path, model):
    tensors = {
        "layer0.mean_diff": A,
        "layer2.mean_diff": B,
        "layer2.pca": A[None].clone(),
        "layer2.covariance": torch.eye(16),
    }
    save_file(tensors, tmp_path / "v.safetensors")
    bank = VectorBank.load(tmp_path / "v.safetensors", model)
    assert {concept: v.sites for concept, v in bank.items()} == {
        "mean_diff": ("model.layers.0", "model.layers.2"),
        "pca": ("model.layers.2",),
    }
    change = mean(model, "model.layers.2"), mean(model, "model.layers.2", bank["pca"])
    assert torch.allclose(change[1] - change[0], A.double(), atol=1e-5)


def test_a_layer_that_is_there_twice_is_refused(tmp_path, model):
    save_file({"layer1.v": A, "layers1.v": B}, tmp_path / "v.safetensors")
    torch.save({"layer_1": A, 1: B}, tmp_path / "v.pt")
    torch.save({1: A, "1": B}, tmp_path / "w.pt")
    for name in ("v.safetensors", "v.pt", "w.pt"):
        with pytest.raises(FileFormatError, match="layer 1 is there twice, under two names"):
            VectorBank.load(tmp_path / name, model)


def test_a_model_s_weights_are_no_vectors(tmp_path, model):
    save_file({"layer0.weight": torch.eye(16)}, tmp_path / "v.safetensors")
    with pytest.raises(FileFormatError, match="none of its tensors is a direction"):
        VectorBank.load(tmp_path / "v.safetensors", model)
    save_file({"layer0.v": A, "model.norm.weight": B}, tmp_path / "v.safetensors")
    with pytest.raises(FileFormatError, match="a safetensors file that actsteer did not write"):
        VectorBank.load(tmp_path / "v.safetensors", model)


# --- tensors -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({0: A, 2: B}, {"v": {0: A, 2: B}}),
        ({"0": A, "layer_2": B}, {"v": {0: A, 2: B}}),
        ({"layers.1": A[None]}, {"v": {1: A}}),
        (torch.stack([A, B, A]), {"v": {0: A, 1: B, 2: A}}),
        ({"calm": {1: A}, "angry": {1: B, 2: A}}, {"calm": {1: A}, "angry": {1: B, 2: A}}),
        ({"calm": torch.stack([A, B, A])[0], "angry": B}, {"v": {"calm": A, "angry": B}}),  # sites
        ({-1: A, -3: B[None]}, {"v": {0: B, 2: A}}),  # RepE, whose last layer is -1
        ({"-1": A, "layer_-2": B}, {"v": {1: B, 2: A}}),
        ({-4: A}, {"v": {"model.layers.0:in": A}}),  # of hidden_states with the embeddings
        ({"calm": {"a": A}, "angry": {"b": B}}, {"calm": {"a": A}, "angry": {"b": B}}),  # sites
        ({"calm": {-1: A}, "angry": {-2: B}}, {"calm": {2: A}, "angry": {1: B}}),
        (torch.stack([A, B, A])[:, None], {"v": {0: A, 1: B, 2: A}}),  # (L, 1, d)
        (torch.stack([A, B])[:, None].half(), {"v": {0: A.half(), 1: B.half()}}),
        ([A, B], {"v": {0: A, 1: B}}),
        ((A[None], B), {"v": {0: A, 1: B}}),
        ({"calm": [A, B], "angry": torch.stack([B, A, B])}, {"calm": {0: A, 1: B}, "angry": {0: B, 1: A, 2: B}}),
        (A.numpy()[None], {"v": {0: A}}),
        ({-1: A.numpy(), -2: B.numpy()[None]}, {"v": {1: B, 2: A}}),
        ({0: A.numpy().astype("float16"), 1: B}, {"v": {0: A.half(), 1: B}}),
        ({"calm": {1: A.double().numpy()}}, {"calm": {1: A.double()}}),
        (np.asfortranarray(torch.stack([A, B]).numpy()), {"v": {0: A, 1: B}}),
        (np.broadcast_to(np.float32(0.5), (2, 16)), {"v": {0: torch.full((16,), 0.5), 1: torch.full((16,), 0.5)}}),
        (nn.Parameter(torch.stack([A, B])), {"v": {0: A, 1: B}}),
        (OrderedDict({"layer_1": A}), {"v": {1: A}}),
    ],
    ids=str,
)
def test_plain_tensors(tmp_path, model, content, expected):
    torch.save(content, tmp_path / "v.pt")
    bank = VectorBank.load(tmp_path / "v.pt", model)
    assert bank.concepts == tuple(expected)
    for concept, rows in expected.items():
        named = {key if isinstance(key, str) else f"model.layers.{key}": row for key, row in rows.items()}
        assert bank[concept].equal(SteeringVector(named))
        assert bank[concept].sites == tuple(named)
        assert bank[concept].concept == concept


def test_the_rows_of_hidden_states_begin_with_the_embeddings(tmp_path, model):
    torch.save(torch.stack([A, B, A, B]), tmp_path / "v.pt")
    with pytest.raises(
        SiteNotFoundError, match=r"layer 3 would be block 3, .* which begin with the embeddings, need 1"
    ):
        VectorBank.load(tmp_path / "v.pt", model)
    v = SteeringVector.load(tmp_path / "v.pt", model, layer_offset=1)
    assert v.sites == ("model.layers.0:in", "model.layers.0", "model.layers.1", "model.layers.2")
    assert torch.equal(v["model.layers.0"], B)


def test_rotalabs_has_a_file_for_each_layer(tmp_path, model):
    folder = tmp_path / "sycophancy"
    folder.mkdir()
    torch.save(A, folder / "layer_0.pt")
    torch.save(B, folder / "layer_2.pt")
    bank = VectorBank.load(folder / "layer_*.pt", model)
    assert bank["sycophancy"].equal(SteeringVector({"model.layers.0": A, "model.layers.2": B}))
    assert SteeringVector.load(folder / "layer_2.pt", model).sites == ("model.layers.2",)


@pytest.mark.parametrize(
    ("name", "concept", "layer", "variant"),
    [
        ("vec_layer_1.pt", "sycophancy", 1, None),
        ("vec_layer_2_Llama-2-7b-chat-hf.pt", "sycophancy", 2, "Llama-2-7b-chat-hf"),
        ("refusal_vec_layer_0_Llama-2-13b.pt", "refusal", 0, "Llama-2-13b"),
        ("vec_layer_-1.pt", "sycophancy", 2, None),
        ("layer_1.pt", "sycophancy", 1, None),
        ("layer2.pth", "sycophancy", 2, None),
        ("power_seeking_layer_1.bin", "power_seeking", 1, None),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda: A, lambda: A[None].clone(), lambda: A.numpy()], ids=["(d,)", "(1, d)", "numpy"]
)
def test_a_file_named_after_its_layer_is_a_direction_at_this_block_s_output(
    tmp_path, model, name, concept, layer, variant, make
):
    """CAA writes vec_layer_<N>_<model>.pt into a folder for each behaviour."""
    folder = tmp_path / "sycophancy"
    folder.mkdir()
    torch.save(make(), folder / name)
    bank = VectorBank.load(folder / name, model)
    assert bank.concepts == (concept,)
    v = bank[concept]
    assert v.equal(SteeringVector({f"model.layers.{layer}": A}))
    assert v.metadata.get("variant") == variant
    change = mean(model, v.sites[0]), mean(model, v.sites[0], v)
    assert torch.allclose(change[1] - change[0], A.double(), atol=1e-5)


def test_caa_s_folders_are_concepts(tmp_path, model):
    for behaviour, sign in (("refusal", 1), ("corrigible", -1)):
        (tmp_path / behaviour).mkdir()
        for layer in (0, 2):
            torch.save(sign * (layer + 1) * A, tmp_path / behaviour / f"vec_layer_{layer}_m.pt")
    bank = VectorBank.load(tmp_path / "*" / "vec_layer_*_m.pt", model)
    assert bank.concepts == ("corrigible", "refusal")
    assert bank["corrigible"].equal(SteeringVector({"model.layers.0": -A, "model.layers.2": -3 * A}))


@pytest.mark.parametrize("name", ["layer_1.pt", "positive_layer_1.pt", "vec_layer_1_m.pt"])
def test_activations_are_no_layers(tmp_path, model, name):
    torch.save(torch.stack([A, B, A]), tmp_path / name)
    with pytest.raises(FileFormatError, match=r"its name tells one layer, and its shape is \(3, 16\)"):
        VectorBank.load(tmp_path / name, model)


def test_layers_from_the_end_need_the_model_and_no_offset(tmp_path, model):
    torch.save({-1: A, -2: B}, tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match="name them with model="):
        VectorBank.load(tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match=r"layer -2 counts from the end, .* leave layer_offset out"):
        VectorBank.load(tmp_path / "v.pt", model, layer_offset=1)
    torch.save({-1: A, -5: B}, tmp_path / "v.pt")
    with pytest.raises(SiteNotFoundError, match="layer -5 would be block -2"):
        VectorBank.load(tmp_path / "v.pt", model)
    torch.save({-1: A, 2: B}, tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match=r"layer 2 is 'model.layers.2', and so is another one of \[-1, 2\]"):
        VectorBank.load(tmp_path / "v.pt", model)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({1: A, "calm": B}, r"expected layers alone, or sites alone; \['calm'\] are no layers"),
        ({1.0: A}, "expected layers' numbers or names, got the key 1.0"),
        ({True: A}, "expected layers' numbers or names, got the key True"),
        ({("a", 1): A}, "expected layers' numbers or names, got the key"),
        ({0: torch.ones(2, 16)}, r"layer 0: expected a finite direction \(d,\), got float32 of shape \(2, 16\)"),
        ({0: A / 0}, "layer 0: expected a finite direction"),
        (torch.ones(2, 2, 2), r"expected a tensor \(layers, d\) or \(layers, 1, d\), got \(2, 2, 2\)"),
        (A, r"got \(16,\); a file with one direction is named after its layer, layer_<N>.pt"),
        ([A, None], "expected a tensor"),
        ({0: np.arange(3)}, "a numpy array of other numbers than float16, float32 or float64"),
        ({0: np.array([1], ">f4")}, "a numpy array of other numbers than .*, little-endian"),
        ({0: np.array([None])}, "a numpy array of other numbers"),
        ({0: np.array(["a"])}, "a numpy array of other numbers"),
        ({0: np.float32(1)}, "nothing is unpickled beside them"),
        ({0: np.array([Ellipsis])}, "nothing is unpickled beside them"),
    ],
    ids=str,
)
def test_what_is_refused_is_told(tmp_path, model, content, why):
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match=why):
        VectorBank.load(tmp_path / "v.pt", model)


def test_no_numpy_is_called_with_what_a_file_says(tmp_path, model, monkeypatch):
    torch.save({1: A.numpy()}, tmp_path / "v.pt")

    def explode(*_, **__):
        raise AssertionError("numpy was called")

    monkeypatch.setattr(np._core.multiarray, "_reconstruct", explode)
    assert VectorBank.load(tmp_path / "v.pt", model)["v"].equal(SteeringVector({"model.layers.1": A}))


class Forged:
    """What a hostile pickle says of a numpy array."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), self.state


@pytest.mark.parametrize(
    "state",
    [
        (1, (2**62, 2**62), np.dtype("f4"), False, b"\0" * 64),
        (1, (-1, 16), np.dtype("f4"), False, b"\0" * 64),
        (1, (3,), np.dtype("f4"), False, b"\0" * 64),
        (1, (16,), np.dtype("f4"), False, [0.0] * 16),
        (1, (16,), "f4", False, b"\0" * 64),
        (1, "ab", np.dtype("f4"), False, b"\0" * 64),
        (1, (), np.dtype("f4"), False, b""),
        (1, (10**12, 0), np.dtype("f4"), False, b""),
        (1, (16,), np.dtype("f4"), False),
        (),
    ],
    ids=str,
)
def test_forged_arrays_are_refused(tmp_path, model, state):
    torch.save({1: Forged(*state)}, tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match=r"v\.pt"):
        VectorBank.load(tmp_path / "v.pt", model)


def test_lists_within_lists_end(tmp_path, model):
    """A few bytes may say that there are 2^60 lists."""
    content = [A]
    for _ in range(60):
        content = [content, content]
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match=r"v\.pt"):
        VectorBank.load(tmp_path / "v.pt", model)
    endless: list[object] = []
    endless.append(endless)
    torch.save(endless, tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match=r"v\.pt"):
        VectorBank.load(tmp_path / "v.pt", model)


class Trap:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self):
        return (open, ("trapped", "w"))


@pytest.mark.parametrize("content", [Trap(), {0: Trap()}, SimpleNamespace(layer_activations={1: A})], ids=type)
def test_nothing_is_unpickled_but_tensors(tmp_path, monkeypatch, model, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match="nothing is unpickled beside them"):
        VectorBank.load(tmp_path / "v.pt", model)
    (tmp_path / "v.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(FileFormatError, match="nothing is unpickled beside them"):
        VectorBank.load(tmp_path / "v.pt", model)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    "content",
    [
        A,
        {},
        [1.0],
        {0: [1.0]},
        {0: torch.ones(2, 2)},
        {0: torch.ones(2, dtype=torch.int64)},
        {0: A / 0},
        *(torch.ones(2, 2, 2), {"a": {}}, 3, torch.empty(0, 4)),
    ],
    ids=lambda content: str(content)[:30],
)
def test_tensors_that_are_no_directions_are_refused(tmp_path, model, content):
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(FileFormatError, match=r"v\.pt"):
        VectorBank.load(tmp_path / "v.pt", model)


@pytest.mark.parametrize("suffix", [".svec", ".pt", ".pth", ".bin"])
def test_they_are_not_written(tmp_path, suffix):
    with pytest.raises(FileFormatError, match=f"{suffix} is only read; name the file with .safetensors or .gguf"):
        SteeringVector({"0": A}).save(tmp_path / f"v{suffix}")
    with pytest.raises(FileNotFoundError):
        SteeringVector.load(tmp_path / f"v{suffix}")


# --- steering-vectors ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layer_type", "site"),
    [
        *(("decoder_block", ""), ("self_attn", ".self_attn:out.0"), ("mlp", ".mlp")),
        *(("input_layernorm", ".input_layernorm"), ("post_attention_layernorm", ".post_attention_layernorm")),
    ],
)
def test_an_object_of_steering_vectors(model, layer_type, site):
    theirs = SimpleNamespace(layer_activations={0: A, 2: B}, layer_type=layer_type)
    bank = from_steering_vectors(theirs, model=model, concept="calm")
    assert bank.concepts == ("calm",)
    assert bank["calm"].equal(SteeringVector({f"model.layers.0{site}": A, f"model.layers.2{site}": B}))
    with Steerer(model, bank):
        model(IDS)


def test_an_object_for_another_architecture():
    theirs = SimpleNamespace(layer_activations={1: torch.ones(8)}, layer_type="self_attn")
    assert from_steering_vectors(theirs, model=gpt2()).sites == ("transformer.h.1.attn:out.0",)
    with pytest.raises(SiteNotFoundError, match="layer 5"):
        from_steering_vectors(SimpleNamespace(layer_activations={5: A}, layer_type="mlp"), model=gpt2())
    with pytest.raises(FileFormatError, match="layer_type 'router'"):
        from_steering_vectors(SimpleNamespace(layer_activations={1: A}, layer_type="router"), model=gpt2())
    with pytest.raises(TypeError, match="expected a SteeringVector of steering-vectors"):
        from_steering_vectors(A, model=gpt2())


@dataclass
class Theirs:
    """An object of the package as far as its fields go."""

    layer_activations: dict
    layer_type: str


@pytest.fixture
def package(monkeypatch):
    module = ModuleType("steering_vectors")
    module.SteeringVector = Theirs
    monkeypatch.setitem(sys.modules, "steering_vectors", module)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("part", ["", ".self_attn:out.0", ".mlp", ".input_layernorm", ".post_attention_layernorm"])
def test_there_and_back_it_is_the_vector(model, part):
    v = SteeringVector({f"model.layers.2{part}": B, f"model.layers.0{part}": A})
    theirs = to_steering_vectors(v, model=model)
    assert list(theirs.layer_activations) == [2, 0] and torch.equal(theirs.layer_activations[0], A)
    assert from_steering_vectors(theirs, model=model)["vector"].equal(v)


@pytest.mark.usefixtures("package")
def test_a_vector_that_no_object_can_hold_is_refused(model):
    with pytest.raises(
        SiteNotFoundError, match=r"'model.layers.0.self_attn.q_proj' is neither a block .*'model.layers.0"
    ):
        to_steering_vectors(SteeringVector({"model.layers.0.self_attn.q_proj": A}), model=model)
    both = SteeringVector({"model.layers.0": A, "model.layers.0.mlp": A})
    for wrong, kinds in ((both, r"\['decoder_block', 'mlp'\]"), (SteeringVector({}), r"\[\]")):
        with pytest.raises(FileFormatError, match=f"expected sites of one kind, .* got {kinds}"):
            to_steering_vectors(wrong, model=model)


def test_without_the_package_it_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "steering_vectors", None)
    with pytest.raises(ImportError, match="pip install steering-vectors"):
        to_steering_vectors(SteeringVector({"model.layers.0": A}), model=model)
