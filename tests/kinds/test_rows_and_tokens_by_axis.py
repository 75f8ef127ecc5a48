"""Rows and tokens along axes that are not the first two: (S, B, D), (4, B, S, D) of streams, (B, S, n, D).

The kind of fault: strengths, positions, pads and counts along the wrong axis.
"""

from typing import ClassVar

import pytest
import torch
from torch import nn

from actsteer import (
    ActsteerError,
    Add,
    CosineAbove,
    MeanDifference,
    ProjectionAbove,
    Steerer,
    SteeringVector,
    collect,
    fit,
    record,
)
from tests.kinds.by_hand import added, every_backend, identity, listening, moved, right_or_refused
from tests.zoo import seeded

B, S, N = 3, 5, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
LAST = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
FIRST = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]])


class Layout(nn.Module):
    """A site "b" that is given the activation in another layout, and "c" in the usual one."""

    def __init__(self):
        super().__init__()
        self.b, self.c = identity(), identity()

    def forward(self, inputs_embeds, attention_mask=None):
        return self.c(self.back(self.b(self.there(inputs_embeds))))


class SequenceFirst(Layout):
    """(S, B, D), as the blocks of the first CLIP, of fairseq and of XLNet."""

    axes: ClassVar = {"row_axis": 1}

    def there(self, x):
        return x.transpose(0, 1)

    def back(self, x):
        return x.transpose(0, 1)


class Streams(Layout):
    """(N, B, S, D), as Gemma 3n."""

    axes: ClassVar = {"row_axis": 1, "token_axis": 2}

    def there(self, x):
        return x.expand(N, *x.shape)

    def back(self, x):
        return x.mean(0)


class HyperConnections(Layout):
    """(B, S, N, D)."""

    axes: ClassVar = {"token_axis": 1}

    def there(self, x):
        return x.unsqueeze(2).expand(-1, -1, N, -1)

    def back(self, x):
        return x.mean(2)


class Heads(Layout):
    """(B, N, S, D), as between the heads of attention."""

    axes: ClassVar = {"token_axis": 2}

    def there(self, x):
        return x.unsqueeze(1).expand(-1, N, -1, -1)

    def back(self, x):
        return x.mean(1)


LAYOUTS = (SequenceFirst, Streams, HyperConnections, Heads)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
V = SteeringVector({"b": torch.ones(2)})


def inputs(rows=B, length=S):
    """Each row has its number everywhere."""
    return torch.arange(float(rows))[:, None, None].expand(rows, length, 2).contiguous()


def amounts(steered, plain):
    """What was added, (rows, tokens)."""
    return (steered - plain).mean(-1)


# --- declared --------------------------------------------------------------------------------------------------------
@every_backend
@every_layout
def test_strengths_per_row_are_those_of_the_rows(backend, layout):
    """Also where the axes are as long as one another."""
    for shape in ((3, 5), (3, 3), (4, 4), (4, 2), (5, 4), (1, 3)):
        x, c = torch.zeros(*shape, 2), torch.arange(float(shape[0]))
        with Steerer(layout(), V, c=c, backend=backend, **layout.axes) as steerer:
            steered = steerer.model(x)
        assert torch.equal(steered, c[:, None, None].expand(*shape, 2))


@pytest.mark.parametrize("backend", ["auto", "tap", "hook"])  # a buffer has no room for them
@every_layout
def test_strengths_per_row_and_token_are_those_of_the_tokens(backend, layout):
    c = torch.arange(float(B * S)).view(B, S)
    with Steerer(layout(), V, c=c, backend=backend, **layout.axes) as steerer:
        assert torch.equal(amounts(steerer.model(inputs()), inputs()), c)


POSITIONS = {
    "all": (None, MASK),
    "last": ("last", LAST),
    "first": (0, FIRST),
    "list": ([0, -1], FIRST + LAST),
    "slice": (slice(1, -1), MASK - FIRST - LAST),
    "mask": (MASK.bool() & (torch.arange(S) == 2), MASK * (torch.arange(S) == 2)),
    "callable": (lambda given: given["inputs_embeds"][..., 0] >= 1, MASK * torch.tensor([[0], [1], [1]])),
}


@every_backend
@every_layout
@pytest.mark.parametrize(("positions", "want"), POSITIONS.values(), ids=POSITIONS)
def test_positions_and_pads_are_those_of_the_tokens(backend, layout, positions, want):
    with Steerer(layout(), V, positions=positions, backend=backend, **layout.axes) as steerer:
        assert moved(steerer.model(inputs(), attention_mask=MASK), inputs()) == want.tolist()


@every_backend
@every_layout
@pytest.mark.parametrize("of", ["all sites", "one site"])
def test_axes_are_one_for_all_sites_or_one_for_each(backend, layout, of):
    """At "c" the activation is (B, S, D)."""
    axes: ClassVar = {name: {"b": axis} if of == "one site" else axis for name, axis in layout.axes.items()}
    sites = "b" if of == "all sites" else ["b", "c"]
    v = SteeringVector({"b": torch.ones(2), "c": torch.full((2,), 8.0)})
    c = torch.arange(float(B))
    with Steerer(layout(), v, sites=sites, c=c, positions="last", backend=backend, **axes) as steerer:
        got = amounts(steerer.model(inputs(), attention_mask=MASK), inputs())
    assert torch.equal(got, c[:, None] * LAST * (1 if of == "all sites" else 9))


@every_backend
@every_layout
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_a_gate_decides_for_the_rows(backend, layout, per):
    """It reads where it steers; row 0 is below the threshold, of row 1 the tokens on the right."""
    x = torch.tensor([[0.0] * 5, [1, 1, 1, 0, 0], [2.0] * 5])[..., None].expand(B, S, 2).contiguous()
    gate = ProjectionAbove(V, 0.5, per=per)
    fires = (x[..., 0] > 0.3).int() if per == "token" else torch.tensor([[0], [1], [1]]).expand(B, S)
    with Steerer(layout(), V, gate=gate, backend=backend, strict=False, **layout.axes) as steerer:
        if per == "token" and layout is not SequenceFirst:  # several activations a token
            right_or_refused(lambda: moved(steerer.model(x), x), fires.tolist())
        else:
            assert moved(steerer.model(x), x) == fires.tolist()


@every_backend
@every_layout
def test_a_gate_does_not_read_the_pads(backend, layout):
    """The pads alone are above the threshold."""
    x = torch.where(MASK.bool()[..., None], 0.0, 100.0).expand(B, S, 2).contiguous()
    with Steerer(layout(), V, gate=ProjectionAbove(V, 0.5), backend=backend, **layout.axes) as steerer:
        assert moved(steerer.model(x, attention_mask=MASK), x) == torch.zeros(B, S).int().tolist()


@every_backend
@every_layout
def test_a_gate_that_reads_elsewhere_decides_for_the_rows_here(backend, layout):
    """It reads at "c", where rows come first, what the other site gives at strength zero."""
    gate = CosineAbove(SteeringVector({"b": torch.tensor([1.0, 0.0])}), 0.9)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])[:, None].expand(B, S, 2).contiguous()
    v = SteeringVector({"c": torch.ones(2)})
    axes: ClassVar = {name: {"b": axis} for name, axis in layout.axes.items()}
    with Steerer(layout(), v, gate=gate, backend=backend, **axes) as steerer:
        assert moved(steerer.model(x), x) == [[1] * S, [0] * S, [1] * S]


@every_layout
@pytest.mark.parametrize(("positions", "want"), [("all", MASK), ("last", LAST), (0, FIRST)], ids=["all", "last", "0"])
def test_counts_are_those_of_the_tokens(layout, positions, want):
    """In streams each stream's token may be a row of its own."""
    batch = {"inputs_embeds": inputs(), "attention_mask": MASK}
    options = {"sites": "b", "positions": positions, "progress": False, **layout.axes}
    s = collect(layout(), [batch], **options)["b"]
    mean = (inputs() * want[..., None]).sum((0, 1)) / want.sum()
    assert s.count in (int(want.sum()), int(want.sum()) * N)
    torch.testing.assert_close(s.mean.float(), mean)
    rows = record(layout(), [batch], **options)["b"]
    assert rows.shape == (s.count, 2)
    torch.testing.assert_close(rows.double().mean(0), s.mean)


@every_layout
def test_the_mean_of_each_row_is_one_row(layout):
    batch = {"inputs_embeds": inputs(), "attention_mask": MASK}
    got = collect(layout(), [batch], sites="b", positions="mean", progress=False, **layout.axes)["b"]
    assert got.count in (B, B * N) and got.mean.tolist() == [1.0, 1.0]


@every_layout
def test_labels_per_row_go_to_the_rows(layout):
    batches = [{"inputs_embeds": inputs(), "attention_mask": MASK}]
    options = {"sites": "b", "positions": "last", "progress": False, **layout.axes}
    got = collect(layout(), batches, by=[[0, 1, 1]], **options)
    for label, mean in ((0, 0.0), (1, 1.5)):
        assert got[label]["b"].mean.tolist() == [mean, mean]


@every_layout
def test_fit_reads_the_tokens(layout):
    high = {"inputs_embeds": torch.where(LAST.bool()[..., None], 3.0, 50.0).expand(B, S, 2), "attention_mask": MASK}
    low = {"inputs_embeds": torch.where(LAST.bool()[..., None], 1.0, 70.0).expand(B, S, 2), "attention_mask": MASK}
    options = {"sites": "b", "positions": "last", "estimator": MeanDifference(), "progress": False, **layout.axes}
    v = fit(layout(), positive=[high], negative=[low], **options)
    assert v["b"].tolist() == [2.0, 2.0]


# --- not declared ----------------------------------------------------------------------------------------------------
ROWS = {
    "strengths": {"c": torch.arange(float(B))},
    "first": {"positions": 0},
    "last": {"positions": "last"},
    "gate": {"gate": ProjectionAbove(V, 0.5)},
}


@every_backend
@pytest.mark.parametrize("layout", [SequenceFirst, Streams])
@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_what_needs_rows_is_refused_where_axis_0_does_not_hold_as_many(backend, layout, options):
    with pytest.raises(ActsteerError), Steerer(layout(), V, backend=backend, strict=False, **options) as steerer:
        steerer.model(inputs())


@every_backend
@pytest.mark.parametrize("layout", [SequenceFirst, Streams])
def test_pads_are_refused_there_too(backend, layout):
    with pytest.raises(ActsteerError), Steerer(layout(), V, backend=backend, strict=False) as steerer:
        steerer.model(inputs(), attention_mask=MASK)
    with pytest.raises(ActsteerError):
        collect(layout(), [{"inputs_embeds": inputs(), "attention_mask": MASK}], sites="b", progress=False)


@every_backend
@every_layout
def test_a_plain_addition_needs_no_axes(backend, layout):
    with Steerer(layout(), V, backend=backend) as steerer:
        assert torch.equal(steerer.model(inputs()), inputs() + 1)
        assert torch.equal(steerer.model(inputs(), attention_mask=torch.ones(B, S).long()), inputs() + 1)


@pytest.mark.parametrize("layout", [SequenceFirst, Streams])
@pytest.mark.parametrize("options", [{"positions": "last"}, {"positions": 0}, {"by": [[0, 1, 1]]}], ids=str)
def test_collect_refuses_what_needs_rows(layout, options):
    with pytest.raises(ActsteerError):
        collect(layout(), [inputs()], sites="b", progress=False, **options)


@every_backend
@pytest.mark.parametrize("layout", [Streams, HyperConnections, Heads])
def test_of_two_axes_which_holds_the_tokens_must_be_said(backend, layout):
    rows = {name: axis for name, axis in layout.axes.items() if name == "row_axis"}
    with pytest.raises(ActsteerError), Steerer(layout(), V, positions=0, backend=backend, strict=False, **rows) as one:
        one.model(inputs())
    c = torch.arange(float(B))
    with Steerer(layout(), V, c=c, backend=backend, **rows) as one:  # strengths per row need no tokens
        assert torch.equal(one.model(inputs()), inputs() + c[:, None, None])


@pytest.mark.parametrize("options", [{"row_axis": 9}, {"token_axis": 9}, {"row_axis": {"x": 0}}], ids=str)
def test_an_axis_that_there_is_not_is_refused(options):
    refused = (ActsteerError, ValueError, IndexError, LookupError)
    with pytest.raises(refused), Steerer(SequenceFirst(), V, c=torch.ones(B), strict=False, **options) as steerer:
        steerer.model(inputs())


@pytest.mark.parametrize("options", [{"row_axis": 2}, {"row_axis": 1, "token_axis": 1}], ids=str)
def test_an_axis_is_one_thing_alone(options):
    with pytest.raises((ActsteerError, ValueError)), Steerer(SequenceFirst(), V, c=torch.ones(B), **options) as steerer:
        steerer.model(inputs())


# --- known by the class ----------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_says_which_axis_holds_the_rows(backend, kind):
    layer, c = kind(2, 2), torch.arange(float(B))
    model = nn.Sequential(layer)
    x = torch.zeros(S, B, 2)
    plain = layer(x)[0]
    with Steerer(model, SteeringVector({"0": torch.ones(2)}), c=c, backend=backend):
        right_or_refused(lambda: model(x)[0], plain + c[None, :, None])


@every_backend
@pytest.mark.parametrize("site", ["layers.0", "layers.0.linear2", "layers.1.norm1"])
def test_torch_s_encoder_says_it_for_all_that_is_in_it(backend, site):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    model = seeded(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = torch.linspace(-1, 1, S * B * 4, dtype=torch.float64).view(S, B, 4).sin()
    pads = ~MASK.bool()
    c, v = torch.arange(float(B)).double(), torch.tensor([1.0, -2.0, 3.0, 0.5]).double()
    with added(model, site, (c[:, None] * MASK).T[..., None] * v):
        want = model(x, src_key_padding_mask=pads)
    with Steerer(model, SteeringVector({site: v}), c=c, backend=backend):
        got = model(x, src_key_padding_mask=pads)
    torch.testing.assert_close(got[MASK.T.bool()], want[MASK.T.bool()])


# --- known by the architecture ---------------------------------------------------------------------------------------
def xlnet():
    from transformers import XLNetConfig, XLNetModel

    return seeded(lambda: XLNetModel(XLNetConfig(vocab_size=23, d_model=8, n_layer=2, n_head=2, d_inner=16, dropout=0)))


@every_backend
@pytest.mark.parametrize("ids", [(3, 5), (3, 3)], ids=str)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_in_xlnet_rows_come_second(backend, ids):
    pytest.importorskip("transformers")
    model, site, rows = xlnet(), "layer.0", ids[0]
    tokens = torch.arange(rows * ids[1]).view(ids) % 19 + 2
    c, v = torch.arange(float(rows)).double(), torch.linspace(-1, 1, 8).double()
    with torch.no_grad():
        with added(model, site, (c[:, None].expand(ids) * v[:, None, None]).permute(2, 1, 0)):
            want = model(tokens).last_hidden_state
        with Steerer(model, SteeringVector({site: v}), c=c, backend=backend, row_axis={site: 1}):
            torch.testing.assert_close(model(tokens).last_hidden_state, want)
        with Steerer(model, SteeringVector({site: v}), c=c, backend=backend, strict=False):
            right_or_refused(lambda: model(tokens).last_hidden_state, want)  # a table may know it


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_in_xlnet_pads_do_not_count():
    pytest.importorskip("transformers")
    model = xlnet()
    batch = {"input_ids": torch.arange(B * S).view(B, S) % 19 + 2, "attention_mask": MASK.flip(1)}
    with torch.no_grad(), listening(model, "layer.1") as seen:
        model(**batch)
    hidden = seen[0].transpose(0, 1)
    for positions, where in (("all", MASK.flip(1)), ("last", FIRST.flip(1))):
        options = {"sites": "layer.0", "positions": positions, "progress": False}
        got = collect(model, [batch], row_axis=1, **options)["layer.0"]
        assert got.count == int(where.sum())
        torch.testing.assert_close(got.mean, hidden[where.bool()].mean(0))
        right_or_refused(lambda o=options: collect(model, [batch], **o)["layer.0"].mean, got.mean)


def gemma3n():
    from transformers import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nForCausalLM

    sizes = {"vocab_size": 23, "vocab_size_per_layer_input": 23, "hidden_size": 8, "intermediate_size": 16}
    layers = {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "hidden_size_per_layer_input": 4}
    streams = {"altup_num_inputs": 4, "laurel_rank": 2, "activation_sparsity_pattern": [0.0, 0.0]}
    tokens = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
    config = Gemma3nTextConfig(**sizes, **layers, **heads, **streams, **tokens)
    return seeded(lambda: Gemma3nForCausalLM(config))


@every_backend
@pytest.mark.parametrize("shape", [(4, 4), (3, 5)], ids=str)
def test_in_gemma_3n_rows_come_second_and_tokens_third(backend, shape):
    pytest.importorskip("transformers")
    model, site = gemma3n(), "model.layers.0"
    tokens = torch.arange(shape[0] * shape[1]).view(shape) % 19 + 2
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    c, v = torch.arange(1.0, 1 + shape[0]).double(), torch.linspace(-1, 1, 8).double()
    axes: ClassVar = {"row_axis": 1, "token_axis": 2}
    with torch.no_grad():
        with added(model, site, (c[:, None] * mask)[None, ..., None] * v) as shapes:
            want = model(tokens, attention_mask=mask).logits
        assert shapes == [(4, *shape, 8)]
        for how in (axes, {name: {site: axis} for name, axis in axes.items()}):
            with Steerer(model, SteeringVector({site: v}), c=c, backend=backend, intervention=Add(), **how):
                torch.testing.assert_close(model(tokens, attention_mask=mask).logits, want)
        with Steerer(model, SteeringVector({site: v}), c=c, backend=backend, strict=False):
            right_or_refused(lambda: model(tokens, attention_mask=mask).logits, want)
