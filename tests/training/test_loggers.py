"""Loggers go together, and each takes what a run tells it."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from atmossl.cli import compose_config
from atmossl.schema import TrainConfig, parse
from atmossl.training import loggers
from atmossl.training.loggers import check_loggers, describe_run, log_picture, make_loggers


def chosen(*overrides: str) -> dict:
    config = parse(TrainConfig, compose_config("train", overrides))
    return config.logger.model_dump(exclude={"csv"})


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("logger=default", set()),
        ("logger=[csv,tensorboard,wandb,mlflow]", {"tensorboard", "wandb", "mlflow"}),
        ("logger.wandb=true", {"wandb"}),
    ],
)
def test_loggers_do_not_switch_each_other_off(override: str, names: set[str]) -> None:
    found = chosen(override)
    assert {name for name in ("tensorboard", "wandb", "mlflow") if found[name]} == names


def test_a_logger_that_is_not_installed_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    wanted = {"tensorboard": False, "wandb": False, "mlflow": True}
    with pytest.raises(ValueError, match=r"logger.mlflow=true needs .*'atmossl\[mlflow\]'"):
        check_loggers(wanted)
    check_loggers(wanted | {"mlflow": False})


def test_mlflow_keeps_what_a_run_tells_in_files(tmp_path: Path, monkeypatch) -> None:
    """By MLflow's own client, without a server."""
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    given = chosen("logger=mlflow", "logger.tags=[blue]", "logger.group=g", "logger.project=air")
    made = make_loggers(tmp_path / "mine", **{k: v for k, v in given.items() if k != "others"})
    logger: loggers._Mlflow = made[-1]  # type: ignore[assignment]
    describe_run([logger], {"model": {"dim": 64}, "run": {"git_commit": "abc"}})
    values = {"rmse_ratio/forecast": 0.5, "rmse_ratio/forecast/temperature": 0.25}
    for step in (10, 20):
        logger.log_metrics({name: step * value for name, value in values.items()}, step)
    picture = tmp_path / "step-20.png"
    Figure().savefig(picture)
    log_picture(logger, "reconstruction/forecast", Figure(), picture, 20)
    client = logger.experiment
    (run,) = client.search_runs([client.get_experiment_by_name("air").experiment_id])
    assert run.info.run_name == "mine" and run.data.tags["blue"] == "true"
    assert run.data.tags["group"] == "g"
    assert run.data.params == {"model/dim": "64", "run/git_commit": "abc"}
    history = client.get_metric_history(run.info.run_id, "rmse_ratio/forecast.temperature")
    assert [(one.step, one.value) for one in history] == [(10, 2.5), (20, 5.0)]
    (artifact,) = client.list_artifacts(run.info.run_id, "reconstruction/forecast")
    assert artifact.path.endswith("step-20.png")
    assert Path(tmp_path / "mine" / "mlflow").is_dir()
