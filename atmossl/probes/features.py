"""The features of every case that a probe sees: frozen latents, or those of a baseline.

Latents are normalised over their features (LayerNorm without scale and shift), for the last step of
the window: pooled over the sphere by area for labels of a date, token by token for labels of a
place. The baselines see the raw fields of the date and of the day before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float

from atmossl.geometry import nearest_cells
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.embed import Embedder, StreamField
from atmossl.model.kinds import build_network
from atmossl.probes.cases import Cases, Run, TokenPlaces, hours_of_day_and_year


@dataclass(frozen=True)
class Features:
    """The features that a probe sees. layer: of the encoder; None for features without one.
    tokens: of the last layer, those of the whole sphere, or evenly spread ones of them."""

    source: str
    layer: int | None
    pooled: Float[np.ndarray, "case feature"]
    local: Float[np.ndarray, "case place feature"]
    tokens: Float[np.ndarray, "case token feature"] | None = None


def layer_normalised(latents: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """Mean 0 and variance 1 over the last axis (Ba et al. 2016, without scale and shift)."""
    centred = latents - latents.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)


def random_network(trained: TrainedModel, seed: int) -> TrainedModel:
    """The same architecture with weights as before the first step of training."""
    record = trained.record
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(
            record["network"], trained.plugins, streams=trained.specs, **record["model"]
        )
    return replace(trained, model=network.eval())


def encoded(
    embedders: Sequence[Embedder],
    runs: Sequence[Run],
    layers: Sequence[int],
    places: TokenPlaces,
    source: str,
    advance: Callable[[float], object] = float,  # of no consequence
) -> list[Features]:
    """The latents of every layer, from 0 on, at all cases. embedders: one for every run."""
    dates = [
        (embedder, time)
        for embedder, run in zip(embedders, runs, strict=True)
        for time in run.times
    ]
    pooled: list[list[np.ndarray]] = [[] for _ in layers]
    local: list[list[np.ndarray]] = [[] for _ in layers]
    tokens: list[np.ndarray] = []
    for case, (embedder, time) in enumerate(dates):
        for number, streams in enumerate(embedder.fields_of_layers(time, layers)):
            last = [_last_step(stream) for stream in streams.values()]
            grids = list(zip(last, streams.values(), strict=True))
            pooled[number].append(np.concatenate([_pooled(*pair) for pair in grids]))
            rows, columns = places.rows[case], places.columns[case]
            at = places.latitude[rows], places.longitude[columns]
            local[number].append(np.concatenate([_nearest(*pair, *at) for pair in grids], axis=1))
            if layers[number] == max(layers):
                at = places.spread_out()
                everywhere = np.concatenate([_nearest(*pair, *at) for pair in grids], axis=1)
                tokens.append(everywhere.astype(np.float16))
        advance(1.0)
    return [
        Features(
            source,
            layer,
            np.stack(pooled[number]),
            np.stack(local[number]),
            np.stack(tokens) if layer == max(layers) else None,
        )  # fmt: skip
        for number, layer in enumerate(layers)
    ]


def _last_step(stream: StreamField) -> Float[np.ndarray, "level lat lon feature"]:
    return layer_normalised(stream.latents[-1])


def _pooled(latents: np.ndarray, stream: StreamField) -> np.ndarray:
    """The mean of a stream's latents over the sphere and over levels, as one vector."""
    weight = np.cos(np.deg2rad(stream.latitude)).clip(0.0)
    rows = latents.mean(axis=(0, 2))
    return np.average(rows, axis=0, weights=weight)


def _nearest(
    latents: np.ndarray, stream: StreamField, latitude: np.ndarray, longitude: np.ndarray
) -> np.ndarray:
    """Latents of all levels of the token whose centre is nearest, [place (level feature)]."""
    rows, columns = nearest_cells(stream.latitude, stream.longitude, latitude, longitude)
    return rearrange(latents[:, rows, columns], "level place feature -> place (level feature)")


def raw_values(cases: Cases, places: TokenPlaces, levels: Mapping[str, Sequence[int]]) -> Features:
    """The fields of the date and of the day before, in units of their spread over training.
    Pooled features are means over tokens; local features are all cells of the place's token and
    the means of the eight tokens around."""
    pooled, local = [], []
    train = cases.of("train")
    for hours in (-24, 0):
        for name, variable_levels in levels.items():
            for level in variable_levels:
                field = cases.states[hours][name].sel(level=level)
                cells = field.transpose("case", "latitude", "longitude").to_numpy()
                spread = float(cells[train].std()) or 1.0
                cells = (cells - float(cells[train].mean())) / spread
                means = places.token_means(cells)
                pooled.append(means.reshape(len(means), -1))
                token_cells = rearrange(places.blocks(cells), "case r y c x -> case r c (y x)")
                around = np.concatenate([token_cells, _around(means)], axis=-1)
                local.append(places.at_places(around))
    return Features("raw", None, np.concatenate(pooled, 1), np.concatenate(local, 2))


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


def principal_components(raw: Features, cases: Cases, like: Features) -> Features:
    """Principal components of the raw values, fitted on the training cases: as many as the
    latents have features, or as many as there are."""
    train = cases.of("train")
    parts = []
    for values, latents in ((raw.pooled, like.pooled), (raw.local, like.local)):
        rows = values[train].reshape(-1, values.shape[-1]).astype(np.float64)
        mean = rows.mean(axis=0)
        if rows.shape[0] >= rows.shape[1]:
            axes = np.linalg.eigh((rows - mean).T @ (rows - mean))[1][:, ::-1].T
        else:
            axes = np.linalg.svd(rows - mean, full_matrices=False)[2][:-1]
        parts.append((values - mean) @ axes[: latents.shape[-1]].T)
    return Features("pca", None, *parts)


def position_and_calendar(cases: Cases, places: TokenPlaces) -> Features:
    """Features that tell time and place alone: harmonics of the time of day and year; for places
    also of latitude, longitude and local solar time."""
    day, year = (2 * np.pi * share for share in hours_of_day_and_year(cases.times))
    clock = [f(k * angle) for angle in (day, year) for k in (1, 2) for f in (np.sin, np.cos)]
    pooled = np.stack(clock, axis=-1)
    latitude = np.deg2rad(places.latitude[places.rows])
    longitude = np.deg2rad(places.longitude[places.columns])
    hour = day[:, None] + longitude
    zonal = [f(k * angle) for angle in (longitude, hour) for k in (1, 2) for f in (np.sin, np.cos)]
    meridional = [f(k * latitude) for k in (1, 2, 3) for f in (np.sin, np.cos)]
    mixed = [np.cos(latitude) * part for part in zonal[:2]]
    place_features = np.stack([*zonal, *meridional, *mixed], axis=-1)
    clocks = np.broadcast_to(pooled[:, None], (*place_features.shape[:2], pooled.shape[-1]))
    return Features("position", None, pooled, np.concatenate([place_features, clocks], axis=-1))
