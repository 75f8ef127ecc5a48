"""Names -> modules: what a pattern selects, what cannot be a site, and what identifies a model."""

import re

import pytest
import torch
from torch import nn

from actsteer import SiteNotFoundError, Steerer, SteeringVector, UnsupportedModelError, collect, find_sites
from actsteer.sites.fingerprint import fingerprint
from actsteer.sites.place import Place
from actsteer.sites.resolve import hook_points, named_sites, resolve, select


class Blocks(nn.Module):
    """Two blocks in a ModuleList, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 2)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)])
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 1)})
        self.tied = self.embed


MODEL = Blocks()
LEAVES = ("layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1")


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ("layers.0.1", ("layers.0.1",)),
        ("layers.*.1", ("layers.0.1", "layers.1.1")),
        ("*.1", ("layers.1",)),
        ("*.*.1", LEAVES[1::2]),
        ("**.0.1", ("layers.0.1",)),
        ("layers.*.**.1", ("layers.0.1", "layers.1.1")),
        ("**.embed", ("embed",)),
        ("**.a", ("heads.a",)),
        ("*", ("embed",)),
        ("layers.?", ("layers.0", "layers.1")),
        ("layers.[1].0", ("layers.1.0",)),
        ("layers.*", ("layers.0", "layers.1")),
        ("layers.0.**", ("layers.0.0", "layers.0.1")),
        (["layers.1.1", "embed"], ("embed", "layers.1.1")),
        (["embed", "e*", "embed"], ("embed",)),
        ((name for name in ("layers.1.0", "layers.0.0")), ("layers.0.0", "layers.1.0")),
        (lambda _, module: isinstance(module, nn.ReLU), ("layers.0.1", "layers.1.1")),
        (lambda name, _: name.startswith("emb"), ("embed",)),
        ("", ("",)),
        ("re:layers\\.\\d", ("layers.0", "layers.1")),
        ("re:.*\\.[01]\\.0", ("layers.0.0", "layers.1.0")),
        ("re:layers\\.(0|1)\\.1:in", ("layers.0.1:in", "layers.1.1:in")),
        ("re:embed|heads.a", ("embed", "heads.a")),
        (MODEL.layers[1][0], ("layers.1.0",)),
        (MODEL.embed, ("embed",)),
        ([MODEL.layers[1], "embed:out.0", lambda name, _: name == "heads.a"], ("embed:out.0", "layers.1", "heads.a")),
        ("layers.*.1:in", ("layers.0.1:in", "layers.1.1:in")),
        ("layers.?:out.last_hidden_state", ("layers.0:out.last_hidden_state", "layers.1:out.last_hidden_state")),
        (["embed", "embed:in", "embed:out"], ("embed", "embed:in", "embed:out")),
        (":in", (":in",)),
        (iter([MODEL.embed, "re:layers.0.0"]), ("embed", "layers.0.0")),
    ],
)
def test_a_pattern_selects_exact_names_in_module_order(sites, expected):
    assert find_sites(MODEL, sites) == expected


@pytest.mark.parametrize("name", [*LEAVES, "embed", "heads.a"])
def test_what_was_found_finds_itself(name):
    assert find_sites(MODEL, find_sites(MODEL, name)) == (name,)


def test_a_module_of_two_names_is_found_once_by_a_glob_and_under_both_by_name():
    assert "tied" not in find_sites(MODEL, "*")
    assert "tied" not in find_sites(MODEL, lambda *_: True)
    assert find_sites(MODEL, ["tied", "embed"]) == ("embed", "tied")


def test_an_exact_name_wins_over_the_glob_that_it_spells():
    model = nn.Module()
    model.add_module("a*", nn.ReLU())
    model.add_module("ab", nn.ReLU())
    assert find_sites(model, "a*") == ("a*",)


def test_a_glob_selects_only_what_is_called():
    with pytest.warns(UserWarning, match="inside others"):
        found = find_sites(MODEL, "**")
    assert set(resolve(MODEL, found)) == {*LEAVES, "embed", "layers.0", "layers.1", "heads.a"}


@pytest.mark.parametrize(
    ("pattern", "inside"),
    [
        ("**", "'layers.0.0' in 'layers.0'"),
        ("layers.**", "'layers.0.0' in 'layers.0'"),
        ("**.1", "'layers.1.1' in 'layers.1'"),
        ("re:.*1", "'layers.1.1' in 'layers.1'"),
        ("layers.**:in", "'layers.0.0:in' in 'layers.0:in'"),
    ],
)
def test_a_pattern_that_selects_a_module_and_its_children_says_so(pattern, inside):
    with pytest.warns(UserWarning, match=rf"'{re.escape(pattern)}' selects \d sites, some of them inside .*{inside}"):
        found = find_sites(MODEL, pattern)
    assert find_sites(MODEL, found) == found  # by name it is meant
    assert find_sites(MODEL, lambda name, _: name in {site.split(":")[0] for site in found})


def test_a_star_that_would_have_to_cross_a_dot_says_so():
    with pytest.raises(
        SiteNotFoundError, match=r"`\*` stays between two dots, and `\*\*` does not: \['layers.0.1', 'la"
    ):
        find_sites(MODEL, "layers*1")


def test_what_is_no_site_is_refused():
    with pytest.raises(
        TypeError, match=r"got the class ReLU; its modules are lambda name, module: isinstance\(module, R"
    ):
        find_sites(MODEL, nn.ReLU)
    with pytest.raises(TypeError, match=r"sites: expected names, patterns, .* got 1; .*called '1'"):
        find_sites(MODEL, 1)
    with pytest.raises(TypeError, match="got 1"):
        collect(nn.Sequential(nn.ReLU()), torch.zeros(2, 2), sites=1)
    with pytest.raises(TypeError, match="got 1"):
        Steerer(nn.Sequential(nn.ReLU()), SteeringVector({"0": torch.ones(2)}), sites=1)


def test_hook_names_are_sites_of_a_transformer_lens_model():
    model = nn.Sequential(nn.Identity())
    model.hook_dict = {"hook_resid": model[0]}
    assert hook_points(model) == {"hook_resid": model[0]}
    assert find_sites(model, "hook_resid") == ("hook_resid",)
    assert {site: place.module for site, place in resolve(model, ["hook_resid", "0"]).items()} == {
        "hook_resid": model[0],
        "0": model[0],
    }
    assert hook_points(MODEL) == {}


def test_resolve_gives_the_modules_in_the_order_asked():
    places = resolve(MODEL, ["layers.1.1", "tied", "embed:in", "embed:out.0"])
    assert list(places.items()) == [
        ("layers.1.1", Place("layers.1.1", "layers.1.1", MODEL.layers[1][1])),
        ("tied", Place("tied", "tied", MODEL.embed)),
        ("embed:in", Place("embed:in", "embed", MODEL.embed, "in")),
        ("embed:out.0", Place("embed:out.0", "embed", MODEL.embed, "out", ("0",))),
    ]
    assert named_sites(MODEL)[""] is MODEL


# --- errors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["layers.0.l", "layers.x.0", "embedd"])
def test_a_pattern_that_selects_nothing_is_named_with_its_neighbours(pattern):
    for sites in (pattern, ["embed", pattern]):
        with pytest.raises(SiteNotFoundError, match=rf"Blocks has no site '{pattern}'. Close names: '"):
            find_sites(MODEL, sites)
    with pytest.raises(SiteNotFoundError, match=rf"Blocks has no site '{pattern}'. Close names: '"):
        resolve(MODEL, ["embed", pattern])


@pytest.mark.parametrize("pattern", ["re:layers", "re:mbed", "re:ayers.0", "re:layers.0.[", "re:"])
def test_an_expression_matches_whole_names_or_is_refused(pattern):
    with pytest.raises(SiteNotFoundError, match=r"Blocks has no site|is not a regular expression"):
        find_sites(MODEL, pattern)


def test_a_module_of_another_model_is_refused():
    with pytest.raises(SiteNotFoundError, match="the Linear given as a site is not a module of Blocks"):
        find_sites(MODEL, nn.Linear(2, 2))
    with pytest.raises(SiteNotFoundError, match="the Linear given as a site is not a module of Blocks"):
        find_sites(MODEL, ["embed", nn.Linear(2, 2)])


@pytest.mark.parametrize(("site", "several"), [("layers.*", "'layers.0', 'layers.1'"), ("**.1:in", "'layers.0.1'")])
def test_a_pattern_where_one_site_is_needed_names_its_matches(site, several):
    with pytest.raises(SiteNotFoundError, match=rf"site '.*' is a pattern for \[{several}.*, and one is needed"):
        resolve(MODEL, [site])
    with pytest.raises(SiteNotFoundError, match="and one is needed; see find_sites"):
        Steerer(MODEL, SteeringVector({site: torch.ones(2)}))


def test_a_wrong_name_with_a_side_is_named_with_its_neighbours():
    for site in ("embde:in", "embde:out.0"):
        with pytest.raises(SiteNotFoundError, match=rf"Blocks has no site '{site}'. Close names: 'embed'"):
            resolve(MODEL, [site])


def test_a_selection_that_is_empty_is_an_error():
    with pytest.raises(SiteNotFoundError, match=r"the predicate selects none of the .* sites of Blocks"):
        find_sites(MODEL, lambda *_: False)
    with pytest.raises(SiteNotFoundError, match="no sites were named; name one, or give a pattern or a predicate"):
        select({"a": nn.ReLU()}, [], owner="the vectors", model=MODEL)
    with pytest.raises(SiteNotFoundError, match="There are: none"):
        find_sites(nn.ReLU(), "a")


@pytest.mark.parametrize("sites", [[1], [None], ["embed", 2.5], [["embed"]]], ids=str)
def test_a_site_is_a_name_a_module_or_a_predicate(sites):
    with pytest.raises(TypeError, match="a site is a module's name, a str, a module, or a predicate; got"):
        find_sites(MODEL, sites)


def test_a_container_that_is_never_called_names_its_members():
    with pytest.raises(SiteNotFoundError, match="site 'layers': a ModuleList is never called; name its members"):
        resolve(MODEL, ["layers"])
    with pytest.raises(SiteNotFoundError, match=r"site 'heads': a ModuleDict is never called; .*'heads.a'"):
        resolve(MODEL, ["heads"])


@pytest.mark.parametrize("model", [None, torch.relu, {"a": nn.ReLU()}])
def test_a_model_is_a_module(model):
    with pytest.raises(UnsupportedModelError, match=r"expected a torch.nn.Module, got"):
        find_sites(model, "a")


# --- scripted and exported ------------------------------------------------------------------------------------------
def scripted(module):
    return torch.jit.script(module)


def traced(module):
    return torch.jit.trace(module, torch.zeros(1, 2))


def exported(module):
    return torch.export.export(module, (torch.zeros(1, 2),)).module()


def inner():
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())


jit = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")


@jit
@pytest.mark.parametrize("make", [scripted, traced])
@pytest.mark.case(15)
def test_a_scripted_model_is_refused(make):
    with pytest.raises(UnsupportedModelError, match="is scripted and ignores hooks; steer the eager model"):
        find_sites(make(inner()), "*")
    with pytest.raises(UnsupportedModelError, match="is scripted and ignores hooks; steer the eager model"):
        resolve(make(inner()), ["1"])


@jit
@pytest.mark.parametrize("make", [scripted, traced])
@pytest.mark.parametrize("site", ["0", "0.1", "0.0.0", "0:in"])
@pytest.mark.case(15)
def test_a_scripted_part_and_what_is_in_it_are_refused_and_the_rest_is_not(make, site):
    model = nn.Sequential(make(inner()), nn.ReLU())
    with pytest.raises(UnsupportedModelError, match=rf"site '{site}': .* is scripted and ignores hooks"):
        resolve(model, [site])
    with pytest.raises(UnsupportedModelError, match="is scripted and ignores hooks"):
        collect(model, torch.zeros(1, 2), sites=site)
    with Steerer(model, SteeringVector({"1": torch.ones(2)})):
        steered = model(torch.zeros(1, 2))
    assert torch.equal(steered, model(torch.zeros(1, 2)) + 1)


@pytest.mark.case(15)
def test_a_traced_graph_is_steered_at_what_it_calls_and_refused_elsewhere():
    model = torch.fx.symbolic_trace(inner())
    with Steerer(model, SteeringVector({"0.0": torch.ones(2), "": torch.ones(2)})):
        assert model(torch.zeros(1, 2)).shape == (1, 2)
    with pytest.raises(
        UnsupportedModelError, match=r"site '0': the graph of .* never calls this module, .*; steer the"
    ):
        resolve(model, ["0"])


@pytest.mark.parametrize("site", ["0", "0.0", "1:in"])
@pytest.mark.case(15)
def test_an_exported_graph_is_refused_but_for_its_own_output(site):
    model = exported(inner())
    with pytest.raises((UnsupportedModelError, SiteNotFoundError), match=rf"site '{site}'"):
        Steerer(model, SteeringVector({site: torch.ones(2)}))
    plain = model(torch.zeros(1, 2))
    with Steerer(model, SteeringVector({"": torch.ones(2)})):
        assert torch.equal(model(torch.zeros(1, 2)), plain + 1)


@pytest.mark.parametrize("make", [exported, torch.fx.symbolic_trace])
@pytest.mark.case(15)
def test_a_graph_within_a_model_is_refused_where_it_calls_no_module(make):
    model = nn.Sequential(make(inner()), nn.Identity())
    with pytest.raises(UnsupportedModelError, match=r"site '0\.0': the graph of .* never calls this module"):
        Steerer(model, SteeringVector({"0.0": torch.ones(2)}))
    plain = model(torch.zeros(1, 2))
    with Steerer(model, SteeringVector({"0": torch.ones(2)})):
        assert torch.equal(model(torch.zeros(1, 2)), plain + 1)


@pytest.mark.case(15)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # torch 2.10's own
def test_an_unflattened_export_calls_its_modules_and_is_steered():
    model = torch.export.unflatten(torch.export.export(inner(), (torch.zeros(1, 2),)))
    plain = model(torch.zeros(1, 2))
    with Steerer(model, SteeringVector({"1": torch.ones(2)})):
        assert torch.equal(model(torch.zeros(1, 2)), plain + 1)


# --- fingerprint -------------------------------------------------------------------------------------------------
def test_the_fingerprint_is_the_architecture_s_and_not_the_weights():
    one, other = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3))
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(one).startswith("Sequential:9:")


@pytest.mark.parametrize(
    "other", [nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), nn.Linear(2, 3)]
)
def test_other_architectures_have_other_fingerprints(other):
    assert fingerprint(other) != fingerprint(nn.Sequential(nn.Linear(2, 3)))
