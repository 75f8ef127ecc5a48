"""Names -> modules: what a pattern selects, what cannot be a site, and what identifies a model."""

import pytest
import torch
from torch import nn

from actsteer import SiteNotFoundError, UnsupportedModelError, find_sites
from actsteer.sites.resolve import fingerprint, hook_points, named_sites, resolve, select


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
        ("*.1", ("layers.0.1", "layers.1", "layers.1.1")),
        ("layers.?", ("layers.0", "layers.1")),
        ("layers.[1].0", ("layers.1.0",)),
        ("layers.*", ("layers.0", "layers.0.0", "layers.0.1", "layers.1", "layers.1.0", "layers.1.1")),
        (["layers.1.1", "embed"], ("embed", "layers.1.1")),
        (["embed", "e*", "embed"], ("embed",)),
        ((name for name in ("layers.1.0", "layers.0.0")), ("layers.0.0", "layers.1.0")),
        (lambda _, module: isinstance(module, nn.ReLU), ("layers.0.1", "layers.1.1")),
        (lambda name, _: name.startswith("emb"), ("embed",)),
        ("", ("",)),
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
    assert set(resolve(MODEL, find_sites(MODEL, "*"))) == {*LEAVES, "embed", "layers.0", "layers.1", "heads.a"}


def test_hook_names_are_sites_of_a_transformer_lens_model():
    model = nn.Sequential(nn.Identity())
    model.hook_dict = {"hook_resid": model[0]}
    assert hook_points(model) == {"hook_resid": model[0]}
    assert find_sites(model, "hook_resid") == ("hook_resid",)
    assert resolve(model, ["hook_resid", "0"]) == {"hook_resid": model[0], "0": model[0]}
    assert hook_points(MODEL) == {}


def test_resolve_gives_the_modules_in_the_order_asked():
    assert list(resolve(MODEL, ["layers.1.1", "tied", "embed"]).items()) == [
        ("layers.1.1", MODEL.layers[1][1]),
        ("tied", MODEL.embed),
        ("embed", MODEL.embed),
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


def test_a_selection_that_is_empty_is_an_error():
    with pytest.raises(SiteNotFoundError, match=r"the predicate selects none of the .* sites of Blocks"):
        find_sites(MODEL, lambda *_: False)
    with pytest.raises(SiteNotFoundError, match="no sites were named; the vectors has 1"):
        select({"a": nn.ReLU()}, [], owner="the vectors")
    with pytest.raises(SiteNotFoundError, match="There are: none"):
        find_sites(nn.ReLU(), "a")


@pytest.mark.parametrize("sites", [[1], [None], ["embed", nn.ReLU]])
def test_a_site_is_a_str(sites):
    with pytest.raises(TypeError, match="a site is a module's name, a str; got"):
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


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m), lambda m: nn.ModuleList([nn.ReLU(), m])])
def test_a_compiled_part_is_refused(wrap):
    with pytest.raises(UnsupportedModelError, match="OptimizedModule is compiled, and compiled code ignores hooks"):
        find_sites(wrap(torch.compile(nn.ReLU())), "*")
    module = nn.ReLU()
    module.compile()
    with pytest.raises(UnsupportedModelError, match="ReLU is compiled, and compiled code ignores hooks"):
        find_sites(wrap(module), "*")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_is_refused():
    with pytest.raises(UnsupportedModelError, match="is scripted and ignores hooks; steer the eager model"):
        find_sites(nn.Sequential(torch.jit.script(nn.ReLU())), "*")


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
