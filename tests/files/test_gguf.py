"""Control vectors: what llama.cpp and repeng read and write, and what the format cannot express."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import FileFormatError, ModelMismatchError, SiteNotFoundError, Steerer, SteeringVector, VectorBank, fit
from tests.zoo import llama

DATA = Path(__file__).parent / "data"
V = SteeringVector({"model.layers.1": torch.tensor([0.5, -2.0]), "model.layers.3": torch.ones(2)}, concept="calm")


def control_vector(path, rows, *, hint="llama", architecture="controlvector", count=gguf.GGUFWriter.add_uint32, **keys):
    """A file as another tool would write it."""
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    if count is not None:
        count(writer, "controlvector.layer_count", len(rows))
    for key, value in keys.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_string)(f"controlvector.{key}", value)
    for name, row in rows.items():
        writer.add_tensor(name, np.asarray(row))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ROWS = {"direction.1": np.float32([0.5, -2.0]), "direction.3": np.float32([1, 1])}


# --- what is written ---------------------------------------------------------------------------------------------
def test_the_file_has_what_llama_cpp_and_repeng_ask_for(tmp_path):
    V.save(tmp_path / "v.gguf", model=llama(num_hidden_layers=4))
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["GGUF.version"] == 3
    assert keys["general.architecture"] == "controlvector"
    assert keys["controlvector.model_hint"] == "llama"
    assert (keys["controlvector.layer_count"], reader.fields["controlvector.layer_count"].types[0].name) == (
        2,
        "UINT32",
    )
    assert keys["actsteer.operation"] == "add"
    tensors = {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tolist()) for t in reader.tensors}
    assert tensors == {"direction.1": ("F32", [2], [0.5, -2.0]), "direction.3": ("F32", [2], [1.0, 1.0])}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_written_as_float32(tmp_path, dtype):
    V.to(dtype=dtype).save(tmp_path / "v.gguf")
    assert SteeringVector.load(tmp_path / "v.gguf").equal(V)


@given(
    rows=st.dictionaries(
        st.integers(1, 40),
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
        min_size=1,
    ),
    prefix=st.sampled_from(["model.layers", "transformer.h", "blocks", "my.own.layers"]),
    metadata=st.dictionaries(st.sampled_from(["a", "層", "model_type"]), st.text(max_size=5)),
)
def test_loading_a_saved_vector_is_the_identity(tmp_path_factory, rows, prefix, metadata):
    path = tmp_path_factory.mktemp("gguf") / "v.gguf"
    directions = {f"{prefix}.{n}": torch.tensor(row, dtype=torch.float32) for n, row in rows.items()}
    v = SteeringVector(directions, concept="c", metadata=metadata)
    v.save(path)
    back = SteeringVector.load(path)
    assert set(back.sites) == set(v.sites)
    assert all(torch.equal(back[s].view(torch.int32), v[s].view(torch.int32)) for s in v)
    assert back.metadata == v.metadata


@pytest.mark.parametrize(
    ("sites", "why"),
    [
        (["model.layers.0"], "direction.0 cannot be written: llama.cpp's format begins at block 1"),
        (["model.layers.1:in"], "direction.0 cannot be written"),
        (["model.layers.0:in"], "direction.-1 cannot be written"),
        (["model.layers.2.mlp"], "'model.layers.2.mlp' is not the output of a block, and a control vector"),
        (["model.embed_tokens"], "is not the output of a block"),
        (["model.layers.2[0:4]"], r"'model.layers.2\[0:4\]' is not the output of a block"),
        (["2"], "is not the output of a block"),
        (["model.layers.2", "model.layers.3:in"], "'model.layers.2' and 'model.layers.3:in' are one place"),
        (["model.layers.2", "encoder.layer.3"], "several lists of blocks"),
    ],
)
def test_what_the_format_cannot_express_is_refused(tmp_path, sites, why):
    with pytest.raises(FileFormatError, match=why):
        SteeringVector({site: torch.ones(2) for site in sites}).save(tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_site_that_the_model_has_not_as_a_block_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"not the output of a block of model.layers \(0 to 2\)"):
        V.save(tmp_path / "v.gguf", model=llama())


def test_another_operation_and_several_vectors_are_refused(tmp_path):
    meant = SteeringVector({"model.layers.1": torch.ones(2)}, concept="no", metadata={"intervention": "ablate"})
    with pytest.raises(FileFormatError, match="'no' is meant for 'ablate', and a control vector is always added"):
        meant.save(tmp_path / "v.gguf")
    with pytest.raises(FileFormatError, match=r"a GGUF file holds one vector, got \['a', 'b'\]"):
        VectorBank({"a": V, "b": V}).save(tmp_path / "v.gguf")
    with pytest.raises(FileFormatError, match="not finite in float32"):
        SteeringVector({"model.layers.1": torch.tensor([1e300], dtype=torch.float64)}).save(tmp_path / "v.gguf")
    with pytest.raises(FileFormatError, match="one direction or more, got none"):
        SteeringVector({}).save(tmp_path / "v.gguf")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        V.save(tmp_path / "absent" / "v.gguf")
    assert list(tmp_path.iterdir()) == []


def test_layer_offset_shifts_the_numbers_both_ways(tmp_path):
    V.save(tmp_path / "v.gguf", layer_offset=1)
    assert [t.name for t in gguf.GGUFReader(tmp_path / "v.gguf").tensors] == ["direction.2", "direction.4"]
    assert SteeringVector.load(tmp_path / "v.gguf", llama(num_hidden_layers=4), layer_offset=1).sites == V.sites
    for model in (None, llama(num_hidden_layers=4)):  # the file says which sites are meant
        assert SteeringVector.load(tmp_path / "v.gguf", model).sites == V.sites
    SteeringVector({"model.layers.0": torch.ones(2)}).save(tmp_path / "v.gguf", layer_offset=1)  # at last
    with pytest.raises(ValueError, match="layer_offset is for files that number the blocks"):
        V.save(tmp_path / "v.safetensors", layer_offset=1)


# --- what others write -------------------------------------------------------------------------------------------
def test_a_file_that_repeng_0_4_wrote():
    v = SteeringVector.load(DATA / "repeng.gguf")
    assert v.sites == ("model.layers.1", "model.layers.3")
    assert v["model.layers.3"].tolist() == [0.0, -0.125, -0.25, -0.375]
    assert v.metadata == {"concept": "repeng", "model_type": "llama"}


@pytest.mark.parametrize("count", [gguf.GGUFWriter.add_uint32, gguf.GGUFWriter.add_int32, None])
def test_both_types_of_layer_count_are_read(tmp_path, count):
    assert SteeringVector.load(control_vector(tmp_path / "v.gguf", ROWS, count=count)).equal(V)


def test_easysteer_s_keys_are_kept(tmp_path):
    v = SteeringVector.load(control_vector(tmp_path / "happy.gguf", ROWS, method="diffmean", scale=0.5))
    assert v.concept == "happy"
    assert v.metadata["controlvector.method"] == "diffmean"
    assert v.metadata["controlvector.scale"] == "0.5"


@pytest.mark.parametrize(
    ("hint", "blocks"), [("llama", "model.layers"), ("gpt2", "transformer.h"), ("gpt_neox", "gpt_neox.layers")]
)
def test_the_sites_have_the_names_of_the_model_s_type(tmp_path, hint, blocks):
    v = SteeringVector.load(control_vector(tmp_path / "v.gguf", ROWS, hint=hint))
    assert v.sites == (f"{blocks}.1", f"{blocks}.3")


@pytest.mark.parametrize("hint", ["mine", None])
def test_an_unknown_type_asks_for_the_model(tmp_path, hint):
    path = control_vector(tmp_path / "v.gguf", ROWS, hint=hint)
    with pytest.raises(FileFormatError, match=r"it numbers the blocks of a m.*; name them with model="):
        SteeringVector.load(path)

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    assert SteeringVector.load(path, Mine()).sites == ("blocks.1", "blocks.3")


def test_a_model_of_another_type_is_warned_about_and_one_with_fewer_blocks_refused(tmp_path):
    path = control_vector(tmp_path / "v.gguf", ROWS, hint="mistral")
    with pytest.warns(UserWarning, match="made for a mistral, the model is a llama"):
        SteeringVector.load(path, llama(num_hidden_layers=4))
    with pytest.raises(SiteNotFoundError, match=r"layer 3 would be block 3, and the model has model.layers.0 to"):
        SteeringVector.load(control_vector(tmp_path / "v.gguf", ROWS), llama())


def test_it_is_checked_against_the_model_like_any_other_file(tmp_path):
    model = llama(num_hidden_layers=4)
    v = fit(model, positive=torch.tensor([[1, 2]]), negative=torch.tensor([[3, 4]]), sites="model.layers.2")
    v.save(tmp_path / "v.gguf")
    with Steerer(model, SteeringVector.load(tmp_path / "v.gguf")):
        model(torch.tensor([[1, 2]]))
    with pytest.raises(ModelMismatchError, match="made for a LlamaForCausalLM"):
        Steerer(llama(num_hidden_layers=5), SteeringVector.load(tmp_path / "v.gguf"))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(2,), (1, 2)], ids=str)
def test_other_dtypes_and_rows_are_read(tmp_path, dtype, shape):
    rows = {name: row.astype(dtype).reshape(shape) for name, row in ROWS.items()}
    v = SteeringVector.load(control_vector(tmp_path / "v.gguf", rows))
    assert v.equal(V.to(dtype=getattr(torch, dtype)))


def written(path, writer, tensors, **raw):
    """What a writer has been given, and these tensors."""
    for name, row in tensors.items():
        writer.add_tensor(name, row, **raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_bfloat16_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    rows = {f"direction.{n}": V[f"model.layers.{n}"].bfloat16().view(torch.uint8).numpy() for n in (1, 3)}
    path = written(tmp_path / "v.gguf", writer, rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    assert SteeringVector.load(path).equal(V.to(dtype=torch.bfloat16))


def test_easysteer_s_architecture_is_read_with_its_keys_and_without(tmp_path):
    """Its engine's tests write this architecture, and no keys at all."""
    path = written(tmp_path / "calm.gguf", gguf.GGUFWriter(tmp_path / "calm.gguf", "steervector"), ROWS)
    v = SteeringVector.load(path, llama(num_hidden_layers=4))
    assert v.equal(V) and v.concept == "calm"
    writer = gguf.GGUFWriter(path, "steervector")
    writer.add_string("steervector.model_hint", "llama")
    writer.add_uint32("steervector.layer_count", 2)
    writer.add_string("steervector.method", "diffmean")
    v = SteeringVector.load(written(path, writer, ROWS))
    assert v.equal(V)
    assert v.metadata == {"concept": "calm", "model_type": "llama", "steervector.method": "diffmean"}


def test_other_tensors_are_ignored_with_a_warning(tmp_path):
    path = control_vector(tmp_path / "v.gguf", ROWS | {"scale": np.float32([2]), "probe.1": np.int32([1, 2, 3])})
    with pytest.warns(UserWarning, match=r"the tensors \['scale', 'probe.1'\] are no directions, and ignored"):
        assert SteeringVector.load(path).equal(V)


def test_a_tensor_that_was_added_to_our_own_file_is_refused(tmp_path):
    V.save(tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    writer = gguf.GGUFWriter(tmp_path / "more.gguf", "controlvector")
    for name, field in reader.fields.items():
        if name.startswith(("controlvector.", "actsteer.")):
            writer.add_key_value(name, field.contents(), field.types[0])
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert SteeringVector.load(written(tmp_path / "more.gguf", writer, tensors)).equal(V)
    writer = gguf.GGUFWriter(tmp_path / "more.gguf", "controlvector")
    for name, field in reader.fields.items():
        if name.startswith(("controlvector.", "actsteer.")):
            writer.add_key_value(name, field.contents(), field.types[0])
    with pytest.raises(FileFormatError, match="the SHA-256 does not match"):
        SteeringVector.load(written(tmp_path / "more.gguf", writer, tensors | {"scale": np.float32([2])}))


def test_big_endian_is_refused_in_words(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector", endianess=gguf.GGUFEndian.BIG)
    writer.add_string("controlvector.model_hint", "llama")
    written(tmp_path / "v.gguf", writer, {"direction.1": ROWS["direction.1"].copy()})
    with pytest.raises(FileFormatError, match="a big-endian GGUF file; convert it first"):
        SteeringVector.load(tmp_path / "v.gguf")


def test_tensors_that_share_their_bytes_are_bounded_by_the_file_s_size(tmp_path):
    path = control_vector(tmp_path / "v.gguf", {f"direction.{n}": np.float32([n] * 640) for n in range(1, 9)})
    content = path.read_bytes()
    for n in range(1, 9):  # each offset becomes 0, and the numbers of one are left
        name = f"direction.{n}".encode()
        at = content.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + 4 + 8 + 4
        content = content[:at] + b"\0" * 8 + content[at + 8 :]
    path.write_bytes(content[: -7 * 2560])
    with pytest.raises(FileFormatError, match="its tensors are larger than the file"):
        SteeringVector.load(path)


# --- what is refused ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ({"direction.1": np.int32([1])}, "direction.1: expected F16, .*, F64 of shape .d,. or .1, d., got I32"),
        ({"direction.1": np.float32([[1, 2], [3, 4]])}, r"expected F16, .* of shape .* got F32 of shape \(2, 2\)"),
        ({"direction.1": np.float32([[1], [2]])}, r"got F32 of shape \(2, 1\)"),
        ({"direction.1": np.float32([np.nan])}, "direction.1 is not finite"),
        ({"direction.1": np.float32([1]), "direction.2": np.float32([1, 2])}, "the directions have several sizes"),
        ({"direction.x": np.float32([1])}, "expected direction.N, with a number"),
        ({"direction.01": np.float32([1])}, "expected direction.N, with a number"),
        ({"weight": np.float32([1])}, r"expected tensors direction.N, got \['weight'\]"),
        ({}, r"expected tensors direction.N, got \[\]"),
    ],
    ids=str,
)
def test_tensors_that_are_no_directions_are_refused(tmp_path, rows, why):
    with pytest.raises(FileFormatError, match=why):
        SteeringVector.load(control_vector(tmp_path / "v.gguf", rows))


def test_a_model_s_file_is_not_a_control_vector(tmp_path):
    with pytest.raises(FileFormatError, match="expected a control vector, this is a GGUF file of 'llama'"):
        SteeringVector.load(control_vector(tmp_path / "v.gguf", ROWS, architecture="llama"))


@pytest.mark.slow
def test_every_flipped_bit_of_our_own_file_is_refused_or_means_the_same(tmp_path):
    path = tmp_path / "v.gguf"
    V.save(path)
    whole, equal = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(damaged))
        try:
            found = SteeringVector.load(path)
        except FileFormatError:
            continue
        assert found.equal(V)
        assert found.metadata == V.metadata
        equal += 1
    assert equal < len(whole) * 2  # the padding, the names of keys that nobody reads


def test_truncations_and_random_bytes_are_refused(tmp_path):
    path = tmp_path / "v.gguf"
    V.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 32):  # the last bytes may be padding
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            SteeringVector.load(path)
    for content in (b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 64, json.dumps({}).encode()):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match="not a readable GGUF file"):
            SteeringVector.load(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        SteeringVector.load(tmp_path / "absent.gguf")
