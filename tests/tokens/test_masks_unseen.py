"""Masks that are passed by position, under another name, in a dict, through a wrapper or to an inner model.

The truth is a mask made by hand. What cannot be known is refused, and says what to pass.
"""

import functools

import pytest
import torch
from torch import nn

from actsteer import ActsteerError, BatchError, ShapeError, Steerer, SteeringVector, collect, fit, optimize, record

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [2, 4, 6, 8]])
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0]])
LAST = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]])
V = SteeringVector({"site": torch.tensor([1.0, 2.0])})
BACKENDS = ["tap", "hook", "buffer"]


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.site = nn.Embedding(9, 2), nn.Identity()

    def run(self, ids):
        return self.site(self.embed(ids))


class Named(Base):
    def forward(self, input_ids, attention_mask=None):
        return self.run(input_ids)


class KeyPadding(Base):
    def forward(self, tokens, src_key_padding_mask=None):
        return self.run(tokens)


class Wrapped(Base):
    """As a decorator leaves a forward that shows its signature."""

    def inner(self, input_ids, attention_mask=None):
        return self.run(input_ids)

    @functools.wraps(inner)
    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Around(nn.Module):
    """Hands all that it is given on to one model."""

    def __init__(self):
        super().__init__()
        self.model = Named()

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Star(Base):
    def forward(self, *args, **kwargs):
        return self.run(args[0])


class Batch(Base):
    def forward(self, batch):
        return self.run(batch["input_ids"])


class Nested(Base):
    def forward(self, batch):
        return self.run(batch["text"]["ids"])


class Other(Base):
    def forward(self, tokens, padding_mask=None):
        return self.run(tokens)


class Lengths(Base):
    def forward(self, tokens, lengths=None):
        return self.run(tokens)


LENGTHS = MASK.sum(1)
RIGHT = torch.arange(4) < LENGTHS[:, None]
KNOWN = {  # model, arguments, how the user says it
    "by position": (Named(), (IDS, MASK), {}),
    "by name": (Named(), {"input_ids": IDS, "attention_mask": MASK}, {}),
    "of bools": (Named(), (IDS, MASK.bool()), {}),
    "of ones in float": (Named(), (IDS, MASK.float()), {}),
    "of torch's name, true at pads": (KeyPadding(), (IDS, MASK == 0), {}),
    "through functools.wraps": (Wrapped(), (IDS, MASK), {}),
    "through a wrapper": (Around(), (IDS, MASK), {}),
    "in a dict under its usual name": (Batch(), ({"input_ids": IDS, "attention_mask": MASK},), {}),
    "a path into positional arguments": (Star(), (IDS, MASK), {"mask": "args.1"}),
    "a path into a dict": (Batch(), ({"input_ids": IDS, "real": MASK},), {"mask": "batch.real"}),
    "a path into a nested dict": (Nested(), ({"text": {"ids": IDS, "real": MASK}},), {"mask": "batch.text.real"}),
    "a callable": (Other(), (IDS, MASK == 0), {"mask": lambda inputs: ~inputs["padding_mask"]}),
    "a callable of lengths": (
        Lengths(),
        (IDS, LENGTHS),
        {"mask": lambda inputs: torch.arange(4) < inputs["lengths"][:, None]},
    ),
    "of one site": (Other(), (IDS, MASK), {"mask": "by site"}),
}
known = pytest.mark.parametrize("case", KNOWN)


def made(case):
    model, given, how = KNOWN[case]
    site = "model.site" if case == "through a wrapper" else "site"
    how = {"mask": {site: "padding_mask"}} if case == "of one site" else how
    real = RIGHT if case == "a callable of lengths" else MASK.bool()
    return model, given, how, SteeringVector({site: V["site"]}), real


def run(model, given):
    return model(**given) if isinstance(given, dict) else model(*given)


def last_of(real):
    where = (real * torch.arange(4)).argmax(1)
    return torch.nn.functional.one_hot(where, 4).bool()


@known
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", [None, "last"])
def test_pads_are_not_steered(case, backend, positions):
    if backend == "buffer" and positions is not None:
        pytest.skip("the buffer backend has no positions here")
    model, given, how, v, real = made(case)
    with torch.no_grad():
        plain = run(model, given)
        with Steerer(model, v, positions=positions, backend=backend, **how):
            moved = run(model, given) - plain
    where = real if positions is None else last_of(real)
    torch.testing.assert_close(moved, where[..., None] * V["site"])


@known
@pytest.mark.parametrize("positions", ["all", "last", "mean", 0, slice(0, 2)], ids=str)
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_pads_are_not_collected_recorded_or_fitted(case, positions):
    model, given, how, v, real = made(case)
    (site,) = v.sites
    rows = [embedded[own] for embedded, own in zip(model_embed(model)(IDS).detach(), real, strict=True)]
    wanted = {
        "all": lambda t: t,
        "last": lambda t: t[-1:],
        "mean": lambda t: t.mean(0, keepdim=True),
        "0": lambda t: t[:1],
        "slice(0, 2, None)": lambda t: t[:2],
    }
    expected = torch.cat([wanted[str(positions)](own) for own in rows])
    batches = [given]
    options = {"sites": site, "positions": positions, "progress": False, **how}
    torch.testing.assert_close(record(model, batches, **options)[site], expected)
    stats = collect(model, batches, **options)[site]
    assert stats.count == len(expected)
    torch.testing.assert_close(stats.mean, expected.double().mean(0))
    v = fit(model, positive=batches, negative=batches, **options)
    assert float(v.norm()) == 0


def model_embed(model):
    return model.embed if hasattr(model, "embed") else model.model.embed


def test_pads_are_not_trained_on():
    model, given, how, _, real = made("a path into positional arguments")
    found = optimize(
        model,
        [given],
        sites="site",
        loss=lambda out: -out[~real].sum() - out[real].sum(),
        steps=3,
        progress=False,
        **how,
    )
    moved = found["site"]
    with torch.no_grad(), Steerer(model, found, **how):
        assert torch.equal(model(*given)[~real], model.embed(IDS)[~real])
    assert bool((moved > 0).all())


PAD = torch.zeros(3, 1, 4, 4).masked_fill((MASK == 0)[:, None, None], -torch.inf)
REFUSED = {
    "a dict of masks": (Named(), (IDS, {"full_attention": PAD, "sliding_attention": PAD})),
    "an additive mask of four axes": (Named(), (IDS, PAD)),
    "an additive mask of two axes": (Named(), (IDS, torch.where(MASK.bool(), 0.0, -1e9))),
    "a name that leaves open what it means": (Other(), (IDS, MASK)),
    "lengths, with pads on an unknown side": (Lengths(), (IDS, LENGTHS)),
    "another class": (Named(), (IDS, MASK.tolist())),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_what_does_not_say_where_the_pads_are_is_refused_and_mask_is_named(case, backend):
    model, given = REFUSED[case]
    with torch.no_grad(), Steerer(model, V, backend=backend), pytest.raises(ActsteerError, match="mask="):
        model(*given)
    for verb in (collect, record):
        with pytest.raises(ActsteerError, match="mask="):
            verb(model, [given], sites="site", progress=False)
    with torch.no_grad(), Steerer(model, V, backend=backend, mask={"site": None}):
        assert torch.equal(model(*given) - model.embed(IDS), (model.embed(IDS) + V["site"]) - model.embed(IDS))
    assert collect(model, [given], sites="site", mask={"site": None}, progress=False)["site"].count == 12


@pytest.mark.parametrize("value", [torch.ones(3, 4), torch.zeros(3, 4).bool()], ids=["ones", "zeros"])
def test_a_name_that_leaves_it_open_says_nothing_where_all_are_alike(value):
    with torch.no_grad(), Steerer(Other(), V) as steerer:
        model = steerer.model
        torch.testing.assert_close(model(IDS, value), model.embed(IDS) + V["site"])
    assert collect(Other(), [(IDS, value)], sites="site", progress=False)["site"].count == 12


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        ("nothing", BatchError, "the call has no such input"),
        ("args.7", BatchError, "the call has no such input"),
        (lambda inputs: torch.ones(2, 2), BatchError, "the mask has shape"),
        (lambda inputs: torch.ones(3), BatchError, "expected shape"),
        (lambda inputs: None, BatchError, "expected shape"),
        (3, TypeError, "mask: expected the name of an argument"),
        ({"elsewhere": None}, LookupError, "mask names no site in use"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask, error, words):
    model = Star()
    with pytest.raises(error, match=words), torch.no_grad(), Steerer(model, V, mask=mask):
        model(IDS, MASK)
    with pytest.raises(error, match=words):
        collect(model, [(IDS, MASK)], sites="site", mask=mask, progress=False)


def test_a_learned_token_in_front_is_refused_where_there_are_pads():
    class Prefixed(Base):
        def forward(self, input_ids, attention_mask=None):
            return self.site(torch.cat([self.embed.weight[:1].expand(3, 1, 2), self.embed(input_ids)], dim=1))

    model = Prefixed()
    with torch.no_grad(), Steerer(model, V), pytest.raises(ShapeError, match="cannot be told which of its positions"):
        model(IDS, MASK)
    with pytest.raises(ShapeError, match="cannot be told which of its positions"):
        collect(model, [(IDS, MASK)], sites="site", progress=False)
    widened = {"mask": lambda inputs: torch.nn.functional.pad(inputs["attention_mask"], (1, 0), value=1)}
    assert collect(model, [(IDS, torch.ones_like(MASK))], sites="site", progress=False)["site"].count == 15
    assert widened
