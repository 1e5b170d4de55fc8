"""One pass of the model over the tiles of many windows, blended into fields as tiles come in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from atmossl.batch import PRIMARY, StreamPrediction, StreamSpec, StreamTokens, View, collate_views
from atmossl.data.segment import HOUR
from atmossl.geometry import Box
from atmossl.inference.blend import BlendedPart, Fields, TileBlender
from atmossl.inference.calibration import Calibration
from atmossl.inference.coherence import coherent
from atmossl.inference.windows import Source, WindowReader, columns, masked_view
from atmossl.masking.tasks import Points
from atmossl.tokens import detokenise

if TYPE_CHECKING:
    from atmossl.inference.predict import Predictor


@dataclass(frozen=True)
class _Tile:
    """One tile of one case. complete: rows that are final once it is in, for the last of a row."""

    case: int
    box: Box
    weight: np.ndarray
    view: View
    hidden: tuple[Points, ...]
    complete: int | None


def blended(predictor: "Predictor", sources: Sequence[Source]) -> Iterator[BlendedPart]:
    """Bands of latitude of one source after another, for the steps of one pass; of streams with
    data of their own before those of the others."""
    return _Tiles(predictor, sources).parts()


def first_view(predictor: "Predictor", source: Source) -> View:
    """What the model is shown of the first tile; no batch axis."""
    return next(_Tiles(predictor, [source]).tiles()).view


@dataclass(frozen=True)
class _Tiles:
    """The tiles of a predictor over windows of some sources."""

    predictor: "Predictor"
    sources: Sequence[Source]

    def parts(self) -> Iterator[BlendedPart]:
        """See `blended`."""
        used = self.predictor
        tiles, mosaics = self.tiles(), self._mosaics()
        while batch := list(islice(tiles, used.batch_size)):
            found = self._predicted(batch)
            for number, tile in enumerate(batch):
                for spec, values in found:
                    if values[number].shape[1] > 0:
                        placed = self._placed(spec.data, tile)
                        mosaics[spec.data].add(spec, values[number], *placed)
                if tile.complete is not None:
                    completes = tile.complete == used.grid.shape[0]
                    yield from self._taken(mosaics, tile, completes=completes)
                    mosaics = self._mosaics() if completes else mosaics

    def _predicted(
        self, batch: list[_Tile]
    ) -> list[tuple[StreamSpec, list[Float[np.ndarray, "variable step member level lat lon"]]]]:
        """What every tile writes of every predicted stream."""
        used = self.predictor
        views = collate_views([(tile.view,) for tile in batch], [tile.case for tile in batch])
        view = views.to(used.device).views[0]
        with torch.inference_mode():
            prediction = used.trained.model.to(used.device)(view)
        streams = [stream for stream in view.streams if stream.spec.role == "predict"]
        return [
            (stream.spec, self._windows(stream, predicted, batch))
            for stream, predicted in zip(streams, prediction.streams, strict=True)
        ]

    def _mosaics(self) -> dict[str, TileBlender]:
        """One for the grid of every source, that of the primary one last."""
        used = self.predictor
        return {
            data: TileBlender(used.grid_of(data).shape[1], used.trained.predicted_levels(data))
            for data in used.coverage
        }

    def _placed(self, data: str, tile: _Tile) -> tuple[Box, np.ndarray]:
        """A tile and its weights on the grid of the streams with that `data`."""
        coverage = self.predictor.coverage[data]
        return coverage.box(tile.box), coverage.weights(tile.weight)

    def _taken(
        self, mosaics: Mapping[str, TileBlender], tile: _Tile, *, completes: bool
    ) -> Iterator[BlendedPart]:
        """The rows of every grid that are final after a tile."""
        assert tile.complete is not None
        for data, mosaic in mosaics.items():
            end = self.predictor.coverage[data].row(tile.complete)
            rows, done = mosaic.take(end)
            if rows.stop > rows.start and done:
                source = self.sources[tile.case]
                leads = self._written(data, source)[1]
                members = self._members_of(source, done, rows, leads, data)
                yield BlendedPart(
                    tile.case, leads, rows, members, completes and data == PRIMARY, data=data
                )

    def _members_of(
        self, source: Source, fields: Fields, rows: slice, leads: np.ndarray, data: str
    ) -> Fields:
        """The blended ensemble with calibrated spread, or the one member of it that a source asks
        for: single members of tiles that overlap would average out."""
        used = self.predictor
        if data == PRIMARY:  # streams of other sources are not calibrated
            calibration, grid = Calibration(used.trained.record, used.task), used.grid
            lat, lon = grid.latitude[rows], grid.longitude
            fields = calibration.apply(fields, leads / HOUR, lat, lon)
        if source.member is None:
            return fields
        return {name: values[:, [source.member]] for name, values in fields.items()}

    def _written(self, data: str, source: Source) -> tuple[list[int], np.ndarray]:
        """Steps of a stream's window that one pass writes, and their times from its reference
        time."""
        used, plan, segment = self.predictor, self.predictor.plan, source.segment
        leads = np.array(plan.pass_offsets) * used.step
        if plan.refine > 1:  # steps between those of the only store
            return [plan.reference + offset for offset in plan.pass_offsets], leads
        read = segment.sources[data]
        first = segment.times[source.start] - plan.read[0] * segment.step
        reference = first + plan.reference * segment.step
        leads = read.leads(reference, leads)
        begin = read.steps(first, used.trained.window.time * segment.step).start
        since = reference + leads - read.segment.times[0]
        return (since // read.segment.step - begin).astype(int).tolist(), leads

    def _windows(
        self, stream: StreamTokens, predicted: StreamPrediction, batch: list[_Tile]
    ) -> list[Float[np.ndarray, "variable step member level lat lon"]]:
        """What every tile of a batch writes of a stream; a stream with data of its own may have
        other steps for every source."""
        written = [self._written(stream.spec.data, self.sources[tile.case])[0] for tile in batch]
        needed = list(dict.fromkeys(step for steps in written for step in steps))
        fields = self._fields(stream, predicted, batch, needed)
        return [
            own if steps == needed else own[:, [needed.index(step) for step in steps]]
            for own, steps in zip(fields, written, strict=True)
        ]

    def tiles(self) -> Iterator[_Tile]:
        """Tiles of all sources in the order of writing; each band of latitude is read once."""
        used, plan = self.predictor, self.predictor.tiles
        num_lat, num_lon = used.grid.shape
        reader = WindowReader(used.trained, used.plan, used.grid, used.coarse_factor, used.task)
        rows = plan.rows()
        for case, source in enumerate(self.sources):
            predicted = replace(source.segment, grid=used.grid)
            for row, numbers in enumerate(rows):
                south = plan.tiles[numbers[0]].lat_start
                around = Box(south, used.segment.alignment.lon_shift, plan.lat_size, num_lon)
                band = reader.read(source, around)
                following = plan.tiles[rows[row + 1][0]].lat_start if row + 1 < len(rows) else None
                complete = (
                    num_lat if following is None else following // used.row_chunk * used.row_chunk
                )
                for number in numbers:
                    box = plan.tiles[number]
                    view, hidden = masked_view(
                        columns(band, predicted, around, box),
                        used.task,
                        first_guess=used.trained.first_guess,
                    )
                    last = complete if number == numbers[-1] else None
                    yield _Tile(case, box, plan.weights[number], view, hidden, last)

    def _fields(
        self,
        stream: StreamTokens,
        predicted: StreamPrediction,
        batch: list[_Tile],
        steps: list[int],
    ) -> Float[np.ndarray, "batch variable step member level lat lon"]:
        """Some steps of windows in the variables' own units: predicted where hidden, as given
        elsewhere."""
        spec = stream.spec
        fields = coherent(detokenise(_in_place(predicted, stream), spec)[..., steps, :, :], spec)
        number = [tile.view.names().index(spec.name) for tile in batch]
        hidden = torch.stack([t.hidden[n] for t, n in zip(batch, number, strict=True)])
        hidden = hidden[..., steps, :, :].to(fields.device)
        if not bool(hidden.all()):
            given = detokenise(stream.target, spec)[..., steps, :, :]
            fields = torch.where(hidden[:, None], fields, given[:, None])
        if stream.valid is not None and not self.predictor.fill_missing:
            never = ~detokenise(stream.valid, spec).any(dim=-3, keepdim=True)  # at no time
            fields = fields.masked_fill(never[:, None], float("nan"))
        values = self.predictor.trained.normaliser.inverse(fields.cpu(), spec).numpy()
        return rearrange(
            values,
            "batch member variable level step lat lon -> batch variable step member level lat lon",
        )


def _in_place(
    predicted: StreamPrediction, stream: StreamTokens
) -> Float[Tensor, "batch member level nt nlat nlon patch"]:
    """Queries back at their tokens, zeros where nothing was asked."""
    members, queries = predicted.members, predicted.queries
    num_level, num_time, num_lat, num_lon = stream.grid.shape
    everywhere = members.new_zeros(
        (members.shape[0], stream.grid.num_tokens + 1, *members.shape[2:])
    )
    # padding goes to a spare token at the end, which is cut off
    spare = torch.full_like(queries.index, stream.grid.num_tokens)
    index = torch.where(queries.valid, queries.index, spare)[..., None, None]
    everywhere.scatter_(1, index.expand_as(members), members)
    return rearrange(
        everywhere[:, :-1],
        "batch (level nt nlat nlon) member patch -> batch member level nt nlat nlon patch",
        level=num_level,
        nt=num_time,
        nlat=num_lat,
        nlon=num_lon,
    )
