"""Masks: wherever a call says which of its tokens are pads, none of them is steered, and none is "last" or counted.

The kind of fault: a mask that is passed by position, under another name, in a dict.
"""

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from actsteer import ActsteerError, MeanDifference, Steerer, SteeringVector, collect, fit, optimize, record
from tests.kinds.by_hand import Text, added, every_backend, ids, moved, right_or_refused
from tests.kinds.by_hand import steerer as steerer_of
from tests.zoo import gpt2, llama, seeded

IDS = ids(2, 4)
MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
WANTED = {None: MASK.tolist(), "last": [[0, 1, 0, 0], [0, 0, 0, 1]], 0: [[1, 0, 0, 0], [0, 1, 0, 0]]}
LENGTHS = torch.tensor([2, 4])
BY_LENGTH = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
PLAIN = Text()(IDS).detach()


class Star(Text):
    def forward(self, *args, **kwargs):
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        return self.b(self.a(self.e(tokens)))


class Wrapped(Text):
    """A forward that a decorator hides, as transformers' own do; its signature is still shown."""

    @functools.wraps(Text.forward)
    def forward(self, *args, **kwargs):
        return Text.forward(self, *args, **kwargs)


class Padding(Text):
    def forward(self, tokens, padding_mask=None):
        return self.b(self.a(self.e(tokens)))


class Lengths(Text):
    def forward(self, tokens, lengths):
        return self.b(self.a(self.e(tokens)))


class Batch(Text):
    def forward(self, batch):
        tokens = batch["input_ids"] if isinstance(batch, dict) else batch.input_ids
        return self.b(self.a(self.e(tokens)))


class Nested(Text):
    def forward(self, inputs, options=None):
        return self.b(self.a(self.e(inputs["text"]["ids"])))


class Keys(Text):
    """The name that torch.nn has, where true means a pad."""

    def forward(self, src, src_key_padding_mask=None, key_padding_mask=None):
        return self.b(self.a(self.e(src)))


class Causal(Text):
    """The other names that transformers knows."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        return self.b(self.a(self.e(input_ids)))


@dataclass
class Inputs:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


KNOWN = {
    "by name": (Text, lambda m: m(IDS, attention_mask=MASK)),
    "by position": (Text, lambda m: m(IDS, MASK)),
    "by name, all of them": (Text, lambda m: m(input_ids=IDS, attention_mask=MASK)),
    "bool": (Text, lambda m: m(IDS, MASK.bool())),
    "float": (Text, lambda m: m(IDS, MASK.float())),
    "uint8": (Text, lambda m: m(IDS, MASK.to(torch.uint8))),
    "a wrapped forward, by position": (Wrapped, lambda m: m(IDS, MASK)),
    "a wrapped forward, by name": (Wrapped, lambda m: m(IDS, attention_mask=MASK)),
    "bare **kwargs": (Star, lambda m: m(IDS, attention_mask=MASK)),
    "bare **kwargs, all": (Star, lambda m: m(input_ids=IDS, attention_mask=MASK)),
    "src_key_padding_mask": (Keys, lambda m: m(IDS, src_key_padding_mask=MASK == 0)),
    "src_key_padding_mask, by position": (Keys, lambda m: m(IDS, MASK == 0)),
    "key_padding_mask": (Keys, lambda m: m(IDS, key_padding_mask=MASK == 0)),
    "with an unused cache": (Causal, lambda m: m(IDS, MASK, None, None, use_cache=True)),
}
ADDITIVE = torch.where(MASK.bool(), 0.0, float("-inf"))[:, None, None].expand(2, 1, 4, 4)
UNCLEAR = {
    "additive (B, 1, S, S)": (Text, lambda m: m(IDS, ADDITIVE)),
    "additive (B, 1, 1, S)": (Text, lambda m: m(IDS, ADDITIVE[:, :, :1])),
    "bool (B, 1, S, S)": (Text, lambda m: m(IDS, ADDITIVE == 0)),
    "a dict of kinds": (Text, lambda m: m(IDS, {"full_attention": ADDITIVE, "sliding_attention": ADDITIVE})),
    "additive (B, S)": (Text, lambda m: m(IDS, torch.where(MASK.bool(), 0.0, -1e9))),
    "additive causal": (
        Text,
        lambda m: m(IDS, ADDITIVE + torch.full((4, 4), -1e9).triu(1)),
    ),
}
TOLD = {
    "a name": (Padding, "padding_mask", lambda m: m(IDS, MASK)),
    "a name, by name": (Padding, "padding_mask", lambda m: m(IDS, padding_mask=MASK)),
    "true at pads": (Padding, lambda inputs: ~inputs["padding_mask"], lambda m: m(IDS, MASK == 0)),
    "args.1": (Star, "args.1", lambda m: m(IDS, MASK)),
    "another name in **kwargs": (Star, "tokens", lambda m: m(IDS, tokens=MASK)),
    "batch.attention_mask of a dict": (
        Batch,
        "batch.attention_mask",
        lambda m: m({"input_ids": IDS, "attention_mask": MASK}),
    ),
    "batch.attention_mask of a dataclass": (Batch, "batch.attention_mask", lambda m: m(Inputs(IDS, MASK))),
    "batch.attention_mask of an object": (
        Batch,
        "batch.attention_mask",
        lambda m: m(SimpleNamespace(input_ids=IDS, attention_mask=MASK)),
    ),
    "a path of three": (Nested, "inputs.text.mask", lambda m: m({"text": {"ids": IDS, "mask": MASK}})),
    "a path with a number": (Nested, "options.1", lambda m: m({"text": {"ids": IDS}}, [None, MASK])),
    "a callable of a dict": (
        Batch,
        lambda inputs: inputs["batch"]["attention_mask"] == 1,
        lambda m: m({"input_ids": IDS, "attention_mask": MASK}),
    ),
    "of the tokens themselves": (
        Text,
        lambda inputs: MASK.bool() if inputs["input_ids"].shape == MASK.shape else None,
        lambda m: m(IDS),
    ),
    "instead of the usual one": (
        Text,
        lambda inputs: MASK.bool(),
        lambda m: m(IDS, attention_mask=torch.ones_like(MASK)),
    ),
    "of one site": (Padding, {"b": "padding_mask"}, lambda m: m(IDS, MASK)),
}


@every_backend
@pytest.mark.parametrize(("kind", "call"), KNOWN.values(), ids=KNOWN)
def test_masks_of_usual_names_are_known(backend, kind, call):
    model = kind()
    for positions, want in WANTED.items():
        with torch.no_grad(), steerer_of(model, backend=backend, positions=positions):
            assert moved(call(model), PLAIN) == want


@every_backend
@pytest.mark.parametrize(("kind", "call"), UNCLEAR.values(), ids=UNCLEAR)
def test_masks_of_other_shapes_are_understood_or_refused(backend, kind, call):
    model = kind()
    for positions, want in WANTED.items():
        with torch.no_grad(), steerer_of(model, backend=backend, positions=positions, strict=False):
            right_or_refused(lambda: moved(call(model), PLAIN), want)


@every_backend
@pytest.mark.parametrize(("kind", "mask", "call"), TOLD.values(), ids=TOLD)
def test_other_masks_are_told(backend, kind, mask, call):
    model = kind()
    for positions, want in WANTED.items():
        with torch.no_grad(), steerer_of(model, backend=backend, positions=positions, mask=mask):
            assert moved(call(model), PLAIN) == want


@every_backend
@pytest.mark.parametrize(
    "mask",
    [
        lambda inputs: torch.arange(inputs["tokens"].shape[1]) < inputs["lengths"][:, None],
        lambda inputs: torch.stack([torch.arange(4) < n for n in inputs["lengths"].tolist()]),
    ],
    ids=["at once", "one by one"],
)
def test_lengths_are_told_by_a_callable(backend, mask):
    model = Lengths()
    with torch.no_grad(), steerer_of(model, backend=backend, mask=mask):
        assert moved(model(IDS, LENGTHS), PLAIN) == BY_LENGTH.tolist()
        assert moved(model(IDS, lengths=LENGTHS.flip(0)), PLAIN) == BY_LENGTH.flip(0).tolist()


@every_backend
def test_no_mask_means_that_the_tokens_of_a_site_are_not_the_call_s(backend):
    model = Text()
    with torch.no_grad(), steerer_of(model, backend=backend, mask={"b": None}):
        assert moved(model(IDS, attention_mask=MASK), PLAIN) == torch.ones_like(MASK).tolist()


@every_backend
def test_a_mask_is_that_of_one_site_and_the_usual_one_is_that_of_the_others(backend):
    v, model = SteeringVector({"a": torch.full((2,), 4.0), "b": torch.ones(2)}), Text()
    with torch.no_grad(), Steerer(model, v, backend=backend, mask={"a": None}):
        got = (model(IDS, attention_mask=MASK) - PLAIN).mean(-1)
    torch.testing.assert_close(got, 4.0 + MASK)


@every_backend
@pytest.mark.parametrize("mask", ["nothing", "batch.nothing", "args.7", "input_ids.attention_mask"], ids=str)
def test_a_name_that_leads_nowhere_is_refused(backend, mask):
    model = Text()
    with pytest.raises((ActsteerError, ValueError)), steerer_of(model, backend=backend, mask=mask, strict=False):
        model(IDS, attention_mask=MASK)


@every_backend
@pytest.mark.parametrize(
    "mask",
    [lambda inputs: torch.ones(3, 4).bool(), lambda inputs: torch.ones(2, 3).bool(), lambda inputs: "pads"],
    ids=["rows", "columns", "no tensor"],
)
def test_a_mask_that_does_not_fit_is_refused(backend, mask):
    model = Text()
    refused = (ActsteerError, TypeError, ValueError)
    with pytest.raises(refused), steerer_of(model, backend=backend, mask=mask, strict=False):
        model(IDS, attention_mask=MASK)


# --- the same in the other verbs -------------------------------------------------------------------------------------
def batches():
    """The mask under another name, as a dict of keyword arguments."""
    return [{"tokens": IDS, "padding_mask": MASK}]


ROWS = {"all": MASK.bool(), "last": torch.tensor(WANTED["last"]).bool(), 0: torch.tensor(WANTED[0]).bool()}


@pytest.mark.parametrize("positions", ROWS, ids=str)
@pytest.mark.parametrize(
    "mask",
    ["padding_mask", lambda inputs: inputs["padding_mask"] == 1, {"b": "padding_mask"}],
    ids=["name", "callable", "name of a site"],
)
def test_collect_and_record_take_it(positions, mask):
    options = {"sites": "b", "positions": positions, "mask": mask, "progress": False}
    want = PLAIN[ROWS[positions]]
    got = collect(Padding(), batches(), **options)["b"]
    assert got.count == len(want)
    torch.testing.assert_close(got.mean.float(), want.mean(0))
    torch.testing.assert_close(record(Padding(), batches(), **options)["b"], want)


def test_collect_takes_masks_by_position_and_in_batches():
    for batch, kind, mask in (
        ((IDS, MASK), Text, "attention_mask"),
        ((IDS, MASK), Star, "args.1"),
        (({"input_ids": IDS, "attention_mask": MASK},), Batch, "batch.attention_mask"),
    ):
        got = collect(kind(), [batch], sites="b", mask=mask, progress=False)["b"]
        assert got.count == int(MASK.sum())
    assert collect(Text(), [(IDS, MASK)], sites="b", progress=False)["b"].count == int(MASK.sum())
    assert collect(Wrapped(), [(IDS, MASK)], sites="b", progress=False)["b"].count == int(MASK.sum())
    assert collect(Text(), [(IDS, MASK)], sites="b", mask={"b": None}, progress=False)["b"].count == MASK.numel()


def test_fit_takes_it():
    other = [{"tokens": IDS.flip(1), "padding_mask": MASK.flip(1)}]
    options = {"sites": "b", "positions": "last", "mask": "padding_mask", "progress": False}
    v = fit(Padding(), positive=batches(), negative=other, estimator=MeanDifference(), **options)
    last = torch.tensor(WANTED["last"]).bool()
    theirs = Text()(IDS.flip(1)).detach()[torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool()]
    torch.testing.assert_close(v["b"], PLAIN[last].mean(0) - theirs.mean(0))


def test_optimize_takes_it():
    """The loss wants every token to move by one; the pads, which cannot, would make it more."""
    model = Padding()
    moved_by = []

    def loss(output):
        moved_by.append((output - PLAIN).detach())
        return ((output - PLAIN - 1) ** 2 * MASK[..., None]).sum()

    v = optimize(model, batches(), sites="b", loss=loss, steps=200, lr=0.1, mask="padding_mask", progress=False)
    torch.testing.assert_close(v["b"], torch.ones(2), atol=1e-2, rtol=0)
    assert not any(by[MASK == 0].any() for by in moved_by)


# --- models of transformers ------------------------------------------------------------------------------------------
def clip():
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 16, "pad_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 4, "patch_size": 2}
    return seeded(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))


def tensor_of(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    return seeded(lambda: BertModel(BertConfig(**sizes, num_attention_heads=2, initializer_range=0.3)))


RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
TOKENS = torch.tensor([[3, 5, 16, 1, 1], [4, 6, 7, 8, 16]])
CALLS = {
    "Bert, by position": (bert, "encoder.layer.0", lambda m: m(TOKENS, RIGHT).last_hidden_state),
    "Bert, by name": (bert, "encoder.layer.0", lambda m: m(TOKENS, attention_mask=RIGHT).last_hidden_state),
    "Llama, by position": (llama, "model.layers.0", lambda m: m(TOKENS, RIGHT).logits),
    "GPT2, third": (gpt2, "transformer.h.0", lambda m: m(TOKENS, None, RIGHT).logits),
    "CLIP, get_text_features": (
        clip,
        "text_model.encoder.layers.0",
        lambda m: tensor_of(m.get_text_features(TOKENS, RIGHT)),
    ),
    "CLIP, get_text_features by name": (
        clip,
        "text_model.encoder.layers.0",
        lambda m: tensor_of(m.get_text_features(input_ids=TOKENS, attention_mask=RIGHT)),
    ),
}


@every_backend
@pytest.mark.parametrize("positions", [None, "last"], ids=str)
@pytest.mark.parametrize(("build", "site", "call"), CALLS.values(), ids=CALLS)
def test_models_of_transformers_by_any_entry(backend, positions, build, site, call):
    pytest.importorskip("transformers")
    model = build()
    d = {"transformer.h.0": 8}.get(site, 16)
    v = 5 * torch.linspace(-1, 1, d).double().cos()
    where = RIGHT if positions is None else torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    with torch.no_grad():
        with added(model, site, where[..., None] * v) as shapes:
            want = call(model)
        assert shapes == [(2, 5, d)] and not torch.allclose(want, call(model))
        with Steerer(model, SteeringVector({site: v}), positions=positions, backend=backend):
            torch.testing.assert_close(call(model), want)


PARTS = {
    "Llama's model": (llama, "model.layers.0", lambda m: m.model(TOKENS, RIGHT).last_hidden_state),
    "GPT2's model": (gpt2, "transformer.h.0", lambda m: m.transformer(TOKENS, None, RIGHT).last_hidden_state),
    "CLIP's text": (clip, "text_model.encoder.layers.0", lambda m: m.text_model(TOKENS, RIGHT).last_hidden_state),
}


@every_backend
@pytest.mark.parametrize("positions", [None, "last"], ids=str)
@pytest.mark.parametrize(("build", "site", "call"), PARTS.values(), ids=PARTS)
def test_a_part_that_is_called_by_itself_is_right_or_refused(backend, positions, build, site, call):
    model = build()
    d = {"transformer.h.0": 8}.get(site, 16)
    v = 5 * torch.linspace(-1, 1, d).double().cos()
    where = RIGHT if positions is None else torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    with torch.no_grad():
        with added(model, site, where[..., None] * v):
            want = call(model)
        with Steerer(model, SteeringVector({site: v}), positions=positions, backend=backend, strict=False):
            right_or_refused(lambda: call(model), want)


class Retriever(nn.Module):
    """Another entry than forward, as SentenceTransformer's encode."""

    def __init__(self):
        super().__init__()
        self.text = Text()

    def encode(self, features):
        return self.text(features["input_ids"], attention_mask=features["attention_mask"])

    def forward(self, features):
        return self.encode(features)


@every_backend
@pytest.mark.parametrize("entry", ["encode", "forward"])
def test_a_model_inside_another_has_its_own_mask(backend, entry):
    """The call of the inner model says it, whatever the outer one is called with, or whether it is called."""
    model = Retriever()
    features = {"input_ids": IDS, "attention_mask": MASK}
    call = model.encode if entry == "encode" else model
    for positions, want in WANTED.items():
        with torch.no_grad(), steerer_of(model, "text.b", backend=backend, positions=positions, strict=False):
            right_or_refused(lambda: moved(call(features), PLAIN), want)
        with torch.no_grad(), steerer_of(model.text, backend=backend, positions=positions):
            assert moved(call(features), PLAIN) == want


@every_backend
def test_a_mask_in_a_decoder_is_the_decoder_s(backend):
    pytest.importorskip("transformers")
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"vocab_size": 23, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    sizes |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3}
    model = seeded(lambda: BartForConditionalGeneration(BartConfig(**sizes, max_position_embeddings=16)))
    batch = {"input_ids": TOKENS, "attention_mask": RIGHT}
    batch |= {"decoder_input_ids": TOKENS.flip(0), "decoder_attention_mask": RIGHT.flip(0)}
    v = torch.linspace(-3, 3, 16).double()
    for site, mask in (("model.encoder.layers.0", RIGHT), ("model.decoder.layers.0", RIGHT.flip(0))):
        with torch.no_grad():
            with added(model, site, mask[..., None] * v):
                want = model(**batch).logits
            with Steerer(model, SteeringVector({site: v}), backend=backend):
                torch.testing.assert_close(model(**batch).logits, want)
                by_place = batch["input_ids"], batch["attention_mask"]
                torch.testing.assert_close(
                    model(*by_place, batch["decoder_input_ids"], batch["decoder_attention_mask"]).logits, want
                )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@every_backend
def test_pads_are_left_alone_in_every_mode_from_the_first_call_on(backend, mode):
    model = Text().requires_grad_(False)
    with mode(), Steerer(model, SteeringVector({"b": torch.ones(2)}), backend=backend):
        for _ in range(2):
            shift = model(IDS, attention_mask=MASK) - model.e(IDS)
            torch.testing.assert_close(shift[..., 0], MASK.float())
