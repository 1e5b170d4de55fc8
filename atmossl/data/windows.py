"""Windows of stores in normalised units, and the statistics that make them so."""

import itertools
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atmossl.batch import StreamSpec, StreamWindow, patch_values
from atmossl.data.fingerprint import Transforms
from atmossl.data.monthly_normals import LocalUnits, MonthlyNormals, local_units
from atmossl.data.segment import Index, Segment, Target, WindowPlace, check_window
from atmossl.data.variables import Limits, Transform
from atmossl.geometry import Box, check_window_fits
from atmossl.model_levels import standard_pressure
from atmossl.settings import NotNegative, Positive

# Memory that is used again once nobody views it. Fresh memory costs as much as a copy of what
# is put into it: the system clears it page by page.

_MOST_KEPT = 2  # pieces of memory that wait to be used again


def lent(memory: np.ndarray, give_back: Callable[[], object]) -> np.ndarray:
    """Memory as an array that calls `give_back` when no array or tensor views it any longer.

    Views of an array keep its outermost owner alive, which must not be the memory itself here:
    through a buffer, numpy takes what is handed out for the owner.
    """
    handed_out = np.frombuffer(memory.data, np.uint8)
    weakref.finalize(handed_out, give_back).atexit = False
    return handed_out


class Pool:
    """Pieces of memory for one process. It may be used by several threads: pieces come back
    whenever their last view dies, so there is no lock to wait for then."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=_MOST_KEPT)

    def take(self, size: int) -> np.ndarray:
        """An array of `size` bytes from a free piece, of which at most half stays unused. Its
        content is not defined."""
        memory = self._reused(size)
        if memory is None:
            memory = np.empty(size, np.uint8)
        return lent(memory, lambda: self._free.append(memory))[:size]

    def _reused(self, size: int) -> np.ndarray | None:
        for _ in range(_MOST_KEPT):
            try:
                memory = self._free.popleft()
            except IndexError:
                return None
            if size <= len(memory) <= 2 * size:
                return memory
            self._free.append(memory)
        return None


_POOL = Pool()
_SURELY_FINITE = 1e25  # float32 of that size can be divided by any standard deviation
Memory = Callable[[int], np.ndarray]


ARRAYS = ("mean", "std", "step_std", "minimum", "maximum", "missing")


@dataclass(frozen=True)
class Statistics:
    """Area-weighted mean and standard deviation of every variable and level over the training
    period, and the standard deviation of its change over one time step, in the variable's units
    or, where it has a transform, after that.

    Arrays are [variable level]; a surface variable has the same values on all levels.
    minimum, maximum: of the values. missing: share of them. Statistics written before version 0.2
    lack these three. normals: of variables that a network takes in units of their month.
    """

    variables: tuple[str, ...]
    levels: tuple[int, ...]
    mean: np.ndarray
    std: np.ndarray
    step_std: np.ndarray
    period: str
    fingerprint: str
    minimum: np.ndarray | None = None
    maximum: np.ndarray | None = None
    missing: np.ndarray | None = None
    transforms: Transforms = field(default_factory=dict)
    normals: Mapping[str, MonthlyNormals] = field(default_factory=dict)

    @classmethod
    def neutral(cls, segment: Segment) -> Self:
        """Means of 0 and deviations of 1, which leave values as they are."""
        levels = segment.levels or (0,)
        zeros = np.zeros((len(segment.variables), len(levels)))
        ones = zeros + 1
        return cls(segment.variables, levels, zeros, ones, ones, period="", fingerprint="")

    def select(self, spec: StreamSpec, field: str) -> Float[Tensor, "variable level"]:
        """`mean`, `std` or `step_std` of one stream's variables and levels."""
        rows = [self.variables.index(name) for name in spec.variables]
        columns = [self.levels.index(level) if spec.levels else 0 for level in spec.level_values]
        return torch.from_numpy(getattr(self, field)[np.ix_(rows, columns)]).float()

    def residual_scale(self, spec: StreamSpec) -> Float[Tensor, "level patch"]:
        """The standard deviation of a one-step change in normalised units, for the tokens of a
        stream; 1 for variables that never change in time."""
        change, std = self.select(spec, "step_std"), self.select(spec, "std")
        return patch_values(torch.where(change > 0, change / std, 1.0), spec)

    def to_dict(self) -> dict:
        """Plain numbers and strings, for a checkpoint; and the tensors of `normals`, if any."""
        arrays = {key: getattr(self, key) for key in ARRAYS}
        normals = {name: value.to_dict() for name, value in self.normals.items()}
        return {
            "variables": list(self.variables),
            "levels": list(self.levels),
            "period": self.period,
            "fingerprint": self.fingerprint,
            "transforms": {name: asdict(value) for name, value in self.transforms.items()},
            **{key: values.tolist() for key, values in arrays.items() if values is not None},
            **({"normals": normals} if normals else {}),
        }

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        arrays = {key: np.array(values[key]) for key in ARRAYS if key in values}
        transforms = values.get("transforms", {})  # versions before 0.2 have none
        normals = values.get("normals", {})
        return cls(
            variables=tuple(values["variables"]),
            levels=tuple(values["levels"]),
            period=values["period"],
            fingerprint=values["fingerprint"],
            transforms={name: Transform(**value) for name, value in transforms.items()},
            normals={name: MonthlyNormals.from_dict(value) for name, value in normals.items()},
            **arrays,
        )


class Normaliser:
    """Brings fields to zero mean and unit variance per variable and level, and back. A variable
    with a transform passes through it first, and last on the way back.

    A network may take some variables in units of their month and place instead: `local` leads from
    normalised fields to these, and back.

    statistics: of every source, by the `data` of the streams that read it.
    """

    def __init__(self, statistics: Mapping[str, Statistics]) -> None:
        self.statistics = statistics

    def forward(
        self, fields: Float[Tensor, "*batch variable level time lat lon"], spec: StreamSpec
    ) -> Float[Tensor, "*batch variable level time lat lon"]:
        fields = self._transformed(fields, spec, Transform.forward)
        return (fields - self.values(spec, "mean")) / self.values(spec, "std")

    def inverse(
        self, fields: Float[Tensor, "*batch variable level time lat lon"], spec: StreamSpec
    ) -> Float[Tensor, "*batch variable level time lat lon"]:
        fields = fields * self.values(spec, "std") + self.values(spec, "mean")
        return self._transformed(fields, spec, Transform.inverse)

    def values(self, spec: StreamSpec, field: str) -> Float[Tensor, "variable level 1 1 1"]:
        return self.statistics[spec.data].select(spec, field)[:, :, None, None, None]

    def local(self, spec: StreamSpec, hours: Tensor, lat: Tensor, lon: Tensor) -> LocalUnits | None:
        """The local normals of a stream's points, at hours since 1970-01-01T00; None if it has
        no such variables."""
        statistics = self.statistics[spec.data]
        if not statistics.normals:
            return None
        mean, std = statistics.select(spec, "mean"), statistics.select(spec, "std")
        return local_units(statistics.normals, spec, mean, std, (hours, lat, lon))

    def local_of(self, window: StreamWindow) -> LocalUnits | None:
        return self.local(window.spec, window.time_hours, window.lat, window.lon)

    def transform(self, variable: str, data: str) -> Transform | None:
        return self.statistics[data].transforms.get(variable)

    def _transformed(
        self,
        fields: Float[Tensor, "*batch variable level time lat lon"],
        spec: StreamSpec,
        function: Callable[[Transform, np.ndarray], np.ndarray],
    ) -> Float[Tensor, "*batch variable level time lat lon"]:
        by_row = {row: self.transform(name, spec.data) for row, name in enumerate(spec.variables)}
        if not any(by_row.values()):
            return fields
        fields = fields.clone()
        for row, transform in by_row.items():
            if transform is not None:
                values = function(transform, fields[..., row, :, :, :, :].numpy())
                fields[..., row, :, :, :, :] = torch.from_numpy(values)
        return fields


@dataclass(frozen=True)
class WindowSize:
    """Points of a window along each axis; lat or lon of 0 take the whole grid."""

    time: Positive
    lat: NotNegative
    lon: NotNegative

    def on(self, segment: Segment) -> "WindowSize":
        """The window size on a segment, with the whole grid put in for 0; ValueError if the
        window does not fit."""
        num_lat, num_lon = segment.grid.shape
        lat, lon = self.lat or num_lat, self.lon or num_lon
        check_window_fits(segment.grid, lat, lon)
        if self.time > len(segment.times) and not segment.partial:
            raise ValueError(
                f"data.window.time={self.time} steps is longer than segment {segment.name} with "
                f"{len(segment.times)} steps"
            )
        check_window(segment, self.time, lat, lon)
        return WindowSize(self.time, lat, lon)

    def points(self, segment: Segment, spec: StreamSpec) -> tuple[int, int, int]:
        """The points (time, lat, lon) of a stream in a window of this size."""
        box = Box(0, segment.alignment.lon_shift, self.lat, self.lon)
        place = segment.place(spec.data, 0, self.time, box)
        return place.count, place.box.lat_size, place.box.lon_size


@dataclass(frozen=True)
class _FieldWriter:
    """Normalises what is read of one variable straight into its place in a window.

    out: [level time lat lon]. mean, std: [level 1 1 1]. limits: what the values may be. valid: like
    `out`, where missing values are marked; without it they are refused.
    """

    out: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    transform: Transform | None
    limits: Limits | None
    refusal: Callable[[], str]
    valid: np.ndarray | None = None

    def __call__(self, values: np.ndarray, index: Index) -> None:
        levels, place = index[0], self.out[index]
        with np.errstate(over="ignore", invalid="ignore"):  # to infinity, which is missing
            values = values.astype(np.float32, copy=False)
            lowest, highest = values.min(), values.max()  # NaN if one is missing
        if self.limits is not None and not self.limits.hold(lowest, highest):
            self.limits.check(values, levels)
        if self.transform is not None:
            values = self.transform.forward(values)
        with np.errstate(invalid="ignore", over="ignore"):
            np.subtract(values, self.mean[levels], out=place)
            np.divide(place, self.std[levels], out=place)
        finite = lowest > -_SURELY_FINITE and highest < _SURELY_FINITE
        if not finite or self.transform is not None:
            self._mark_missing(place, index)

    def _mark_missing(self, place: np.ndarray, index: Index) -> None:
        observed = np.isfinite(place)
        if observed.all():
            return
        if self.valid is None:
            raise ValueError(self.refusal())
        self.valid[index] = observed
        place[~observed] = 0.0


def read_windows(
    segment: Segment,
    specs: Sequence[StreamSpec],
    normaliser: Normaliser,
    count: int,
    places: Sequence[tuple[int, Box]],
    memory: Memory = _POOL.take,
) -> list[tuple[StreamWindow, ...]]:
    """Read windows of `count` steps, each at (first step, box), for all streams: normalised
    fields with the coordinates of their points. Chunks that several windows touch are read once.
    memory: returns as many bytes as it is asked for, in which the fields of all windows lie."""
    laid = [
        [segment.place(spec.data, start, count, box) for spec in specs] for start, box in places
    ]
    windows = _empty_windows(laid, specs, memory)
    targets_of_data: dict[str, dict[str, list[Target]]] = {}  # by the streams' data and variable
    for places_of_sample, streams in zip(laid, windows, strict=True):
        for place, window in zip(places_of_sample, streams, strict=True):
            if place.count == 0:  # none of the stream's steps lies in so short a window
                continue
            targets = targets_of_data.setdefault(window.spec.data, {})
            for name, target in _targets(place, window, normaliser):
                targets.setdefault(name, []).append(target)
    for data, targets in targets_of_data.items():
        segment.sources[data].segment.read_into(targets)
    for window in itertools.chain.from_iterable(windows):
        _into_local_units(window, normaliser)
    return windows


def _into_local_units(window: StreamWindow, normaliser: Normaliser) -> None:
    """Change normalised fields in place, if the network takes them in units of month and place."""
    local = normaliser.local_of(window)
    if local is not None:
        window.fields.copy_(local.into(window.fields))
        if window.valid is not None:
            window.fields.masked_fill_(~window.valid, 0.0)


def _targets(
    place: WindowPlace, window: StreamWindow, normaliser: Normaliser
) -> Iterator[tuple[str, Target]]:
    """The read requests for every variable of a stream."""
    record, start, count, box = place
    names, levels = window.spec.variables, window.spec.level_values
    refusals = [partial(record.missing_message, name, start, count) for name in names]
    limits = [record.limits(name, levels, start, count) for name in names]
    writers = _field_writers(window, normaliser, limits, refusals)
    for name, write in zip(names, writers, strict=True):
        yield name, record.target(name, levels, start, count, box, write)


def _field_writers(
    window: StreamWindow,
    normaliser: Normaliser,
    limits: Sequence[Limits | None],
    refusals: Sequence[Callable[[], str]],
) -> list[_FieldWriter]:
    """Writers, one per variable, which put normalised values into the window's memory."""
    spec = window.spec
    mean, std = (normaliser.values(spec, field).numpy() for field in ("mean", "std"))
    fields = window.fields.numpy()
    valid = None if window.valid is None else window.valid.numpy()
    return [
        _FieldWriter(
            out=fields[row],
            mean=mean[row],
            std=std[row],
            transform=normaliser.transform(name, spec.data),
            limits=limits[row],
            refusal=refusals[row],
            valid=None if valid is None else valid[row],
        )
        for row, name in enumerate(spec.variables)
    ]


def _empty_windows(
    laid: Sequence[Sequence[WindowPlace]], specs: Sequence[StreamSpec], memory: Memory
) -> list[tuple[StreamWindow, ...]]:
    """Windows with their coordinates and empty fields, in one piece of memory. numpy asks for
    large pages where the piece is large, which the system clears much faster."""
    shapes = [
        (len(spec.variables), spec.num_levels, place.count, place.box.lat_size, place.box.lon_size)
        for places in laid
        for place, spec in zip(places, specs, strict=True)
    ]
    sizes = [math.prod(shape) for shape in shapes]
    pieces = np.split(memory(4 * sum(sizes)).view(np.float32), np.cumsum(sizes)[:-1])
    fields = iter(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))
    return [
        tuple(_empty_window(*pair, next(fields)) for pair in zip(places, specs, strict=True))
        for places in laid
    ]


def _empty_window(place: WindowPlace, spec: StreamSpec, fields: np.ndarray) -> StreamWindow:
    segment, start, count, box = place
    grid = segment.grid
    lat, lon = box.lat_index(), box.lon_index(grid.shape[1])
    return StreamWindow(
        spec=spec,
        fields=torch.from_numpy(fields),
        valid=torch.ones(fields.shape, dtype=torch.bool) if spec.missing == "mask" else None,
        time_hours=torch.from_numpy(segment.time_hours(start, count)),
        level_hpa=torch.tensor(_told_levels(segment, spec), dtype=torch.float32),
        lat=torch.from_numpy(grid.latitude[lat]).float(),
        lon=torch.from_numpy(grid.longitude[lon]).float(),
        weight=torch.from_numpy(grid.weights[lat]).float(),
        year_hours=segment.calendar.year_hours,
    )


def _told_levels(segment: Segment, spec: StreamSpec) -> list[float]:
    """hPa of every level, 0 at the surface: in the standard atmosphere where the store's are
    numbers of model levels."""
    if not (segment.model_levels and spec.levels):
        return [float(level) for level in spec.level_values]
    return [standard_pressure(level) for level in spec.level_values]


def read_window(
    segment: Segment,
    specs: Sequence[StreamSpec],
    normaliser: Normaliser,
    start: int,
    count: int,
    box: Box,
) -> tuple[StreamWindow, ...]:
    """One window of all streams; see `read_windows`."""
    (window,) = read_windows(segment, specs, normaliser, count, [(start, box)])
    return window
