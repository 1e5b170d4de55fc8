"""Signals that end a command: one line, an exit code, and what was done is kept."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from atmossl import at_work
from atmossl.at_work import Stopped
from atmossl.cli import main
from atmossl.data import climatology, ingest, statistics
from atmossl.inference import writer
from atmossl.training.keeping import checkpoints_in
from tests.inference.test_command import STORE, arguments, save_tiny
from tests.processes import run, training
from tests.synthetic import catalog

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


ANEW = (  # whatever started pytest, as a shell that lets it run in the background without signals
    "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
)


def python(code: str, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", ANEW + code, *more], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["the package is imported", "the command begins"])
def test_a_signal_in_the_first_seconds_is_one_line(number: signal.Signals, moment: str) -> None:
    signalled = "import atmossl, os; os.kill(os.getpid(), NUMBER)"
    if moment == "the command begins":
        signalled = (
            "import atmossl.cli as cli, os;"
            "cli._COMMANDS['info'] = lambda _: os.kill(os.getpid(), NUMBER); cli.main()"
        )
    code = f"import sys; sys.argv = ['/bin/atmossl', 'info']; {signalled}"
    done = python(code.replace("NUMBER", str(int(number))))
    assert done.returncode == 128 + number
    assert done.stderr.strip().startswith("atmossl")
    assert done.stderr.strip().endswith(f"stopped by {number.name}")
    assert done.stdout == "" and done.stderr.strip().count("\n") == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has it")
def test_a_full_disk_behind_the_standard_output_is_named() -> None:
    code = "import sys; from atmossl.cli import main; sys.exit(main(['data', 'list']))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "atmossl data: standard output: No space left on device\n"


COMMANDS = {"script": ["SCRIPT", "data", "list"], "module": ["-m", "atmossl", "data", "list"]}


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("module", ["fcntl", "pyproj"])  # one of the first imports, one of the last
def test_a_signal_in_an_import_of_the_package_is_one_line(
    kind: str, module: str, tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    script = tmp_path / "atmossl"
    script.write_text("import sys\nfrom atmossl.cli import main\nsys.exit(main())")
    words = [str(script) if word == "SCRIPT" else word for word in COMMANDS[kind]]
    code = (
        "import os, sys; os.environ['PYTHONPATH'] = os.pathsep.join(sys.argv[1:3]);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[3:]])"
    )
    done = python(code, str(tmp_path), str(Path(__file__).parents[1]), *words)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "\natmossl: stopped by SIGINT\n"


LOSES = {  # code that prints the traceback of any exception, or ignores it
    "an import": "import heavy",
    "a deletion": "class Lost:\n    def __del__(self):\n        import os\n"
    "        os.kill(os.getpid(), 2)\n        sum(range(99))\nLost()",
}


@pytest.mark.parametrize("where", LOSES)
def test_a_signal_where_an_exception_is_lost_is_raised_after_it(where: str, tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text(
        "import os, traceback\ntry:\n    os.kill(os.getpid(), 2)\n    sum(range(99))\n"
        "except BaseException:\n    traceback.print_exc()\n"
    )
    code = (
        "import sys, time\nfrom atmossl.at_work import Stopped, answering, keeping\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "try:\n    with answering('x'), keeping('the rest stays'):\n"
        "        exec(sys.argv[2])\n        time.sleep(20)\n        print('too far')\n"
        "except Stopped as stop:\n    print(stop)\n"
    )
    done = python(code, str(tmp_path), LOSES[where])
    assert (done.stdout, done.stderr) == ("stopped by SIGINT; the rest stays\n", "")


def test_importing_the_package_elsewhere_leaves_signals_alone() -> None:
    code = "import signal, atmossl; print(signal.getsignal(signal.SIGINT).__name__)"
    assert python(code).stdout == "default_int_handler\n"


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    code = (
        "import sys, signal; sys.argv[0] = 'atmossl'; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "import atmossl; signal.raise_signal(signal.SIGHUP); print('on')"
    )
    assert python(code).stdout == "on\n"


def test_what_is_kept_is_told_by_the_innermost_context() -> None:
    with (
        pytest.raises(Stopped) as caught,
        at_work.answering("info"),
        at_work.keeping("outer"),
        at_work.keeping("inner"),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert str(caught.value) == "stopped by SIGTERM; inner"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    """A launcher's copy of the first one does not count."""
    code = (
        "import signal, sys, time\nfrom pathlib import Path\n"
        "from atmossl import at_work\n"
        "from atmossl.at_work import answering, keeping, owned\n"
        "with answering('x'), owned(Path(sys.argv[1]), 'output'), keeping():\n"
        "    try:\n        signal.raise_signal(2)\n    except at_work.Stopped:\n"
        "        signal.raise_signal(2)\n        print('goes on', flush=True)\n"
        "        time.sleep(0.4)\n        signal.raise_signal(2)\n        print('too far')\n"
    )
    done = python(code, str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (130, "goes on\n")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def group_signal_at_batch(number: int, sent: int) -> None:
    """A signal to a training process and all that loads data for it, as a terminal sends it."""
    from atmossl.training.module import TrainingModule

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started pytest
    step, count = TrainingModule.training_step, 0

    def counted(self: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal count
        count += 1
        if count == number:
            for process in [*multiprocessing.active_children(), multiprocessing.current_process()]:
                os.kill(process.pid or 0, sent)
        return step(self, batch, batch_idx)

    TrainingModule.training_step = counted  # type: ignore[method-assign]


@pytest.mark.e2e
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_training_saves_and_its_workers_say_nothing(number: signal.Signals, tmp_path: Path) -> None:
    told = training(tmp_path / "run", "data.num_workers=1")
    errors = tmp_path / "errors"
    before = (group_signal_at_batch, (3, number))
    assert run(told, cache=tmp_path, before=before, ERRORS=str(errors)) == 128 + number
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == [
        "step-3.ckpt"
    ]
    assert not (tmp_path / "run" / ".lock").exists()
    (line,) = [one for one in errors.read_text().splitlines() if one.startswith("atmossl")]
    assert f"{number.name} at step 3; saved in" in line and "resume=auto" in line
    assert "Traceback" not in errors.read_text()


@pytest.mark.e2e
def test_training_that_is_stopped_before_its_first_step_says_so(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    before = (signal_in_statistics, ())
    told = training(tmp_path / "run")
    assert run(told, cache=tmp_path, before=before, ERRORS=str(errors)) == 130
    line = errors.read_text().strip().splitlines()[-1]
    assert line.startswith("atmossl train: stopped by SIGINT; no step was taken")
    assert not (tmp_path / "run").exists()


def signal_in_statistics() -> None:
    from atmossl import build

    build.load_or_compute = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """SIGINT in the n-th call of a function."""
    function, count = getattr(module, name), 0

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.2)  # in a thread: until the first one has it
        return function(*given, **more)

    monkeypatch.setattr(module, name, counted)


def stopped(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, *where: Any) -> str:
    """The one line of a command that gets SIGINT somewhere."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, *where)
        assert main(command) == 130
    told = capsys.readouterr().err.strip()
    assert told.splitlines()[-1].startswith("atmossl ")
    assert "Traceback" not in told
    return told.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stops")
    catalog(folder, train=STORE, validation=STORE, test=STORE)
    save_tiny(folder / "tiny.ckpt")
    return folder


def test_a_stopped_prediction_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    chosen = ["predict", "init_time=all", "every=3"]
    whole, output = tmp_path / "whole.zarr", tmp_path / "out.zarr"
    assert main([*chosen, *arguments(folder, whole)]) == 0
    command = [*chosen, *arguments(folder, output)]
    parts = len(list(xr.open_zarr(whole, consolidated=False)["init_time"]))
    assert parts > 2
    line = stopped(command, monkeypatch, capsys, writer._Progress, "save", 3)
    assert "1 of" in line or "2 of" in line
    assert "resume=true" in line and str(writer.partial_of(output)) in line
    assert main([*command, "resume=true"]) == 0
    with (
        xr.open_zarr(output, consolidated=False) as found,
        xr.open_zarr(whole, consolidated=False) as expected,
    ):
        xr.testing.assert_equal(found, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.zarr", "whole.zarr"]


@pytest.mark.parametrize("changed", [0, 6, 9])
def test_a_prediction_does_not_go_on_from_a_store_that_has_changed(
    changed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """changed: the first of the steps that hold other values."""
    store = STORE.copy(deep=True)
    catalog(tmp_path, train=store, validation=store, test=store)
    save_tiny(tmp_path / "tiny.ckpt")
    command = ["predict", "init_time=all", *arguments(tmp_path, tmp_path / "out.zarr")]
    stopped(command, monkeypatch, capsys, writer._Progress, "save", 3)
    store["temperature"][changed:] += 1.0
    store.to_zarr(tmp_path / "test.zarr", mode="w", consolidated=False)
    assert main([*command, "resume=true"]) == 2
    *notes, line = capsys.readouterr().err.strip().splitlines()
    assert f"was begun with content of {tmp_path / 'test.zarr'}" in line
    assert all(note.startswith("note: this checkpoint was not trained for") for note in notes)


def test_a_stopped_ingest_and_statistics_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("ATMOSSL_CACHE", str(tmp_path / "cache"))
    command = ["data", "ingest", f"input={folder / 'train.zarr'}", f"output={tmp_path}/new.zarr",
               "layout.time=3", "workers.count=2"]  # fmt: skip
    line = stopped(command, monkeypatch, capsys, ingest, "write_region", 3)
    assert "the same command goes on" in line
    assert main(command) == 0
    capsys.readouterr()
    stats = ["data", "stats", "experiment=quickstart", "~stream.atmosphere", "data.name=waves",
             f"data.catalog={folder / 'catalog.yaml'}",
             "+stream.t={variables: [temperature], levels: [500, 850], "
             "token_size: {time: 1, lat: 2, lon: 2, level: 2}, role: predict}"]  # fmt: skip
    line = stopped(stats, monkeypatch, capsys, statistics, "read_block", 1)
    assert "the same command goes on" in line
    climate = [*stats, "climatologies=[month]", f"output={tmp_path / 'climate'}"]
    line = stopped(climate, monkeypatch, capsys, climatology, "_write_piece", 1)
    assert "the same command goes on" in line
    assert main(climate) == 0
    assert [path.name for path in (tmp_path / "climate").iterdir()] == ["month.zarr"]


def test_a_stopped_evaluation_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from atmossl.commands import evaluate

    command = ["evaluate", f"checkpoint={folder / 'tiny.ckpt'}", f"output={tmp_path / 'report'}",
               f"data.catalog={folder / 'catalog.yaml'}", "accelerator=cpu"]  # fmt: skip
    line = stopped(command, monkeypatch, capsys, evaluate, "score_tasks", 1)
    assert "nothing is kept" in line
    assert list(tmp_path.iterdir()) == []
