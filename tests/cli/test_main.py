"""The command itself: help, completion, exit codes, models that are not there; some of it in a process of its own."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from actsteer import BatchError

COMMANDS = ("sites", "fit", "show", "generate", "look", "play", "convert", "fold", "verify", "explain")


def shell(*arguments, cwd, **environment):
    """The installed script in a process of its own, without a terminal."""
    script = Path(sys.executable).with_name("actsteer")
    return subprocess.run(
        [script, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_installed_script_without_a_terminal(folder):
    done = shell("sites", "nets:build", "0", cwd=folder)  # a module of the current folder
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [["site", "class", "features"], ["0", "Linear", "8"]]
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    done = shell("sites", "nets:number", cwd=folder)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_shell_completion(folder, kind):
    words = {"bash": {"COMP_WORDS": "actsteer ge", "COMP_CWORD": "1"}}
    both = {"_TYPER_COMPLETE_ARGS": "actsteer ge", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = shell(cwd=folder, _ACTSTEER_COMPLETE=f"complete_{kind}", **words.get(kind, both))
    assert done.returncode == 0
    assert "generate" in done.stdout
    assert "verify" not in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(run, command):
    for flag in ("--help", "-h"):
        done = run(command, flag)
        assert done.code == 0
        assert "Examples" in done.out
        assert f"actsteer {command} " in done.out.split("Examples")[-1]
        assert done.err == ""


def test_help_and_version(run):
    done = run("--help")
    assert all(command in done.out for command in COMMANDS)
    assert run("--version").out == f"{version('actsteer')}\n"
    assert "Usage" in run().out + run().err


@pytest.mark.parametrize("arguments", [["shwo"], ["show"], ["show", "a", "b"], ["sites", "llama", "--frobnicate"]])
def test_wrong_usage_exits_with_2(run, arguments):
    done = run(*arguments)
    assert done.code == 2
    assert "Usage" in done.err
    assert done.out == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("./nothing", "there is no such directory"),
        ("nothing:build", "no module 'nothing'"),
        ("nets:nothing", "has no 'nothing'"),
        ("nets:number", "expected a torch.nn.Module, got int"),
        (":build", "expected module:factory"),
        ("../nets:build", "expected module:factory"),
        ("nowhere", "there is no such folder, and no such model was found"),
        ("empty", "empty"),
        ("silly", "silly"),
        ("remote", "trust_remote_code"),
    ],
)
def test_a_model_that_is_not_there(run, folder, monkeypatch, name, why):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "empty").mkdir()
    (folder / "silly").mkdir()
    (folder / "silly/config.json").write_text('{"model_type": "a_family_that_is_not_there"}')
    (folder / "remote").mkdir()
    (folder / "remote/config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    (folder / "remote/code.py").write_text("raise SystemExit('remote code ran')")
    done = run("sites", name)
    assert done.code == 2
    assert why in done.err
    assert "remote code ran" not in done.err


REMOTE = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Config(PretrainedConfig):
    model_type = "mine_alone"


class Mine(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.middle = nn.Linear(4, 4)
        self.post_init()
"""


@pytest.mark.slow
def test_remote_code_runs_when_it_is_asked_for_alone(folder, tmp_path):
    (folder / "remote").mkdir()
    auto = {"AutoConfig": "code.Config", "AutoModel": "code.Mine"}
    (folder / "remote/config.json").write_text(json.dumps({"model_type": "mine_alone", "auto_map": auto}))
    (folder / "remote/code.py").write_text(REMOTE)
    refused, done = (
        shell("sites", "remote", *flags, cwd=folder, HF_MODULES_CACHE=str(tmp_path / "modules"))
        for flags in ([], ["--trust-remote-code"])
    )
    assert refused.returncode == 2
    assert "trust_remote_code" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["site", "class", "features", "middle", "Linear", "4"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nets:broken", "raised ModuleNotFoundError: No module named 'a_module_that_is_not_there' in "),
        ("nets:asks", "raised TypeError: asks() missing 1 required positional argument"),
        ("silly:build", "raised SyntaxError"),
        ("needs:build", "raised ModuleNotFoundError: No module named 'a_module_that_is_not_there' in "),
    ],
)
def test_a_user_s_own_error_says_where_it_was(run, folder, name, why):
    (folder / "silly.py").write_text("def build(:")
    (folder / "needs.py").write_text("import a_module_that_is_not_there")
    done = run("sites", name)
    assert done.code == 1
    assert why in done.err
    assert done.err.count("\n") == 1


def test_what_a_model_raises_is_one_line_or_on_demand_all_of_it(run, monkeypatch):
    command = [
        "fit",
        "-m",
        "nets:other",
        "--positive",
        "right.pt",
        "--negative",
        "left.pt",
        "--sites",
        "0",
        "-o",
        "v.gguf",
    ]
    done = run(*command)
    assert done.code == 1
    assert done.err.startswith("error: a batch does not fit the model: site '0', a float32 Linear(in_features=")
    assert "mat1 and mat2 shapes cannot be multiplied" in done.err and "linear.py" not in done.err
    monkeypatch.setenv("ACTSTEER_TRACEBACK", "1")
    with pytest.raises(BatchError, match="mat1 and mat2"):
        run(*command)


def test_stopping_it_is_no_error(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("actsteer.cli.models.load", interrupted)
    done = run("sites", "llama")
    assert done.code == 130
    assert "Traceback" not in done.err


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["typer", "rich"])
def test_without_its_extra_it_says_which(extra):
    code = f"import sys; sys.modules[{extra!r}] = None\nfrom actsteer.cli.main import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "the command line needs typer and rich; pip install 'actsteer[cli]'\n"
