"""Caches: whatever their name, a pass with one goes on with a text; what holds nothing is none.

The kind of fault: RWKV's `state=` is no cache to us, and each next token counts as a prompt.
"""

import pytest
import torch

from actsteer import ActsteerError, PositionsError, Steerer, SteeringVector
from tests.kinds.by_hand import Text, added, every_backend, listening, moved
from tests.zoo import gpt2, llama, seeded

IDS = torch.tensor([[1, 2, 3]])
PLAIN = Text().e(IDS).detach()
V = SteeringVector({"b": torch.ones(2)})
UNKNOWN = ("prompt", "generated", "last", -1, slice(-2, None))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class Length:
    """A cache that says how much it holds."""

    def __init__(self, n):
        self.n = n

    def get_seq_length(self):
        return self.n


class Opaque:
    """A cache that does not."""


def reader(*names):
    """A model whose forward takes these arguments beside the text."""
    body = ", ".join(f"{name}=None" for name in names)
    space = {"Text": Text}
    exec(f"def forward(self, input_ids, attention_mask=None, {body}):\n    return Text.forward(self, input_ids)", space)
    return type("Reader", (Text,), {"forward": space["forward"]})()


HELD = {
    "state, a list": ("state", lambda: [torch.zeros(1)]),
    "state, a tuple": ("state", lambda: (torch.zeros(1), torch.zeros(1))),
    "state, a tensor": ("state", lambda: torch.zeros(2, 3)),
    "state, an object": ("state", Opaque),
    "past_key_values of layers": ("past_key_values", lambda: [(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))]),
    "past_key_values, an object": ("past_key_values", Opaque),
    "past_key_values that say": ("past_key_values", lambda: Length(3)),
    "past_key_value": ("past_key_value", lambda: Length(3)),
    "past": ("past", lambda: [torch.zeros(2, 1, 2, 3, 4)]),
    "layer_past": ("layer_past", lambda: (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))),
    "cache": ("cache", lambda: Length(3)),
    "kv_cache": ("kv_cache", Opaque),
    "cache_params": ("cache_params", Opaque),
    "mems": ("mems", lambda: [torch.zeros(3, 1, 2)]),
    "past_kv_cache": ("past_kv_cache", Opaque),
}
EMPTY = (None, False, [], ())
NAMES = ("state", "past_key_values", "cache", "past", "kv_cache", "cache_params", "mems")


# --- what is held ----------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize(("name", "make"), HELD.values(), ids=HELD)
def test_where_the_prompt_ended_is_not_known_in_a_loop_by_hand(backend, name, make):
    model = reader(name)
    for positions in UNKNOWN:
        with Steerer(model, V, positions=positions, backend=backend, strict=False):
            model(IDS)
            with pytest.raises(PositionsError):
                model(IDS[:, :1], **{name: make()})


@every_backend
@pytest.mark.parametrize(("name", "make"), HELD.values(), ids=HELD)
def test_all_tokens_are_all_tokens(backend, name, make):
    model = reader(name)
    with Steerer(model, V, backend=backend):
        assert moved(model(IDS[:, :1], **{name: make()}), PLAIN[:, :1]) == [[1]]


@every_backend
@pytest.mark.parametrize("positions", [0, 1, [0, 1], slice(1, 2), slice(0, 3)], ids=str)
@pytest.mark.parametrize("name", ["past_key_values", "cache", "past_key_value"])
def test_places_from_the_start_are_known_where_the_cache_says_how_much_it_holds(backend, positions, name):
    model = reader(name)
    with Steerer(model, V, positions=positions, backend=backend, strict=False):
        model(IDS)
        assert moved(model(IDS, **{name: Length(3)}), PLAIN) == [[0, 0, 0]]
    with Steerer(model, V, positions=[3, 5], backend=backend, strict=False):
        assert moved(model(IDS, **{name: Length(3)}), PLAIN) == [[1, 0, 1]]


@every_backend
@pytest.mark.parametrize(("name", "make"), HELD.values(), ids=HELD)
def test_places_from_the_start_are_never_those_of_the_pass(backend, name, make):
    """The first token of a pass with a cache is not the text's first."""
    model = reader(name)
    with Steerer(model, V, positions=0, backend=backend, strict=False):
        try:
            got = moved(model(IDS[:, :1], **{name: make()}), PLAIN[:, :1])
        except ActsteerError:
            return
    assert got == [[0]]


@every_backend
def test_a_mask_of_all_tokens_says_how_much_is_held(backend):
    model = reader("past_key_values")
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    with Steerer(model, V, positions=[2, 3], backend=backend):
        got = model(IDS[:, :2], attention_mask=mask, past_key_values=Opaque())
    assert moved(got, PLAIN[:, :2]) == [[1, 1]]


# --- what holds nothing ----------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("name", NAMES)
def test_what_is_empty_is_no_cache(backend, name):
    model = reader(name)
    for positions, want in (("prompt", [1, 1, 1]), ("last", [0, 0, 1]), (0, [1, 0, 0]), ("generated", [0, 0, 0])):
        with Steerer(model, V, positions=positions, backend=backend, strict=False):
            for empty in EMPTY:
                assert moved(model(IDS, **{name: empty}), PLAIN) == [want]


@every_backend
@pytest.mark.parametrize("value", [True, False, None])
@pytest.mark.parametrize("name", ["use_cache", "cache", "use_kv_cache", "return_cache"])
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_a_switch_is_no_cache(backend, value, name):
    """`cache=True` asks for one, and holds nothing."""
    model = reader(name)
    with Steerer(model, V, positions="last", backend=backend):
        try:
            got = moved(model(IDS, **{name: value}), PLAIN)
        except PositionsError:
            assert name == "cache" and value is True
            return
    assert got == [[0, 0, 1]]


@every_backend
def test_a_cache_of_length_zero_is_a_prompt_s(backend):
    model = reader("past_key_values")
    with Steerer(model, V, positions="last", backend=backend):
        assert moved(model(IDS, past_key_values=Length(0)), PLAIN) == [[0, 0, 1]]


@every_backend
def test_a_cache_by_position_is_one(backend):
    model = reader("past_key_values")
    for positions in UNKNOWN:
        with Steerer(model, V, positions=positions, backend=backend, strict=False), pytest.raises(PositionsError):
            model(IDS[:, :1], None, Length(3))


@every_backend
@pytest.mark.parametrize("name", ["position", "statement", "estate", "cached_size", "passport", "history_length"])
def test_other_words_are_no_caches(backend, name):
    model = reader(name)
    with Steerer(model, V, positions="last", backend=backend):
        assert moved(model(IDS, **{name: 3}), PLAIN) == [[0, 0, 1]]


# --- models of transformers ------------------------------------------------------------------------------------------
def rwkv():
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"vocab_size": 37, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}
    return seeded(lambda: RwkvForCausalLM(RwkvConfig(**sizes, intermediate_size=16, eos_token_id=None)))


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 37, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}
    return seeded(lambda: MambaForCausalLM(MambaConfig(**sizes, eos_token_id=None, pad_token_id=0)))


TEXT = torch.tensor([[5, 9, 4, 12, 7]])
MODELS = {
    "Rwkv": (rwkv, "rwkv.blocks.0", "state", 16),
    "Mamba": (mamba, "backbone.layers.0", "cache_params", 16),
    "Llama": (llama, "model.layers.0", "past_key_values", 16),
    "GPT2": (gpt2, "transformer.h.0", "past_key_values", 8),
}


@pytest.fixture(scope="module")
def built():
    pytest.importorskip("transformers")
    made = {}
    return lambda build: made.setdefault(build, build())


# transformers 5.24 calls Mamba's `cache`, and knows the old name still
of_old_names = pytest.mark.filterwarnings("ignore:.cache_params. is deprecated:FutureWarning")
families = pytest.mark.parametrize(("build", "site", "name", "d"), MODELS.values(), ids=MODELS)


@every_backend
@families
@of_old_names
def test_a_loop_by_hand_over_a_model_of_transformers_is_refused(built, backend, build, site, name, d):
    model = built(build)
    for positions in UNKNOWN:
        with Steerer(model, SteeringVector({site: torch.ones(d).double()}), positions=positions, backend=backend):
            held = model(TEXT, use_cache=True)[name]
            with pytest.raises(PositionsError):
                model(TEXT[:, :1], **{name: held}, use_cache=True)


@every_backend
@families
@of_old_names
def test_all_tokens_of_such_a_loop_are_steered(built, backend, build, site, name, d):
    model, v = built(build), 3 * torch.linspace(-1, 1, d).double()

    def loop():
        out = model(TEXT, use_cache=True)
        rest = model(TEXT[:, :1], **{name: out[name]}, use_cache=True)
        return torch.cat([out.logits, rest.logits], dim=1)

    with added(model, site, v):
        want = loop()
    with Steerer(model, SteeringVector({site: v}), backend=backend):
        torch.testing.assert_close(loop(), want)


@every_backend
@families
@pytest.mark.parametrize("positions", ["prompt", "generated", "last", 0], ids=str)
def test_generate_knows_where_the_prompt_ended(built, backend, build, site, name, d, positions):
    """The same tokens as by hooks that count the passes."""
    model, v = built(build), 3 * torch.linspace(-1, 1, d).double()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(TEXT)

    def delta(h, n):
        first = {"prompt": 1.0, "generated": 0.0, "last": torch.arange(5) == 4, 0: torch.arange(5) == 0}[positions]
        c = torch.as_tensor(first if n == 0 else float(positions == "generated")).double()
        return (c[None, :, None] if c.ndim else c) * v

    with added(model, site, delta) as shapes:
        want = model.generate(TEXT, **options)
    assert [shape[1] for shape in shapes] == [5, 1, 1, 1]
    with Steerer(model, SteeringVector({site: v}), positions=positions, backend=backend):
        assert torch.equal(model.generate(TEXT, **options), want)


@every_backend
@pytest.mark.parametrize("empty", [None, [], ()], ids=str)
def test_rwkv_without_a_state_begins_a_text(built, backend, empty):
    model = built(rwkv)
    v = torch.full((16,), 1e6).double()
    steerer = Steerer(model, SteeringVector({"rwkv.blocks.0": v}), positions="last", backend=backend)
    with listening(model, "rwkv.blocks.1") as seen, steerer:
        model(TEXT, state=empty or None)
    assert seen[0].abs().amax(-1).gt(5e5).int().tolist() == [[0, 0, 0, 0, 1]]
