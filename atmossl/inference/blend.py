"""Tiles into fields of the whole grid, kept only as long as more tiles can come."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from atmossl.batch import PRIMARY, StreamSpec
from atmossl.geometry import Box

Fields = dict[str, np.ndarray]  # by variable, [step member level lat lon] in its own units


@dataclass(frozen=True)
class BlendedPart:
    """What is ready to be written of one case, which is one init or valid time.

    leads: times of the steps that the fields hold, from the reference time. rows: latitudes that
    they cover. completes: whether nothing is left of the case. departure: mean square per variable
    of what the coarsened prediction lacks of the given coarse cells, for downscaling.
    data: of the streams that the fields belong to, on whose cells and at whose steps they are.
    """

    case: int
    leads: np.ndarray
    rows: slice
    fields: Fields
    completes: bool
    departure: dict[str, float] = field(default_factory=dict)
    data: str = PRIMARY


class TileBlender:
    """Weighted mean of the tiles of one case, over the bands of latitude that are still open.

    Members of the same number in two tiles are hardly related, so their mean has less spread than
    either. Each member's departure from the ensemble mean is therefore scaled where tiles overlap,
    such that the variance over members is the weighted mean of the tiles' variances; the ensemble
    mean is the weighted mean of theirs.

    levels: of every variable in hPa; a tile of one stream may hold some of them.
    """

    def __init__(self, num_lon: int, levels: Mapping[str, tuple[int, ...]]) -> None:
        self.num_lon = num_lon
        self.levels = levels
        self.south = 0  # first row that is held
        self._fields: Fields = {}
        self._variance: Fields = {}  # over members, kept as one member

    def add(self, spec: StreamSpec, values: np.ndarray, tile: Box, weight: np.ndarray) -> None:
        """Add [variable step member level lat lon] of a stream, of which the lat and lon are the
        tile's."""
        share = weight.astype(np.float32)
        self._add(self._fields, spec, values * share, tile)
        self._add(self._variance, spec, values.var(axis=2, keepdims=True) * share, tile)

    def _add(self, fields: Fields, spec: StreamSpec, weighted: np.ndarray, tile: Box) -> None:
        top = tile.lat_start + tile.lat_size - self.south
        rows = slice(tile.lat_start - self.south, top)
        first = tile.lon_start
        before = min(tile.lon_size, self.num_lon - first)  # columns before the circle closes
        for name, own in zip(spec.variables, weighted, strict=True):
            levels = self.levels[name]
            shape = (*own.shape[:2], len(levels), *own.shape[3:])
            field = self._room(fields, name, shape, top)
            whole = levels == spec.level_values
            at = slice(None) if whole else [levels.index(level) for level in spec.level_values]
            field[..., at, rows, first : first + before] += own[..., :before]
            if before < tile.lon_size:
                field[..., at, rows, : tile.lon_size - before] += own[..., before:]

    def _room(self, fields: Fields, name: str, shape: tuple[int, ...], num_rows: int) -> np.ndarray:
        """The variable's field with at least so many rows."""
        field = fields.get(name)
        held = 0 if field is None else field.shape[-2]
        if field is None or held < num_rows:
            grown = np.zeros((*shape[:-2], num_rows, self.num_lon), np.float32)
            if field is not None:
                grown[..., :held, :] = field
            fields[name] = field = grown
        return field

    def take(self, end: int) -> tuple[slice, Fields]:
        """Rows up to `end`, to which no more tiles come; they are forgotten here."""
        rows, count = slice(self.south, max(end, self.south)), max(end - self.south, 0)
        done = {
            name: _with_variance(field[..., :count, :], self._variance[name][..., :count, :])
            for name, field in self._fields.items()
        }
        self._fields = _rows_from(self._fields, count)
        self._variance = _rows_from(self._variance, count)
        self.south = rows.stop
        return rows, done


def _rows_from(fields: Fields, first: int) -> Fields:
    return {name: field[..., first:, :].copy() for name, field in fields.items()}


def _with_variance(members: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Departures of members (axis 1) from their mean scaled to the given variance."""
    departure = members - members.mean(axis=1, keepdims=True)
    present = (departure**2).mean(axis=1, keepdims=True)
    ratio = np.divide(variance, present, out=np.ones_like(present), where=present > 0)
    # added, so that members stay as they are, to the last bit, where nothing is to be scaled
    return members + (np.sqrt(ratio) - 1) * departure
