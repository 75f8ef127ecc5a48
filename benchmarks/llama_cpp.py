"""llama.cpp, called through the prebuilt library in the `xllamacpp` wheel: an oracle for control vectors."""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch


class Opaque(ctypes.Structure):
    """A struct of llama.cpp's, passed on by value as it came; larger than any of them, so that no field is named."""

    _fields_ = [("bytes", ctypes.c_char * 1024)]


def library() -> ctypes.CDLL:
    """The library, its functions declared."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.submodule_search_locations
    (found,) = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(found))
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_model_default_params", Opaque, []),
        ("llama_context_default_params", Opaque, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Opaque]),
        ("llama_init_from_model", pointer, [pointer, Opaque]),
        ("llama_batch_get_one", Opaque, [pointer, ctypes.c_int32]),
        ("llama_decode", ctypes.c_int32, [pointer, Opaque]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        (
            "llama_set_adapter_cvec",
            ctypes.c_int32,
            [pointer, pointer, ctypes.c_size_t, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32],
        ),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("llama_log_set", None, [pointer, pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def exact(params: Opaque) -> Opaque:
    """The same in F32 throughout: keys and values, otherwise F16, and no flash attention, which rounds to F16."""
    content = ctypes.string_at(ctypes.addressof(params), ctypes.sizeof(params))
    types = [struct.pack("8i", 0, 0, 0, 0, kind, kind, 0, 0) for kind in (1, 0)]  # they follow two null pointers
    flash = [struct.pack("6i", -1, -1, -1, kind, 0, 0) for kind in (-1, 0)]  # the last of four that are "automatic"
    for present, wanted in (types, flash):
        assert content.count(present) == 1
        content = content.replace(present, wanted)
    return Opaque.from_buffer_copy(content)


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(self, path: Path) -> None:
        self.lib = library()
        self.lib.llama_log_set(ctypes.cast(_SILENT, ctypes.c_void_p), None)
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model

    def logits(self, ids: list[int], vocabulary: int, vector: Path | None = None, *, shift: int = 0) -> torch.Tensor:
        """The logits of the last token; with a control vector's file, as its numbers say, or `shift` blocks later."""
        context = self.lib.llama_init_from_model(self.model, exact(self.lib.llama_context_default_params()))
        assert context
        try:
            if vector is not None:
                rows = {int(t.name.split(".")[1]): np.array(t.data) for t in gguf.GGUFReader(vector).tensors}
                last, d = max(rows) + shift, len(next(iter(rows.values())))
                data = np.zeros((last, d), np.float32)  # as llama.cpp has it, the row of block 1 first
                for number, row in rows.items():
                    data[number + shift - 1] = row
                at = data.ctypes.data_as(ctypes.c_void_p)
                assert self.lib.llama_set_adapter_cvec(context, at, data.size, d, 1, last) == 0
            tokens = (ctypes.c_int32 * len(ids))(*ids)
            batch = self.lib.llama_batch_get_one(ctypes.cast(tokens, ctypes.c_void_p), len(ids))
            assert self.lib.llama_decode(context, batch) == 0
            return torch.tensor(self.lib.llama_get_logits_ith(context, -1)[:vocabulary])
        finally:
            self.lib.llama_free(context)

    def close(self) -> None:
        """Free the model."""
        self.lib.llama_model_free(self.model)


def write_llama(model: Any, path: Path) -> None:
    """A transformers Llama as a GGUF of F32 weights, without a vocabulary."""
    config = model.config
    heads, kept = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kept)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = model.state_dict()
    found = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    found["output.weight"] = state["lm_head.weight"]
    for number in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{number}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):  # llama.cpp rotates neighbours, transformers halves
                parts = weight.reshape(heads if ours == "attn_q" else kept, 2, -1, weight.shape[1])
                weight = parts.transpose(1, 2).reshape(weight.shape)
            found[f"blk.{number}.{ours}.weight"] = weight
    for name, weight in found.items():
        writer.add_tensor(name, weight.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
