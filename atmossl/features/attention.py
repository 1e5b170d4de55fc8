"""Attention of an encoder's heads, recomputed from queries and keys.

Fused attention gives no weights, so while a view is encoded, every attention of the encoder hands
over its queries and keys, rotary positions included. The weights of some query tokens are the
softmax of their scaled products with all keys that the head may see. A query stands for a place: it
is the token there at the last time step of the window, and the mean is taken over its levels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atmossl.batch import TokenGrid, collate_views
from atmossl.geometry import nearest_cells
from atmossl.inference.embed import Embedder, StreamField, TileView
from atmossl.model.atmorep import FieldAttention
from atmossl.model.atmorep_network import AtmoRepNetwork
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Network
from atmossl.probes.labels import EARTH_RADIUS_M

AXES = ("km", "h", "hPa")  # of a distance: along the great circle, in time, in pressure
_PRODUCTS_AT_ONCE = 2**25
Shape = tuple[int, int, int, int]  # of a token grid: level, nt, nlat, nlon


@dataclass(frozen=True)
class Pair:
    """The heads of one encoder layer by which the tokens of `stream` see those of `other`; of the
    stream itself in self-attention. reaches: which tokens each head may see, in words."""

    layer: int
    stream: str
    other: str
    reaches: tuple[str, ...]


@dataclass(frozen=True)
class Reach:
    """Which keys the heads of a network may see.

    attention, window: as of `Multiformer`. causal: no later time step. periodic: longitudes close
    the circle.
    """

    attention: str
    window: tuple[int, int, int]
    causal: bool
    periodic: bool

    def words(self, num_heads: int, same_grid: bool) -> tuple[str, ...]:
        """`everything`, `column` (levels and times of the place), `plane` (places of the level and
        time), `window` or `shifted window`, for every head."""
        kinds = {
            "factorised": ("column", "plane"),
            "temporal": ("column", "column"),
            "windowed": ("window", "shifted window"),
        }.get(self.attention if same_grid else "full", ("everything", "everything"))
        half = num_heads // 2
        return (kinds[0],) * half + (kinds[1],) * (num_heads - half)

    def seen(
        self, rows: Int[np.ndarray, "query"], shape: Shape, other: Shape, num_heads: int
    ) -> Bool[np.ndarray, "head query key"]:
        """Which keys of a grid each query, a flat number of a token, may see by each head."""
        query = np.stack(np.unravel_index(rows, shape))[:, :, None]
        key = np.stack(np.unravel_index(np.arange(np.prod(other)), other))[:, None]
        allowed = query[1] >= key[1] if self.causal else np.ones(1, bool)
        by_word: dict[str, Any] = {
            "everything": np.ones((len(rows), key.shape[-1]), bool),
            "column": (query[2:] == key[2:]).all(axis=0),
            "plane": (query[:2] == key[:2]).all(axis=0),
        }
        words = self.words(num_heads, shape == other)
        for word in {"window", "shifted window"} & set(words):
            shifted = word != "window"
            cuts = (self._windows(axes, shape, shifted=shifted) for axes in (query, key))
            one, two = cuts
            by_word[word] = (one == two).all(axis=0)
        return np.stack([by_word[word] & allowed for word in words])

    def _windows(self, token: np.ndarray, shape: Shape, *, shifted: bool) -> np.ndarray:
        """Number of the window along time, lat and lon that tokens [axis ...] fall into; see
        `atmossl.model.blocks.Cut`."""
        numbers = []
        for axis, (size, tokens) in enumerate(zip(self.window, shape[1:], strict=True)):
            size = min(size, tokens)
            place = token[axis + 1] + (size // 2 if shifted and tokens > size else 0)
            if axis == 2 and self.periodic:
                place = place % tokens
            numbers.append(place // size)
        return np.stack(numbers)


def attention_weights(
    query: Float[Tensor, "head token feature"],
    key: Float[Tensor, "head other feature"],
    rows: Int[np.ndarray, "query"],
    seen: Bool[np.ndarray, "head query other"],
) -> Float[Tensor, "head query other"]:
    """Softmax of the scaled products of some queries with the keys that they see, float32."""
    score = query[:, torch.from_numpy(rows)].float() @ key.float().mT * query.shape[-1] ** -0.5
    return score.masked_fill(~torch.from_numpy(seen), -torch.inf).softmax(dim=-1)


Take = Callable[[Pair, Tensor, Tensor, Reach], object]


@contextmanager
def handed_over(network: Network, take: Take) -> Iterator[None]:
    """While the network encodes, `take` gets the queries and keys [batch head token feature] of
    every attention of its encoder. Tokens are those of the whole grid, rows from south to north.

    Raises:
        ValueError: a network whose attention is not known here.
    """
    check_attention(network)
    if isinstance(network, AtmoRepNetwork):
        with _of_atmorep(network, take):
            yield
        return
    assert isinstance(network, Multiformer)
    modules = {}
    for layer, blocks in enumerate(network.encoder):
        for stream, block in blocks.items():  # type: ignore[operator]
            modules[layer, stream, stream] = block.attention
            modules |= {(layer, stream, name): m for name, m in block.coupling.items()}
    before = {of: module.attend for of, module in modules.items()}

    def attend(of: tuple[int, str, str], query: Tensor, key: Tensor, value: Tensor, x, context):
        assert x.place.chosen.complete and context.place.chosen.complete, "tokens are hidden"
        reach = Reach(*network.attention, network.causal, x.place.periodic)
        words = reach.words(query.shape[1], x.place.shape == context.place.shape)
        take(Pair(*of, words), query, key, reach)
        return before[of](query, key, value, x, context)

    try:
        for of, module in modules.items():
            module.attend = partial(attend, of)
        yield
    finally:
        for of, module in modules.items():
            module.attend = before[of]


def check_attention(network: Network) -> None:
    """Raise ValueError for a network whose attention is not known here."""
    if not isinstance(network, Multiformer | AtmoRepNetwork):
        raise ValueError(f"attention of {type(network).__name__} is not known")


@contextmanager
def _of_atmorep(network: AtmoRepNetwork, take: Take) -> Iterator[None]:
    """AtmoRep has its rows from north to south, and one head for every coupled field."""
    reach = Reach("full", (1, 1, 1), causal=False, periodic=False)
    settings = network.settings

    def hook(name: str, layer: int, module: FieldAttention, given: tuple[Any, ...]) -> None:
        field = settings.field(name)
        fields = (field, *(settings.field(other) for other in field.coupled))
        x, other_fields = given
        for other, (query, key, _) in zip(fields, module.projected(x, other_fields), strict=True):
            words = ("everything",) * query.shape[1]
            shapes = [(len(f.levels), *f.num_tokens) for f in (field, other)]
            turned = (
                x.unflatten(2, shape).flip(4).flatten(2, 5)
                for x, shape in zip((query, key), shapes, strict=True)
            )
            query, key = turned
            take(Pair(layer, name, other.name, words), query, key, reach)

    hooks = [
        module.register_forward_pre_hook(partial(hook, name, layer))
        for name, encoder in network.core.encoders.items()
        for layer, module in enumerate(encoder.attentions)  # type: ignore[arg-type]
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def distances(
    rows: Int[np.ndarray, "query"], grid: TokenGrid, other: TokenGrid
) -> Float[np.ndarray, "unit query key"]:
    """How far tokens of a window are from all tokens of another grid, in the units of `AXES`.

    grid, other: of one sample, without an axis for the batch.
    """
    degrees = [np.deg2rad(x.double().numpy()) for x in (grid.lat, grid.lon, other.lat, other.lon)]
    level, step, lat, lon = np.unravel_index(rows, grid.shape)
    key = np.unravel_index(np.arange(other.num_tokens), other.shape)
    lat1, lon1 = degrees[0][lat][:, None], degrees[1][lon][:, None]
    lat2, lon2 = degrees[2][key[2]], degrees[3][key[3]]
    # haversine, which is exact for small distances
    half = np.sin((lat2 - lat1) / 2) ** 2
    half = half + np.cos(lat1) * np.cos(lat2) * np.sin((lon2 - lon1) / 2) ** 2
    circle = 2e-3 * EARTH_RADIUS_M * np.arcsin(np.sqrt(half.clip(0.0, 1.0)))
    hours = [x.time_hours.double().numpy() for x in (grid, other)]
    levels = [x.level_hpa.double().numpy() for x in (grid, other)]
    time = np.abs(hours[1][key[1]] - hours[0][step][:, None])
    return np.stack([circle, time, np.abs(levels[1][key[0]] - levels[0][level][:, None])])


def mean_distance(
    weights: Float[np.ndarray, "head query key"], apart: Float[np.ndarray, "unit query key"]
) -> Float[np.ndarray, "head unit query"]:
    """The mean distance to the keys, weighted by the attention (as of Dosovitskiy et al. 2021,
    figure 7, there within an image)."""
    return np.einsum("hqk,aqk->haq", weights, apart)


@dataclass(frozen=True)
class Places:
    """Places on the token grid of the first stream: degrees, and the number of their row and column
    there. names: of those that have one, by number."""

    latitude: Float[np.ndarray, "place"]
    longitude: Float[np.ndarray, "place"]
    row: Int[np.ndarray, "place"]
    column: Int[np.ndarray, "place"]

    @classmethod
    def of(
        cls, stream: StreamField, row: Int[np.ndarray, "place"], column: Int[np.ndarray, "place"]
    ) -> "Places":
        return cls(stream.latitude[row], stream.longitude[column], row, column)

    def __len__(self) -> int:
        return len(self.latitude)


def attention(
    embedder: Embedder, time: np.datetime64, places: Places, layers: Sequence[int]
) -> dict[tuple[str, str], xr.Dataset]:
    """Attention of every head of some encoder layers for every place, by (stream that sees, stream
    that is seen).

    A dataset has `by_place` [layer head place latitude longitude], the share of the attention that
    goes to a place, at all levels and times together, NaN outside of the window that was encoded;
    `by_time` [layer head place level offset], the share of a level and a time step (hours before
    `init_time`) at all places together; `distance` and `uniform_distance` [layer head unit place],
    the mean distance to what is attended, and the same if all tokens that the head may see were
    attended alike. Every place is seen through the window in whose middle it lies best.
    """
    embedder.trained.require("embed")
    source, streams = embedder.find(time), embedder.fields(time)
    best = _best_tiles(embedder, places)
    parts: dict[tuple[int, str, str], dict[str, Any]] = {}
    network = embedder.trained.model.to(embedder.device)
    for tile in embedder.tile_views(source):
        asked = np.flatnonzero(best == embedder.tiles.tiles.index(tile.box))
        if len(asked):
            taker = _Taker(embedder, tile, streams, places, asked, tuple(layers), parts)
            (view,) = collate_views([(tile.view,)], [0]).views
            with torch.inference_mode(), handed_over(network, taker):
                network.encode(view.to(embedder.device))
    return _datasets(parts, streams, places, time)


def _best_tiles(embedder: Embedder, places: Places) -> Int[np.ndarray, "place"]:
    """The tile whose blending weight is the largest at each place."""
    size, plan = embedder.shown_specs[0].token_size, embedder.tiles
    num_lon = plan.grid.shape[1]
    row = places.row * size.lat + size.lat // 2
    column = (places.column * size.lon + size.lon // 2 + embedder.first_lon) % num_lon
    weights = np.zeros((len(plan.tiles), len(places)))
    for number, (box, weight) in enumerate(zip(plan.tiles, plan.weights, strict=True)):
        y, x = row - box.lat_start, (column - box.lon_start) % num_lon
        inside = (y >= 0) & (y < box.lat_size) & (x < box.lon_size)
        weights[number, inside] = weight[y[inside], x[inside]]
    return weights.argmax(axis=0)


@dataclass(frozen=True)
class _Taker:
    """Turns the queries and keys of one tile into the attention of the places in it."""

    embedder: Embedder
    tile: TileView
    streams: dict[str, StreamField]
    places: Places
    asked: Int[np.ndarray, "place"]
    layers: tuple[int, ...]
    parts: dict[tuple[int, str, str], dict[str, Any]]

    def __call__(self, pair: Pair, query: Tensor, key: Tensor, reach: Reach) -> None:
        if pair.layer not in self.layers or not {pair.stream, pair.other} <= set(self.streams):
            return
        grids = {stream.spec.name: stream.grid for stream in self.tile.view.streams}
        grid, other = grids[pair.stream], grids[pair.other]
        part = self.parts.setdefault(
            (pair.layer, pair.stream, pair.other), self._empty(pair, query.shape[1], other)
        )
        rows_of_place = self._rows(grid)
        many = query.shape[1] * rows_of_place.shape[1] * other.num_tokens
        for chunk in np.array_split(
            np.arange(len(self.asked)), -(-many * len(self.asked) // _PRODUCTS_AT_ONCE)
        ):
            rows = rows_of_place[chunk].ravel()
            seen = reach.seen(rows, grid.shape, other.shape, query.shape[1])
            weights = attention_weights(query[0].cpu(), key[0].cpu(), rows, seen).numpy()
            apart = distances(rows, grid, other)
            numbers = self.asked[chunk]
            uniform = seen / seen.sum(axis=-1, keepdims=True)
            for name, share in (("distance", weights), ("uniform_distance", uniform)):
                means = mean_distance(share, apart)
                part[name][:, :, numbers] = reduce(
                    means, "head unit (place level) -> head unit place", "mean", place=len(chunk)
                )
            mean = reduce(
                weights, "head (place level) key -> head place key", "mean", place=len(chunk)
            )
            self._add(part, pair.other, mean, numbers, other)

    def _rows(self, grid: TokenGrid) -> Int[np.ndarray, "place level"]:
        """Flat numbers of the tokens at every asked place, at the last step and all levels."""
        latitude, longitude = (
            values[self.asked] for values in (self.places.latitude, self.places.longitude)
        )
        row, column = nearest_cells(grid.lat.numpy(), grid.lon.numpy(), latitude, longitude)
        levels, steps, num_lat, num_lon = grid.shape
        level = np.arange(levels)
        row_of_level = (level * steps + steps - 1) * num_lat + row[:, None]
        return row_of_level * num_lon + column[:, None]

    def _empty(self, pair: Pair, num_heads: int, other: TokenGrid) -> dict[str, Any]:
        stream, count = self.streams[pair.other], len(self.places)
        shape = (num_heads, count, len(stream.latitude), len(stream.longitude))
        distance = np.full((num_heads, len(AXES), count), np.nan)
        return {
            "reaches": pair.reaches,
            "by_place": np.full(shape, np.nan, np.float32),
            "by_time": np.full((num_heads, count, *other.shape[:2]), np.nan, np.float32),
            "distance": distance,
            "uniform_distance": distance.copy(),
        }

    def _add(
        self,
        part: dict[str, Any],
        name: str,
        mean: Float[np.ndarray, "head place key"],
        numbers: Int[np.ndarray, "place"],
        other: TokenGrid,
    ) -> None:
        level, step, num_lat, num_lon = other.shape
        axes = rearrange(
            mean, "head place (level nt nlat nlon) -> head place level nt nlat nlon",
            level=level, nt=step, nlat=num_lat, nlon=num_lon,
        )  # fmt: skip
        spec = next(spec for spec in self.embedder.shown_specs if spec.name == name)
        rows, columns = self.embedder.rows_and_columns(self.tile.box, spec, (num_lat, num_lon))
        maps = reduce(axes, "head place level nt nlat nlon -> head place nlat nlon", "sum")
        part["by_place"][:, numbers[:, None, None], rows[:, None], columns] = maps
        part["by_time"][:, numbers] = reduce(
            axes, "head place level nt nlat nlon -> head place level nt", "sum"
        )


def _datasets(
    parts: dict[tuple[int, str, str], dict[str, Any]],
    streams: dict[str, StreamField],
    places: Places,
    time: np.datetime64,
) -> dict[tuple[str, str], xr.Dataset]:
    datasets = {}
    for stream, other in dict.fromkeys((of[1], of[2]) for of in parts):
        layers = sorted(of[0] for of in parts if of[1:] == (stream, other))
        by_layer = [parts[layer, stream, other] for layer in layers]
        seen = streams[other]
        dims = {
            "by_place": ("place", "latitude", "longitude"),
            "by_time": ("place", "level", "offset"),
            "distance": ("unit", "place"),
            "uniform_distance": ("unit", "place"),
        }
        datasets[stream, other] = xr.Dataset(
            {
                name: (("layer", "head", *own), np.stack([part[name] for part in by_layer]))
                for name, own in dims.items()
            },
            coords={
                "layer": layers,
                "reach": (("layer", "head"), [list(part["reaches"]) for part in by_layer]),
                "unit": list(AXES),
                "latitude": seen.latitude,
                "longitude": seen.longitude,
                "level": seen.level,
                "offset": seen.offset,
                "place_latitude": ("place", places.latitude),
                "place_longitude": ("place", places.longitude),
            },
            attrs={"stream": stream, "other": other, "init_time": str(time)},
        )  # fmt: skip
    return datasets
