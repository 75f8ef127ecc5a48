"""Places: a site's name is a module, a side and the keys of a part; the name of a module wins over all of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import SiteNotFoundError, Steerer, SteeringVector, find_sites, record
from actsteer.sites.place import split_site
from actsteer.sites.resolve import resolve

V = torch.tensor([1.0, 2.0, 3.0, 4.0])
X = torch.zeros(2, 4)

word = st.text("abcXYZ019_", min_size=1, max_size=5)
dotted = st.lists(word, min_size=1, max_size=4).map(".".join)


@given(dotted, st.sampled_from(["in", "out"]), st.lists(word, max_size=3))
def test_a_name_with_side_and_keys_splits_into_them(name, side, keys):
    assert split_site(".".join([f"{name}:{side}", *keys])) == (name, side, tuple(keys))


@given(dotted)
def test_a_name_alone_is_the_output(name):
    assert split_site(name) == (name, "out", ())


@pytest.mark.parametrize(
    "pattern", ["re:a|b", "layers.*", "layers.[0-3]", "re:(?:a|b)\\d", "a:b", "a:inner", "a:out.", "a:in.x-y"]
)
def test_what_has_no_side_is_a_name_or_a_pattern_as_a_whole(pattern):
    assert split_site(pattern) == (pattern, "out", ())


def test_the_root_has_sides_too():
    assert split_site(":in") == ("", "in", ())
    assert split_site(":out.last_hidden_state") == ("", "out", ("last_hidden_state",))


def test_a_module_whose_name_looks_like_a_side_is_found_by_its_name():
    model = nn.Sequential()
    model.add_module("a:in", nn.Identity())
    assert find_sites(model, "a:in") == ("a:in",)
    place = resolve(model, ["a:in"])["a:in"]
    assert (place.name, place.side, place.path) == ("a:in", "out", ())
    assert resolve(model, ["a:in:in"])["a:in:in"].side == "in"


# --- what the places are ---------------------------------------------------------------------------------------------
class Passes(nn.Module):
    """Gives out what a function makes of its arguments."""

    def __init__(self, make=lambda x: x):
        super().__init__()
        self.make = make

    def forward(self, *args, **kwargs):
        return self.make(*args, **kwargs)


class Two(nn.Module):
    """Takes two tensors."""

    def forward(self, hidden, other=None):
        return hidden if other is None else torch.cat([hidden, other])


class Calls(nn.Module):
    """Calls its part with both tensors, by position or by name."""

    def __init__(self, part, *, named):
        super().__init__()
        self.part, self.named = part, named

    def forward(self, x):
        one, other = x, x + 1
        return self.part(hidden=one, other=other) if self.named else self.part(one, other)


def steered(model, site, **options):
    with Steerer(model, SteeringVector({site: V}), **options):
        return model(X)


@pytest.mark.parametrize("named", [False, True], ids=["by position", "by name"])
@pytest.mark.parametrize(
    ("site", "shifts"),
    [("part:in.0", (1, 0)), ("part:in.hidden", (1, 0)), ("part:in.1", (0, 1)), ("part:in.other", (0, 1))],
)
@pytest.mark.case(23)
def test_an_argument_is_the_same_one_by_position_and_by_name_however_it_is_passed(named, site, shifts):
    expected = torch.cat([X + shifts[0] * V, X + 1 + shifts[1] * V])
    assert torch.equal(steered(Calls(Two(), named=named), site), expected)
    rows = record(Calls(Two(), named=named), X, sites=site, progress=False)[site]
    assert torch.equal(rows, X + shifts[1])


class OnlyNamed(nn.Module):
    """Takes its input by name alone, as transformers' attention does."""

    def forward(self, *, hidden, other=None):
        return hidden


class CallsNamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = OnlyNamed()

    def forward(self, x):
        return self.part(hidden=x)


@pytest.mark.parametrize("site", ["part:in", "part:in.0", "part:in.hidden"])
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.case(23)
def test_an_input_that_is_passed_by_name_alone_is_steered(site, backend):
    assert torch.equal(steered(CallsNamed(), site, backend=backend), V.expand(2, 4))


class Star(nn.Module):
    """An argument that is only passed by name, behind any number of others."""

    def forward(self, x, *rest, scale=None):
        return torch.cat([x, *rest])


class CallsStar(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Star()

    def forward(self, x):
        return self.part(x, x, x)


def test_an_argument_that_was_not_given_is_never_taken_for_another():
    model = CallsStar()
    with pytest.raises(TypeError, match="has no part 'scale'"):
        steered(model, "part:in.scale")


@pytest.mark.parametrize("suffix", [":out", ":out.h", ":out.h.0"])
def test_keys_lead_into_nested_outputs(suffix):
    nested = {":out": lambda x: x, ":out.h": lambda x: {"h": x}, ":out.h.0": lambda x: {"h": (x, x)}}[suffix]
    model = nn.Sequential(Passes(nested))
    out = steered(model, f"0{suffix}")
    if suffix == ":out.h.0":
        assert torch.equal(out["h"][0], V.expand(2, 4))
        assert torch.equal(out["h"][1], X)
    else:
        assert torch.equal(out["h"] if suffix == ":out.h" else out, V.expand(2, 4))


def test_a_tensor_has_no_part_and_is_never_indexed():
    with pytest.raises(TypeError, match=r"site '0:out.0': a Tensor has no part '0'"):
        steered(nn.Sequential(nn.Identity()), "0:out.0")


def test_input_and_output_of_one_module_are_two_sites():
    model = nn.Sequential(Passes(lambda x: 2 * x))
    with Steerer(model, SteeringVector({"0:in": V, "0": V})):
        assert torch.equal(model(X), (3 * V).expand(2, 4))


@pytest.mark.parametrize("twin", ["0:out", "0:out.0"])
def test_two_names_of_one_activation_are_refused(twin):
    model = nn.Sequential(Passes(lambda x: (x,)))
    with pytest.raises(TypeError, match="are one module, and an edit at either is an edit at both"):
        Steerer(model, SteeringVector({"0": V, twin: V}))


def test_two_parts_of_one_output_are_two_sites():
    model = nn.Sequential(Passes(lambda x: (x, x)))
    with Steerer(model, SteeringVector({"0:out.0": V, "0:out.1": 2 * V})):
        one, other = model(X)
    assert torch.equal(one, V.expand(2, 4))
    assert torch.equal(other, (2 * V).expand(2, 4))


# --- which of the vectors' sites are steered -------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["glob", "predicate", "module", "names"])
def test_a_selection_of_the_vectors_sites_takes_both_sides_of_a_module(by):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    v = SteeringVector({"1:in": V, "1": V})
    sites = {"glob": "*", "predicate": lambda *_: True, "module": model[1], "names": ["1", "1:in"]}[by]
    assert Steerer(model, v, sites=sites).sites == ("1:in", "1")


def test_one_side_of_a_module_is_chosen_by_its_name():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    v = SteeringVector({"1:in": V, "1": V})
    assert Steerer(model, v, sites="*:in").sites == ("1:in",)
    assert Steerer(model, v, sites="1").sites == ("1",)


def test_a_pattern_with_a_side_names_every_match_with_it():
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity())
    assert find_sites(model, "[02]:in") == ("0:in", "2:in")
    assert find_sites(model, "re:[02]:out.0") == ("0:out.0", "2:out.0")
    assert find_sites(model, ["2", "0:in", model[1]]) == ("0:in", "1", "2")
    with pytest.raises(SiteNotFoundError, match="has no site"):
        find_sites(model, "7:in")
