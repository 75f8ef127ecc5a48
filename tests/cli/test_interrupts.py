"""Ctrl-C, at moments that are known: exit code 130, and not a word."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).with_name("actsteer")
WAITS = "import time; print('here', flush=True); time.sleep(60)"


def launched(folder, *arguments, handler=signal.SIG_DFL, **options):
    """The installed script, with this handler of Ctrl-C: a shell that runs the tests with `&` has it ignored."""
    return subprocess.Popen(
        [SCRIPT, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if sys.platform == "win32" else lambda: signal.signal(signal.SIGINT, handler),
        **options,
    )


def started(folder, code, *, module, handler=signal.SIG_DFL):
    """The installed script, which makes a model of this module, once it has said that it is here."""
    (folder / f"{module}.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    process = launched(folder, "sites", "mine:build", handler=handler, env=environment)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    return process


def ended(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def inside(*lines):
    return "\n".join(["def build():", *(f"    {line}" for line in lines)])


@pytest.mark.parametrize(
    "code",
    [
        WAITS,
        f"try:\n    {WAITS}\nexcept KeyboardInterrupt:\n    pass\nprint('it went on')",
        f"try:\n    {WAITS}\nexcept KeyboardInterrupt:\n    raise ImportError('initialization failed') from None",
        f"import os\ntry:\n    {WAITS}\nexcept KeyboardInterrupt:\n    os.abort()",
    ],
    ids=["plainly", "swallowed", "made another error", "aborted"],
)
def test_while_torch_is_imported_whatever_its_c_code_does(tmp_path, code):
    assert ended(started(tmp_path, code, module="torch")) == (130, "", "")


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_while_the_command_line_itself_is_imported(tmp_path, module):
    assert ended(started(tmp_path, WAITS, module=module)) == (130, "", "")


@pytest.mark.slow
def test_while_a_module_of_the_users_is_imported(tmp_path):
    assert ended(started(tmp_path, WAITS, module="mine")) == (130, "", "")


@pytest.mark.slow
def test_while_a_command_runs_what_is_half_done_is_undone(tmp_path):
    code = inside("try:", f"    {WAITS}", "finally:", "    print('undone', flush=True)")
    assert ended(started(tmp_path, code, module="mine")) == (130, "undone\n", "")


@pytest.mark.slow
def test_an_error_that_c_code_makes_of_it_is_no_error(tmp_path):
    code = inside("try:", f"    {WAITS}", "except KeyboardInterrupt:", "    raise RuntimeError('failed') from None")
    assert ended(started(tmp_path, code, module="mine")) == (130, "", "")


@pytest.mark.slow
def test_the_second_one_waits_for_nothing(tmp_path):
    code = inside("try:", f"    {WAITS}", "finally:", f"    {WAITS}")
    process = started(tmp_path, code, module="mine")
    assert process.stdout.readline() == "here\n"  # it undoes what is half done
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "")


@pytest.mark.slow
def test_after_the_command_it_waits_for_nothing_either(tmp_path):
    code = "\n".join(
        [
            "import atexit, time",
            "from torch import nn",
            "build = nn.Linear(2, 3)",
            "def last():",
            f"    {WAITS}",
            "atexit.register(last)",
        ]
    )
    (tmp_path / "mine.py").write_text(code)
    process = launched(tmp_path, "sites", "mine:build", "")
    assert "here\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there a parent ignores nothing for its children")
def test_where_they_are_ignored_they_stay_ignored(tmp_path):
    waits = WAITS.replace("60", "0.2")
    code = f"{waits}\nfrom torch import nn\nbuild = nn.Sequential(nn.Linear(2, 3))"
    code, out, err = ended(started(tmp_path, code, module="mine", handler=signal.SIG_IGN))
    assert (code, err) == (0, "")
    assert "Linear" in out
