"""The private parts of torch and its neighbours: all named in one place, all there, and what is done without them."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import nn

import actsteer
from actsteer.private_names import OLDEST, PARTS, refuse_older

ROOT = Path(actsteer.__file__).parent.parent
FILES = sorted(path for path in (ROOT / "actsteer").rglob("*.py") if path.name != "private_names.py")
OLDEST_TORCH = ".".join(map(str, OLDEST))
PYTHONS = {"_exit", "_fields", "_replace", "_getframe"}  # which Python documents
NAMED = {word for part in PARTS for word in part.split(".")}
PRIVATE = re.compile(r"_[a-z]\w*|[a-z_.]+\._[a-z][\w.]*")


def tree(path):
    return list(ast.walk(ast.parse(path.read_text())))


def is_private(word):
    return word.startswith("_") and not word.startswith("__")


def own(nodes):
    """The private names that this library gives."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.asname or ""
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Constant) and str(node.value).startswith("_actsteer_"):  # on modules of others
            yield node.value


def used(nodes):
    """The private names that a file reads, as an attribute, in an import, or as a word in quotes."""
    for node in nodes:
        if isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            words = [word for alias in node.names for word in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE.fullmatch(node.value):
            words = node.value.split(".")
        else:
            continue
        yield from filter(is_private, words)


TREES = [tree(path) for path in FILES]
OWN = {word for nodes in TREES for word in own(nodes)}
USED = {word for nodes in TREES for word in used(nodes)} - OWN - PYTHONS


def test_every_private_name_that_is_not_the_librarys_own_is_named_in_one_place():
    assert USED <= NAMED


def test_no_name_is_kept_that_nothing_uses():
    text = (ROOT / "actsteer" / "private_names.py").read_text()
    below = set(re.findall(r"\w+", text[text.index("def _part") :]))
    last = {part.rpartition(".")[2] for part in PARTS}
    assert {word for word in last if is_private(word)} <= USED | below | OWN


@pytest.mark.parametrize("part", [part for part in PARTS if part.startswith("torch._")])
def test_what_is_deep_inside_of_torch_is_there(part):
    """On the oldest torch and on the newest, this says which part has gone."""
    if part == "torch._inductor.freezing":
        assert importlib.util.find_spec(part)
    elif part.endswith("._orig_mod"):
        assert isinstance(torch.compile(nn.Identity(), backend="eager")._orig_mod, nn.Identity)
    else:
        attrgetter(part.removeprefix("torch."))(torch)


@pytest.mark.parametrize("part", [part for part in PARTS if part.startswith("torch.nn.Module.")])
def test_every_module_has_the_private_attributes(part):
    assert hasattr(nn.Identity(), part.rpartition(".")[2])


# --- old versions ----------------------------------------------------------------------------------------------------
def run(code):
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_oldest_torch_is_the_one_that_the_package_asks_for():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"torch>={OLDEST_TORCH}" in declared


@pytest.mark.parametrize("version", ["1.13.1", "2.6.0+cu124", "2.8.1"])
def test_an_older_torch_is_refused_with_what_to_do(version):
    with pytest.raises(ImportError) as error:
        refuse_older(version)
    for words in (f"torch {OLDEST_TORCH}", version, f"pip install 'torch>={OLDEST_TORCH}'"):
        assert words in str(error.value)


@pytest.mark.parametrize("version", [f"{OLDEST_TORCH}.0", f"{OLDEST_TORCH}.0a0+git1234", "3.0.0", torch.__version__])
def test_this_torch_and_newer_ones_are_welcome(version):
    refuse_older(version)


def test_the_import_of_the_library_refuses_an_older_torch_before_anything_else():
    said = run(
        "import sys, torch; torch.__version__ = '2.6.0'\n"
        "try:\n    from actsteer import Steerer\nexcept ImportError as error:\n"
        "    print(error, [name for name in sys.modules if name.startswith('actsteer')])"
    )
    assert "expected torch" in said
    assert said.endswith("['actsteer']\n")  # nothing of it but this


WITHOUT = """
import torch, torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

there = torch._C._autograd._top_saved_tensors_default_hooks, torch._C._is_fwd_grad_enabled
del torch._C._autograd._top_saved_tensors_default_hooks, torch._C._is_fwd_grad_enabled
del torch._C._functorch.is_functorch_wrapped_tensor, torch._dynamo.eval_frame.skip_code

import actsteer.private_names
from actsteer import Ablate, Steerer, SteeringVector

assert actsteer.private_names.is_outside_of_functions() is False  # a stand-in
torch._C._autograd._top_saved_tensors_default_hooks, torch._C._is_fwd_grad_enabled = there  # torch needs them too
model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
x, v = torch.randn(3, 4), torch.randn(4)
expected = model[2](model[1](model[0](x) + 2 * v))
gradient, = torch.autograd.grad(expected.sum(), model[0].weight)
with Steerer(model, SteeringVector({"0": v}), c=2.0):
    for call in (model, torch.compile(model, backend="eager")):
        assert torch.equal(call(x), expected)
    for reentrant in (False, True):
        h = x.clone().requires_grad_()
        checkpoint(model, h, use_reentrant=reentrant).sum().backward()
        assert torch.equal(model[0].weight.grad, gradient)
        model.zero_grad()
with Steerer(model, SteeringVector({"0": v}), intervention=Ablate()):
    assert torch.allclose(model[:1](x) @ v, torch.zeros(3), atol=1e-5)
"""


def test_without_the_parts_that_have_a_stand_in_everything_is_steered_the_same():
    run(WITHOUT)
