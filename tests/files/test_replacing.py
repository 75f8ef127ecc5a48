"""Saving writes through to the kind of file that is there, and a killed process leaves nothing for long."""

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from actsteer import FileFormatError, Moments, Statistics, SteeringVector, VectorBank
from actsteer.files.replacing import filling, replacing

V = SteeringVector({"model.layers.1": torch.tensor([1.0, -2.0])}, concept="nine")
STATISTICS = Statistics({"2": Moments.of(torch.ones(3, 2))})
SAVED = {"v.safetensors": V, "v.gguf": V, "bank.safetensors": VectorBank({"nine": V}), "s.safetensors": STATISTICS}
every_kind = pytest.mark.parametrize(("name", "value"), SAVED.items(), ids=SAVED.keys())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@every_kind
@pytest.mark.parametrize("kept", [0o600, 0o640, 0o666, 0o755], ids=oct)
def test_a_mode_stays(tmp_path, name, value, kept):
    path = tmp_path / name
    path.write_bytes(b"old")
    path.chmod(kept)
    value.save(path)
    assert mode(path) == kept
    assert type(value).load(path).sites == value.sites


@every_kind
def test_a_new_file_has_the_mode_of_any_new_file(tmp_path, name, value):
    (tmp_path / "other").touch()
    value.save(tmp_path / name)
    assert mode(tmp_path / name) == mode(tmp_path / "other")


def test_no_moment_shows_more_than_the_mode_allows(tmp_path):
    path = tmp_path / "v.safetensors"
    path.touch(mode=0o600)
    with replacing(path) as temporary:
        assert mode(temporary) == 0o600


@every_kind
def test_a_link_stays_a_link_wherever_it_leads(tmp_path, name, value):
    (tmp_path / "inner").mkdir()
    link = tmp_path / name
    link.symlink_to(f"inner/{name}")
    for _ in range(2):  # it leads nowhere, and then to a file
        value.save(link)
        assert link.is_symlink()
        assert type(value).load(tmp_path / "inner" / name).sites == value.sites
    assert [path.name for path in (tmp_path / "inner").iterdir()] == [name]


@every_kind
@pytest.mark.parametrize("by_link", [False, True], ids=["itself", "by a link"])
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_what_is_no_file_is_refused_and_stays(tmp_path, name, value, kind, by_link):
    path = there = tmp_path / name
    if by_link:
        there = tmp_path / "there"
        path.symlink_to(there)
    match kind:
        case "FIFO":
            os.mkfifo(there)
        case "device":
            path.unlink(missing_ok=True)
            path.symlink_to("/dev/null")
            there = Path("/dev/null")
        case _:
            there.mkdir()
    before = there.stat().st_ino, there.stat().st_mode
    with pytest.raises(FileFormatError, match=f"it is a {kind}, and only a file is written over"):
        value.save(path)
    assert (there.stat().st_ino, there.stat().st_mode) == before
    assert not [left for left in tmp_path.iterdir() if left not in (path, there)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    path.touch(mode=0o444)
    with pytest.raises(PermissionError):
        V.save(path)


# --- what is left ------------------------------------------------------------------------------------------------
KILLED = """
    import os, signal, sys, torch
    from actsteer import SteeringVector

    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
    SteeringVector({"model.layers.1": torch.ones(2)}).save(sys.argv[1])
"""


def killed_while_saving(path, script=KILLED):
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    done = subprocess.run(command, check=False, cwd=root, env=os.environ, timeout=60)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_what_a_killed_process_has_left_is_removed_by_the_next_save(tmp_path, suffix):
    path = tmp_path / f"v{suffix}"
    V.save(path)
    before = path.read_bytes()
    killed_while_saving(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    V.save(tmp_path / "other.safetensors")
    assert sorted(own.name for own in tmp_path.iterdir()) == sorted(["other.safetensors", path.name])


FILLED = """
    import os, pathlib, signal, sys
    from actsteer.files.replacing import filling

    with filling(pathlib.Path(sys.argv[1])) as folder:
        (folder / "config.json").write_text("{}")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_that_a_killed_process_has_left_is_removed_too(tmp_path):
    killed_while_saving(tmp_path / "model", FILLED)
    (left,) = tmp_path.iterdir()
    assert [own.name for own in left.iterdir()] == ["config.json"]
    with filling(tmp_path / "mine") as mine:
        (mine / "a").touch()
        V.save(tmp_path / "v.safetensors")
        assert sorted(own.name for own in tmp_path.iterdir()) == sorted([mine.name, "v.safetensors"])
    assert sorted(own.name for own in tmp_path.iterdir()) == ["mine", "v.safetensors"]
    assert [own.name for own in (tmp_path / "mine").iterdir()] == ["a"]


def test_a_folder_is_filled_at_the_end_or_not_at_all(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")

    def fail():
        with filling(tmp_path / "new") as folder:
            (folder / "a").touch()
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    with filling(tmp_path / "link") as folder:
        (folder / "a").touch()
    assert sorted(own.name for own in tmp_path.iterdir()) == ["link", "there"]
    assert [own.name for own in (tmp_path / "there").iterdir()] == ["a"]


def test_what_others_are_writing_and_their_files_stay(tmp_path):
    path, others = tmp_path / "v.safetensors", [".v.safetensors.tmp", ".hidden", f".v.safetensors.{'0' * 32}"]
    for name in others:
        (tmp_path / name).touch()
    with replacing(path) as mine:  # as another thread or process has it
        mine.write_bytes(b"mine")
        V.save(tmp_path / "other.safetensors")
        V.save(path)
        assert mine.read_bytes() == b"mine"
    assert path.read_bytes() == b"mine"
    assert sorted(own.name for own in tmp_path.iterdir()) == sorted([*others, "other.safetensors", path.name])
