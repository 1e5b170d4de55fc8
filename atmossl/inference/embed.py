"""Latents of a trained encoder over the whole grid, with the coordinates of their tokens.

Windows of the training's size are encoded with nothing hidden, tile by tile. All tiles start at
token edges, so that every token of the grid has one place, and its latents from several tiles are
blended as predictions are: with weights that sum to one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import dask.array
import numpy as np
import torch
import xarray as xr
from einops import rearrange, reduce
from jaxtyping import Float

from atmossl import __version__
from atmossl.at_work import check_is_free
from atmossl.atomic_files import write_atomically
from atmossl.batch import StreamSpec, StreamWindow, TokenGrid, TokenSize, View, collate_views
from atmossl.data.segment import Segment
from atmossl.geometry import Box, TilePlan
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.plan import Source
from atmossl.inference.tiles import WindowReader, columns
from atmossl.inference.writer import COORDINATES, attributes_of, encoding
from atmossl.masking.base import hide_nothing, make_view
from atmossl.masking.tasks import TimePlan
from atmossl.model.network import StreamLatents
from atmossl.value_faults import as_written, listed

_DIMS = ("offset", "level", "latitude", "longitude", "feature")
_OFFSET = {"long_name": "time from init_time to the centre of the token"}


EMBEDDING = "embedding"  # in place of a layer: what the first layer gets
Layer = int | Literal["embedding"]


@dataclass(frozen=True)
class StreamField:
    """One stream's latents of one window on the whole grid, and the coordinates of their tokens:
    `offset` hours from the reference time, `level` hPa, degrees."""

    latents: Float[np.ndarray, "offset level latitude longitude feature"]
    offset: Float[np.ndarray, "offset"]
    level: Float[np.ndarray, "level"]
    latitude: Float[np.ndarray, "latitude"]
    longitude: Float[np.ndarray, "longitude"]


@dataclass(frozen=True)
class TileView:
    """A tile of the globe: its cells, their blending weights, and what the encoder is shown."""

    box: Box
    weight: np.ndarray
    view: View


@dataclass
class _Blend:
    """The weighted sum of a stream's tiles, and their coordinates."""

    spec: StreamSpec
    num_lat: int
    num_lon: int
    first_lon: int  # cell at which the tokens of the grid begin
    latents: np.ndarray | None = None
    coordinates: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, latents: np.ndarray, tile: TileView, grid: TokenGrid, number: int) -> None:
        """Add the latents [level nt nlat nlon feature] of one tile, which is sample `number` of
        a batch."""
        size = self.spec.token_size
        rows, places = _rows_and_columns(
            tile.box, size, latents.shape[2:4], self.num_lon, self.first_lon
        )
        shape = (*latents.shape[:2], self.num_lat // size.lat, self.num_lon // size.lon)
        if self.latents is None:
            self.latents = np.zeros((*shape, latents.shape[-1]), np.float32)
            self.coordinates = {"latitude": np.zeros(shape[2]), "longitude": np.zeros(shape[3])}
        weight = reduce(
            tile.weight, "(nlat lat) (nlon lon) -> nlat nlon 1", "mean", lat=size.lat, lon=size.lon
        ).astype(np.float32)
        self.latents[:, :, rows[:, None], places] += latents * weight
        self.coordinates["latitude"][rows] = grid.lat[number].double().numpy()
        self.coordinates["longitude"][places] = grid.lon[number].double().numpy() % 360.0
        levels = np.array(self.spec.level_values, np.float64).reshape(-1, size.level)
        self.coordinates["level"] = levels.mean(axis=1)
        self.coordinates["time_hours"] = grid.time_hours[number].double().numpy()

    def field(self, reference_hours: float) -> StreamField:
        assert self.latents is not None
        places = dict(self.coordinates)
        # as of grids: those of a region across Greenwich go on past 360
        west = places["longitude"][0]
        places["longitude"] = west + (places["longitude"] - west) % 360.0
        offset = places.pop("time_hours") - reference_hours
        latents = rearrange(self.latents, "level time ... -> time level ...")
        return StreamField(latents, offset, **places)


@dataclass(frozen=True)
class Embedder:
    """The latents of one encoder layer over records of one grid and time step.

    The reference time (`init_time`) is the last step of a window. layer: 0 the first, -1 the last.
    overlap, batch_size: as of `Options`. withheld: streams that the encoder is not shown. blank:
    variables of which it is shown their training mean everywhere.

    Streams with data of their own are shown to the encoder, but their latents, which lie on other
    cells, are not given.

    Raises:
        ValueError: an objective that teaches no latents, no such layer or stream, or a grid that
            is no whole number of tokens.
    """

    trained: TrainedModel
    segments: tuple[Segment, ...]
    layer: int
    overlap: float
    batch_size: int
    device: str
    withheld: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.trained.require("embed")
        names = [spec.name for spec in self.trained.own_specs]
        if not set(self.withheld) <= set(names) or len(set(self.withheld)) == len(names):
            raise ValueError(
                f"withheld={as_written(self.withheld)}: the checkpoint's streams are "
                f"{listed(names)}, of which one at least must be shown"
            )
        count = self.trained.model.num_encoder_layers
        if not -count <= self.layer < count:
            raise ValueError(f"layer={self.layer}; valid: {-count} to {count - 1}")
        _ = self.tiles

    @property
    def segment(self) -> Segment:
        return self.segments[0]

    @property
    def shown_specs(self) -> tuple[StreamSpec, ...]:
        """The run's own streams, without those that are withheld."""
        return tuple(spec for spec in self.trained.own_specs if spec.name not in self.withheld)

    @property
    def _steps(self) -> int:
        return self.trained.window.time

    @cached_property
    def tiles(self) -> TilePlan:
        window, grid = self.trained.window, self.segment.grid
        sizes = [spec.token_size for spec in self.trained.own_specs]
        cells = [cell for size in sizes for cell in (size.lat, size.lon)]
        align = math.lcm(self.segment.alignment.cells, *cells)
        for key, have in zip(("rows", "columns"), grid.shape, strict=True):
            if have % align:
                raise ValueError(
                    f"the grid has {have} {key}, which tokens of {align} cells do not fill; "
                    "latents need a grid of whole tokens"
                )
        lat, lon = (
            window_size if 0 < window_size <= have else have
            for window_size, have in zip((window.lat, window.lon), grid.shape, strict=True)
        )
        return TilePlan(grid, lat, lon, self.overlap, (self.first_lon,), align)

    @property
    def first_lon(self) -> int:
        return self.segment.alignment.lon_shift

    def rows_and_columns(
        self, box: Box, spec: StreamSpec, counts: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the tokens of a tile, so many rows and columns, are among those of the grid."""
        num_lon = self.segment.grid.shape[1]
        return _rows_and_columns(box, spec.token_size, counts, num_lon, self.first_lon)

    def possible_times(self) -> np.ndarray:
        """Reference times with a whole window before them, in order."""
        return np.sort(np.concatenate([s.times[self._steps - 1 :] for s in self.segments]))

    def find(self, time: np.datetime64) -> Source:
        """The record that holds a reference time and the window before it.

        Raises:
            ValueError: none does.
        """
        for segment in self.segments:
            if time in segment.times[self._steps - 1 :]:
                return Source(segment, segment.find_time(time) - (self._steps - 1))
        self.segment.find_time(time)  # says what it covers if it lacks the time itself
        when = self.segment.calendar.show(time)
        raise ValueError(
            f"init_time={when} lacks steps before it: a window has {self._steps}, of which it is "
            "the last"
        )

    def fields(self, time: np.datetime64) -> dict[str, StreamField]:
        """The latents of every stream for the window that ends at a reference time."""
        return self.fields_of_layers(time, (self.layer,))[0]

    def fields_of_layers(
        self, time: np.datetime64, layers: Sequence[Layer]
    ) -> list[dict[str, StreamField]]:
        """The same as `fields` for several layers, from one pass of the encoder."""
        source, (num_lat, num_lon) = self.find(time), self.segment.grid.shape
        blends = [
            {spec.name: _Blend(spec, num_lat, num_lon, self.first_lon) for spec in self.shown_specs}
            for _ in layers
        ]
        tiles = self.tile_views(source)
        while batch := list(islice(tiles, self.batch_size)):
            (view,) = collate_views([(t.view,) for t in batch], list(range(len(batch)))).views
            with torch.inference_mode():
                encoded = self.trained.model.to(self.device).encode(view.to(self.device))
            for layer, by_stream in zip(layers, blends, strict=True):
                for name, blend in by_stream.items():
                    _add_batch(blend, encoded[name], layer, batch)
        reference = float(source.segment.time_hours(source.start + self._steps - 1, 1)[0])
        return [
            {name: blend.field(reference) for name, blend in by_stream.items()}
            for by_stream in blends
        ]

    def whole_view(self, time: np.datetime64) -> View:
        """The window that ends at a reference time, of a window that is the whole grid."""
        (tile,) = self.tile_views(self.find(time))
        return tile.view

    def tile_views(self, source: Source) -> Iterator[TileView]:
        """All tiles of a window; each band of latitude is read once."""
        plan, grid, used = self.tiles, self.segment.grid, self.trained
        all_steps = TimePlan(self._steps - 1, (0,), tuple(range(self._steps)))
        reader, rng = WindowReader(used, all_steps, grid), np.random.default_rng(0)  # never used
        for numbers in plan.rows():
            south = plan.tiles[numbers[0]].lat_start
            around = Box(south, self.first_lon, plan.lat_size, grid.shape[1])
            band = reader.read(source, around)
            for number in numbers:
                windows = columns(band, source.segment, around, plan.tiles[number])
                windows = tuple(
                    _blanked(w, self.blank) for w in windows if w.spec.name not in self.withheld
                )
                view = make_view(windows, hide_nothing, rng, first_guess=used.first_guess)
                yield TileView(plan.tiles[number], plan.weights[number], view)

    def dataset(
        self, times: np.ndarray, fields: dict[str, StreamField] | None = None
    ) -> xr.Dataset:
        """A dataset with CF attributes. fields: of a single time; without them the dataset is
        lazy and empty, for all times, with the tokens of the first."""
        described = fields or self.fields(times[0])
        several = len(described) > 1
        dataset = xr.Dataset(coords={"init_time": self.segment.calendar.dates(times)})
        for name, stream in described.items():
            end = f"_{name}" if several else ""
            dims = tuple(f"{dim}{end}" for dim in _DIMS)
            shape = (len(times), *stream.latents.shape)
            values = (
                dask.array.zeros(shape, dtype=np.float32, chunks=(1, *shape[1:]))
                if fields is None
                else stream.latents[None]
            )
            about = {"long_name": f"latents of stream {name}, encoder layer {self.layer}"}
            dataset[f"latents{end}"] = (("init_time", *dims), values, about)
            dataset = dataset.assign_coords(self._coordinates(times, stream, dims, f"time{end}"))
        for name in map(str, dataset.coords):
            kind = name if name in COORDINATES else name.partition("_")[0]
            pressure_levels = self.trained.pressure_levels
            dataset[name].attrs = (
                attributes_of(kind, pressure_levels=pressure_levels)
                if kind in COORDINATES
                else dict(_OFFSET)
            )
        return dataset.assign_attrs(
            Conventions="CF-1.11",
            title="atmossl latents",
            source=f"atmossl {__version__}, checkpoint {self.trained.digest}",
        )

    def _coordinates(
        self, times: np.ndarray, stream: StreamField, dims: tuple[str, ...], time_name: str
    ) -> dict[str, Any]:
        """The coordinates of the tokens' centres: offset, valid time, level and place."""
        offset = np.round(stream.offset * 3600).astype("timedelta64[s]")
        valid = self.segment.calendar.dates((times[:, None] + offset).ravel())
        values = (offset.astype("timedelta64[ns]"), stream.level, stream.latitude, stream.longitude)
        valid_times = (("init_time", dims[0]), valid.reshape(len(times), -1))
        return {**dict(zip(dims, values, strict=False)), time_name: valid_times}


def _blanked(window: StreamWindow, variables: Sequence[str]) -> StreamWindow:
    """A window in which some variables are their training mean, which is 0 in normalised units."""
    numbers = [n for n, name in enumerate(window.spec.variables) if name in variables]
    if not numbers:
        return window
    fields = window.fields.clone()
    fields[numbers] = 0.0
    return replace(window, fields=fields)


def _rows_and_columns(
    box: Box, size: TokenSize, counts: Sequence[int], num_lon: int, first_lon: int
) -> tuple[np.ndarray, np.ndarray]:
    rows = box.lat_start // size.lat + np.arange(counts[0])
    first = (box.lon_start - first_lon) // size.lon
    return rows, (first + np.arange(counts[1])) % (num_lon // size.lon)


def _add_batch(
    blend: _Blend, stream: StreamLatents, layer: Layer, batch: Sequence[TileView]
) -> None:
    """One stream's latents of a batch of tiles, after one layer."""
    level, steps, nlat, nlon = stream.grid.shape
    of_layer = stream.layers[layer] if isinstance(layer, int) else stream.embedded
    assert of_layer is not None, "ask Network.tells_embedding first"
    latents = rearrange(
        of_layer.features.float().cpu().numpy(),
        "batch (level nt nlat nlon) feature -> batch level nt nlat nlon feature",
        level=level, nt=steps, nlat=nlat, nlon=nlon,
    )  # fmt: skip
    grid = stream.grid.to("cpu", non_blocking=False)
    for number, tile in enumerate(batch):
        blend.add(latents[number], tile, grid, number)


def embeddings(embedder: Embedder, times: Sequence[np.datetime64]) -> Iterator[xr.Dataset]:
    """The latents of every reference time, one dataset after another, in memory."""
    for time in times:
        yield embedder.dataset(np.array([time]), embedder.fields(time))


def write_embeddings(
    embedder: Embedder,
    times: np.ndarray,
    output: Path,
    *,
    advance: Callable[[float], object] = float,  # of no consequence
) -> None:
    """Write the latents of all times as zarr, time after time. `output` appears when it is
    complete.

    Raises:
        ValueError: the output exists or is no zarr.
    """
    check_embedding_output(output)

    def fill(partial: Path) -> None:
        empty = embedder.dataset(times)
        empty.to_zarr(partial, compute=False, encoding=encoding(empty), consolidated=True)
        arrays = [str(name) for name in empty.data_vars]
        advance(0.0)  # nothing was there before
        for case, dataset in enumerate(embeddings(embedder, list(times))):
            part = dataset[arrays].drop_vars(list(dataset.coords))
            part.to_zarr(partial, region={"init_time": slice(case, case + 1)})
            advance(1.0)

    write_atomically(output, fill)


def check_embedding_output(output: Path) -> None:
    """Raise ValueError if the output exists or is not to be a zarr store."""
    if output.suffix != ".zarr":
        raise ValueError(f"output={output} must end in .zarr")
    check_is_free(output)
