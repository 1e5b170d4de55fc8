"""Pictures of reconstructions while a model trains: what it saw, what it said, what was true."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from einops import rearrange
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from atmossl.batch import Batch, Corruption, StreamPrediction, StreamTokens
from atmossl.checkpoint_files import write_atomically
from atmossl.data.statistics import Normaliser
from atmossl.names import file_name
from atmossl.objectives.masked import predicted_streams
from atmossl.tokens import detokenise
from atmossl.training.loggers import log_picture

_MAX_ROWS = 6
_PANELS = ("source", "prediction", "truth", "error", "spread")


@dataclass(frozen=True)
class Reconstruction:
    """One variable on one level and time of one sample, [lat lon] arrays in physical units, south
    first; cells of `source` of which nothing is shown are NaN."""

    title: str
    source: np.ndarray
    prediction: np.ndarray
    truth: np.ndarray
    spread: np.ndarray

    @property
    def error(self) -> np.ndarray:
        return self.prediction - self.truth


def reconstructions(
    stream: StreamTokens, predicted: StreamPrediction, normaliser: Normaliser
) -> list[Reconstruction]:
    """Every variable of the first sample, at its middle level and the time that hides most."""
    spec = stream.spec
    unseen = (stream.corruption == Corruption.MASK) | (stream.corruption == Corruption.DROP)
    hidden, unseen = (
        _fields(chosen[..., None].expand_as(stream.target).float(), stream)
        for chosen in (stream.hidden, unseen)
    )
    members = _on_grid(stream, predicted)
    mean, spread = members.mean(dim=0), members.std(dim=0)
    fields = {"source": stream.source, "prediction": mean, "truth": stream.target}
    physical = {
        name: normaliser.inverse(_fields(tokens, stream), spec) for name, tokens in fields.items()
    }
    # a spread has a scale but no mean
    zero = normaliser.inverse(torch.zeros_like(hidden), spec)
    physical["spread"] = normaliser.inverse(_fields(spread, stream), spec) - zero
    level = spec.num_levels // 2
    time = int(hidden[0, level].sum(dim=(-2, -1)).argmax())
    physical["source"][unseen.bool()] = float("nan")
    northwards = bool(stream.grid.lat[0, 0] <= stream.grid.lat[0, -1])
    chosen = {
        name: (values if northwards else values.flip(-2))[:, level, time].numpy()
        for name, values in physical.items()
    }
    place = f"{spec.level_values[level]} hPa" if spec.levels else "surface"
    return [
        Reconstruction(f"{name}, {place}", **{k: v[number] for k, v in chosen.items()})
        for number, name in enumerate(spec.variables)
    ]


def _fields(tokens: Tensor, stream: StreamTokens) -> Tensor:
    """[variable level time lat lon] of the first sample."""
    return detokenise(tokens[0].float().cpu(), stream.spec)


def _on_grid(stream: StreamTokens, predicted: StreamPrediction) -> Tensor:
    """Ensemble on all tokens, [member 1 level nt nlat nlon patch]; visible ones as they are."""
    level, nt, nlat, nlon = stream.grid.shape
    valid = predicted.queries.valid[0]
    members = rearrange(predicted.members[0, valid], "query member patch -> member query patch")
    flat = rearrange(stream.target[0], "level nt nlat nlon patch -> (level nt nlat nlon) patch")
    flat = flat.float().expand(len(members), *flat.shape).clone()
    flat[:, predicted.queries.index[0][valid]] = members.float()
    return rearrange(
        flat, "member (level nt nlat nlon) patch -> member 1 level nt nlat nlon patch",
        level=level, nt=nt, nlat=nlat, nlon=nlon,
    )  # fmt: skip


def draw(rows: list[Reconstruction], title: str) -> Figure:
    """One row for each variable: source with hidden tokens in grey, prediction, truth, error and
    spread, each with its colours; prediction and truth share theirs."""
    figure = Figure(figsize=(3 * len(_PANELS), 1.9 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(len(rows), len(_PANELS), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        low, high = float(np.min(row.truth)), float(np.max(row.truth))
        largest = float(np.abs(row.error).max())
        limits = {"error": (-largest, largest), "spread": (0.0, float(row.spread.max()))}
        colours = {"error": "RdBu_r", "spread": "magma_r"}
        for axis, panel in zip(line, _PANELS, strict=True):
            bottom, top = limits.get(panel, (low, high))
            axis.set_facecolor("0.6")
            image = axis.imshow(
                getattr(row, panel), origin="lower", aspect="auto", vmin=bottom, vmax=top,
                cmap=colours.get(panel, "viridis"),
            )  # fmt: skip
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(panel, fontsize=8)
            figure.colorbar(image, ax=axis, shrink=0.8)
        line[0].set_ylabel(row.title.replace(", ", "\n"), fontsize=7, parse_math=False)
    return figure


class Pictures(L.Callback):
    """After every validation, one picture for each task: `TASK/step-N.png`, and in the loggers."""

    def __init__(self, folder: Path, normaliser: Normaliser) -> None:
        self.folder = folder
        self.normaliser = normaliser

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if idx or not trainer.is_global_zero or outputs.prediction is None:
            return
        view = batch.views[0]  # the others are of further parts of the objective
        pairs = zip(predicted_streams(view), outputs.prediction.streams, strict=True)
        rows = [row for one, two in pairs for row in reconstructions(one, two, self.normaliser)]
        task, step = pl_module.task_names[dataloader_idx], trainer.global_step
        figure = draw(rows[:_MAX_ROWS], f"{task}, step {step}")
        path = self.folder / file_name(task) / f"step-{step}.png"
        write_atomically(path, lambda partial: figure.savefig(partial, dpi=80, format="png"))
        for logger in trainer.loggers:
            log_picture(logger, f"reconstruction/{task}", figure, path, step)
