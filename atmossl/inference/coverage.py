"""Where the streams of a source lie in a prediction: on the cells of their own store, as far as
those of the primary source cover them."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from einops import reduce, repeat

from atmossl.data.segment import Segment
from atmossl.geometry import Box, Grid, Nesting


@dataclass(frozen=True)
class Coverage:
    """The cells of a source's grid that the cells of a segment fill. whole: them, as a
    box in that grid; from its first column on if they close the circle."""

    nesting: Nesting
    whole: Box

    @classmethod
    def of(cls, segment: Segment, data: str) -> Self:
        nesting = segment.sources[data].nesting
        whole = nesting.box(Box(0, segment.alignment.lon_shift, *segment.grid.shape))
        closed = nesting.other.periodic and whole.lon_size == nesting.other.shape[1]
        return cls(nesting, replace(whole, lon_start=0) if closed else whole)

    @property
    def grid(self) -> Grid:
        return self.nesting.other.part(self.whole)

    def box(self, tile: Box) -> Box:
        """A tile in cells of `grid`."""
        found = self.nesting.box(tile)
        west = (found.lon_start - self.whole.lon_start) % self.nesting.other.shape[1]
        return replace(found, lat_start=found.lat_start - self.whole.lat_start, lon_start=west)

    def row(self, own: int) -> int:
        """Where a row of the segment's grid, with an edge in common, begins in `grid`."""
        return own // self.nesting.lat.own * self.nesting.lat.other

    def weights(self, own: np.ndarray) -> np.ndarray:
        """Blending weights [lat lon] of a tile on the cells of `grid`: means over those of the
        segment's cells in common blocks, so that they sum to one over tiles as those do."""
        lat, lon = self.nesting.lat, self.nesting.lon
        blocks = reduce(own, "(lat y) (lon x) -> lat lon", "mean", y=lat.own, x=lon.own)
        return repeat(blocks, "lat lon -> (lat y) (lon x)", y=lat.other, x=lon.other)
