"""`actsteer explain`, to which every error points, and the errors of the command line, which name it."""

import subprocess
import sys

import pytest

from actsteer import ActsteerError, errors

KINDS = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ActsteerError)]


@pytest.mark.parametrize("name", KINDS)
def test_it_prints_what_a_class_says_and_where_its_page_is(run, name):
    done = run("explain", name)
    assert done.code == 0 and done.err == ""
    said = " ".join(done.out.split())
    assert all(line.strip() in done.out for line in getattr(errors, name).__doc__.splitlines())
    assert said.startswith(f"{name}: ") and said.endswith(f"{errors.PAGES}{name}/")


def test_without_a_name_it_prints_the_tree(run):
    done = run("explain")
    assert done.code == 0 and done.err == ""
    assert all(name in done.out for name in KINDS)


def test_a_name_that_is_none_is_wrong_usage_with_close_names(run):
    done = run("explain", "ShapError")
    assert done.code == 2 and done.out == ""
    assert "no error is called 'ShapError'. Close names: 'ShapeError'" in " ".join(done.err.split())


def test_an_error_of_the_command_line_is_a_line_that_names_it(run):
    files = ("--positive", "right.pt", "--negative", "left.pt")
    done = run("fit", "-m", "nets:other", *files, "--sites", "0", "-o", "v.gguf")
    assert done.code == 1 and done.err.count("\n") == 1
    assert done.err.endswith(" [actsteer explain InputError]\n")


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["typer", "rich", "torch"])
def test_it_needs_neither_the_extra_nor_torch(lacks):
    code = f"import sys; sys.modules[{lacks!r}] = None\nfrom actsteer.cli.main import main\nmain()"
    tree, one, wrong = (
        subprocess.run([sys.executable, "-c", code, "explain", *name], capture_output=True, text=True, check=False)
        for name in ([], ["ShapeError"], ["ShapError"])
    )
    assert "SteeringNotApplied" in tree.stdout and tree.returncode == 0
    assert one.stdout == f"{errors.explained('ShapeError')}\n" and one.stderr == ""
    assert wrong.returncode == (2 if lacks == "torch" else 1) and "'ShapeError'" in wrong.stderr and not wrong.stdout
