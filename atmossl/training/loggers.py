"""The loggers of a run: `metrics.csv` always, and TensorBoard, Weights & Biases (W&B) and MLflow
beside it, in any combination."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from atmossl.extras import EXTRAS

_OPTIONAL = ("tensorboard", "wandb", "mlflow")  # keys, and packages, of those beside metrics.csv


def check_loggers(chosen: Mapping[str, Any]) -> None:
    """Raise ValueError if a logger is wanted whose package is not installed."""
    for name in _OPTIONAL:
        if chosen[name] and find_spec(name) is None:
            raise ValueError(
                f"logger.{name}=true needs the package {name}, which is not installed; "
                f"pip install 'atmossl[{EXTRAS[name]}]'"
            )


def make_loggers(
    folder: Path,
    *,
    tensorboard: bool,
    wandb: bool,
    mlflow: bool,
    project: str,
    name: str | None,
    group: str | None,
    tags: Sequence[str],
    entity: str | None,
    mlflow_uri: str | None,
) -> list[Logger]:
    """The loggers of a run in `folder`.

    project: of W&B; the experiment of MLflow. name: of the run, by default that of its folder.
    group, tags: of the run in W&B and MLflow. entity: user or team in W&B. mlflow_uri: where MLflow
        keeps runs; by default MLFLOW_TRACKING_URI, or files in `folder/mlflow`.
    """
    title = name or folder.resolve().name
    loggers: list[Logger] = [CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)]
    if tensorboard:
        loggers.append(
            TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)
        )
    if wandb:
        details = {"entity": entity, "group": group, "tags": list(tags) or None}
        offline = _wandb_is_offline()
        loggers.append(
            WandbLogger(project=project, name=title, save_dir=folder, offline=offline, **details)
        )
    if mlflow:
        loggers.append(_mlflow_logger(folder, project, title, group, tags, mlflow_uri))
    return loggers


@rank_zero_only
def finish_runs(loggers: Sequence[Logger]) -> None:
    """Close W&B's run, so that all is written, and the next run of a sweep begins its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _wandb_is_offline() -> bool:
    """Whether no key for W&B is at hand."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"] != "online"
    return "WANDB_API_KEY" not in os.environ


class _Mlflow(MLFlowLogger):
    """Renames keys for MLflow. Its file store makes a file of every metric, so that `a/b` cannot
    be beside `a/b/c`: here they are `a/b` and `a/b.c`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({_with_one_slash(key): v for key, v in metrics.items()}, step)


def _with_one_slash(key: str) -> str:
    first, slash, rest = key.partition("/")
    return first + slash + rest.replace("/", ".")


def _mlflow_logger(
    folder: Path, project: str, title: str, group: str | None, tags: Sequence[str], uri: str | None
) -> Logger:
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri()
    if uri.startswith("file:"):
        # from version 3.7 on MLflow asks for this consent to the store that needs no database
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    marks = {tag: "true" for tag in tags} | ({} if group is None else {"group": group})
    return _Mlflow(experiment_name=project, run_name=title, tracking_uri=uri, tags=marks)


def describe_run(loggers: Sequence[Logger], description: Mapping[str, Any]) -> None:
    """Give every logger the configuration of the run and its description."""
    for logger in loggers:
        logger.log_hyperparams(dict(description))
        if isinstance(logger, TensorBoardLogger):  # it shows texts, but no file beside its own
            text = OmegaConf.to_yaml(OmegaConf.create(dict(description)))
            logger.experiment.add_text("configuration", f"```yaml\n{text}```")


def log_picture(logger: Logger, key: str, figure: Figure, path: Path, step: int) -> None:
    """Pass a picture, which is a PNG file already, to a logger that takes pictures."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(key, figure, step)
    elif isinstance(logger, WandbLogger):
        logger.log_image(key, [str(path)], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(path), key)
