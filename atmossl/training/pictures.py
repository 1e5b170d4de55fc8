"""Draws reconstructions while a model trains: what the encoder saw, what the network predicted,
and the truth."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from atmossl.atomic_files import write_atomically
from atmossl.batch import Batch, StreamPrediction, StreamTokens, detokenise
from atmossl.coastlines import coastlines
from atmossl.data.axes import STANDARD, Calendar
from atmossl.data.variables import VARIABLES
from atmossl.data.windows import Normaliser
from atmossl.geometry import ascending_longitudes, latitude_edges
from atmossl.masking.base import TokenLayout
from atmossl.names import file_name
from atmossl.objectives.masked import predicted_streams
from atmossl.training.loggers import log_picture

_MAX_ROWS = 6
_PANELS = ("source", "baseline", "prediction", "truth", "error", "spread")
_OF_FIELD = 4  # panels that share their colours
_SIGNED = ("component_of_wind", "vertical_velocity", "vorticity", "divergence")
_WIDTH, _HEIGHT, _LEFT = 2.7, 2.1, 1.0  # inches: a panel with its colour bar, and the names


@dataclass(frozen=True)
class Reconstruction:
    """One variable of one sample on one level at one time: arrays [lat lon] in physical units,
    south first.

    source: what the encoder sees, NaN where something is hidden; of `source_offset` hours later
    than the rest, since a time that is hidden whole shows nothing. baseline: the first guess.
    hidden: True where the rest is predicted. lat, lon: degrees.
    """

    variable: str
    place: str
    date: str
    source_offset: float
    source: np.ndarray
    baseline: np.ndarray
    prediction: np.ndarray
    truth: np.ndarray
    spread: np.ndarray
    hidden: np.ndarray
    lat: np.ndarray
    lon: np.ndarray

    @property
    def error(self) -> np.ndarray:
        return self.prediction - self.truth

    def rmse(self, field: np.ndarray) -> float:
        """The RMSE of a field over the hidden cells, weighted by their area."""
        weight = self.hidden * np.cos(np.deg2rad(self.lat))[:, None]
        return float(np.sqrt((weight * (field - self.truth) ** 2).sum() / max(weight.sum(), 1e-30)))


def reconstructions(
    stream: StreamTokens,
    predicted: StreamPrediction,
    normaliser: Normaliser,
    calendar: Calendar = STANDARD,
) -> list[Reconstruction]:
    """Reconstructions of every variable of the first sample, at its middle level and the time at
    which most is hidden."""
    spec, layout = stream.spec, TokenLayout(stream.spec, stream.grid._map(lambda t: t[0].cpu()))
    hidden = _fields(_of_values(stream.hidden, stream), stream).bool()
    unseen = _fields(stream.unseen, stream).bool()
    members = _on_grid(stream, predicted)
    mean, spread = members.mean(dim=0), members.std(dim=0)
    tokens = {
        "source": stream.source,
        "baseline": stream.guess,
        "prediction": mean,
        "truth": stream.target,
    }
    place = (layout.point_times().flatten(), layout.point_lat(), layout.point_lon())
    local = normaliser.local(spec, *place)

    def in_units(values: Tensor) -> Tensor:
        return normaliser.inverse(values if local is None else local.out_of(values), spec)

    fields = {name: in_units(_fields(values, stream)) for name, values in tokens.items()}
    # a spread has a scale but no mean
    zero = in_units(torch.zeros_like(fields["truth"]))
    fields["spread"] = in_units(_fields(spread, stream)) - zero
    fields |= {"hidden": hidden}
    fields["source"][unseen] = float("nan")
    level = spec.num_levels // 2
    time = int(hidden[0, level].sum(dim=(-2, -1)).argmax())
    shown = _visible_time(unseen[0, level], time)
    times = {name: shown if name == "source" else time for name in fields}
    hours, lat, lon = layout.point_times().flatten(), layout.point_lat(), layout.point_lon()
    south_first = slice(None) if lat[0] <= lat[-1] else slice(None, None, -1)
    order, lon_ascending = ascending_longitudes(lon.numpy())
    chosen = {
        name: values[:, level, times[name]].numpy()[:, south_first][..., order]
        for name, values in fields.items()
    }
    common = {
        "place": f"{spec.level_values[level]} hPa" if spec.levels else "surface",
        "date": _date(float(hours[time]), calendar),
        "source_offset": float(hours[shown] - hours[time]),
        "lat": lat.numpy()[south_first],
        "lon": lon_ascending,
    }
    return [
        Reconstruction(variable=name, **common, **{k: v[number] for k, v in chosen.items()})
        for number, name in enumerate(spec.variables)
    ]


def _of_values(chosen: Tensor, stream: StreamTokens) -> Tensor:
    """The chosen tokens at the values of their patches; of hidden tokens at the target points
    alone."""
    values = chosen[..., None].expand_as(stream.target)
    return (values if stream.target_points is None else values & stream.target_points).float()


def _visible_time(unseen: Tensor, time: int) -> int:
    """The time nearest to `time` at which something is visible, an earlier one before a later
    one. unseen: [time lat lon]."""
    visible = (~unseen).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return min(visible, key=lambda other: (abs(other - time), other), default=time)


def _date(hours: float, calendar: Calendar) -> str:
    """The date of a time in hours since 1970-01-01T00."""
    time = np.datetime64(0, "us") + np.timedelta64(round(hours * 60), "m")
    time = time.astype("datetime64[ns]") if calendar.plain else time
    return f"{calendar.show(time, 'm').replace('T', ' ')} UTC"


def _fields(tokens: Tensor, stream: StreamTokens) -> Tensor:
    """The fields [variable level time lat lon] of the first sample."""
    return detokenise(tokens[0].float().cpu(), stream.spec)


def _on_grid(stream: StreamTokens, predicted: StreamPrediction) -> Tensor:
    """The ensemble on all tokens, [member 1 level nt nlat nlon patch], with visible tokens as
    they are."""
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
    """Draw one row of maps with coastlines for each variable: what is visible, with hidden parts
    hatched, the baseline, prediction, truth, error and spread. The first four share their
    colours, which are centred on zero for winds."""
    size = (_LEFT + len(_PANELS) * _WIDTH, 0.4 + _HEIGHT * len(rows))
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, parse_math=False, y=1 - 0.12 / size[1])
    for number, row in enumerate(rows):
        bottom = size[1] - 0.4 - (number + 1) * _HEIGHT
        name = f"{row.variable.replace('_', ' ')}\n{row.place}\n{row.date.replace(' ', chr(10), 1)}"
        figure.text(
            0.5 * _LEFT / size[0], (bottom + 1.2) / size[1], name.replace(" of wind", "\nof wind"),
            fontsize=8, ha="center", va="center", parse_math=False,
        )  # fmt: skip
        for column, panel in enumerate(_PANELS):
            x = _LEFT + column * _WIDTH
            box = (x / size[0], (bottom + 0.5) / size[1], 2.55 / size[0], 1.35 / size[1])
            axes = figure.add_axes(box)
            cells = _draw_panel(axes, row, panel)
            if column in (1, _OF_FIELD, _OF_FIELD + 1):
                width = 2.15 if column > 1 else 2 * _WIDTH - 0.55  # below all that share it
                _draw_bar(figure, cells, row, (x + 0.2, bottom + 0.38, width), size)
    return figure


def _draw_bar(
    figure: Figure,
    cells: Any,
    row: Reconstruction,
    place: tuple[float, float, float],
    size: tuple[float, float],
) -> None:
    """A colour bar with units. place: left, bottom and width in inches."""
    x, y, width = place
    box = (x / size[0], y / size[1], width / size[0], 0.07 / size[1])
    bar = figure.colorbar(cells, cax=figure.add_axes(box), orientation="horizontal")
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.ax.tick_params(labelsize=6, pad=1)
    bar.ax.xaxis.get_offset_text().set_fontsize(6)
    units = VARIABLES[row.variable].units if row.variable in VARIABLES else ""
    bar.set_label(units, fontsize=6, labelpad=1)


def _draw_panel(axes: Axes, row: Reconstruction, panel: str) -> Any:
    """Draw one map; returns its coloured cells."""
    colours, low, high = _colours(row, panel)
    middle = float(row.lon[[0, -1]].mean())
    spacing = (row.lon[-1] - row.lon[0]) / max(len(row.lon) - 1, 1)
    edges = row.lon[0] - middle + spacing * (np.arange(len(row.lon) + 1) - 0.5)
    cells = axes.pcolormesh(
        edges, latitude_edges(row.lat), getattr(row, panel), cmap=colours, vmin=low, vmax=high
    )
    lines = LineCollection(list(coastlines(middle)), colors="0.1", linewidths=0.5)
    axes.add_collection(lines, autolim=False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_aspect(min(1 / np.cos(np.deg2rad(float(row.lat.mean()))), 2.0))
    axes.patch.set(facecolor="0.85", hatch="////", edgecolor="0.6")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(_panel_title(row, panel), fontsize=7, pad=2)
    return cells


def _colours(row: Reconstruction, panel: str) -> tuple[str, float, float]:
    """The colour map and limits of a panel. The limits of a constant field differ, too."""
    if panel == "spread":
        return "magma_r", 0.0, float(row.spread.max()) or 1.0
    if panel == "error":
        largest = float(np.abs(row.error).max()) or 1.0
        return "RdBu_r", -largest, largest
    low, high = float(row.truth.min()), float(row.truth.max())
    if row.variable.endswith(_SIGNED):
        largest = max(-low, high) or 1.0
        return "RdBu_r", -largest, largest
    return "viridis", low, high if high > low else low + 1.0


def _panel_title(row: Reconstruction, panel: str) -> str:
    if panel == "source":
        hours = row.source_offset
        when = f", {abs(hours):g} h {'before' if hours < 0 else 'after'}" if hours else ""
        return f"visible input{when}"
    errors = {"baseline": row.baseline, "prediction": row.prediction}
    if panel in errors:
        return f"{panel}, RMSE {row.rmse(errors[panel]):.3g}"
    return {"error": "error of the prediction", "spread": "spread of members"}.get(panel, panel)


class Pictures(L.Callback):
    """Draws one picture for each task after every validation, `TASK/step-N.png`, and passes it
    to the loggers."""

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
        calendar = trainer.datamodule.train_set.segments[0].calendar  # type: ignore[attr-defined]
        rows = [
            row
            for stream, predicted in pairs
            for row in reconstructions(stream, predicted, self.normaliser, calendar)
        ]
        task, step = pl_module.task_names[dataloader_idx], trainer.global_step
        figure = draw(rows[:_MAX_ROWS], f"{task}, step {step}")
        path = self.folder / file_name(task) / f"step-{step}.png"
        write_atomically(path, lambda partial: figure.savefig(partial, dpi=90, format="png"))
        for logger in trainer.loggers:
            log_picture(logger, f"reconstruction/{task}", figure, path, step)
