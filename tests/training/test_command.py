"""`atmossl train` from the command line on: fields trained apart are coupled, grown, tuned at the
tail; what a run tells its loggers."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import atmossl
from atmossl.batch import PRIMARY, View, collate_views
from atmossl.cli import main
from atmossl.commands.run_description import _periods, git_commit
from atmossl.commands.train import tell_warm_start
from atmossl.inference.checkpoint import TrainedModel, load_checkpoint
from atmossl.masking.base import make_view
from atmossl.masking.tasks import Forecast
from atmossl.training.curves import read_metrics
from tests.inference.oracle_models import segment
from tests.lean import whole_runs
from tests.processes import run
from tests.synthetic import catalog, dataset, window

pytestmark = pytest.mark.e2e
TOKEN = "token_size: {time: 1, lat: 2, lon: 2, level: %d}, role: predict"
NO_STEP = "optimizer.learning_rate=1e-30"  # leaves float32 weights as they are, bit for bit


def stream(name: str, *variables: str, levels: tuple[int, ...] = (300, 850)) -> str:
    token = TOKEN % len(levels)
    return f"+stream.{name}={{variables: {list(variables)}, levels: {list(levels)}, {token}}}"


T, U = stream("t", "temperature"), stream("u", "u_component_of_wind")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catalogs of a coarse and of a fine grid, and runs `t` and `u` of one field each; `u` with
    everything that tells how it goes."""
    folder = tmp_path_factory.mktemp("growth")
    for name, num_lat in (("coarse", 8), ("fine", 16)):
        (folder / name).mkdir()
        store = dataset(num_lat=num_lat, num_lon=2 * num_lat, steps=16)
        catalog(folder / name, train=store, validation=store, test=store)
    assert train(folder, "t", T) == 0
    told = ("logger=[csv,tensorboard,wandb]", "logger.tags=[blue]", "logger.group=colours",
            "trainer.pictures=true", "trainer.profiler=torch",
            "trainer.profile_steps=[0,2]")  # fmt: skip
    more = {"OUTPUT": str(folder / "said"), "before": (whole_runs, ())}
    assert train(folder, "u", U, *told, **more) == 0
    return folder


def train(folder: Path, name: str, *more: str, grid: str = "coarse", **environment: Any) -> int:
    """A tiny run of two steps and a validation."""
    arguments = [
        "train", "experiment=quickstart", "model=tiny", "optimizer=adamw", "~stream.atmosphere",
        "data.name=waves", f"data.catalog={folder / grid / 'catalog.yaml'}",
        "data.window={time: 5, lat: 8, lon: 0}", "data.batch_size=2", "optimizer.warmup_steps=1",
        "trainer.max_steps=2", "trainer.validation_interval=2", "trainer.validation_batches=1",
        "trainer.log_interval=1", "trainer.accelerator=cpu", "trainer.pictures=false",
        f"paths.output={folder / name}", *more,
    ]  # fmt: skip
    return run(arguments, cache=folder / "cache", WANDB_MODE="offline", **environment)


def from_runs(folder: Path, *names: str) -> str:
    return f"warm_start.checkpoints=[{','.join(str(checkpoint(folder, name)) for name in names)}]"


def checkpoint(folder: Path, name: str) -> Path:
    return folder / name / "checkpoints" / "last.ckpt"


def load(folder: Path, name: str) -> TrainedModel:
    return load_checkpoint(str(checkpoint(folder, name)))


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load(folder, name).model.state_dict()


def report(folder: Path, name: str) -> dict[str, list[str]]:
    return yaml.safe_load((folder / name / "warm_start.yaml").read_text())


def view_of(trained: TrainedModel) -> View:
    """One window of noise, the same field in every model, of which the last step is hidden."""
    seeds = {"t": 1, "u": 2}
    windows = tuple(window(spec, seed=seeds[spec.name]) for spec in trained.specs)
    sample = make_view(windows, Forecast(6), np.random.default_rng(0))
    return collate_views([(sample,)], [0]).views[0]


def predicted(trained: TrainedModel) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        streams = trained.model(view_of(trained)).streams
    return {spec.name: s.members for spec, s in zip(trained.specs, streams, strict=True)}


def test_fields_trained_apart_start_coupled_with_what_they_predicted_alone(folder: Path) -> None:
    more = (from_runs(folder, "t", "u"), NO_STEP, "trainer.max_steps=2")
    assert train(folder, "coupled", T, U, *more) == 0
    together = predicted(load(folder, "coupled"))
    for name in ("t", "u"):
        alone = predicted(load(folder, name))[name]
        torch.testing.assert_close(together[name], alone, rtol=1e-5, atol=1e-6)
    found = report(folder, "coupled")
    assert found["initialised"] and all(".coupling." in name for name in found["initialised"])
    assert found["grown"] == found["left"] == []
    assert len(found["loaded"]) + len(found["initialised"]) == sum(
        not name.endswith("scale") for name in weights(folder, "coupled")
    )


@pytest.mark.parametrize("first", [True, False])
def test_the_first_rank_tells_of_the_warm_start(first: bool, tmp_path: Path, capsys) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=first)
    tell_warm_start(trainer, {"loaded": ["tail.t.bias"], "left": []}, tmp_path)
    assert ("warm start: 1 loaded, 0 left" in capsys.readouterr().out) == first
    assert (tmp_path / "warm_start.yaml").exists() == first


def test_a_run_grows_by_variable_level_and_resolution_around_frozen_layers(folder: Path) -> None:
    wider = stream("air", "u_component_of_wind", "temperature", levels=(300, 500, 850))
    more = (from_runs(folder, "t"), "+warm_start.rename={t: air}", "optimizer.freeze=[encoder.0.*]")
    assert train(folder, "grown", wider, *more, grid="fine") == 0
    found = report(folder, "grown")
    assert {name.split(".")[0] for name in found["grown"]} == {"embedding", "query", "tail"}
    assert found["initialised"] == found["left"] == []
    old, new = weights(folder, "t"), weights(folder, "grown")
    for name in found["loaded"]:
        same = torch.equal(new[name], old[name.replace(".air.", ".t.")])
        assert same == name.startswith("encoder.0."), name


def test_tuning_the_tail_leaves_all_other_weights_and_lowers_the_loss(folder: Path) -> None:
    more = (from_runs(folder, "t"), "objective.train_only=tail", "objective.losses={crps: 1.0}",
            "optimizer.learning_rate=1e-2", "trainer.max_steps=12")  # fmt: skip
    assert train(folder, "tail", T, *more) == 0
    old, new = weights(folder, "t"), weights(folder, "tail")
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all(name.startswith("tail.") for name in moved)
    saved = torch.load(checkpoint(folder, "tail"), weights_only=True)["optimizer_states"][0]
    parameters = [n for n, _ in load(folder, "tail").model.named_parameters()]
    assert len(saved["state"]) == sum(name.startswith("tail.") for name in parameters)
    losses = read_metrics(folder / "tail" / "metrics.csv")["validation/forecast/loss"].dropna()
    assert losses.iloc[-1] < 0.98 * losses.iloc[0]


def test_low_rank_tuning_leaves_the_weights_and_is_merged_where_it_is_read(folder: Path) -> None:
    more = (from_runs(folder, "t"), "warm_start.low_rank.rank=3", "optimizer.learning_rate=1e-2",
            "trainer.checkpoint_interval=1")  # fmt: skip
    assert train(folder, "slim", T, *more, "trainer.max_steps=1", "optimizer.warmup_steps=0") == 0
    assert train(folder, "slim", T, *more, "trainer.max_steps=3", "resume=auto") == 0
    saved = torch.load(checkpoint(folder, "slim"), weights_only=True)
    old, held = weights(folder, "t"), saved["state_dict"]
    assert all(torch.equal(held[f"model.{name}"], value) for name, value in old.items())
    thin = [name for name in held if name.startswith("model.") and name.endswith((".up", ".down"))]
    assert len(saved["optimizer_states"][0]["state"]) == len(thin) > 0
    assert all(held[name].any() for name in thin)
    output = folder / "slim.ckpt"
    assert main(["export", f"checkpoint={checkpoint(folder, 'slim')}", f"output={output}"]) == 0
    exported, new = load_checkpoint(str(output)).model.state_dict(), weights(folder, "slim")
    assert exported.keys() == new.keys() == old.keys()
    for name, value in new.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-3, atol=1e-4)
    layers = [name.removeprefix("model.").removesuffix(".up") for name in thin]
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {f"{name}.weight" for name in layers if not name.endswith(".down")}
    assert moved and all(name.startswith(("encoder.", "decoder.")) for name in moved)


def test_a_tail_without_a_trained_network_is_refused(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    output = f"paths.output={folder / 'none'}"
    assert main(["train", "objective.train_only=tail", output]) == 2
    assert "warm_start.checkpoints" in capsys.readouterr().err
    more = ("trainer.precision=16-mixed", "trainer.accelerator=cpu")
    assert main(["train", *more, output]) == 2
    assert "16-mixed needs a GPU; valid here: 32-true" in capsys.readouterr().err
    assert main(["train", "resume=default", "trainer.accelerator=cpu", output]) == 2
    assert "holds weights alone" in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_a_prediction_at_another_time_step_than_the_trained_one_is_told(folder: Path) -> None:
    model = atmossl.load(checkpoint(folder, "t"), device="cpu")
    assert model.trained.checkpoint_record["step_hours"] == 6.0
    with pytest.warns(UserWarning, match="not trained for steps of 3 h; training had 6 h"):
        model.predict("forecast", dataset(step_hours=3, steps=8), ["2001-01-01T15"], lead_time="3h")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.predict("forecast", dataset(steps=8), ["2001-01-02"], lead_time="6h")
    assert not any("steps of" in str(one.message) for one in caught)
    del model.trained.checkpoint_record["step_hours"]  # as in checkpoints before it was recorded
    model.predict("forecast", dataset(step_hours=3, steps=8), ["2001-01-01T15"], lead_time="3h")


def test_a_run_shows_its_reconstructions_and_traces_its_steps(folder: Path) -> None:
    told = folder / "u"
    (events,) = (told / "tensorboard").glob("events.*")
    found = EventAccumulator(str(events), {"images": 0}).Reload()
    (image,) = found.Images("reconstruction/forecast")
    assert image.step == 2 and image.width > 500
    assert "train/loss" in found.Tags()["scalars"]
    media = "offline-run-*/files/media/images/reconstruction"
    (png,) = (told / "wandb").glob(f"{media}/forecast_*.png")
    assert png.read_bytes() == (told / "pictures" / "forecast" / "step-2.png").read_bytes()
    trace = json.loads((told / "profile" / "trace-rank0.json").read_text())
    assert any("scaled_dot_product" in event.get("name", "") for event in trace["traceEvents"])
    assert "Self CPU" in (told / "profile" / "costs-rank0.txt").read_text()


def test_a_run_without_a_terminal_says_what_it_is_and_then_a_line_a_log(folder: Path) -> None:
    said = (folder / "said").read_text()
    loaded = load(folder, "u")
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    tokens = 5 * 4 * 8  # of 2 x 2 cells in a window of 5 steps of 8 x 16, both levels in each
    for part in (
        f"{count:,} parameters, objective MaskedModelling",
        f"{tokens} tokens of u in a sample, 2 samples in a step",
        "waves, training train: 2001-01-01T00 to 2001-01-04T18 (16 times every 6 h)",
        f"output   {folder / 'u'}\nloggers  csv, tensorboard, wandb\n",
        "1 x cpu, precision 32-true",
    ):
        assert part in said
    lines = [line for line in said.splitlines() if line.startswith("step")]
    logged = read_metrics(folder / "u" / "metrics.csv")
    losses = logged["train/loss"].dropna()
    starts = [f"step {n}/2, loss {loss:.4g}, " for n, loss in enumerate(losses, 1)]
    ratio = logged["rmse_ratio/forecast"].dropna().iloc[-1]
    starts.append("step 2/2, validation: ")
    assert lines[0].startswith("steps    2; a log every 1, a validation every 2")
    shown = [line[: len(start)] for line, start in zip(lines[1:], starts, strict=True)]
    assert shown == starts
    assert f"rmse_ratio forecast {ratio:.4g}, " in lines[-1]
    assert "samples/s" in lines[1] and "Epoch" not in said and "━" not in said


def test_runs_of_the_same_dates_are_told_apart_by_their_names() -> None:
    def dataset(*names: str) -> Any:
        return SimpleNamespace(segments=tuple(segment(name=name) for name in names))

    first, second = dataset("run_0", "run_1"), dataset("run_4")
    assert _periods(first, second).startswith("run_0, run_1: 2001-01-01T00 to ")
    assert _periods(second, first).startswith("run_4: 2001-01-01T00 to ")
    assert _periods(first, first).startswith("2001-01-01T00 to ")


def test_every_logger_has_configuration_parameters_commit_and_fingerprint(folder: Path) -> None:
    record = load(folder, "u").checkpoint_record
    told = yaml.safe_load((folder / "u" / "hparams.yaml").read_text())
    assert told["data"]["name"] == "waves" and told["logger"]["tags"] == ["blue"]
    facts, count = told["run"], sum(p.numel() for p in load(folder, "u").model.parameters())
    assert facts["parameters"] == facts["parameters_trained"] == count
    assert facts["dataset_fingerprint"] == {"waves": record["statistics"][PRIMARY]["fingerprint"]}
    assert facts["git_commit"] == git_commit()
    (log,) = (folder / "u" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for name in ("parameters", "git_commit", "dataset_fingerprint"):
        assert json.dumps({name: facts[name]}, separators=(",", ":"))[1:-1].encode() in content
    assert b"blue" in content and b"colours" in content
    (events,) = (folder / "u" / "tensorboard").glob("events.*")
    found = EventAccumulator(str(events), {"tensors": 0}).Reload()
    (text,) = found.Tensors("configuration/text_summary")
    shown = text.tensor_proto.string_val[0].decode().removeprefix("```yaml").removesuffix("```")
    assert yaml.safe_load(shown) == told


def test_a_resume_with_nothing_left_keeps_the_log_where_it_is(folder: Path) -> None:
    metrics = folder / "u" / "metrics.csv"
    before, curves = metrics.read_bytes(), folder / "u" / "curves" / "loss.png"
    assert train(folder, "u", U, "resume=auto") == 0
    assert metrics.read_bytes() == before and curves.exists()
    assert list(metrics.parent.glob("metrics-*.csv")) == []
