"""Damaged checkpoints, caches, catalogs and stores, and inputs that change under what goes on."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import yaml

from benchmarks.hostile import comparing
from benchmarks.hostile.inputs.metadata import same
from benchmarks.hostile.inputs.places import failed
from benchmarks.hostile.inputs.rows import Place, Row
from benchmarks.hostile.kills import count_events
from benchmarks.hostile.processes import Ended, call
from benchmarks.hostile.stores import dataset, evaluating, predicting, training, write_catalog

FIXTURES = Path("fix")
NAMES = {name: name for name in ("temperature", "u_component_of_wind")}
OWN = {"ATMOSSL_CACHE": "own"}
STATS = ("data", "stats", *training(FIXTURES, "run")[1:])


def rows() -> list[Row]:
    return [*_checkpoints(), *_runs(), *_caches(), *_catalogs(), *_stores(), *_changes()]


# Checkpoints


def _damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        whole = (folder / "fix" / "tiny.ckpt").read_bytes()
        (folder / "bad.ckpt").write_bytes(change(whole))

    return make


def _saved(contents: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import torch

        whole = torch.load(folder / "fix" / "tiny.ckpt", weights_only=True)
        torch.save(contents(whole), folder / "bad.ckpt")

    return make


def _without(*keys: str) -> Callable[[dict[str, Any]], Any]:
    def contents(whole: dict[str, Any]) -> Any:
        part = whole
        for key in keys[:-1]:
            part = part[key]
        part.pop(keys[-1])
        return whole

    return contents


def _with_code(whole: dict[str, Any]) -> Any:
    return {**whole, "more": Path}


def _no_weight(whole: dict[str, Any]) -> Any:
    name = next(name for name in whole["state_dict"] if "encoder" in name)
    return {**whole, "state_dict": {k: v for k, v in whole["state_dict"].items()
                                    if not k.endswith(name.rpartition("model.")[2])}}  # fmt: skip


def _checkpoints() -> list[Row]:
    bad = {
        "cut in half": _damaged(lambda whole: whole[: len(whole) // 2]),
        "without its last byte": _damaged(lambda whole: whole[:-1]),
        "empty": _damaged(lambda whole: whole[:0]),
        "of zeros": _damaged(lambda whole: bytes(len(whole))),
        "that is text": _damaged(lambda _: b"version https://git-lfs.github.com/spec/v1\n"),
        "of another program": _saved(lambda whole: {"weights": whole["state_dict"]}),
        "that is a list": _saved(lambda whole: list(whole)),
        "without statistics": _saved(_without("atmossl", "statistics")),
        "without its streams": _saved(_without("atmossl", "streams")),
        "without a weight": _saved(_no_weight),
        "with code in it": _saved(_with_code),
        "that is an empty folder": lambda folder: (folder / "bad.ckpt").mkdir(),
    }
    given = [item for item in predicting(FIXTURES, "out.zarr") if "tiny.ckpt" not in item]
    commands = {
        "predict from": (*given, "checkpoint=bad.ckpt"),
        "info of": ("info", "checkpoint=bad.ckpt"),
        "resume from": tuple(training(FIXTURES, "run", "resume=bad.ckpt")),
    }
    rows = [
        Row(f"{verb} a checkpoint {name}", "refused", arguments, ("bad.ckpt",), make)
        for name, make in bad.items() for verb, arguments in commands.items()
        if verb == "predict from" or name in ("cut in half", "empty", "without its streams")
    ]  # fmt: skip
    for verb, arguments in (
        ("start from", training(FIXTURES, "run", "warm_start.checkpoints=[bad.ckpt]")),
        ("export", ("export", "checkpoint=bad.ckpt", "output=o.ckpt")),
        ("evaluate", (*evaluating(FIXTURES, "report"), "checkpoint=bad.ckpt")),
        ("calibrate", ("calibrate", *given[1:], "checkpoint=bad.ckpt", "output=new.ckpt")),
    ):
        rows.append(Row(f"{verb} a checkpoint cut in half", "refused", tuple(arguments),
                         ("bad.ckpt",), bad["cut in half"]))  # fmt: skip
    return rows


# Runs that go on


def _trained(folder: Path) -> Path:
    """A copy of the run of six steps, with its checkpoints of steps 4 and 6."""
    shutil.copytree(folder / "fix" / "run", folder / "run", symlinks=True)
    return folder / "run" / "checkpoints"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _newest_torn(folder: Path) -> None:
    _cut(_trained(folder) / "step-6.ckpt")


def _all_torn(folder: Path) -> None:
    for path in _trained(folder).glob("*.ckpt"):
        if not path.is_symlink():
            _cut(path)


def _empty_metrics(folder: Path) -> None:
    _trained(folder)
    (folder / "run" / "metrics.csv").write_text("")


def _good_at(*steps: int, least: int = 1) -> Callable[[Path], str]:
    """That at least so many of the checkpoints of these steps can be read, and that what
    `last.ckpt` leads to can."""

    def check(folder: Path) -> str:
        checkpoints = folder / "run" / "checkpoints"
        good = []
        for step in steps:
            try:
                comparing.read_checkpoint(checkpoints / f"step-{step}.ckpt")
                good.append(step)
            except Exception:
                continue
        try:
            last = comparing.read_checkpoint(checkpoints / "last.ckpt")["global_step"]
        except Exception as error:
            return f"last.ckpt cannot be read: {error!r}"[:200]
        if last != max(steps):
            return f"last.ckpt is of step {last}"
        return "" if len(good) >= least else f"good are {good} of {steps}"

    return check


def _runs() -> list[Row]:
    more = ("resume=auto", "trainer.max_steps=8", "trainer.checkpoint_interval=2")
    onwards = tuple(training(FIXTURES, "run", *more))
    keep_one = (*onwards, "trainer.keep_checkpoints=1")
    older = tuple(training(FIXTURES, "run", *more, "resume=run/checkpoints/step-4.ckpt",
                           "trainer.keep_checkpoints=1"))  # fmt: skip

    def with_run(folder: Path) -> None:
        _trained(folder)

    def changed(*settings: str) -> tuple[str, ...]:
        return (*onwards, *settings)

    fixed = [
        ("model.dim=32", "model.dim"), ("optimizer=muon", "optimizer.algorithm"),
        ("stream.air.levels=[500]", "levels"), ("data.first_guess=false", "first_guess"),
        ("stream.air.variables=[temperature]", "variables"),
    ]  # fmt: skip
    rows = [
        Row(f"resume with {setting}", "refused", changed(setting), (word,), with_run)
        for setting, word in fixed
    ]
    return [
        *rows,
        Row("a run without resume in its folder", "refused", tuple(training(FIXTURES, "run")),
            ("resume=auto",), with_run),
        Row("the newest checkpoint is torn", "told", onwards, ("step-6",), _newest_torn,
            _good_at(8)),
        Row("the newest is torn and one is kept", "told", keep_one, ("step-6",), _newest_torn,
            _good_at(8)),
        Row("all checkpoints are torn", "refused", onwards, ("step|checkpoint",), _all_torn),
        Row("going on from an older checkpoint", "right", older, (), with_run, _good_at(8)),
        Row("an empty metrics.csv", "right", onwards, (), _empty_metrics, _good_at(8)),
        Row("shards without a file", "refused", words=("shards.ckpt",), act=_shards("missing")),
        Row("shards with a cut file", "refused", words=("shards.ckpt",), act=_shards("cut")),
        Row("shards without their index", "refused", words=("shards.ckpt",), act=_shards("index")),
    ]  # fmt: skip


def _shards(fault: str) -> Callable[[Place], Ended]:
    """A sharded checkpoint that lacks something is one line, whatever torch raises."""

    def act(place: Place) -> Ended:
        sharded = ("trainer.strategy=fsdp", "trainer.checkpoint_format=sharded",
                   "trainer.max_steps=2")  # fmt: skip
        first = place.run(training(FIXTURES, "run", *sharded))
        if first.code:
            return failed(first, "the sharded run")
        path = place.folder / "shards.ckpt"
        (place.folder / "run" / "checkpoints" / "step-2.ckpt").rename(path)
        (shard,) = path.glob("*.distcp")
        if fault == "missing":
            shard.unlink()
        elif fault == "cut":
            _cut(shard)
        else:
            (path / ".metadata").unlink()
        return place.run(("export", "checkpoint=shards.ckpt", "output=o.ckpt"))

    return act


# Caches


def _caches() -> list[Row]:
    """Statistics that are damaged in the cache are refused or made anew, and `--force` helps."""
    damages: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda _: b"",
        "cut": lambda whole: whole[: len(whole) // 2],
        "{}": lambda _: b"{}",
        "[]": lambda _: b"[]",
        "binary": lambda _: bytes(range(256)),
        "with null for a mean": lambda whole: _changed(whole, "mean", None),
        "with a word for a number": lambda whole: _changed(whole, "std", "wide"),
        "with a level less": lambda whole: _shorter(whole),
    }

    def damaged(change: Callable[[bytes], bytes], *then: str) -> Callable[[Place], Ended]:
        def act(place: Place) -> Ended:
            first = place.run(STATS, environment=OWN)
            if first.code:
                return failed(first, "the statistics themselves")
            (file,) = (place.folder / "own").glob("statistics-*.json")
            whole = file.read_bytes()
            file.write_bytes(change(whole))
            ended = place.run((*STATS, *then), environment=OWN)
            if ended.code == 0 and json.loads(file.read_bytes()) != json.loads(whole):
                return failed(ended, f"{file.name} is damaged still")
            return ended

        return act

    rows = [
        Row(f"statistics {name}", "refused|right", words=("statistics",), act=damaged(change))
        for name, change in damages.items()
    ]
    forced = [
        Row(f"statistics {name}, --force", "right", act=damaged(change, "--force"))
        for name, change in damages.items()
        if name in ("empty", "cut", "{}")
    ]
    return [*rows, *forced]


def _changed(whole: bytes, key: str, value: Any) -> bytes:
    return json.dumps({**json.loads(whole), key: value}).encode()


def _shorter(whole: bytes) -> bytes:
    statistics = json.loads(whole)
    return json.dumps({**statistics, "mean": [row[:1] for row in statistics["mean"]]}).encode()


# Catalogs


def _catalogs() -> list[Row]:
    def text(content: str | bytes) -> Callable[[Path], object]:
        data = content.encode() if isinstance(content, str) else content
        return lambda folder: (folder / "catalog.yaml").write_bytes(data)

    def entry(**changes: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            store = {"all": {"location": str(folder / "fix" / "train.zarr")}}
            splits = {split: [{"segment": "all"}] for split in ("train", "validation", "test")}
            whole = {"description": "x", "segments": store, "splits": splits, "levels": [500, 850],
                     "variables": NAMES, "licence": "x", "citation": "x"}  # fmt: skip
            whole = {k: v for k, v in (whole | changes).items() if v is not None}
            (folder / "catalog.yaml").write_text(yaml.safe_dump({"waves": whole}))

        return make

    arguments = tuple(["data", "stats", *training(Path(), "run")[1:]])
    table = [
        ("a catalog that is no YAML", text("waves: [\n"), "catalog.yaml"),
        ("an empty catalog", text(""), "catalog.yaml"),
        ("a catalog that is a list", text("- waves\n"), "catalog.yaml"),
        ("a catalog that is binary", text(bytes(range(256))), "catalog.yaml"),
        ("an entry that is a word", text("waves: store\n"), "waves|catalog.yaml"),
        ("an entry without splits", entry(splits=None), "splits"),
        ("an entry without variables", entry(variables=None), "variables"),
        ("an entry with a misspelt key", entry(variabels=NAMES), "variabels"),
        ("levels that are words", entry(levels=["low"]), "levels"),
        ("a split of an unknown segment", entry(splits={"train": [{"segment": "none"}]}), "none"),
        ("a segment that is not there", entry(segments={"all": {"location": "none.zarr"}}),
         "none.zarr"),
        ("a format that does not exist",
         entry(segments={"all": {"location": "x", "format": "hdf4"}}), "format|hdf4"),
        ("gaps that do not exist", entry(gaps="fill"), "gaps"),
        ("a coordinate that does not exist", entry(coordinates={"depth": "z"}), "depth"),
        ("a variable that the store lacks", entry(variables={"temperature": "tt",
                                                             "u_component_of_wind": "uu"}), "tt"),
        ("a period that ends before it begins",
         entry(splits={s: [{"segment": "all", "start": "2001-01-05", "end": "2001-01-02"}]
                       for s in ("train", "validation", "test")}), "2001-01"),
        ("a period of no date",
         entry(splits={s: [{"segment": "all", "start": "2001-02-30"}]
                       for s in ("train", "validation", "test")}), "2001-02-30"),
        ("a level that the store lacks", entry(levels=[500, 850, 1000]), ""),
    ]  # fmt: skip
    return [
        Row(name, "refused" if word else "right|refused", arguments, (word,) if word else (), make)
        for name, make, word in table
    ]


# Stores


def _stores() -> list[Row]:
    """Damaged stores, by what the statistics of them say."""

    def damaged(change: Callable[[Path], object], kind: str = "zarr") -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            path = folder / f"in.{kind}"
            if kind == "zarr":
                shutil.copytree(folder / "fix" / "train.zarr", path)
            elif kind == "nc":
                dataset().to_netcdf(path)
            else:
                shutil.make_archive(str(folder / "in.zarr"), "zip", folder / "fix" / "train.zarr")
            change(path)
            write_catalog(folder, {"all": str(path)}, NAMES, (500, 850))

        return make

    def array_of(path: Path, name: str) -> Path:
        return path / name / "zarr.json"

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def chunk(path: Path) -> Path:
        return next(p for p in (path / "temperature" / "c").rglob("*") if p.is_file())

    arguments = tuple(["data", "stats", *training(Path(), "run")[1:]])
    table = [
        ("zarr whose metadata are empty",
         damaged(lambda path: array_of(path, "temperature").write_text("")), "in.zarr"),
        ("zarr whose metadata are cut", damaged(lambda path: cut(array_of(path, "temperature"))),
         "in.zarr"),
        ("zarr whose metadata are {}",
         damaged(lambda path: array_of(path, "temperature").write_text("{}")), "in.zarr"),
        ("zarr whose group is cut", damaged(lambda path: cut(path / "zarr.json")), "in.zarr"),
        ("zarr without its times", damaged(lambda path: shutil.rmtree(path / "time")),
         "time"),
        ("zarr without a variable", damaged(lambda path: shutil.rmtree(path / "temperature")),
         "temperature"),
        ("zarr with a cut chunk", damaged(lambda path: cut(chunk(path))), "in.zarr"),
        ("zarr with an empty chunk", damaged(lambda path: chunk(path).write_bytes(b"")),
         "in.zarr"),
        ("zarr with a chunk of text", damaged(lambda path: chunk(path).write_text("404")),
         "in.zarr"),
        ("a cut NetCDF file", damaged(cut, "nc"), r"in\.nc"),
        ("an empty NetCDF file", damaged(lambda path: path.write_bytes(b""), "nc"), r"in\.nc"),
        ("a cut zip", damaged(cut, "zarr.zip"), r"in\.zarr\.zip"),
    ]  # fmt: skip
    rows = [Row(name, "refused", arguments, (word,), make) for name, make, word in table]
    ingest = ("data", "ingest", "input=in.nc", "output=out.zarr")
    rows += [
        Row("ingest of a cut NetCDF file", "refused", ingest, (r"in\.nc",), damaged(cut, "nc")),
        Row("ingest of zarr with a cut chunk", "refused",
            ("data", "ingest", "input=in.zarr", "output=out.zarr"), ("in.zarr",),
            damaged(lambda path: cut(chunk(path)))),
    ]  # fmt: skip
    return [*rows, *_endings()]


def _endings() -> list[Row]:
    """NetCDF under any name."""

    def named(name: str, **options: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            store = dataset(("temperature",))
            np.save(folder / "truth.npy", store["temperature"].values)
            store.to_netcdf(folder / name, **options)

        return make

    def check(folder: Path) -> str:
        out = xr.open_zarr(folder / "out.zarr", consolidated=False)
        return same(out["temperature"].values, np.load(folder / "truth.npy"))

    classic: dict[str, Any] = {"format": "NETCDF3_64BIT"}
    table = [("old.cdf", classic), ("data", {}), ("x.nc4", {}), ("x.netcdf", {}), ("x.h5", {}),
             ("x.nc.1", classic), ("X.NC", {})]  # fmt: skip
    return [
        Row(f"NetCDF called {name}", "right", ("data", "ingest", f"input={name}",
                                               "output=out.zarr"), (), named(name, **o), check)
        for name, o in table
    ]  # fmt: skip


# Inputs that change


def _own_store(folder: Path, plus: float = 0.0, steps: int = 24) -> None:
    """`in.zarr`, which is all periods of `catalog.yaml`."""
    store = dataset(steps=steps)
    store["temperature"].values[:] += plus
    shutil.rmtree(folder / "in.zarr", ignore_errors=True)
    store.to_zarr(folder / "in.zarr", consolidated=False)
    write_catalog(folder, {"all": str(folder / "in.zarr")}, NAMES, (500, 850))


def _after_change(
    first: Sequence[str], second: Sequence[str], plus: float | None = 3.0, share: float = 1.0
) -> Callable[[Place], Ended]:
    """A command, up to a share of its operations on files; its input changes, or is not touched
    if `plus` is None; then another."""

    def act(place: Place) -> Ended:
        call(_own_store, place.folder)
        note = str(place.folder / "events")
        whole = place.folder / "whole"
        if share < 1:
            whole.mkdir()
            call(_own_store, whole)
            (whole / "fix").symlink_to((place.folder / "fix").resolve())
            unbroken = Place(whole, place.program)
            counted = unbroken.run(first, environment=OWN, before=lambda: count_events(note))
            if counted.code:
                return failed(counted, "the first command itself")
            limit = int(share * int(Path(note).read_text()))
            begun = place.run(first, environment=OWN, before=lambda: count_events(note, limit))
            if begun.code != -9:
                return failed(begun, "the first command was not killed")
        else:
            begun = place.run(first, environment=OWN)
            if begun.code:
                return failed(begun, "the first command itself")
        if plus is not None:
            call(_own_store, place.folder, plus)
        return place.run(second, environment=OWN)

    return act


def _changes() -> list[Row]:
    here = Path()
    ingest = ("data", "ingest", "input=in.zarr", "output=out.zarr", "layout.time=2")
    stats = ("data", "stats", *training(here, "run")[1:])
    train = tuple(training(here, "run"))
    onwards = (*train, "resume=auto", "trainer.max_steps=8")
    predict = tuple(item for item in predicting(here, "out.zarr", "batch_size=1", "resume=true")
                    if "tiny.ckpt" not in item) + ("checkpoint=fix/tiny.ckpt",)  # fmt: skip
    climate = (*stats, "climatologies=[cell_month]", "output=climate")
    evaluate = (*evaluating(here, "report", "climatology=climate/cell_month.zarr"),
                "checkpoint=run/checkpoints/last.ckpt")  # fmt: skip
    refused = ("in.zarr|changed|another|differ|begun|stat",)

    def other_settings(place: Place) -> Ended:
        return _after_change(ingest, (*ingest, "layout.time=3"), 0.0, 0.6)(place)

    return [
        Row("an ingest whose input changed", "refused", words=refused,
            act=_after_change(ingest, ingest, share=0.6)),
        Row("an ingest with other settings", "refused", words=refused, act=other_settings),
        Row("an ingest that goes on", "right", act=_after_change(ingest, ingest, None, 0.6)),
        Row("statistics whose store changed", "refused", words=refused,
            act=_after_change(stats, stats)),
        Row("statistics made anew", "right", act=_after_change(stats, (*stats, "--force"))),
        Row("a training whose store changed", "refused", words=refused,
            act=_after_change(train, onwards)),
        Row("a training that goes on", "right", act=_after_change(train, onwards, 0.0)),
        Row("a prediction whose store changed", "refused", words=refused,
            act=_after_change(predict, predict, share=0.7)),
        Row("a prediction that goes on", "right", act=_after_change(predict, predict, 0.0, 0.7)),
        Row("a prediction with another seed", "refused", words=("seed|another|other|begun",),
            act=_after_change(predict, (*predict, "seed=5"), 0.0, 0.7)),
        Row("a climatology of another state", "refused", words=("climate|state|changed",),
            act=_two_then(train, climate, evaluate)),
    ]  # fmt: skip


def _two_then(*commands: Sequence[str]) -> Callable[[Place], Ended]:
    """All commands but the last, then the store changes, then the last."""

    def act(place: Place) -> Ended:
        call(_own_store, place.folder)
        for command in commands[:-1]:
            ended = place.run(command, environment=OWN)
            if ended.code:
                return failed(ended, "an earlier command itself")
        call(_own_store, place.folder, 3.0)
        return place.run(commands[-1], environment=OWN)

    return act
