"""Zero-shot prediction: a trained model under one task's mask, tile by tile, blended.

A generator over init (or valid) times yields fields of one time after another, so memory does not
grow with their number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from atmossl.batch import StreamSpec, StreamTokens, StreamWindow, View, collate_views
from atmossl.data.store import Segment
from atmossl.data.windows import read_window
from atmossl.geometry import Box, TilePlan
from atmossl.inference.checkpoint import TrainedModel
from atmossl.masking.base import MaskingSampler, make_view
from atmossl.masking.tasks import Downscaling, Forecast, TemporalInterpolation
from atmossl.tokens import detokenise


@dataclass(frozen=True)
class TimePlan:
    """Which steps of a window a task writes: `offsets` from the reference step, which is the init
    time of a forecast or the valid time otherwise; `reference` counts from the window's start."""

    reference: int
    offsets: tuple[int, ...]
    is_forecast: bool


def time_plan(task: MaskingSampler, num_steps: int, step_hours: float) -> TimePlan:
    """Steps that a task writes in a window of `num_steps`."""
    match task:
        case Forecast(lead_hours):
            count = round(lead_hours / step_hours)
            return TimePlan(num_steps - 1 - count, tuple(range(1, count + 1)), True)
        case TemporalInterpolation(hidden_hours):
            count = round(hidden_hours / step_hours)
            return TimePlan((num_steps - count) // 2, tuple(range(count)), False)
        case Downscaling():
            return TimePlan(num_steps // 2, (0,), False)
    raise ValueError(f"task {type(task).__name__} cannot be predicted")


@dataclass(frozen=True)
class Predictor:
    """One task on one segment. overlap: share of a tile that its neighbour covers as well."""

    trained: TrainedModel
    segment: Segment
    task: MaskingSampler
    overlap: float
    batch_size: int
    device: str
    lon_shift: int = 0

    @property
    def plan(self) -> TimePlan:
        return time_plan(self.task, self.trained.window.time, self.segment.step_hours)

    def tiles(self) -> TilePlan:
        window = self.trained.window.on(self.segment)
        align = self.task.factor if isinstance(self.task, Downscaling) else 1
        return TilePlan(
            self.segment.grid, window.lat, window.lon, self.overlap, self.lon_shift, align
        )

    def possible_times(self) -> np.ndarray:
        """Reference times with all the steps that a window needs around them."""
        last = len(self.segment.times) - self._steps_read + self.plan.reference + 1
        return self.segment.times[self.plan.reference : max(last, 0)]

    @property
    def _steps_read(self) -> int:
        """Steps of the window that are read: none after the init time of a forecast."""
        plan = self.plan
        return plan.reference + 1 if plan.is_forecast else self.trained.window.time

    def window_start(self, time: np.datetime64) -> int:
        """First step of the window for a reference time.

        Raises:
            ValueError: the time is not in the store, or there are too few steps around it.
        """
        index = self.segment.find_time(time)
        possible = self.possible_times()
        if len(possible) == 0 or not possible[0] <= time <= possible[-1]:
            before = self.plan.reference
            raise ValueError(
                f"init_time={np.datetime_as_string(time, 'h')} lacks steps around it: the task "
                f"needs {before} before and {self._steps_read - 1 - before} after; valid: "
                f"{possible[:1]} to {possible[-1:]}"
            )
        return index - self.plan.reference

    def run(self, times: Sequence[np.datetime64]) -> Iterator[dict[str, np.ndarray]]:
        """For every reference time, each variable's blended ensemble in its own units,
        [step member level lat lon] over the steps that the task writes."""
        model = self.trained.model.to(self.device)
        tiles = self.tiles()
        for time in times:
            start = self.window_start(time)
            blended: dict[str, np.ndarray] = {}
            for first in range(0, len(tiles.tiles), self.batch_size):
                chosen = range(first, min(first + self.batch_size, len(tiles.tiles)))
                views = [(self._view(start, tiles.tiles[i]),) for i in chosen]
                batch = collate_views(views, list(chosen)).to(self.device)
                with torch.inference_mode():
                    prediction = model(batch.views[0])
                for stream, predicted in zip(
                    _predicted(batch.views[0]), prediction.streams, strict=True
                ):
                    fields = self._fields(stream, predicted.members, predicted.queries)
                    self._blend(blended, stream.spec, fields, tiles, chosen)
            yield blended

    def _view(self, start: int, box: Box) -> View:
        """The window's view under the task's mask; the mask's generator is never used."""
        trained = self.trained
        windows = read_window(
            self.segment, trained.specs, trained.normaliser, start, self._steps_read, box
        )
        missing = trained.window.time - self._steps_read
        windows = tuple(_extended(w, missing, self.segment.step_hours) for w in windows)
        rng = np.random.default_rng(0)
        return make_view(windows, self.task, rng, first_guess=trained.first_guess)

    def _fields(
        self, stream: StreamTokens, members: Tensor, queries
    ) -> Float[np.ndarray, "batch member variable level step lat lon"]:
        """Queries back into windows, denormalised, only the steps that are written."""
        num_members = members.shape[2]
        everywhere = members.new_zeros(
            (members.shape[0], stream.grid.num_tokens + 1, num_members, members.shape[-1])
        )
        # padding goes to a spare token at the end, which is cut off
        spare = torch.full_like(queries.index, stream.grid.num_tokens)
        index = torch.where(queries.valid, queries.index, spare)[..., None, None]
        everywhere.scatter_(1, index.expand_as(members), members)
        num_level, num_time, num_lat, num_lon = stream.grid.shape
        tokens = rearrange(
            everywhere[:, :-1],
            "batch (level nt nlat nlon) member patch -> batch member level nt nlat nlon patch",
            level=num_level,
            nt=num_time,
            nlat=num_lat,
            nlon=num_lon,
        )
        fields = detokenise(tokens, stream.spec).cpu()
        steps = [self.plan.reference + offset for offset in self.plan.offsets]
        return self.trained.normaliser.inverse(fields[..., steps, :, :], stream.spec).numpy()

    def _blend(
        self,
        blended: dict[str, np.ndarray],
        spec: StreamSpec,
        fields: np.ndarray,
        tiles: TilePlan,
        chosen: range,
    ) -> None:
        """Add weighted tiles into the global fields of every variable."""
        num_lat, num_lon = self.segment.grid.shape
        for position, number in enumerate(chosen):
            tile, weight = tiles.tiles[number], tiles.weights[number]
            rows, columns = tile.lat_index()[:, None], tile.lon_index(num_lon)
            for row, name in enumerate(spec.variables):
                values = rearrange(
                    fields[position, :, row],
                    "member level step lat lon -> step member level lat lon",
                )
                if name not in blended:
                    shape = (*values.shape[:3], num_lat, num_lon)
                    blended[name] = np.zeros(shape, np.float32)
                blended[name][..., rows, columns] += values * weight.astype(np.float32)


def _extended(window: StreamWindow, missing: int, step_hours: float) -> StreamWindow:
    """The window with its last field repeated for steps to come, all of which are hidden."""
    if missing == 0:
        return window
    steps = torch.arange(1, missing + 1) * step_hours
    last = window.fields[..., -1:, :, :]
    return replace(
        window,
        fields=torch.cat([window.fields, *[last] * missing], dim=-3),
        time_hours=torch.cat([window.time_hours, window.time_hours[-1] + steps]),
    )


def _predicted(view: View) -> list[StreamTokens]:
    return [stream for stream in view.streams if stream.spec.role == "predict"]
