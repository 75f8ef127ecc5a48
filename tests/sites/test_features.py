"""Features: a site's name may end in brackets, which name a part of the features by numbers, or a head."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import ShapeError, SiteNotFoundError, Steerer, SteeringVector, UnsupportedModelError, find_sites, record
from actsteer.sites.features import known_size
from actsteer.sites.place import split_features, split_site
from actsteer.sites.resolve import resolve
from tests.zoo import gpt2, llama

O_PROJ = "model.layers.1.self_attn.o_proj"
dotted = st.lists(st.text("abcXYZ019_", min_size=1, max_size=5), min_size=1, max_size=3).map(".".join)


class Attention(nn.Module):
    """Projections that are called one after another; `config` is what a Hugging Face model's says."""

    def __init__(self, **config):
        super().__init__()
        self.self_attn = nn.ModuleDict(
            {"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 4), "o_proj": nn.Linear(8, 8)}
        )
        self.mlp = nn.Linear(8, 8)
        if config:
            self.config = SimpleNamespace(**config)

    def forward(self, x):
        return self.mlp(self.self_attn["o_proj"](x))


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2}


# --- parsing ---------------------------------------------------------------------------------------------------------
@given(dotted, st.sampled_from(["", ":in", ":out.0"]), st.integers(0, 999), st.integers(0, 999))
def test_numbers_in_brackets_are_split_off(name, side, start, stop):
    assert split_features(f"{name}{side}[{start}:{stop}]") == (f"{name}{side}", f"{start}:{stop}")
    assert split_site(f"{name}{side}[{start}:{stop}]") == split_site(f"{name}{side}")


@pytest.mark.parametrize("pattern", ["layers.[0-3]", "[12]", "a[!b]", "re:layers\\.[^:]", "re:a[bc:]", "a.[ab=]"])
def test_other_brackets_are_a_patterns(pattern):
    assert split_features(pattern) == (pattern, "")


def test_places_carry_the_numbers():
    place = resolve(llama(), [f"{O_PROJ}:in[8:16]"])[f"{O_PROJ}:in[8:16]"]
    assert (place.site, place.name, place.side) == (f"{O_PROJ}:in[8:16]", O_PROJ, "in")
    assert (place.features, place.size, known_size(place)) == ((8, 16), 8, 8)


def test_a_module_whose_name_ends_in_brackets_is_found_by_its_name():
    model = nn.Sequential()
    model.add_module("a[0:2]", nn.Identity())
    assert find_sites(model, "a[0:2]") == ("a[0:2]",)
    assert resolve(model, ["a[0:2]"])["a[0:2]"].features is None
    assert resolve(model, ["a[0:2][1:2]"])["a[0:2][1:2]"].features == (1, 2)


@pytest.mark.parametrize(
    "site", ["0[2:2]", "0[3:1]", "0[-2:3]", "0[0:-1]", "0[0:4:2]", "0[:2]", "0[1:]", "0[:]", "0[::]"]
)
@pytest.mark.parametrize("use", [find_sites, lambda model, site: Steerer(model, SteeringVector({site: torch.ones(2)}))])
def test_what_is_no_part_of_the_features_is_refused(site, use):
    with pytest.raises(SiteNotFoundError, match=r"expected features \[start:stop\] with 0 <= start < stop"):
        use(nn.Sequential(nn.Linear(4, 4)), site)


def test_features_beyond_the_size_are_refused_when_it_is_known():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with pytest.raises(ShapeError, match=r"site '0\[4:7\]': it names features up to 7, and the activation has 6"):
        Steerer(model, SteeringVector({"0[4:7]": torch.ones(3)}))
    with pytest.raises(ShapeError, match=r"site '1\[4:7\]': it names features up to 7, and the activation has 6"):
        record(model, torch.zeros(2, 4), sites="1[4:7]")
    steerer = Steerer(model, SteeringVector({"1[4:7]": torch.ones(3)}))
    with steerer, pytest.raises(ShapeError, match=r"site '1\[4:7\]'"):
        model(torch.zeros(2, 4))


@pytest.mark.parametrize("axis", [None, -1])
def test_a_vector_of_another_size_than_the_part_is_refused(axis):
    with pytest.raises(ShapeError, match=r"site '1\[1:3\]': the activation has 2 features, the vector 3"):
        Steerer(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), SteeringVector({"1[1:3]": torch.ones(3)}), axis=axis)


def test_one_part_under_two_names_is_refused_and_two_parts_are_two_sites():
    model, both = nn.Sequential(nn.Linear(4, 4)), {"0[0:2]": torch.ones(2), "0:out[00:2]": torch.ones(2)}
    with pytest.raises(UnsupportedModelError, match="are one module"):
        Steerer(model, SteeringVector(both))
    parts = ("0[0:2]", "0[1:3]")
    assert Steerer(model, SteeringVector(dict.fromkeys(parts, torch.ones(2)))).sites == parts


def test_where_each_process_holds_some_of_the_features_no_part_is_known(monkeypatch):
    monkeypatch.setattr("actsteer.sites.resolve.replicas", lambda model: (0, 1))
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert resolve(model, ["1"])["1"].features is None
    with pytest.raises(UnsupportedModelError, match=r"site '1\[0:1\]': under tensor parallelism"):
        resolve(model, ["1[0:1]"])


# --- patterns --------------------------------------------------------------------------------------------------------
def test_a_pattern_has_its_parts_in_module_order_and_numbers_are_spelled_in_one_way():
    found = find_sites(llama(), ["model.layers.[01].self_attn.o_proj:in[04:8]", f"{O_PROJ}:in[0:2]"])
    assert found == (O_PROJ.replace("1", "0") + ":in[4:8]", f"{O_PROJ}:in[4:8]", f"{O_PROJ}:in[0:2]")


def test_a_steerer_selects_parts_among_those_of_its_vectors():
    model = llama()
    v = SteeringVector({site: torch.ones(8) for site in find_sites(model, "**.o_proj:in[head=*]")})
    assert len(v) == 6
    assert Steerer(model, v, sites="**.o_proj:in[head=1]").sites == v.sites[1::2]
    assert Steerer(model, v, sites=f"{O_PROJ}:in[0:8]").sites == (f"{O_PROJ}:in[0:8]",)
    assert Steerer(model, v.select(*v.sites[:3]), sites="**.o_proj:in[head=*]").sites == v.sites[:3]
    with pytest.raises(SiteNotFoundError, match=r"the bank has no site '\*\*.o_proj:in\[1:8\]'"):
        Steerer(model, v, sites="**.o_proj:in[1:8]")


# --- heads -----------------------------------------------------------------------------------------------------------
def test_heads_are_what_the_config_says():
    model = llama(num_attention_heads=4, num_key_value_heads=2, head_dim=6, hidden_size=16)
    assert find_sites(model, f"{O_PROJ}:in[head=2]") == (f"{O_PROJ}:in[12:18]",)
    assert find_sites(model, f"{O_PROJ}:in[head=*]") == tuple(f"{O_PROJ}:in[{6 * i}:{6 * i + 6}]" for i in range(4))
    keys = "model.layers.0.self_attn.k_proj"
    assert find_sites(model, f"{keys}[head=*]") == (f"{keys}[0:6]", f"{keys}[6:12]")
    assert len(find_sites(model, "**.q_proj[head=*]")) == 12


def test_of_a_config_without_their_size_they_share_the_width():
    site = "transformer.h.0.attn.c_proj:in"
    assert find_sites(gpt2(), f"{site}[head=*]") == (f"{site}[0:4]", f"{site}[4:8]")


@pytest.mark.parametrize("site", [f"{O_PROJ}:in", "model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.k_proj"])
def test_a_head_is_what_the_attention_itself_splits_off(site):
    """Each head's part, seen as (rows, tokens, heads, features)."""
    model, x = llama(), {"input_ids": torch.tensor([[3, 4, 5]])}
    kept = record(model, x, sites=[f"{site}[head=*]", site], keep_shape=True)
    *heads, whole = (kept[name] for name in sorted(kept, key=lambda name: (name == site, name)))
    split = whole.view(1, 3, -1, model.config.head_dim)
    assert len(heads) == split.shape[2]
    assert all(torch.equal(own, split[:, :, i]) for i, own in enumerate(heads))


def test_a_head_is_a_pattern_where_an_exact_name_is_needed():
    with pytest.raises(SiteNotFoundError, match=r"is a pattern for \['model.*o_proj:in\[8:16\]'\], and one is needed"):
        Steerer(llama(), SteeringVector({f"{O_PROJ}:in[head=1]": torch.ones(8)}))


@pytest.mark.parametrize(
    ("model", "site", "error", "message"),
    [
        (
            Attention(**HEADS),
            "self_attn.o_proj[head=0]",
            SiteNotFoundError,
            "input of an attention's output projection",
        ),
        (Attention(**HEADS), "mlp:in[head=0]", SiteNotFoundError, "heads are known in the input"),
        (Attention(**HEADS), "self_attn.o_proj:in.0.x[head=0]", SiteNotFoundError, "heads are known in the input"),
        (Attention(**HEADS), "self_attn.o_proj:in[head=4]", SiteNotFoundError, "there are the heads 0 to 3"),
        (Attention(**HEADS), "self_attn.o_proj:in[head=-1]", SiteNotFoundError, "expected a head's number"),
        (Attention(**HEADS), "self_attn.o_proj:in[head=]", SiteNotFoundError, "expected a head's number"),
        (Attention(), "self_attn.o_proj:in[head=0]", UnsupportedModelError, "a config says.* tells nothing of them"),
        (Attention(num_attention_heads=4), "self_attn.o_proj:in[head=0]", UnsupportedModelError, "nothing of them"),
        (Attention(**HEADS | {"head_dim": 4}), "self_attn.o_proj:in[head=0]", UnsupportedModelError, "4 of 4 .* has 8"),
        (Attention(**HEADS | {"head_dim": None}), "self_attn.q_proj[head=0]", UnsupportedModelError, "nothing of them"),
        (Attention(**HEADS, is_encoder_decoder=True), "self_attn.q_proj[head=0]", UnsupportedModelError, "nothing"),
        (
            Attention(num_attention_heads=[4, 4], head_dim=2),
            "self_attn.q_proj[head=0]",
            UnsupportedModelError,
            "nothing",
        ),
    ],
)
def test_heads_that_are_not_told_are_refused(model, site, error, message):
    with pytest.raises(error, match=message):
        find_sites(model, site)


def test_the_nearest_config_tells():
    model = Attention(num_attention_heads=2, head_dim=4)
    model.self_attn.config = SimpleNamespace(**HEADS)
    assert find_sites(model, "self_attn.o_proj:in[head=3]") == ("self_attn.o_proj:in[6:8]",)
    assert find_sites(model, "self_attn.k_proj[head=*]") == ("self_attn.k_proj[0:2]", "self_attn.k_proj[2:4]")


def test_a_part_keeps_what_else_is_said_of_its_activation():
    """The side and the keys."""
    model = llama()
    site = "model.layers.0:in.hidden_states[2:5]"
    whole = record(model, {"input_ids": torch.tensor([[3, 4]])}, sites=site.partition("[")[0])
    part = record(model, {"input_ids": torch.tensor([[3, 4]])}, sites=site)
    assert torch.equal(part[site], whole[site.partition("[")[0]][:, 2:5])
