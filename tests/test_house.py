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
    "html": 0,
    "private_names": 0,
    "files": 1,
    "sites": 1,
    "tokens": 2,
    "vectors": 2,
    "collecting": 3,
    "steering": 4,
    "estimators": 5,
    "folding": 5,
    "tuning": 6,
    "integrations": 7,
    "looking": 7,
    "cli": 8,
    "public": 9,
    "__init__": 10,
}


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
def test_a_file_imports_only_from_lower_floors_and_its_own_folder():
    upward = [
        f"{name(path)} (floor {FLOORS[own]}) imports {module}"
        for path in FILES
        for own in [folder(name(path))]
        for module in imported(path)
        if folder(module) != own and FLOORS[folder(module)] >= FLOORS[own]
    ]
    assert upward == []


def test_imports_are_absolute_and_every_folder_has_a_floor():
    nodes = [(path, node) for path in FILES for node in ast.walk(ast.parse(path.read_text()))]
    assert [str(path) for path, node in nodes if isinstance(node, ast.ImportFrom) and node.level] == []
    assert {folder(name(path)) for path in FILES} <= set(FLOORS)


def test_no_file_asks_the_package_for_a_name():
    """`from actsteer import x` loads all the public names first, and with them the file that asks."""
    nodes = [(name(path), node) for path in FILES for node in ast.walk(ast.parse(path.read_text()))]
    asking = {module for module, node in nodes if isinstance(node, ast.ImportFrom) and node.module == "actsteer"}
    assert asking == set()


def test_the_files_import_one_another():
    assert "actsteer.vectors.vector" in imported(ROOT / "actsteer/vectors/bank.py")
    assert "actsteer.files.native" in imported(ROOT / "actsteer/files/formats.py")


# --- sizes and names ---------------------------------------------------------------------------------------------
def test_files_are_short():
    lines = {name(path): len(path.read_text().splitlines()) for path in FILES if path.name != "__init__.py"}
    assert {module: count for module, count in lines.items() if count > 400} == {}
    assert statistics.median(lines.values()) < 150


def test_no_file_or_folder_has_a_name_without_meaning():
    parts = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert parts & {"utils", "util", "base", "common", "core", "helpers", "misc"} == set()


def test_every_public_name_exists_and_is_documented():
    documented = {public: getattr(actsteer, public).__doc__ or "" for public in actsteer.__all__}
    generated = [public for public, text in documented.items() if text.startswith(f"{public}(")]  # by dataclass
    assert [public for public, text in documented.items() if not text] == generated == []


def test_the_public_names_are_sorted_and_complete():
    public = {
        n
        for n, value in vars(import_module("actsteer.public")).items()
        if not n.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert actsteer.__all__ == sorted(public)
    assert public < set(dir(actsteer))


def test_every_module_with_code_says_what_it_is():
    code = {name(path): path.read_text() for path in FILES}
    assert [module for module, text in code.items() if text and not ast.get_docstring(ast.parse(text))] == []


# --- in a fresh interpreter --------------------------------------------------------------------------------------
def in_a_fresh_interpreter(command):
    """The names that a command has made, and the top-level modules that it has loaded."""
    show = "print(*vars()); import sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", f"{command}; {show}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()[-2:]]


def test_importing_every_name_does_not_import_the_extras():
    names, loaded = in_a_fresh_interpreter("from actsteer import *")
    assert set(actsteer.__all__) < names
    assert "torch" in loaded
    assert loaded & {"transformers", "torchvision", "matplotlib", "transformer_lens", "sklearn", "pandas"} == set()


def test_what_needs_no_torch_loads_none():
    _, loaded = in_a_fresh_interpreter("import actsteer, actsteer.cli.app; actsteer.__version__")
    assert "actsteer" in loaded and "torch" not in loaded


def test_a_name_that_is_not_public_is_none_of_the_packages():
    with pytest.raises(AttributeError, match="module 'actsteer' has no attribute 'steerer'"):
        _ = actsteer.steerer
    with pytest.raises(ImportError, match="cannot import name '_steerer'"):
        exec("from actsteer import _steerer")


# --- the tools, in the slow tier: an editor and pre-commit run them all the time -----------------------------------
@pytest.mark.slow
def test_mypy_is_content():
    run("-m", "mypy")


@pytest.mark.slow
def test_ruff_is_content():
    run("-m", "ruff", "check", ".")
    run("-m", "ruff", "format", "--check", ".")


@pytest.mark.slow
def test_the_examples_run_with_every_annotation_checked():
    checks = "--jaxtyping-packages=actsteer,tests.typechecker.typechecked"
    run("-m", "pytest", "actsteer", "-q", "-n0", "-p", "tests.typechecker", checks)
