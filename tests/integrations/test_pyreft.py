"""LoReFT edits of pyreft: the same edit, from files as it writes them, old and new, and from no others."""

import json
import pickle
import re

import pytest
import torch
from torch import nn

from actsteer import FileFormatError, LowRank, SiteNotFoundError, Steerer
from actsteer.integrations.pyreft import from_pyreft
from tests.zoo import gpt2, llama

D, RANK = 16, 3
IDS = torch.tensor([[3, 1, 4, 1, 5]])
LOREFT = "<class 'pyreft.interventions.LoreftIntervention'>"


def state(seed, d=D, rank=RANK):
    generator = torch.Generator().manual_seed(seed)
    rotate = torch.linalg.qr(torch.randn(d, rank, generator=generator))[0]
    weight, bias = torch.randn(rank, d, generator=generator), torch.randn(rank, generator=generator)
    return {"weight": weight, "bias": bias, "rotate_layer": rotate}


def written(folder, layers=(0, 2), *, dotted=False, kinds=LOREFT, component="block_output", unit="pos", states=None):
    """A folder as ReftModel.save writes it; old versions named its files with dots."""
    folder.mkdir(exist_ok=True)
    for layer in layers:
        path = component.format(layer=layer)
        parts = [] if "." in path else ["layer", str(layer)]
        parts += ["comp", path, "unit", unit, "nunit", "1"]
        key = ".".join(parts) if dotted else "_".join(part.replace(".", "_") for part in parts)
        torch.save(state(layer) if states is None else states, folder / f"intkey_{key}#0.bin")
    rest = [None] * 10
    config = {
        "representations": [[layer, component.format(layer=layer), unit, 1, *rest] for layer in layers],
        "intervention_types": [kinds] * len(layers),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def formula(h, parts):
    parts = {name: own.to(h.dtype) for name, own in parts.items()}
    rotated = h @ parts["rotate_layer"]
    return h + (h @ parts["weight"].T + parts["bias"] - rotated) @ parts["rotate_layer"].T


@pytest.mark.parametrize("dotted", [False, True])
def test_the_edit_is_lorefts_at_the_blocks_output(tmp_path, dotted):
    model = llama()
    edit = from_pyreft(written(tmp_path / "calm", dotted=dotted), model=model)
    assert isinstance(edit, LowRank) and edit.concept == "calm" and edit.rank == RANK
    assert edit.sites == ("model.layers.0", "model.layers.2")
    for layer in (0, 2):
        h = torch.randn(7, D, generator=torch.Generator().manual_seed(9))
        seen = edit.at(f"model.layers.{layer}")(h, torch.zeros(D), torch.ones(()))
        torch.testing.assert_close(seen, formula(h, state(layer)), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), Steerer(model, edit, positions="last"):
        steered = model(IDS).logits
    handles = [model.model.layers[layer].register_forward_hook(at_last(state(layer))) for layer in (0, 2)]
    with torch.no_grad():
        torch.testing.assert_close(steered, model(IDS).logits, rtol=1e-5, atol=1e-6)
    for handle in handles:
        handle.remove()


def at_last(parts):
    def hook(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        edited = torch.cat([h[:, :-1], formula(h[:, -1:], parts)], dim=1)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook


@pytest.mark.parametrize(
    ("component", "site"),
    [
        ("block_input", "model.layers.1:in"),
        ("model.layers[{layer}].output", "model.layers.1"),
        ("model.layers[{layer}].mlp.output", "model.layers.1.mlp"),
        ("model.layers[{layer}].self_attn.o_proj.input", "model.layers.1.self_attn.o_proj:in"),
    ],
)
@pytest.mark.parametrize("dotted", [False, True])
def test_a_component_is_a_site(tmp_path, component, site, dotted):
    edit = from_pyreft(written(tmp_path, (1,), component=component, dotted=dotted), model=llama(), concept="x")
    assert edit.sites == (site,) and edit.concept == "x"
    with torch.no_grad(), Steerer(model := llama(), edit):
        model(IDS)


def test_it_travels_in_a_file_of_ours_and_of_half_numbers_is_float32(tmp_path):
    halves = {name: own.bfloat16() if name != "rotate_layer" else own for name, own in state(1).items()}
    edit = from_pyreft(written(tmp_path / "calm", (1,), states=halves), model=llama())
    edit.save(tmp_path / "calm.safetensors")
    again = LowRank.load(tmp_path / "calm.safetensors")
    for mine, theirs in zip(edit["model.layers.1"], again["model.layers.1"], strict=True):
        assert torch.equal(mine, theirs) and mine.dtype is torch.float32


def test_another_model_has_other_names(tmp_path):
    folder = written(tmp_path, (1,), states=state(1, d=8))
    assert from_pyreft(folder, model=gpt2()).sites == ("transformer.h.1",)
    with pytest.raises(SiteNotFoundError, match=r"layers\.9"):
        from_pyreft(written(tmp_path / "far", (9,)), model=llama())


CHANGED = {
    "no bias": ({"bias": None}, "expected the tensors weight, bias, rotate_layer"),
    "another size": ({"rotate_layer": torch.ones(D, RANK + 1)}, r"rotate_layer \(d, r\), got"),
    "transposed": ({"weight": torch.ones(D, RANK)}, "expected weight"),
    "not finite": ({"bias": torch.full((RANK,), float("nan"))}, "expected finite"),
    "integers": ({"bias": torch.ones(RANK, dtype=torch.long)}, "bias: expected one of"),
    "no storage": ({"weight": torch.ones(1).expand(RANK, D)}, "weight: expected a storage"),
    "a number": ({"bias": 1.0}, "bias: "),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    states = {name: own for name, own in (state(1) | change).items() if own is not None}
    with pytest.raises(FileFormatError, match=message):
        from_pyreft(written(tmp_path, (1,), states=states), model=llama())


def test_what_is_no_loreft_is_refused(tmp_path):
    model = llama()
    with pytest.raises(FileFormatError, match=r"expected LoreftInterventions alone, got .*NoreftIntervention"):
        from_pyreft(written(tmp_path, kinds="<class 'pyreft.interventions.NoreftIntervention'>"), model=model)
    for component in ("mlp_activation", "head_query_output", "model.layers.*.output"):
        config = json.dumps({"representations": [[1, component, "pos", 1]], "intervention_types": [LOREFT]})
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(FileFormatError, match=rf"component '{re.escape(component)}': expected block_output"):
            from_pyreft(tmp_path, model=model)
    with pytest.raises(FileFormatError, match=r"unit 'pos', got 'h\.pos'"):
        from_pyreft(written(tmp_path, unit="h.pos"), model=model)
    with pytest.raises(FileFormatError, match=r"several edits at site 'model\.layers\.1'"):
        from_pyreft(written(tmp_path, (1, 1)), model=model)
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "config.json").write_text((written(tmp_path) / "config.json").read_text())
    with pytest.raises(FileFormatError, match="expected one of the files"):
        from_pyreft(tmp_path / "lost", model=model)
    for text in ("{}", "[1]", "no json", '{"representations": [[1]], "intervention_types": []}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(FileFormatError, match="expected representations and types"):
            from_pyreft(tmp_path, model=model)
    with pytest.raises(FileNotFoundError):
        from_pyreft(tmp_path / "nowhere", model=model)


class Planted:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    folder = written(tmp_path, (1,))
    (file,) = folder.glob("*.bin")
    file.write_bytes(pickle.dumps({"weight": Planted()}))
    with pytest.raises(FileFormatError, match="nothing is unpickled"):
        from_pyreft(folder, model=nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), nn.Identity()])}))
    assert "executed" not in capsys.readouterr().out
