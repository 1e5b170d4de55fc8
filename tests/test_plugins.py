"""Plugins: all six kinds of classes of a user's own package, and what a checkpoint may not run."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import atmossl
from atmossl.api import open_data
from atmossl.build import build_trainer
from atmossl.checkpoint_files import FORMAT, read_contents
from atmossl.cli import compose_config, main
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.objectives.base import Monitor
from atmossl.overrides import as_searchpath, joined
from atmossl.schema import ConfigError, TrainConfig, parse

ROOT = Path(__file__).resolve().parents[1]
NAME = "atmossl_example_plugin"
STORED = ROOT / "tests" / "checkpoints" / f"format_{FORMAT}.ckpt"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for packages, on the path, into which pip has installed the example."""
    folder = tmp_path_factory.mktemp("plugin")
    source, site = folder / "source", folder / "site"
    shutil.copytree(ROOT / "examples" / NAME, source)  # the build leaves files beside it
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--no-index", "--target", str(site), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield site
    for name in [name for name in sys.modules if name.startswith(NAME)]:
        del sys.modules[name]


def training(site: Path, output: Path, *more: str) -> list[str]:
    """A tiny run of the example's own experiment, from the example's own folder of choices."""
    return [
        "train", "--config-dir", str(site / NAME / "conf"), "experiment=example_plugin",
        "debug=quick", "data.num_workers=0", "data.batch_size=2", "trainer.accelerator=cpu",
        "trainer.pictures=false", "trainer.max_steps=2", "data.window={time: 5, lat: 16, lon: 32}",
        f"paths.output={output}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that uses all six classes of the example."""
    output = tmp_path_factory.mktemp("run") / "run"
    assert main(training(site, output)) == 0
    return output


def refused(arguments: list[str], capsys: Any) -> str:
    """What is said of arguments that are refused, in one line."""
    capsys.readouterr()
    code, told = main(arguments), capsys.readouterr().err
    assert code == 2, told
    assert told.count("\n") == 1, told
    return told


def test_a_run_trains_with_every_class_of_the_example(run: Path) -> None:
    record = read_contents(run / "checkpoints" / "last.ckpt")["atmossl"]
    assert record["network"] == f"{NAME}.parts.MeanNetwork"
    assert record["objective"]["kind"] == f"{NAME}.parts.HuberLoss"
    assert record["plugins"] == {
        "masking": f"{NAME}.parts.Checkerboard",  # by its entry point
        "tasks.0": f"{NAME}.parts.LatitudeBand",
        "model": f"{NAME}.parts.MeanNetwork",
        "objective": f"{NAME}.parts.HuberLoss",
        "callbacks.weight_norm": f"{NAME}.parts.WeightNorm",
        "logger.others.json_lines": f"{NAME}.parts.JsonLines",
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert {"norm/weights", "train/loss", "validation/latitude_band/loss"} <= logged


def test_the_example_predicts_once_the_user_trusts_it(
    site: Path, run: Path, tmp_path: Path, capsys: Any
) -> None:
    checkpoint, output = f"checkpoint={run / 'checkpoints' / 'last.ckpt'}", tmp_path / "o.zarr"
    asked = [
        "predict", checkpoint, f"output={output}", "every=1000", "tilings=1",
        "--config-dir", str(site / NAME / "conf"), "task=latitude_band",
    ]  # fmt: skip
    assert f"plugins=[{NAME}]" in refused(asked, capsys)
    assert main([*asked, f"plugins=[{NAME}]", "task.south=0", "task.north=45"]) == 0
    with xr.open_zarr(output, consolidated=False, decode_timedelta=True) as predicted:
        time = predicted["time"].values[0]
        values = predicted["temperature"].isel(time=0).load()
    truth = open_data("sample")["temperature"].sel(time=time, level=values["level"])
    error = abs(values.mean("member") - truth).mean(("level", "longitude"))
    # hidden where the task hides, given as it is elsewhere, but for one token at the edges
    assert float(error.sel(latitude=slice(5, 40)).min()) > 0.1
    assert main(["info", checkpoint, f"plugins=[{NAME}]"]) == 0
    assert "plugin of model" in capsys.readouterr().out


def test_every_way_to_load_a_checkpoint_wants_its_plugin_named(
    site: Path, run: Path, tmp_path: Path, capsys: Any
) -> None:
    """Nothing refuses once it is, a run that names the plugin itself among them."""
    path = run / "checkpoints" / "last.ckpt"
    output = f"output={tmp_path / 'out.ckpt'}"
    commands = (
        ["evaluate", f"output={tmp_path / 'report'}"], ["embed", f"output={tmp_path / 'e.zarr'}"],
        ["calibrate", output], ["info"], ["export", output],
        ["export", f"hub={tmp_path / 'hub'}"],
    )  # fmt: skip
    for command in commands:
        assert f"plugins=[{NAME}]" in refused([*command, f"checkpoint={path}"], capsys)
    small = tmp_path / "small.ckpt"
    named = f"plugins=[{NAME}]"
    assert main(["export", f"checkpoint={path}", f"output={small}", named]) == 0
    with pytest.raises(ValueError, match=f"plugins=.{NAME}"):
        atmossl.load(small)
    model = atmossl.load(small, device="cpu", plugins=[NAME])
    latents = model.embed(open_data("sample"), "1959-02-12T00")["latents"]
    assert latents.sizes["feature"] == 32 and np.isfinite(latents).all()
    # a warm start and a resumed run: the run's own configuration names the plugin
    warm = (f"warm_start.checkpoints=[{small}]", "optimizer.warmup_steps=0", "trainer.max_steps=1")
    assert main(training(site, tmp_path / "warm", *warm)) == 0
    assert main(training(site, run, "resume=auto", "trainer.max_steps=3")) == 0
    assert read_contents(path)["atmossl"]["step"] == 3
    own = training(site, tmp_path / "own", f"resume={path}", "model=tiny", "trainer.max_steps=4")
    assert "model._target_=atmossl_example_plugin.parts.MeanNetwork, not" in refused(own, capsys)


def with_record(path: Path, **changes: Any) -> Path:
    """A checkpoint whose record others have changed."""
    contents = torch.load(STORED, weights_only=True)
    contents["atmossl"] |= changes
    torch.save(contents, path)
    return path


def test_a_checkpoint_that_names_os_system_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(os, "system", calls.append)
    path = with_record(tmp_path / "bad.ckpt", network="os.system", model={"command": "false"})
    output = f"output={tmp_path / 'o.zarr'}"
    for command in (["predict", output], ["info"], ["embed", output]):
        told = refused([*command, f"checkpoint={path}"], capsys)
        assert "os.system is code of the package os, which runs only if you trust it" in told
    # trusted, it is still no network
    told = refused(["info", f"checkpoint={path}", "plugins=[os]"], capsys)
    assert "this is a function, and a subclass of atmossl.model.network.Network is needed" in told
    taken = ["config", "validate", "warm_start.network=true", f"warm_start.checkpoints=[{path}]"]
    assert "os.system is code of the package os" in refused(taken, capsys)
    sly = {**torch.load(STORED, weights_only=True)["atmossl"]["model"], "_target_": "os.system"}
    taken[-1] = f"warm_start.checkpoints=[{with_record(tmp_path / 'sly.ckpt', model=sly)}]"
    main(taken)  # the network that the record names counts
    bad = {"_target_": "os.system", "command": "false"}
    record = torch.load(STORED, weights_only=True)["atmossl"]
    for masking in (bad, {"_target_": "mixture", "samplers": [bad], "probabilities": [1.0]}):
        config = {**record["config"], "masking": masking}
        path = with_record(tmp_path / "masked.ckpt", config=config)
        model = atmossl.load(path, device="cpu")
        with pytest.warns(UserWarning, match=r"masks that are known here: os\.system is code of"):
            model.predict("forecast", open_data("sample"), "1959-02-12T00", tilings=1)
    assert calls == []


def test_a_package_that_is_not_listed_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nosy_plugin.py").write_text("from pathlib import Path\nPath('seen').touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = with_record(tmp_path / "nosy.ckpt", network="nosy_plugin.Net")
    for plugins in ((), ("nosy",), ("atmossl",)):
        with pytest.raises(ValueError, match=r"give plugins=\[nosy_plugin\]"):
            load_checkpoint(str(path), plugins)
    assert "nosy_plugin" not in sys.modules and not (tmp_path / "seen").exists()
    with pytest.raises(ValueError, match="nosy_plugin has no Net"):
        load_checkpoint(str(path), ("nosy_plugin",))
    assert (tmp_path / "seen").exists()
    del sys.modules["nosy_plugin"]


PART = f"{NAME}.parts"


MISSING = object()
FAULTS: list[tuple[str, Any, str]] = [
    ("masking.sise", 3, r"^unknown key masking.sise; did you mean masking.size\?$"),
    ("masking.size", "many", r"masking.size=many: valid: a whole number"),
    ("masking.size", 0, r"masking.size=0: valid: above 0"),
    ("masking._target_", "chess", r"_target_=chess: no name .* have checkerboard; valid: "),
    (
        "masking._target_",
        "os.system",
        r"_target_=os.system: this is a function, and a class is needed here; .* an atmossl",
    ),
    (
        "masking._target_",
        f"{PART}.HuberLoss",
        r"masking._target_=.*HuberLoss: this class is a module of torch, and no MaskingSampler",
    ),
    (
        "masking._target_",
        f"{PART}.WeightNorm",
        r"this class has no method __call__, which is needed here",
    ),
    (
        "objective._target_",
        "os.environ",
        r"this is an object of .*, and a subclass of atmossl.objectives.base.Objective is needed",
    ),
    ("masking._target_", f"{PART}.Chess", r"atmossl_example_plugin.parts has no Chess"),
    ("masking._target_", "nowhere.Chess", r"imported \(No module named 'nowhere'\)"),
    ("tasks.0.south", "far", r"tasks.0.south=far: valid: a number"),
    ("tasks.0.depth", 1, r"unknown key tasks.0.depth; valid: north, south"),
    ("tasks.0.north", -30, r"task.south=-20 and task.north=-30; valid: "),
    ("objective.delta", "big", r"objective.delta=big: valid: a number"),
    ("objective.dleta", 1, r"unknown key objective.dleta; did you mean objective.delta\?"),
    ("objective._target_", f"{PART}.Checkerboard", r"objective.*this class is not a subclass of"),
    ("model.dim", "wide", r"model.dim=wide: valid: a whole number"),
    ("model.num_heads", 2, r"unknown key model.num_heads; did you mean model.num_"),
    ("model.dim", MISSING, r"model.dim: is missing"),
    ("callbacks.weight_norm.every", 0, r"callbacks.weight_norm.every=0: valid: above 0"),
    ("callbacks.weight_norm", None, r"weight_norm=null: needs the key _target_"),
    ("logger.others.json_lines.keys", 7, r"others.json_lines.keys=7: valid: a list, such as"),
    (
        "logger.others.json_lines._target_",
        "lightning.Trainer",
        r"logger.*this class is not a subclass of",
    ),
    ("plugins", ["not_there"], r"plugins=\[not_there\]: no package 'not_there' is installed"),
    (
        "trainer.extra.detect_anomally",
        True,
        r"unknown key trainer.extra.detect_anomally; .*detect_anomaly\?",
    ),
    ("trainer.extra.devices", 2, r"trainer.extra.*devices is set by trainer.devices"),
    ("trainer.extra.gradient_clip_val", 2, r"is set by optimizer.gradient_clip"),
    ("trainer.extra.min_steps", "soon", r"trainer.extra.min_steps=soon: valid: a whole number"),
]


@pytest.fixture(scope="module")
def composed(site: Path) -> str:
    """The configuration of the example's experiment as JSON."""
    return json.dumps(compose_config("train", joined(training(site, Path("run"))[1:])))


@pytest.mark.parametrize(("key", "value", "message"), FAULTS)
def test_what_does_not_fit_a_plugin_is_named(
    composed: str, key: str, value: Any, message: str
) -> None:
    values = node = json.loads(composed)
    *way, last = key.split(".")
    for part in way:
        node = node[int(part) if part.isdigit() else part]
    node[last] = value
    if value is MISSING:
        del node[last]
    with pytest.raises(ConfigError, match=message) as told:
        parse(TrainConfig, values)
    assert str(told.value).count("\n") == 0, str(told.value)


def test_lightning_gets_what_is_not_listed(tmp_path: Path) -> None:
    words = ("experiment=quickstart", "trainer.extra.detect_anomaly=true",
             "trainer.extra.max_time=00:01:00:00", "trainer.pictures=false",
             "trainer.accelerator=cpu",
             "callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping",
             "callbacks.stop.monitor=rmse_ratio/mean",
             f"paths.output={tmp_path / 'run'}")  # fmt: skip
    config = parse(TrainConfig, compose_config("train", words))
    nothing: Any = None  # of pictures, which are not made
    trainer: Any = build_trainer(config, nothing, Monitor("rmse_ratio/mean"))
    assert trainer._detect_anomaly
    kinds = [type(callback).__name__ for callback in trainer.callbacks]
    assert {"EarlyStopping", "Timer"} <= set(kinds)
    with pytest.raises(ValueError, match="trainer.extra=.*barebones"):
        config = parse(
            TrainConfig, compose_config("train", [*words, "trainer.extra.barebones=true"])
        )
        build_trainer(config, nothing, Monitor("rmse_ratio/mean"))


WHEEL = """
import json, sys
import atmossl
from atmossl.cli import compose_config, joined
values = compose_config("train", joined(sys.argv[1:]))
print(json.dumps([atmossl.__file__, values["masking"], values["seed"], values["model"]["dim"]]))
"""


def test_an_installed_package_takes_folders_of_choices_but_no_conf_that_lies_about(
    site: Path, tmp_path: Path
) -> None:
    """The package as its wheel lays it out, in a folder with a `conf` of the user's own."""
    installed = tmp_path / "installed"
    shutil.copytree(
        ROOT / "atmossl", installed / "atmossl",
        ignore=shutil.ignore_patterns("__pycache__", "sample", "*.ckpt"),
    )  # fmt: skip
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    for source, target in built["targets"]["wheel"]["force-include"].items():
        whole = (ROOT / source).is_dir()
        (shutil.copytree if whole else shutil.copy)(ROOT / source, installed / target)
    work = tmp_path / "work"
    (work / "conf" / "model").mkdir(parents=True)
    (work / "conf" / "train.yaml").write_text("seed: 666\n")
    (work / "conf" / "model" / "tiny.yaml").write_text("dim: 666\n")
    shutil.copytree(work / "conf", installed / "conf")  # of another package, beside it
    environment = os.environ | {"PYTHONPATH": f"{installed}:{site}"}
    conf = site / NAME / "conf"
    for words in (
        ["--config-dir", os.path.relpath(conf, work)],
        [f"--config-dir={conf}", "hydra.searchpath=[]"],
        [f"hydra.searchpath=[pkg://{NAME}.conf]"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", WHEEL, *words, "masking=checkerboard", "model=tiny"],
            cwd=work, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        file, masking, seed, dim = json.loads(done.stdout)
        assert Path(file).parent == installed / "atmossl"
        assert masking == {"_target_": "checkerboard", "size": 2}
        assert (seed, dim) == (0, 32)


def test_a_file_of_choices_that_is_no_yaml_is_named(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\nmodel:\n  dim: [5\n")
    assert main(["train", f"--config-dir={tmp_path}", "experiment=mine"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"atmossl train: {file} is no YAML: line 4, column 1: expected ',' or ']'"
    )


def test_a_folder_whose_files_would_not_be_found_is_refused(tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    for folder in (shipped, tmp_path / "mine"):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "small.yaml").write_text("dim: 1\n")
    words = ["seed=1", f"--config-dir={tmp_path / 'mine'}"]  # the same file: nothing is lost
    assert as_searchpath(words, shipped) == [
        "seed=1", f"hydra.searchpath=['file://{tmp_path / 'mine'}']"
    ]  # fmt: skip
    (tmp_path / "mine" / "model" / "small.yaml").write_text("dim: 2\n")
    with pytest.raises(ValueError, match=r"model/small.yaml has the name of a file of the package"):
        as_searchpath(words, shipped)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        as_searchpath([f"--config-dir={tmp_path / 'nowhere'}"], shipped)
    assert joined(["a=1", "--config-dir", "x", "b=2"]) == ["a=1", "--config-dir=x", "b=2"]
