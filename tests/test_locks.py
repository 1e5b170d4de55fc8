"""One owner of an output, whatever else wants it and however the owner ended."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from atmossl import at_work
from atmossl.at_work import check_is_free, owned
from atmossl.cli import main

CONTEXT = multiprocessing.get_context("spawn")
HOLD = """
import sys, time
from pathlib import Path
from atmossl.at_work import owned
with owned(Path(sys.argv[1]), "output", inside=sys.argv[2] == "inside"):
    print("owned", flush=True)
    time.sleep(600)
"""


def lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def holder(path: Path, where: str = "beside") -> subprocess.Popen:
    """A process that owns a place until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), where], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "owned\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_the_second_comer_is_told_who_owns_the_place_until_that_one_is_killed(
    where: str, tmp_path: Path
) -> None:
    output, inside = tmp_path / "folder" / "out", where == "inside"
    process = holder(output, where)
    try:
        with (
            pytest.raises(ValueError, match=f"output={output} .* process {process.pid} on ") as one,
            owned(output, "output", inside=inside),
        ):
            raise AssertionError
        assert "\n" not in str(one.value)
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie still has its number
        with owned(output, "output", inside=inside):
            pass
    finally:
        end(process)
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"] + [output] * inside


def test_an_owner_that_raises_or_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out.zarr"
    with pytest.raises(KeyError), owned(output, "output"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with owned(output, "output"):
        output.mkdir()
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_of_many_that_come_at_once_one_at_a_time_owns(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale file lies there, so that all of them want to remove it."""
    output = tmp_path / "out"
    end(holder(output))
    if not links:
        monkeypatch.setenv("NO_LINKS", "1")
    (tmp_path / "owners").mkdir()
    processes = [CONTEXT.Process(target=_own_often, args=(output,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert list((tmp_path / "owners").iterdir()) == []
    assert not lock_of(output).exists()


def _own_often(output: Path) -> None:
    if "NO_LINKS" in os.environ:

        def refuse(*_: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        os.link = refuse
    for _ in range(30):
        try:
            with owned(output, "output"):
                (output.parent / "owners" / "present").mkdir()  # fails if another is there
                time.sleep(0.001)
                (output.parent / "owners" / "present").rmdir()
        except ValueError as error:
            assert "is being written by process" in str(error)


def foreign(output: Path, **changes: Any) -> None:
    """The file of an owner that ended, as it would look from elsewhere."""
    end(holder(output))
    owner = json.loads(lock_of(output).read_text())
    lock_of(output).write_text(json.dumps(owner | changes))


OTHER_MACHINES = [{"host": "elsewhere"}, {"boot": "another"}, {"process_namespace": "pid:[1]"}]


@pytest.mark.parametrize("changes", OTHER_MACHINES)
def test_an_owner_elsewhere_counts_until_it_gives_no_sign_of_life(
    changes: dict, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    foreign(output, **changes)
    with pytest.raises(ValueError, match=rf"or remove {lock_of(output)}"), owned(output, "output"):
        raise AssertionError
    old = time.time() - at_work.SILENT_SECONDS - 5
    os.utime(lock_of(output), (old, old))
    with owned(output, "output"):
        pass


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    output = tmp_path / "out"
    foreign(output, process=os.getpid())
    with owned(output, "output"):
        pass


def test_a_requeued_job_follows_itself_on_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    foreign(output, host="elsewhere", slurm_job="7", slurm_restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ValueError, match="elsewhere"), owned(output, "output"):
        raise AssertionError
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with owned(output, "output"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"process": "x"}', "{}"])
def test_a_damaged_file_counts_until_it_is_old(text: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    lock_of(output).write_text(text)
    with pytest.raises(ValueError, match="remove"), owned(output, "output"):
        raise AssertionError
    os.utime(lock_of(output), (1.0, 1.0))
    with owned(output, "output"):
        pass


def test_an_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_work, "BEAT_SECONDS", 0.01)
    lock = lock_of(tmp_path / "out")
    with owned(tmp_path / "out", "output"):
        os.utime(lock, (1.0, 1.0))
        while lock.stat().st_mtime < 2.0:
            time.sleep(0.01)


def test_a_place_that_cannot_be_written_is_named_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", Path("/proc/out")):
        with (
            pytest.raises(ValueError, match=f"paths.output={output} cannot be written"),
            owned(output, "paths.output"),
        ):
            raise AssertionError
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize(
    ("number", "file", "named"),
    [
        (28, None, True),
        (28, "elsewhere", True),
        (30, "out/part", True),
        (13, ".out.partial/part", True),
        (13, "input", False),
        (2, None, False),
    ],
)
def test_errors_of_writing_name_the_key(
    number: int, file: str | None, named: bool, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    error = OSError(number, "No space") if file is None else OSError(number, "No", tmp_path / file)
    with pytest.raises(OSError) as caught, owned(output, "output"):
        raise error
    assert (f"output={output}: No" in str(caught.value.strerror)) == named
    assert file is None or file in str(caught.value)


def test_a_place_is_free_where_nothing_or_an_empty_folder_lies(tmp_path: Path) -> None:
    full, hollow, file = tmp_path / "full", tmp_path / "hollow", tmp_path / "file"
    (full / "inner").mkdir(parents=True)
    hollow.mkdir()
    file.touch()
    for path in (tmp_path / "none", hollow):
        check_is_free(path)
    check_is_free(tmp_path / "none", is_folder=False)
    for path, is_folder in ((full, True), (file, True), (file, False), (hollow, False)):
        with pytest.raises(ValueError, match=f"^hub={path} exists; choose another path"):
            check_is_free(path, "hub", is_folder=is_folder)


WRITING = {
    "train": (["train", "experiment=quickstart"], "paths.output", "run", True),
    "predict": (["predict"], "output", "out.zarr", False),
    "calibrate": (["calibrate"], "output", "new.ckpt", False),
    "evaluate": (["evaluate"], "output", "report", False),
    "export": (["export", "checkpoint=default"], "output", "small.ckpt", False),
    "stats": (["data", "stats", "climatologies=[month]"], "output", "climate", True),
    "ingest": (["data", "ingest", "input=none.nc"], "output", "new.zarr", False),
    "inspect": (["data", "inspect", "sample"], "output", "maps", True),
}


@pytest.mark.parametrize("name", WRITING)
def test_every_command_refuses_a_place_that_another_owns_and_one_that_it_cannot_write(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments, key, file, inside = WRITING[name]
    output = tmp_path / file
    with owned(output, key, inside=inside):
        before = sorted(tmp_path.rglob("*"))
        assert main([*arguments, f"{key}={output}"]) == 2
        assert sorted(tmp_path.rglob("*")) == before
    told = capsys.readouterr().err
    assert f"{key}={output} is being written by process {os.getpid()}" in told
    assert told.count("\n") == 1
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / file
    assert main([*arguments, f"{key}={nowhere}"]) == 2
    assert f"{key}={nowhere} cannot be written: Not a directory" in capsys.readouterr().err
