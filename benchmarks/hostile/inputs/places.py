"""Two at once, signals, full disks, places that cannot be written, names that are no file names."""

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.hostile import comparing
from benchmarks.hostile.inputs.rows import Place, Row, make_writable
from benchmarks.hostile.processes import Ended, call
from benchmarks.hostile.stores import AIR, dataset, evaluating, predicting, training, write_catalog

FIXTURES = Path("fix")
STATS = ("data", "stats", *training(FIXTURES, "run")[1:])
INGEST = ("data", "ingest", "input=fix/train.zarr", "output=out.zarr", "layout.time=4")
CALIBRATE = ("calibrate", *predicting(FIXTURES, "new.ckpt", "task.lead_time=6h", "every=4")[1:])
LONG = tuple(training(FIXTURES, "run", "trainer.max_steps=400",
                      "trainer.checkpoint_interval=1000",
                      "trainer.validation_interval=1000"))  # fmt: skip


def rows() -> list[Row]:
    return [*_two_at_once(), *_signals(), *_full_disks(), *_unwritable(), *_names(), *_homes()]


def failed(ended: Ended, why: str) -> Ended:
    """What a command left, with a fault that its exit code does not show."""
    return Ended(99, ended.stdout, f"{why}\n{ended.stderr}", ended.cpu_s, ended.wall_s)


# Two at once


def _pair(arguments: Sequence[str], head_start_s: float) -> Callable[[Place], Ended]:
    """The same command twice; what the one left that did not end well."""

    def act(place: Place) -> Ended:
        first = place.start(arguments)
        first.is_over(head_start_s)
        second = place.start(arguments)
        ends = [first.wait(), second.wait()]
        good = [end for end in ends if end.code == 0]
        bad = [end for end in ends if end.code != 0]
        if not good:
            return failed(ends[0], f"neither of the two ended well: {ends[1].stderr[-300:]}")
        return bad[0] if bad else good[0]

    return act


def _two_at_once() -> list[Row]:
    predict = predicting(FIXTURES, "out.zarr", "batch_size=1")

    def same_store(folder: Path) -> str:
        out, source = (comparing.store_of(str(folder / name)) for name in
                       ("out.zarr", "fix/train.zarr"))  # fmt: skip
        return "" if {"temperature", "time"} <= set(out) & set(source) else f"only {set(out)}"

    rows = []
    for head_start_s in (0.0, 0.6):
        after = f"{head_start_s:g} s apart"
        rows += [
            Row(f"two predictions to one output, {after}", "refused", words=("out.zarr",),
                act=_pair(predict, head_start_s)),
            Row(f"two trainings in one folder, {after}", "refused", words=("run",),
                act=_pair(training(FIXTURES, "run"), head_start_s)),
            Row(f"two ingests to one store, {after}", "right|refused", words=("out.zarr",),
                act=_pair(INGEST, head_start_s), check=same_store),
            Row(f"two statistics, {after}", "right", act=_pair(STATS, head_start_s)),
        ]  # fmt: skip
    return [
        *rows,
        Row("two evaluations to one report", "refused", words=("report",),
            act=_pair(evaluating(FIXTURES, "report"), 0.3)),
        Row("two calibrations to one checkpoint", "refused|right", words=("new.ckpt",),
            act=_pair(CALIBRATE, 0.2)),
    ]  # fmt: skip


# Signals


def _signalled(
    number: int, *more: str, to_all: bool = False, own_server: bool = False
) -> Callable[[Place], Ended]:
    """A training that gets a signal once it has begun; it must have saved before it left."""

    def act(place: Place) -> Ended:
        process = place.start([*LONG, *more], own_server=own_server)
        begun = place.folder / "run" / "metrics.csv"
        limit = time.monotonic() + 90
        while not begun.exists() and time.monotonic() < limit and not process.is_over(0.05):
            pass
        process.is_over(0.3)
        process.send(number, to_all)
        ended = process.wait()
        saved = list((place.folder / "run" / "checkpoints").glob("step-*.ckpt"))
        if ended.code not in (0, None) and not saved:
            return failed(ended, "the steps since the last checkpoint are lost")
        return ended

    return act


def _early(arguments: Sequence[str], delay_s: float) -> Callable[[Place], Ended]:
    """Ctrl-C while a command starts; a command that was faster is right, too."""

    def act(place: Place) -> Ended:
        process = place.start(arguments)
        process.is_over(delay_s)
        process.send(signal.SIGINT)
        return process.wait()

    return act


def really(arguments: Sequence[str]) -> int:
    """The program from its first import on, in place of a fork that has all imports behind it."""
    program = str(Path(sys.executable).with_name("atmossl"))
    os.execve(program, [program, *arguments], dict(os.environ))


def _while_importing(place: Place) -> Ended:
    """Ctrl-C in the first second of a real start."""
    process = Place(place.folder, really).start(LONG)
    process.is_over(1.5)
    process.send(signal.SIGINT)
    return process.wait()


def _twice(place: Place) -> Ended:
    """A second Ctrl-C leaves at once, without waiting for what the first one began."""
    process = place.start(LONG)
    begun = place.folder / "run" / "metrics.csv"
    limit = time.monotonic() + 90
    while not begun.exists() and time.monotonic() < limit and not process.is_over(0.05):
        pass
    process.send(signal.SIGINT)
    process.is_over(0.01)
    process.send(signal.SIGINT)
    return process.wait()


def _signals() -> list[Row]:
    words = ("saved|SIG|interrupt|stopped",)
    rows = [
        Row(f"{signal.Signals(number).name} while training", "refused", words=words,
            act=_signalled(number), codes=(128 + number,))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    ]  # fmt: skip
    early = {"train": LONG, "predict": predicting(FIXTURES, "out.zarr", "batch_size=1"),
             "ingest": INGEST, "stats": STATS, "evaluate": evaluating(FIXTURES, "report"),
             "calibrate": CALIBRATE}  # fmt: skip
    rows += [
        Row(f"Ctrl-C {delay:g} s after the start of {name}", "refused|right",
            words=("interrupt|SIGINT|stopped",), act=_early(arguments, delay), codes=(1, 2, 130))
        for name, arguments in early.items()
        for delay in ((0.05, 0.7) if name == "train" else (0.5,))
    ]  # fmt: skip
    return [
        *rows,
        Row("Ctrl-C while training with workers", "refused", words=words, codes=(130,),
            act=_signalled(signal.SIGINT, "data.num_workers=2", to_all=True, own_server=True)),
        Row("Ctrl-C while importing", "refused", words=("interrupt|SIGINT|stopped",),
            act=_while_importing, codes=(1, 2, 130)),
        Row("Ctrl-C twice", "refused", words=("interrupt|SIGINT|saved|stopped",), act=_twice,
            codes=(1, 2, 130)),
    ]  # fmt: skip


# Full disks, and places that cannot be written


def _full(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _full_beside_output() -> None:
    """A disk that takes 100 bytes of a file, and a standard output that takes all."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _full(100)()


COMMANDS = {  # a command, and a part of the name of what it writes
    "train": (tuple(training(FIXTURES, "{}run")), "run"),
    "predict": (tuple(predicting(FIXTURES, "{}out.zarr", "every=4")), "out.zarr"),
    "predict to NetCDF": (tuple(predicting(FIXTURES, "{}out.nc", "every=4")), r"out\.nc"),
    "evaluate": (tuple(evaluating(FIXTURES, "{}report")), "report"),
    "calibrate": (("calibrate", *predicting(FIXTURES, "{}new.ckpt", "task.lead_time=6h",
                                            "every=4")[1:]), "new.ckpt"),
    "export": (("export", "checkpoint=fix/tiny.ckpt", "output={}small.ckpt"), "small.ckpt"),
    "ingest": (("data", "ingest", "input=fix/train.zarr", "output={}out.zarr"), "out.zarr"),
    "inspect": (
        ("data", "inspect", "waves", "data.catalog=fix/catalog.yaml", "output={}maps"), "maps"
    ),
    "climatologies": ((*STATS, "climatologies=[month]", "output={}climate"), "climate"),
}  # fmt: skip


def _full_disks() -> list[Row]:
    rows = [
        Row(f"{name} on a full disk", "refused",
            tuple(item.replace("{}", "") for item in arguments), (word,), before=_full(300),
            codes=(1, 2))
        for name, (arguments, word) in COMMANDS.items()
    ]  # fmt: skip
    checkpoint = tuple(training(FIXTURES, "run"))
    return [
        *rows,
        Row("train on a disk that fills later", "refused", checkpoint, ("ckpt|checkpoint",),
            before=_full(60_000), codes=(1, 2)),
        Row("statistics on a full disk", "refused", STATS, ("cache|statistics",),
            environment={"ATMOSSL_CACHE": "own"}, before=_full_beside_output, codes=(1, 2)),
    ]  # fmt: skip


def _unwritable() -> list[Row]:
    def file_in_the_way(folder: Path) -> None:
        (folder / "file").write_text("no folder\n")

    rows = [
        Row(f"{name} below a file", "refused",
            tuple(item.replace("{}", "file/") for item in arguments), ("file",), file_in_the_way,
            codes=(1, 2))
        for name, (arguments, _) in COMMANDS.items()
    ]  # fmt: skip
    return [
        *rows,
        Row("a cache below a file", "refused", STATS, ("file|ATMOSSL_CACHE",), file_in_the_way,
            environment={"ATMOSSL_CACHE": "file/cache"}, codes=(1, 2)),
        Row("predict in a folder of the system", "refused",
            tuple(predicting(FIXTURES, "/proc/out.zarr", "every=4")), ("/proc",), codes=(1, 2)),
        Row("train in a folder of the system", "refused",
            tuple(training(FIXTURES, "/proc/run")), ("/proc",), codes=(1, 2)),
    ]  # fmt: skip


# Names


def _names() -> list[Row]:
    return [*_paths(), *_outside(), *_markup()]


def _paths() -> list[Row]:
    """The checkpoint lies in a folder whose name is no plain word."""
    rows = []
    for odd in ("lr=0.1", "a b", "größe", "x,y", "(1)", "a'b", "100%", "{a}", "[1]", "$HOME", "~x"):
        expect = "right" if odd in ("lr=0.1", "a b", "größe") else "right|refused"

        def make(folder: Path, odd: str = odd) -> None:
            (folder / odd).mkdir()
            shutil.copy(folder / "fix" / "tiny.ckpt", folder / odd / "tiny.ckpt")

        predict = [item for item in predicting(FIXTURES, f"{odd}/out.zarr", "every=20",
                                               "task.lead_time=6h")
                   if not item.startswith("checkpoint")]  # fmt: skip
        checkpoint = f"checkpoint={odd}/tiny.ckpt"

        def there(folder: Path, odd: str = odd) -> str:
            return "" if (folder / odd / "out.zarr").exists() else f"no {odd}/out.zarr"

        rows += [
            Row(f"info of a checkpoint in {odd}", expect, ("info", checkpoint), (), make),
            Row(f"predict in {odd}", expect, (*predict, checkpoint), (), make, there),
        ][: 2 if expect == "right" or odd in ("x,y", "{a}", "$HOME") else 1]
    return rows


def _outside() -> list[Row]:
    """Names with `..` write nothing outside of the folder that was given."""
    names = {"temperature": "temperature"}

    def tried(prepare: Callable[[Path], object], *arguments: str) -> Callable[[Place], Ended]:
        def act(place: Place) -> Ended:
            inner = place.folder / "a" / "b"
            inner.mkdir(parents=True)
            (inner / "fix").symlink_to(FIXTURES if not place.folder else
                                       (place.folder / "fix").resolve())  # fmt: skip
            call(prepare, inner)
            before = _tree(place.folder, inner)
            ended = Place(inner, place.program).run(arguments, environment={
                "ATMOSSL_CACHE": str(inner / "cache")})  # fmt: skip
            outside = _tree(place.folder, inner) - before
            make_writable(inner)
            return failed(ended, f"wrote {sorted(outside)}") if outside else ended

        return act

    def catalog(variable: str, segment: str = "all", name: str = "waves") -> Callable:
        def make(folder: Path) -> None:
            store = dataset(("temperature",)).rename(temperature="x")
            store.to_netcdf(folder / "in.nc")
            splits = {split: [{"segment": segment}] for split in ("train", "validation", "test")}
            segments = {segment: {"location": str(folder / "in.nc")}}
            write_catalog(folder, {}, {variable: "x"} if variable else names, (500, 850),
                          name=name, splits=splits, segments=segments)  # fmt: skip

        return make

    odd = "../../x"
    air = AIR.replace("temperature, u_component_of_wind", odd)
    stats = ("data", "stats", *training(Path(), "run", streams=(air,))[1:])
    inspect = ("data", "inspect", "waves", "data.catalog=catalog.yaml", "output=maps")
    expect = "right|refused"
    plain = AIR.replace("temperature, u_component_of_wind", "temperature")
    named = AIR.replace("+stream.air", "+stream.../../x")
    return [
        Row("inspect a variable called ../../x", expect, act=tried(catalog(odd), *inspect)),
        Row("inspect a segment called ../../x", expect,
            act=tried(catalog("temperature", odd), *inspect)),
        Row("statistics of a variable called ../../x", expect, act=tried(catalog(odd), *stats)),
        Row("climatologies of a variable called ../../x", expect,
            act=tried(catalog(odd), *stats, "climatologies=[month]", "output=c")),
        Row("statistics of an entry called ../../x", expect,
            act=tried(catalog("temperature", name=odd), "data", "stats",
                      *training(Path(), "run", f"data.name={odd}", streams=(plain,))[1:])),
        Row("a stream called ../../x", expect,
            act=tried(catalog("temperature"), *training(Path(), "run", streams=(named,)))),
        Row("ingest a variable called ../../x", expect,
            act=tried(catalog("temperature"), "data", "ingest", "input=in.nc", "output=o.zarr",
                      f"variables={{{odd}: x}}")),
    ]  # fmt: skip


def _tree(folder: Path, inner: Path) -> set[str]:
    """Paths below a folder that are not below the inner one."""
    names = set()
    for path in folder.rglob("*"):
        if inner not in path.parents and path != inner and "streams-" not in str(path):
            names.add(str(path.relative_to(folder)))
    return names


def _markup() -> list[Row]:
    odd = "[red]x[/red]<script>alert(1)"

    def make(folder: Path) -> None:
        dataset(("temperature",)).rename(temperature="x").to_netcdf(folder / "in.nc")
        write_catalog(folder, {"all": str(folder / "in.nc")}, {odd: "x"}, (500, 850))

    inspect = ("data", "inspect", "waves", "data.catalog=catalog.yaml", "output=maps")

    def printed(place: Place) -> Ended:
        ended = place.run(inspect)
        if ended.code == 0 and "[red]x[/red]" not in " ".join(ended.stdout.split()):
            return failed(ended, "the name was taken as markup")
        return ended

    def escaped(folder: Path) -> str:
        page = (folder / "report<script>alert(1)" / "index.html").read_text()
        return "markup of a name is in the page" if "<script>alert(1)" in page else ""

    evaluate = tuple(evaluating(FIXTURES, "report<script>alert(1)", "every=10"))
    return [
        Row("inspect a variable with markup in its name", "right|refused", make=make, act=printed),
        Row("evaluate into a folder with markup in its name", "right|refused", evaluate,
            check=escaped),
    ]  # fmt: skip


def _homes() -> list[Row]:
    """A container: no HOME, and a user that the system does not know."""
    unknown = {"HOME": None, "XDG_CACHE_HOME": None}

    def stranger() -> None:
        os.setresuid(12345, 0, 0)

    with_cache = {**unknown, "ATMOSSL_CACHE": "own"}
    return [
        Row("no HOME, with ATMOSSL_CACHE", "right", STATS, environment=with_cache,
            before=stranger, program=really),
        Row("no HOME, no cache", "right|refused|told", STATS, ("HOME|ATMOSSL_CACHE|cache",),
            environment={**unknown, "ATMOSSL_CACHE": None}, before=stranger, program=really),
        Row("train with no HOME", "right", tuple(training(FIXTURES, "run")),
            environment=with_cache, before=stranger, program=really),
    ]  # fmt: skip
