"""AtmoRep's network behind the contract of every network: it takes views of streams.

A stream is one field of AtmoRep. AtmoRep wants tokens from north to south, each described by its
date, level and place as raw numbers (`token_info`), and knows them by their position in a window
of fixed size. It predicts values, not departures from a first guess, and shows a hidden token as
zeros. `atmossl.model.atmorep` is the network itself, `atmossl.model.atmorep_files` reads its files.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from atmossl.batch import (
    YEAR_HOURS,
    Corruption,
    Prediction,
    StreamPrediction,
    StreamSpec,
    StreamTokens,
    TokenGrid,
    TokenIndex,
    TokenSize,
    View,
)
from atmossl.model.atmorep import (
    AtmoRep,
    AtmoRepField,
    AtmoRepInput,
    AtmoRepSettings,
    DecoderAttention,
    FieldAttention,
    Perceptron,
    Tail,
)
from atmossl.model.network import Latent, Latents, Network, StreamLatents, TokenPlace
from atmossl.model_levels import L137_HPA
from atmossl.names import VARIABLE_OF_FIELD
from atmossl.value_faults import as_written, listed

HOURS_PER_DAY = 24.0
_SECONDS_PER_HOUR = 3600.0
_INFO_ENTRIES = (8, 6)  # numbers that describe a token, in models of 2024 and in older ones
_LAYER = re.compile(r"core\.encoders\.[^.]+\.(?:attentions|perceptrons)\.(\d+)\.")
_EMBEDDING = re.compile(r"core\.encoders\.[^.]+\.embed(_info)?\.")


class AtmoRepNetwork(Network):
    """AtmoRep on views whose streams are its fields, by the fields' names.

    fields, sizes: what `AtmoRepSettings` are built from, as plain values (`dataclasses.asdict`).

    Raises:
        ValueError: streams that are not the fields.
    """

    exported_dtype = torch.float32  # half precision would change what is known to be exact
    low_rank_layers = ("core.*.attentions.*", "core.*.perceptrons.*")

    def __init__(
        self,
        *,
        streams: tuple[StreamSpec, ...],
        fields: Sequence[Mapping[str, Any]],
        scales: Any = None,
        **sizes: Any,
    ) -> None:
        del scales  # AtmoRep predicts values, not departures from a first guess
        super().__init__()
        settings = settings_from(fields, sizes)
        if settings.info_entries not in _INFO_ENTRIES:
            raise ValueError(
                f"size_token_info={settings.info_entries}: AtmoRep's models are told "
                f"{' or '.join(map(str, _INFO_ENTRIES))} numbers of a token"
            )
        if set(streams) != set(streams_of(settings)):
            raise ValueError(
                f"streams {listed([spec.name for spec in streams])} are not the fields of "
                f"AtmoRep's settings, {listed([field.name for field in settings.fields])}, with "
                "their levels and token sizes"
            )
        self.widths = {field.name: field.width for field in settings.fields}
        self.core = AtmoRep(settings)
        self.num_members = settings.members
        self.ends = tuple(f"core.decoders.{name}.tail" for name in settings.predicted)

    @property
    def settings(self) -> AtmoRepSettings:
        return self.core.settings

    @property
    def num_encoder_layers(self) -> int:
        return self.settings.encoder_layers

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        kinds = (FieldAttention, DecoderAttention, Perceptron)
        return tuple(module for module in self.modules() if isinstance(module, kinds))

    @property
    def wide_parts(self) -> tuple[nn.Module, ...]:
        return tuple(module for module in self.modules() if isinstance(module, Perceptron))

    def depth(self, name: str) -> int | None:
        layer = _LAYER.match(name)
        if layer is not None:
            return self.num_encoder_layers - 1 - int(layer[1])
        return self.num_encoder_layers if _EMBEDDING.match(name) else None

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        for module in (*self.blocks, *(m for m in self.modules() if isinstance(m, Tail))):
            module.compile(backend=backend)

    def encode(self, view: View) -> Latents:
        """Latents of all tokens of every field, hidden ones included: AtmoRep drops none."""
        for stream in view.streams:
            _check_window(stream, self.settings.field(stream.spec.name))
        inputs = {stream.spec.name: self._input(stream) for stream in view.streams}
        states = self.core.encode(inputs)
        return {
            stream.spec.name: _latents(states[stream.spec.name], stream) for stream in view.streams
        }

    def _input(self, stream: StreamTokens) -> AtmoRepInput:
        """The tokens of one stream from north to south, with zeros for hidden ones."""
        field = self.settings.field(stream.spec.name)
        corruption = stream.corruption[..., None]
        is_hidden = (corruption == Corruption.MASK) | (corruption == Corruption.DROP)
        time, lat, lon = field.token_size
        values = rearrange(
            stream.source.masked_fill(is_hidden, 0.0),
            "batch level nt nlat nlon (time lat lon) -> batch level nt nlat nlon time lat lon",
            time=time, lat=lat, lon=lon,
        )  # fmt: skip
        info = token_info(stream.grid, field, self.settings.info_entries)
        return AtmoRepInput(values.flip(3, 6), info)

    def reconstruct(
        self, latents: Latents, view: View, members: Sequence[int | Tensor] | None = None
    ) -> Prediction:
        """The members of the hidden tokens. The view's first guess is not used."""
        del members  # they are fixed functions of the input
        predictions = []
        for stream in view.streams:
            name, queries = stream.spec.name, stream.queries
            if name not in self.settings.predicted:
                continue
            assert queries is not None, "collate the view first: token indices are missing"
            chosen = _from_north(queries.index, stream.grid)
            of_tokens = self.core.members(name, _states(latents[name]), chosen)
            patches = _from_south_to_north(of_tokens, self.settings.field(name))
            predictions.append(StreamPrediction(patches, queries))
        return Prediction(tuple(predictions))

    def predict(self, latents: Latents, view: View) -> Latents:
        """The latents of the hidden tokens after the decoder, before the tail."""
        predicted = {}
        for stream in view.streams:
            name, queries = stream.spec.name, stream.queries
            if name not in self.settings.predicted:
                continue
            assert queries is not None, "collate the view first: token indices are missing"
            chosen = _from_north(queries.index, stream.grid)
            decoded = self.core.decoded(name, _states(latents[name]), chosen)
            place = TokenPlace({}, queries, stream.grid.shape, stream.grid.periodic)
            latent = Latent(decoded, place)
            predicted[name] = StreamLatents((latent,), queries, stream.grid)
        return predicted


def settings_from(fields: Sequence[Mapping[str, Any]], sizes: Mapping[str, Any]) -> AtmoRepSettings:
    """The settings, from plain values whose tuples may have become lists."""

    def exact(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    return AtmoRepSettings(tuple(AtmoRepField(**exact(field)) for field in fields), **exact(sizes))


def streams_of(settings: AtmoRepSettings) -> tuple[StreamSpec, ...]:
    """One stream for every field, under the field's name. A field that is not predicted has the
    role `input`.

    Raises:
        ValueError: a field whose variable is not known here, or one at the surface and above it.
    """
    specs = []
    for field in settings.fields:
        if field.name not in VARIABLE_OF_FIELD:
            raise ValueError(
                f"fields: {field.name!r} is no field that is known here; known: "
                f"{listed(sorted(VARIABLE_OF_FIELD))}"
            )
        if 0 in field.levels and len(field.levels) > 1:
            raise ValueError(
                f"fields: {field.name} has levels {listed(field.levels)}, of which 0 is the "
                "surface; a stream has levels or none"
            )
        specs.append(
            StreamSpec(
                name=field.name,
                variables=(VARIABLE_OF_FIELD[field.name],),
                levels=() if field.levels == (0,) else field.levels,
                token_size=TokenSize(*field.token_size),
                role="predict" if field.name in settings.predicted else "input",
            )
        )
    return tuple(specs)


def window_of(settings: AtmoRepSettings) -> tuple[int, int, int]:
    """Steps, rows and columns of the window that all fields share.

    Raises:
        ValueError: fields with windows of different sizes.
    """
    windows = {
        field.name: tuple(
            count * size for count, size in zip(field.num_tokens, field.token_size, strict=True)
        )
        for field in settings.fields
    }
    steps, rows, columns = next(iter(windows.values()))
    if len(set(windows.values())) > 1:
        raise ValueError(
            f"fields: their windows (time, lat, lon) differ: {as_written(windows)}; streams share "
            "one here"
        )
    return steps, rows, columns


def token_info(
    grid: TokenGrid, field: AtmoRepField, num_entries: int
) -> Float[Tensor, "batch level token entry"]:
    """The numbers with which AtmoRep describes every token, not normalised. Tokens are in order of
    time, latitude from north to south, and longitude.

    Eight entries: year, day of year from 0, hour, level, latitude from 0 at the north pole to 180,
    longitude, level again, grid spacing in degrees. Six, in older models: year, day of year with
    the hour as its fraction, level, latitude, longitude, grid spacing. The time is that of the last
    step of a token, the place that of its point number size // 2.
    """
    steps, rows, columns = field.token_size
    last = grid.time_hours.double() + grid.time_extent.double()[:, None] * (steps - 1) / steps / 2
    year, day, hour = dates_of(last)
    height = grid.lat_extent.double()[:, None] / rows
    width = grid.lon_extent.double()[:, None] / columns
    lat = grid.lat.double().flip(1) + height * ((rows - 1) / 2 - rows // 2)
    lon = (grid.lon.double() + width * (columns // 2 - (columns - 1) / 2)) % 360.0
    level = _level_numbers(grid.level_hpa.double())  # a counterfactual may tell others
    sizes = {"level": level.shape[1], "nt": last.shape[1], "nlat": lat.shape[1]}
    sizes |= {"nlon": lon.shape[1], "batch": lat.shape[0]}

    def spread(values: Tensor, axes: str) -> Tensor:
        other_sizes = {name: size for name, size in sizes.items() if name not in axes.split()}
        return repeat(values, f"{axes} -> batch level (nt nlat nlon)", **other_sizes)

    levels, spacing = spread(level, "batch level"), spread(height[:, 0], "batch")
    place = (spread(90.0 - lat, "batch nlat"), spread(lon, "batch nlon"))
    if num_entries == 8:
        when = (spread(time, "batch nt") for time in (year, day, hour))
        entries = (*when, levels, *place, levels, spacing)
    else:
        when = (spread(time, "batch nt") for time in (year, day + hour / HOURS_PER_DAY))
        entries = (*when, levels, *place, spacing)
    return torch.stack(entries, dim=-1).float()


def _level_numbers(levels: Float[Tensor, "batch level"]) -> Float[Tensor, "batch level"]:
    """Numbers of model levels from their pressures in the standard atmosphere; whole numbers, which
    none of these is, are numbers already."""
    pressures = torch.tensor(L137_HPA, dtype=levels.dtype).to(levels.device, non_blocking=True)
    nearest = (levels[..., None] - pressures).abs().argmin(dim=-1) + 1
    return torch.where(levels == levels.round(), levels, nearest.to(levels.dtype))


def dates_of(hours: Float[Tensor, "batch nt"]) -> tuple[Tensor, Tensor, Tensor]:
    """Year, day of the year from 0, and hour, from hours since 1970-01-01T00 in the standard
    calendar."""
    hours = (hours * _SECONDS_PER_HOUR).round() / _SECONDS_PER_HOUR
    days = (hours / HOURS_PER_DAY).floor()
    year = ((days + 0.5) * HOURS_PER_DAY / YEAR_HOURS).floor() + 1970
    year = year - (days < _new_year(year)).double()  # leap days come irregularly
    year = year + (days >= _new_year(year + 1)).double()
    return year, days - _new_year(year), hours - days * HOURS_PER_DAY


def _new_year(year: Tensor) -> Tensor:
    """Days from 1970-01-01 to the first of January of a year."""
    before = year - 1
    leaps = (before / 4).floor() - (before / 100).floor() + (before / 400).floor()
    return 365 * (year - 1970) + leaps - 477  # leap days before 1970


def _check_window(stream: StreamTokens, field: AtmoRepField) -> None:
    shape = (len(field.levels), *field.num_tokens)
    if stream.grid.shape != shape:
        raise ValueError(
            f"stream {field.name} has {stream.grid.shape} tokens (level, time, latitude, "
            f"longitude); the positions of this network are fixed to {shape}: the grid must have "
            "at least a window's rows and columns"
        )
    if abs(stream.grid.year_hours - YEAR_HOURS) > 1e-6:
        raise ValueError(
            "AtmoRep is told dates of the standard calendar; this record has another one"
        )


def _latents(states: list[Tensor], stream: StreamTokens) -> StreamLatents:
    """AtmoRep's latents of one field, from south to north."""
    grid, device = stream.grid, stream.source.device
    all_tokens = torch.ones((len(stream.source), *grid.shape), dtype=torch.bool)
    chosen = TokenIndex.of(all_tokens).to(device)
    place = TokenPlace({}, chosen, grid.shape, grid.periodic)
    layers = tuple(Latent(_turned(state, grid), place) for state in states)
    return StreamLatents(layers, chosen, grid)


def _states(latents: StreamLatents) -> list[Tensor]:
    """The latents of all layers from north to south, as AtmoRep has them."""
    return [_turned(layer.features, latents.grid) for layer in latents.layers]


def _turned(
    x: Float[Tensor, "batch token width"], grid: TokenGrid
) -> Float[Tensor, "batch token width"]:
    """Tokens with their rows in the opposite order."""
    return x.unflatten(1, grid.shape).flip(3).flatten(1, 4)


def _from_north(index: Int[Tensor, "batch query"], grid: TokenGrid) -> Int[Tensor, "batch query"]:
    """The places of tokens among those with rows from north to south; `index` counts them with rows
    from south to north."""
    *_, num_lat, num_lon = grid.shape
    row = index % (num_lat * num_lon) // num_lon
    return index + (num_lat - 1 - 2 * row) * num_lon


def _from_south_to_north(
    members: Float[Tensor, "batch query member value"], field: AtmoRepField
) -> Float[Tensor, "batch query member patch"]:
    """Values of tokens with their rows of grid points from south to north, as patches have them."""
    return members.unflatten(-1, field.token_size).flip(4).flatten(3)
