"""The features of every case that a probe sees: frozen latents, or those of a baseline.

Latents are normalised over their features (LayerNorm without scale and shift), for the last step of
the window. A label of a place is asked of the token there. A label of a sector of longitude is
asked of its means over bands of latitude, side by side: a mean over the whole sector could not tell
the latitude of a jet, and all its tokens are too many features for some hundred dates. The
baselines see the raw fields of the date and of the day before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float

from atmossl.geometry import nearest_cells
from atmossl.inference.checkpoint import TrainedModel, build_network
from atmossl.inference.embed import Embedder, Layer, StreamField
from atmossl.probes.cases import Cases, Run, TokenPlaces, hours_of_day_and_year

MOST_BANDS = 16  # of latitude, over which tokens are averaged for labels of a sector


@dataclass(frozen=True)
class Features:
    """The features that a probe sees. layer: of the encoder, `embedding` for what its first layer
    gets, `all` for all these side by side; None for features without one.

    sectors: for labels of a sector or of two dates. local: for labels of a place. departures: the
    same from every token's mean over the training cases, for labels that are such departures
    themselves.
    tokens: of the last layer, those of the whole sphere, or evenly spread ones of them. pooled:
    means over the sphere, by which latents are compared with each other.
    """

    source: str
    layer: Layer | Literal["all"] | None
    sectors: Float[np.ndarray, "case sector feature"]
    local: Float[np.ndarray, "case place feature"] | None = None
    departures: Float[np.ndarray, "case place feature"] | None = None
    tokens: Float[np.ndarray, "case token feature"] | None = None
    pooled: Float[np.ndarray, "case feature"] | None = None


def layer_normalised(latents: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """Mean 0 and variance 1 over the last axis (Ba et al. 2016, without scale and shift)."""
    centred = latents - latents.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)


def band_weights(latitude: np.ndarray) -> Float[np.ndarray, "band row"]:
    """What every row of tokens counts in the mean over each band of latitude: its area. A band is
    one row, or several where there are more than `MOST_BANDS`."""
    area = np.cos(np.deg2rad(latitude)).clip(1e-6)
    bands, rows = min(MOST_BANDS, len(latitude)), np.arange(len(latitude))
    weights = np.zeros((bands, len(latitude)))
    weights[rows * bands // len(latitude), rows] = area
    return weights / weights.sum(axis=1, keepdims=True)


def sector_weights(columns: int, sectors: int) -> Float[np.ndarray, "sector column"]:
    """What every column of tokens counts in the mean over each sector: their overlap."""
    west, east = (np.arange(sectors)[:, None] + shift for shift in (0, 1))
    start, end = (np.arange(columns) * sectors / columns + shift * sectors / columns
                  for shift in (0, 1))  # fmt: skip
    overlap = (np.minimum(east, end) - np.maximum(west, start)).clip(0.0)
    return overlap / overlap.sum(axis=1, keepdims=True)


def random_network(trained: TrainedModel, seed: int) -> TrainedModel:
    """The same architecture with weights as before the first step of training. Buffers, such as the
    typical size of tendencies, are those of the trained network, since they come from the data."""
    checkpoint_record = trained.checkpoint_record
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(
            checkpoint_record["network"],
            trained.plugins,
            streams=trained.specs,
            **checkpoint_record["model"],
        )
    buffers = dict(trained.model.named_buffers())
    for name, values in network.named_buffers():
        values.copy_(buffers[name])
    return replace(trained, model=network.eval())


def encoded(
    embedders: Sequence[Embedder],
    runs: Sequence[Run],
    layers: Sequence[Layer],
    places: TokenPlaces,
    source: str,
    advance: Callable[[float], object] = float,  # of no consequence
) -> list[Features]:
    """The latents of every layer at all cases; numbers of layers are from 0 on. embedders: one for
    every run."""
    deepest = max(layer for layer in layers if isinstance(layer, int))
    collected = [_Collected(places, layer == deepest) for layer in layers]
    for embedder, run in zip(embedders, runs, strict=True):
        for time in run.times:
            of_layers = embedder.fields_of_layers(time, layers)
            for layer, streams in zip(collected, of_layers, strict=True):
                layer.add(list(streams.values()), is_training=run.split == "train")
            advance(1.0)
    return [found.features(source, layer) for found, layer in zip(collected, layers, strict=True)]


@dataclass
class _Collected:
    """The latents of one layer, case after case. total: of every token's latents over the training
    cases, of which there are `count`."""

    places: TokenPlaces
    keeps_tokens: bool
    pooled: list[np.ndarray] = field(default_factory=list)
    sectors: list[np.ndarray] = field(default_factory=list)
    local: list[np.ndarray] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    total: np.ndarray | float = 0.0
    count: int = 0

    def add(self, streams: Sequence[StreamField], *, is_training: bool) -> None:
        places, case = self.places, len(self.local)
        grids = [(layer_normalised(stream.latents[-1]), stream) for stream in streams]
        self.pooled.append(np.concatenate([_pooled(*pair) for pair in grids]))
        by_sector = [_by_sector(*pair, places.sectors) for pair in grids]
        self.sectors.append(np.concatenate(by_sector, axis=1))
        at = places.latitude[places.rows[case]], places.longitude[places.columns[case]]
        self.local.append(np.concatenate([_nearest(*pair, *at) for pair in grids], axis=1))
        if self.keeps_tokens:
            at = places.spread_out()
            everywhere = np.concatenate([_nearest(*pair, *at) for pair in grids], axis=1)
            self.tokens.append(everywhere.astype(np.float16))
        if is_training:
            rows, columns = np.meshgrid(places.latitude, places.longitude, indexing="ij")
            parts = [_nearest(*pair, rows.ravel(), columns.ravel()) for pair in grids]
            self.total = self.total + np.concatenate(parts, axis=1).astype(np.float64)
            self.count += 1

    def features(self, source: str, layer: Layer) -> Features:
        places, local = self.places, np.stack(self.local)
        departures = None
        if self.count:
            mean = (np.asarray(self.total) / self.count).astype(local.dtype)
            token = (places.rows * len(places.longitude) + places.columns)[: len(local)]
            departures = local - mean[token]
        return Features(
            source, layer, np.stack(self.sectors), local, departures,
            np.stack(self.tokens) if self.tokens else None, np.stack(self.pooled),
        )  # fmt: skip


def side_by_side(layers: Sequence[Features]) -> Features:
    """The features of several layers as those of one: a linear probe takes from each what it knows
    (Evci et al. 2022, Head2Toe)."""

    def joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
        known = [part for part in parts if part is not None]
        return np.concatenate(known, axis=-1) if len(known) == len(layers) else None

    sectors = np.concatenate([layer.sectors for layer in layers], axis=-1)
    local, departures = (
        joined([getattr(layer, name) for layer in layers]) for name in ("local", "departures")
    )
    return Features(layers[0].source, "all", sectors, local, departures)


def _pooled(latents: np.ndarray, stream: StreamField) -> np.ndarray:
    """The mean of a stream's latents over the sphere and over levels, as one vector."""
    weight = np.cos(np.deg2rad(stream.latitude)).clip(0.0)
    rows = latents.mean(axis=(0, 2))
    return np.average(rows, axis=0, weights=weight)


def _by_sector(
    latents: np.ndarray, stream: StreamField, sectors: int
) -> Float[np.ndarray, "sector feature"]:
    """Means of a stream's latents over levels, columns of a sector and bands of latitude."""
    weights = sector_weights(len(stream.longitude), sectors), band_weights(stream.latitude)
    means = np.einsum("sc,br,rcf->sbf", *weights, latents.mean(axis=0), optimize=True)
    return rearrange(means, "sector band f -> sector (band f)").astype(latents.dtype)


def _nearest(
    latents: np.ndarray, stream: StreamField, latitude: np.ndarray, longitude: np.ndarray
) -> np.ndarray:
    """Latents of all levels of the token whose centre is nearest, [place (level feature)]."""
    rows, columns = nearest_cells(stream.latitude, stream.longitude, latitude, longitude)
    return rearrange(latents[:, rows, columns], "level place feature -> place (level feature)")


@dataclass(frozen=True)
class RawValues:
    """The fields of the date and of the day before, in units of their spread over training. What a
    token has are all its cells and the means of the eight tokens around.

    features: of a sector the means of all its tokens, which are a map of every field. bands: means
    over bands of latitude of what tokens of a sector have. levels: of every variable.
    """

    features: Features
    bands: Float[np.ndarray, "case sector band feature"]
    levels: Mapping[str, Sequence[int]]


def raw_values(cases: Cases, places: TokenPlaces, levels: Mapping[str, Sequence[int]]) -> RawValues:
    """The raw values of all cases. levels: of the variables that are shown."""
    train, weights = cases.of("train"), band_weights(places.latitude)
    maps, bands, local, departures = [], [], [], []
    for of_tokens, num_cells in _values_of_tokens(cases, places, levels):
        cells_mean = of_tokens[..., :num_cells].mean(axis=-1)
        of_sectors = "case row (sector column) -> case sector (row column)"
        maps.append(rearrange(cells_mean, of_sectors, sector=places.sectors))
        rows = reduce(of_tokens, "case row (sector column) f -> case sector row f", "mean",
                      sector=places.sectors)  # fmt: skip
        bands.append(np.einsum("br,csrf->csbf", weights, rows))
        local.append(places.at_places(of_tokens))
        means = of_tokens[train].mean(axis=0)
        departures.append(local[-1] - means[places.rows, places.columns])
    joined = (np.concatenate(parts, axis=2) for parts in (local, departures))
    return RawValues(
        Features("raw", None, np.concatenate(maps, 2), *joined), np.concatenate(bands, 3), levels
    )


def _values_of_tokens(
    cases: Cases, places: TokenPlaces, levels: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Float[np.ndarray, "case row column value"], int]]:
    """What tokens have of one field after another, and how many of the values are its cells."""
    train = cases.of("train")
    for hours in (-24, 0):
        for name, variable_levels in levels.items():
            for level in variable_levels:
                of_level = cases.states[hours][name].sel(level=level)
                cells = of_level.transpose("case", "latitude", "longitude").to_numpy()
                known = cells[train]
                if np.isnan(cells).any():  # a gap is at the mean
                    known = known[~np.isnan(known)]
                    cells = np.where(np.isnan(cells), known.mean() if known.size else 0.0, cells)
                spread = float(known.std()) if known.size else 1.0
                cells = (cells - (float(known.mean()) if known.size else 0.0)) / (spread or 1.0)
                token_cells = rearrange(places.blocks(cells), "case r y c x -> case r c (y x)")
                around = _around(places.token_means(cells))
                yield np.concatenate([token_cells, around], axis=-1), token_cells.shape[-1]


def _around(means: Float[np.ndarray, "case row column"]) -> np.ndarray:
    """The eight neighbours of every token, along the last axis. The outermost rows are their own
    neighbours towards the pole."""
    padded = np.pad(means, ((0, 0), (1, 1), (0, 0)), mode="edge")
    rows = means.shape[1]
    shifted = [
        np.roll(padded[:, 1 + north : 1 + north + rows], -east, axis=2)
        for north in (-1, 0, 1)
        for east in (-1, 0, 1)
        if (north, east) != (0, 0)
    ]
    return np.stack(shifted, axis=-1)


def principal_components(
    raw: RawValues, cases: Cases, places: TokenPlaces, like: Features
) -> Features:
    """Principal components of what tokens have of the raw values, fitted on the training cases: the
    best linear encoder of a token with as many features as the latents have, which is averaged
    over bands and attended to as they are. like: latents of one layer, or of all side by side."""
    train, given = cases.of("train"), raw.features
    assert given.local is not None and given.departures is not None
    assert like.local is not None
    mean, axes = leading_axes(given.local[train].reshape(-1, given.local.shape[-1]))
    anomalies = given.departures[train].reshape(-1, given.departures.shape[-1])
    anomaly_mean, anomaly_axes = leading_axes(anomalies)
    width = like.local.shape[-1]
    bands = (raw.bands - mean) @ axes[: like.sectors.shape[-1] // raw.bands.shape[2]].T
    of_tokens = None
    if like.tokens is not None:
        chosen = axes[: like.tokens.shape[-1]].astype(np.float32)
        of_tokens = _projected_tokens(raw, cases, places, mean.astype(np.float32), chosen)
    return Features(
        "pca", "all" if like.layer == "all" else None,
        rearrange(bands, "case sector band f -> case sector (band f)"),
        (given.local - mean) @ axes[:width].T,
        (given.departures - anomaly_mean) @ anomaly_axes[:width].T, of_tokens,
    )  # fmt: skip


def _projected_tokens(
    raw: RawValues, cases: Cases, places: TokenPlaces, mean: np.ndarray, axes: np.ndarray
) -> Float[np.ndarray, "case token component"]:
    """What tokens that an attentive probe sees have of the raw values, along principal axes."""
    projected, first, every = np.zeros((), np.float32), 0, places.every
    for values, _ in _values_of_tokens(cases, places, raw.levels):
        part = slice(first, first + values.shape[-1])
        centred = values[:, ::every, ::every].astype(np.float32) - mean[part]
        projected, first = projected + centred @ axes[:, part].T, part.stop
    return rearrange(projected, "case row column feature -> case (row column) feature")


def map_components(raw: RawValues, cases: Cases, like: Features) -> Features:
    """Principal components of a sector's maps of all raw values (empirical orthogonal functions),
    fitted on the training cases: as many as a token has features of latents, or as many as there
    are. Maps are departures from every sector's mean, which nobody is asked for."""
    assert like.local is not None
    train, maps = cases.of("train"), raw.features.sectors
    departures = maps - maps[train].mean(axis=0)
    known = rearrange(departures[train], "case sector feature -> (case sector) feature")
    mean, axes = leading_axes(known)
    layer = "all" if like.layer == "all" else None
    return Features("eofs", layer, (departures - mean) @ axes[: like.local.shape[-1]].T)


def leading_axes(
    rows: Float[np.ndarray, "row feature"],
) -> tuple[Float[np.ndarray, "feature"], Float[np.ndarray, "component feature"]]:
    """The mean of rows, and the principal axes of their departures from it, the first one first."""
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    if rows.shape[0] >= rows.shape[1]:
        return mean, np.linalg.eigh((rows - mean).T @ (rows - mean))[1][:, ::-1].T
    return mean, np.linalg.svd(rows - mean, full_matrices=False)[2][:-1]


def position_and_calendar(cases: Cases, places: TokenPlaces) -> Features:
    """Features that tell time and place alone: harmonics of the time of day and year; for places
    also of latitude, longitude and local solar time."""
    day, year = (2 * np.pi * share for share in hours_of_day_and_year(cases.times))
    clock = [f(k * angle) for angle in (day, year) for k in (1, 2) for f in (np.sin, np.cos)]
    of_date = np.stack(clock, axis=-1)[:, None]
    latitude = np.deg2rad(places.latitude[places.rows])
    longitude = np.deg2rad(places.longitude[places.columns])
    hour = day[:, None] + longitude
    zonal = [f(k * angle) for angle in (longitude, hour) for k in (1, 2) for f in (np.sin, np.cos)]
    meridional = [f(k * latitude) for k in (1, 2, 3) for f in (np.sin, np.cos)]
    mixed = [np.cos(latitude) * part for part in zonal[:2]]
    place_features = np.stack([*zonal, *meridional, *mixed], axis=-1)
    clocks = np.broadcast_to(of_date, (*place_features.shape[:2], of_date.shape[-1]))
    local = np.concatenate([place_features, clocks], axis=-1)
    of_sectors = np.repeat(of_date, places.sectors, axis=1)
    return Features("position", None, of_sectors, local, local)
