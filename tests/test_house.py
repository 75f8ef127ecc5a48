"""The house: floors, sizes, names, and the tools that keep it clean."""

import ast
import statistics
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest

import actsteer

ROOT = Path(actsteer.__file__).parent.parent
FILES = sorted((ROOT / "actsteer").rglob("*.py"))
FLOORS = {
    "errors": 0,
    "files": 1,
    "sites": 1,
    "vectors": 2,
    "collecting": 2,
    "steering": 3,
    "estimators": 4,
    "tuning": 5,
    "integrations": 6,
    "cli": 6,
    "public": 7,
    "__init__": 8,
}
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def folder(module: str) -> str:
    """The step of the pipeline to which a dotted module name belongs."""
    return [*module.split("."), "__init__"][1]


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> list[str]:
    """The modules of this library that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    parts = [
        f"{node.module}.{alias.name}" if (ROOT / node.module.replace(".", "/")).is_dir() else node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    ]
    return [module for module in (*whole, *parts) if module.split(".")[0] == "actsteer"]


def run(*command: str) -> None:
    """Run a tool in the repository; its output is the message if it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- floors ------------------------------------------------------------------------------------------------------
@every_file
def test_a_file_imports_only_from_lower_floors_and_its_own_folder(path):
    own = folder(name(path))
    for module in imported(path):
        other = folder(module)
        assert other == own or FLOORS[other] < FLOORS[own], f"{name(path)} (floor {FLOORS[own]}) imports {module}"


@every_file
def test_imports_are_absolute_and_every_folder_has_a_floor(path):
    relative = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
    assert relative == []
    assert folder(name(path)) in FLOORS


def test_the_files_import_one_another():
    assert "actsteer.vectors.vector" in imported(ROOT / "actsteer/vectors/bank.py")
    assert "actsteer.files.native" in imported(ROOT / "actsteer/vectors/formats.py")


# --- sizes and names ---------------------------------------------------------------------------------------------
def test_files_are_short():
    lines = {name(path): len(path.read_text().splitlines()) for path in FILES if path.name != "__init__.py"}
    assert {module: count for module, count in lines.items() if count > 400} == {}
    assert statistics.median(lines.values()) < 150


def test_no_file_or_folder_has_a_name_without_meaning():
    parts = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert parts & {"utils", "util", "base", "common", "core", "helpers", "misc"} == set()


@pytest.mark.parametrize("public", actsteer.__all__)
def test_every_public_name_exists_and_is_documented(public):
    found = getattr(actsteer, public)
    assert found.__doc__
    assert not found.__doc__.startswith(f"{public}(")  # what dataclass writes when nobody does


def test_the_public_names_are_sorted_and_complete():
    public = {
        n
        for n, value in vars(import_module("actsteer.public")).items()
        if not n.startswith("_") and n != "annotations" and not isinstance(value, types.ModuleType)
    }
    assert set(actsteer.__all__) == public
    assert public < set(dir(actsteer))
    assert len(set(actsteer.__all__)) == len(actsteer.__all__)


@every_file
def test_every_module_with_code_says_what_it_is(path):
    if path.read_text():
        assert ast.get_docstring(ast.parse(path.read_text()))


# --- in a fresh interpreter --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "extra", ["transformers", "torchvision", "matplotlib", "transformer_lens", "sklearn", "pandas"]
)
def test_importing_does_not_import_the_extras(extra, modules_after_import):
    assert extra not in modules_after_import


@pytest.fixture(scope="module")
def modules_after_import():
    """The top-level modules that `import actsteer` loads."""
    found = modules_after("from actsteer import *")
    assert "torch" in found
    return found


def modules_after(command):
    """The top-level modules that are loaded when a command has run."""
    show = "import sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{command}; {show}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("command", ["import actsteer; actsteer.__version__", "import actsteer.cli.app"])
def test_what_needs_no_torch_loads_none(command):
    found = modules_after(command)
    assert "actsteer" in found and "torch" not in found


def test_every_public_name_comes_with_the_first_and_no_other_does():
    show = "print(sorted(vars())); print(actsteer.__all__)"
    done = subprocess.run(
        [sys.executable, "-c", f"import actsteer; from actsteer import *; {show}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names, public = map(ast.literal_eval, done.stdout.splitlines())
    assert set(public) < set(names)
    with pytest.raises(AttributeError, match="module 'actsteer' has no attribute 'steerer'"):
        _ = actsteer.steerer
    with pytest.raises(ImportError, match="cannot import name '_steerer'"):
        exec("from actsteer import _steerer")


def test_mypy_is_content():
    run("-m", "mypy")


def test_ruff_is_content():
    run("-m", "ruff", "check", ".")
    run("-m", "ruff", "format", "--check", ".")


def test_the_examples_run_with_every_annotation_checked():
    checks = "--jaxtyping-packages=actsteer,tests.typechecker.typechecked"
    run("-m", "pytest", "actsteer", "-q", "-p", "tests.typechecker", checks)
