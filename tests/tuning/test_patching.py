"""patching: equal to plain hooks, cell by cell and bit for bit; what a whole activation recovers is all."""

import importlib.util

import pytest
import torch
from torch import nn

from actsteer import (
    BatchError,
    ShapeError,
    SiteNotFoundError,
    UnsupportedModelError,
    find_sites,
    patching,
    residual_sites,
)
from actsteer.collecting.eval_mode import eval_mode
from reference.language.model import cache, load, packaged
from tests.oracles import state
from tests.zoo import cnn, mlp, normal

IDS = torch.tensor([[3, 9, 4, 22, 6], [8, 7, 12, 5, 30]])
OTHER = torch.tensor([[3, 11, 4, 22, 6], [8, 7, 19, 5, 30]])
LAYERS = [f"model.layers.{n}" for n in range(2)]


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers")
    from tests.zoo import llama

    return llama(num_hidden_layers=2)


def difference(output):
    """The logit of one answer less that of another."""
    return output.logits[:, -1, 7] - output.logits[:, -1, 11]


def by_hooks(net, clean, corrupted, metric, site, put):
    """The metric of the corrupted run where `put(activation, clean one)` changes the activation of a site in place."""
    call = lambda x: net(**x) if isinstance(x, dict) else net(x)  # noqa: E731
    module, seen = net.get_submodule(site), []
    with torch.no_grad():
        handle = module.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
        call(clean)
        handle.remove()

        def patch(m, args, out):
            out = out.clone()
            put(out, seen[0])
            return out

        handle = module.register_forward_hook(patch)
        found = metric(call(corrupted)).double()
        handle.remove()
    return found


def put_at(*tokens):
    def put(own, clean):
        own[:, list(tokens)] = clean[:, list(tokens)]

    return put


# --- the table -------------------------------------------------------------------------------------------------------
def test_every_cell_of_a_language_model_is_what_plain_hooks_give(model):
    clean, corrupted = {"input_ids": IDS}, {"input_ids": OTHER}
    before = state(model)
    found = patching(model, clean, corrupted, metric=difference)
    assert state(model) == before
    assert found.sites == tuple(LAYERS) and found.positions == ("0", "1", "2", "3", "4")
    for row, site in enumerate(LAYERS):
        for token in range(5):
            expected = by_hooks(model, clean, corrupted, difference, site, put_at(token))
            assert torch.equal(found.patched[row, token], expected)
    with torch.no_grad():
        assert torch.equal(found.clean, difference(model(**clean)).double())
        assert torch.equal(found.corrupted, difference(model(**corrupted)).double())
    means = found.patched.mean(-1) - found.corrupted.mean()
    assert torch.equal(found.recovered, means / (found.clean.mean() - found.corrupted.mean()))
    assert bool((found.recovered[:, 0] == 0).all())  # the first token is the same in both
    assert torch.equal(found.patched[-1, 4], found.clean)  # of the last block the last token alone is read


def test_columns_are_any_positions_and_have_names(model):
    clean, corrupted, site = {"input_ids": IDS}, {"input_ids": OTHER}, LAYERS[0]
    columns = {"changed": [[1], [2]], "span": slice(1, 3), "last": -1, "all": "all"}
    found = patching(model, clean, corrupted, metric=difference, sites=site, positions=columns)
    assert found.positions == tuple(columns)

    def each(own, before):
        own[0, 1], own[1, 2] = before[0, 1], before[1, 2]

    for place, put in enumerate((each, put_at(1, 2), put_at(4), put_at(*range(5)))):
        assert torch.equal(found.patched[0, place], by_hooks(model, clean, corrupted, difference, site, put))
    assert torch.equal(found.patched[0, 3], found.clean) and float(found.recovered[0, 3]) == 1.0
    named = patching(model, clean, corrupted, metric=difference, sites=site, positions=[slice(1, 3), -1, "all"])
    assert torch.equal(named.patched, found.patched[:, 1:]) and named.positions[1:] == ("-1", "all")


def test_exchanged_inputs_are_the_other_direction(model):
    clean, corrupted = {"input_ids": IDS}, {"input_ids": OTHER}
    there = patching(model, clean, corrupted, metric=difference, sites=LAYERS)
    back = patching(model, corrupted, clean, metric=difference, sites=LAYERS)
    assert torch.equal(back.clean, there.corrupted) and torch.equal(back.corrupted, there.clean)
    assert not torch.allclose(back.recovered, there.recovered)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_left_out_and_each_row_is_what_it_is_alone(model, side):
    flip = (lambda own: own) if side == "left" else (lambda own: own.flip(1))
    ids, other = (
        torch.tensor([[2, 2, 9, 4, 22], [8, 7, 12, 5, 30]]),
        torch.tensor([[2, 2, 11, 4, 22], [8, 6, 12, 5, 30]]),
    )
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    clean, corrupted = ({"input_ids": flip(own), "attention_mask": flip(mask)} for own in (ids, other))
    last = [4, 4] if side == "left" else [2, 4]
    metric = lambda output: output.logits[[0, 1], last[: len(output.logits)], 7]  # noqa: E731
    with pytest.raises(BatchError, match="the texts have 3 to 5 tokens"):
        patching(model, clean, corrupted, metric=metric)
    found = patching(model, clean, corrupted, metric=metric, sites=LAYERS, positions=[0, 1, -1])
    for row in range(2):
        real = flip(mask)[row].bool()
        alone = [{"input_ids": own["input_ids"][row : row + 1, real]} for own in (clean, corrupted)]
        single = patching(model, *alone, metric=lambda out: out.logits[:, -1, 7], sites=LAYERS, positions=[0, 1, -1])
        torch.testing.assert_close(found.patched[:, :, row], single.patched[:, :, 0], rtol=0, atol=1e-5)


def test_heads_are_patched_as_by_plain_hooks(model):
    clean, corrupted = {"input_ids": IDS}, {"input_ids": OTHER}
    heads = find_sites(model, "model.layers.1.self_attn.o_proj:in[head=*]")
    found = patching(model, clean, corrupted, metric=difference, sites=heads)
    projection, size, seen = model.model.layers[1].self_attn.o_proj, int(heads[0].split(":")[-1][:-1]), []
    assert len(heads) == model.config.num_attention_heads > 1 and found.sites == heads
    with torch.no_grad():
        handle = projection.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
        model(**clean)
        handle.remove()
        for head in range(len(heads)):
            for token in range(IDS.shape[1]):

                def patch(m, args, part=slice(head * size, (head + 1) * size), token=token):
                    own = args[0].clone()
                    own[:, token, part] = seen[0][:, token, part]
                    return (own,)

                handle = projection.register_forward_pre_hook(patch)
                assert torch.equal(found.patched[head, token], difference(model(**corrupted)).double())
                handle.remove()


def test_a_cache_that_comes_with_the_call_is_left_as_it_is(model):
    with torch.no_grad():
        caches = [model(own[:, :2]).past_key_values for own in (IDS, OTHER)]
    clean, corrupted = (
        {"input_ids": own[:, 2:], "past_key_values": cache} for own, cache in zip((IDS, OTHER), caches, strict=True)
    )
    found = patching(model, clean, corrupted, metric=difference, sites=LAYERS[-1], positions=["all"])
    assert [cache.get_seq_length() for cache in caches] == [2, 2]
    whole = [difference(model(own)).detach().double() for own in (IDS, OTHER)]
    torch.testing.assert_close(torch.stack([found.clean, found.corrupted]), torch.stack(whole), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.patched[0, 0], found.clean)


@pytest.mark.parametrize("build", [mlp, cnn])
def test_a_network_without_tokens_has_one_column(build):
    net = build().eval()
    x = normal(4, 12) if build is mlp else normal(4, 3, 4, 4)
    metric, sites = lambda y: y[:, 0] - y[:, 1], [name for name, _ in net.named_children()]
    found = patching(net, x, x.flip(0) * 0.5 + 1, metric=metric, sites=sites)
    assert found.positions == ("all",) and found.recovered.shape == (len(sites), 1)
    for row, site in enumerate(sites):
        expected = by_hooks(net, x, x.flip(0) * 0.5 + 1, metric, site, lambda own, clean: own.copy_(clean))
        assert torch.equal(found.patched[row, 0], expected)
        assert torch.equal(found.patched[row, 0], found.clean)  # nothing goes past a layer of a chain


def test_what_a_pass_counts_is_as_before():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = nn.Identity()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            return self.site(x)

    patching(net := Counted(), torch.ones(2, 1), torch.zeros(2, 1), metric=lambda y: y[:, 0], sites="site")
    assert not net.passes.any()


def test_what_a_branch_carries_is_its_share():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Identity(), nn.Identity()

        def forward(self, x):
            return 3 * self.one(x) + self.other(x)

    found = patching(Branches(), torch.ones(2, 1), torch.zeros(2, 1), metric=lambda y: y[:, 0], sites=["one", "other"])
    assert found.recovered.tolist() == [[0.75], [0.25]]
    assert found.verdict == "a share of 0.75 of 4 (corrupted 0, clean 4) is recovered at 'one', positions all"


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not (cache().exists() or packaged()), reason="SmolLM2 is not installed")
def test_a_real_model_carries_the_subject_and_then_the_answer_and_equals_plain_hooks():
    net, tokenizer = load()
    clean, corrupted = (
        tokenizer(f"John and Mary went to the shop. {name} gave a bottle of milk to", return_tensors="pt")
        for name in ("John", "Mary")
    )
    mary, john = (tokenizer(f" {name}").input_ids[0] for name in ("Mary", "John"))
    metric = lambda output: output.logits[:, -1, mary] - output.logits[:, -1, john]  # noqa: E731
    sites, columns = residual_sites(net, [9, 27]), {"name": 8, "last": -1}
    found = patching(net, clean, corrupted, metric=metric, sites=sites, positions=columns, progress=False)
    with eval_mode(net):
        for row, site in enumerate(sites):
            for place, token in enumerate((8, 14)):
                expected = by_hooks(net, dict(clean), dict(corrupted), metric, site, put_at(token))
                assert torch.equal(found.patched[row, place], expected)
    (early, early_last), (late, late_last) = found.recovered.tolist()
    assert early > 0.9 > 0.5 > late and late_last > 0.9 > 0.5 > early_last


# --- what is refused -------------------------------------------------------------------------------------------------
def is_late(batch):
    return batch["input_ids"] > 9


def test_bad_inputs_are_refused_and_the_model_stays(model):
    clean, before = {"input_ids": IDS}, state(model)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for corrupted, options, error, message in (
        ({"input_ids": OTHER[:, :4]}, {}, BatchError, r"clean has the shape \(2, 5\), and corrupted \(2, 4\)"),
        ({"input_ids": OTHER, "attention_mask": mask}, {}, BatchError, "pads at other places"),
        ([OTHER], {}, BatchError, "corrupted: expected one call"),
        (clean, {}, ValueError, "expected two numbers that differ"),
        ({"input_ids": OTHER}, {"positions": "last"}, TypeError, "a column or more"),
        ({"input_ids": OTHER}, {"positions": []}, TypeError, "a column or more"),
        ({"input_ids": OTHER}, {"positions": ["first"]}, ValueError, "expected one of"),
        ({"input_ids": OTHER}, {"positions": [is_late, is_late]}, ValueError, "two columns have one name"),
        ({"input_ids": OTHER}, {"positions": [7]}, BatchError, "has 5 tokens, and 8 are needed"),
        ({"input_ids": OTHER}, {"positions": [slice(7, 9)]}, BatchError, "no token of the inputs is meant"),
        ({"input_ids": OTHER}, {"sites": "model.layer.0"}, SiteNotFoundError, "model.layers.0"),
        ({"input_ids": OTHER}, {"metric": lambda out: out.logits[:, -1]}, TypeError, "a number for every row"),
        ({"input_ids": OTHER}, {"metric": lambda out: out.logits[:, -1, 0] / 0}, ValueError, "finite"),
    ):
        with pytest.raises(error, match=message):
            patching(model, clean, corrupted, **({"metric": difference} | options))
        assert state(model) == before


def test_without_blocks_sites_are_asked_for_and_without_tokens_there_are_no_positions():
    net, x = mlp(), normal(4, 12)
    with pytest.raises(UnsupportedModelError, match="name the sites"):
        patching(net, x, -x, metric=lambda y: y[:, 0])
    with pytest.raises(ShapeError, match="in which there are none"):
        patching(net, x, -x, metric=lambda y: y[:, 0], sites="0", positions=[0])


# --- to look at ------------------------------------------------------------------------------------------------------
def test_it_shows_itself_as_text_html_and_a_picture(model, tmp_path):
    found = patching(model, {"input_ids": IDS}, {"input_ids": OTHER}, metric=difference)
    text, page = str(found), found._repr_html_()
    assert text.splitlines()[0].split() == ["site", *"01234"] and text.splitlines()[-1] == found.verdict
    for row, site in zip(found.recovered.tolist(), LAYERS, strict=True):
        assert [site, *(f"{share:.2f}" for share in row)] in [line.split() for line in text.splitlines()]
        assert site in page and all(f"{share:+.2f}" in page for share in row)
    assert repr(found) == "Patched(sites=2, positions=5, rows=2)"
    if importlib.util.find_spec("matplotlib"):
        for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
            found.plot(tmp_path / f"shares.{suffix}")
            assert (tmp_path / f"shares.{suffix}").read_bytes().startswith(start)
