"""Everything that the page of a checkpoint's features shows, worked out in one go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import xarray as xr
from einops import rearrange
from jaxtyping import Float, Int

from atmossl.batch import levels_by_variable
from atmossl.data.axes import Calendar
from atmossl.data.segment import Segment
from atmossl.features import latents
from atmossl.features.attention import Places, attention, check_attention
from atmossl.features.filters import Filters, first_layer
from atmossl.geometry import degrees_east_of, nearest_cells
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.embed import Embedder, StreamField
from atmossl.probes.cases import Run, TokenPlaces, state_of
from atmossl.probes.features import encoded
from atmossl.probes.labels import GRAVITY, LABELS

# Places that can be named, degrees north and east.
NAMED_PLACES = {
    "north_atlantic": (50.0, -30.0),
    "north_pacific": (45.0, -170.0),
    "europe": (50.0, 10.0),
    "sahara": (23.0, 10.0),
    "amazon": (-5.0, -60.0),
    "tibet": (33.0, 90.0),
    "maritime_continent": (0.0, 120.0),
    "nino34": (0.0, -145.0),
    "southern_ocean": (-55.0, 60.0),
    "antarctica": (-80.0, 90.0),
}
_SHOWN_FIRST = ("north_atlantic", "nino34", "southern_ocean")  # where no places are chosen
# What the colours of token components, and the page's maps, are compared with.
FIELDS = (
    ("geopotential", 500), ("temperature", 850), ("u_component_of_wind", 850),
    ("v_component_of_wind", 850), ("specific_humidity", 850),
)  # fmt: skip
HEIGHT, JET = FIELDS[0], FIELDS[2]
_MAP_VALUES = 5_000_000  # of all maps of attention together, by which places to click on are chosen
_MOST_PLACES = 512
Place = str | tuple[float, float]


@dataclass(frozen=True)
class FeatureOptions:
    """layer: whose latents are shown. layers: whose attention is; empty for all. num_dates: so many
    or a few less. places: names, or degrees north and east; None for some that the data reach.
    overlap, batch_size: of the tiles."""

    layer: int = -1
    layers: tuple[int, ...] = ()
    num_dates: int = 240
    places: tuple[Place, ...] | None = None
    overlap: float = 0.0
    batch_size: int = 16
    device: str = "cpu"


@dataclass(frozen=True)
class FeatureResults:
    """What was found, for figures and the page.

    shown: number of the date that maps are of. run: number of every date's run, of `run_names`.
    names: of the last of the `places`, which the user named. fields: of all dates, dims (case,
    latitude, longitude), names such as `geopotential_500`. token_latitude, token_longitude: axes of
    the `tokens` [date token feature] of the layer. left_out: why a part is not there, by its name.
    """

    trained: TrainedModel
    options: FeatureOptions
    times: np.ndarray
    run: Int[np.ndarray, "date"]
    run_names: tuple[str, ...]
    shown: int
    names: tuple[str, ...]
    places: Places
    attention: Mapping[tuple[str, str], xr.Dataset]
    token_latitude: Float[np.ndarray, "row"]
    token_longitude: Float[np.ndarray, "column"]
    tokens: Float[np.ndarray, "date token feature"]
    pooled: Float[np.ndarray, "date feature"]
    fields: xr.Dataset
    filters: tuple[Filters, ...]
    step_hours: float
    calendar: Calendar
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def token_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Latitude and longitude of every token."""
        grid = np.meshgrid(self.token_latitude, self.token_longitude, indexing="ij")
        return grid[0].ravel(), grid[1].ravel()

    @cached_property
    def anomalies(self) -> Float[np.ndarray, "date token feature"]:
        """Departures of the tokens' latents from every token's mean over all dates."""
        return latents.anomalies(self.tokens)

    @property
    def height(self) -> xr.DataArray | None:
        """Geopotential height at 500 hPa of all dates in metres."""
        if name_of(HEIGHT) not in self.fields:
            return None
        return self.fields[name_of(HEIGHT)] / GRAVITY

    @cached_property
    def jet(self) -> Float[np.ndarray, "date"] | None:
        """Latitude of the jet (`atmossl.probes.labels.jet_latitude`), if the fields tell it."""
        if name_of(JET) not in self.fields:
            return None
        wind = self.fields[name_of(JET)].expand_dims(level=[JET[1]], axis=1)
        state = wind.to_dataset(name=JET[0])
        try:
            return LABELS["jet_latitude"].of(state, state).to_numpy()
        except ValueError:  # a region without the jet's latitudes
            return None

    @cached_property
    def planes(self) -> dict[str, Float[np.ndarray, "date 2"]]:
        """All dates in two dimensions, by the name of the method."""
        return latents.planes_of_days(self.pooled)

    @cached_property
    def distances(self) -> dict[str, Float[np.ndarray, "date date"]]:
        """How far all dates are from each other: their `latents`, root mean square of the
        standardised features, and their `height` at 500 hPa, RMSE by area in metres."""
        rows = latents.standardised(self.pooled)
        apart = {"latents": latents.root_mean_squares(rows, np.ones(rows.shape[1]))}
        if self.height is not None:
            area = np.cos(np.deg2rad(self.height["latitude"].to_numpy())).clip(0.0)
            cells = self.height.to_numpy().reshape(len(self.times), -1)
            area = np.repeat(area, self.height.sizes["longitude"])
            apart["height"] = latents.root_mean_squares(cells, area)
        return apart

    @cached_property
    def analogues(self) -> dict[str, latents.Analogues]:
        """The nearest dates of other runs, or some days away, by each of the `distances`."""
        allowed = latents.admissible(self.times, self.run)
        return {name: latents.analogues(apart, allowed) for name, apart in self.distances.items()}

    def title(self, date: int) -> str:
        """Run and date, for people."""
        when = self.calendar.show(self.times[date], "m").replace("T", " ")
        return f"{self.run_names[self.run[date]]}, {when} UTC"


def few_dates(count: int) -> str | None:
    """A sentence where there are fewer dates than `latents.STEADY_DATES`."""
    if count >= latents.STEADY_DATES:
        return None
    return (
        f"the page compares {count} dates alone: means of places, components, analogues and planes "
        f"of days change with the choice of so few; take {latents.STEADY_DATES} or more, by a "
        "larger num_dates, more splits or longer data"
    )


def name_of(of: tuple[str, int]) -> str:
    """The name of a variable on a level [hPa], as in `geopotential_500`."""
    return f"{of[0]}_{of[1]}"


@dataclass(frozen=True)
class FeatureRun:
    """A checkpoint, its dates and its places, all checked; `run` does the long work."""

    trained: TrainedModel
    options: FeatureOptions
    layers: tuple[int, ...]
    runs: tuple[Run, ...]
    time: np.datetime64

    @classmethod
    def prepare(
        cls,
        trained: TrainedModel,
        records: Mapping[str, Sequence[Segment]],
        options: FeatureOptions,
        time: np.datetime64 | None = None,
    ) -> "FeatureRun":
        """records: by split. time: of the date that is shown; else the middle one of the dates of
        the last split.

        Raises:
            ValueError: a checkpoint that cannot embed, no such layer, a place outside of the globe,
                too few dates.
        """
        trained.require("embed")
        count = trained.model.num_encoder_layers
        for key, layers in (("layer", (options.layer,)), ("layers", options.layers)):
            wrong = [layer for layer in layers if not -count <= layer < count]
            if wrong:
                raise ValueError(f"{key}={wrong[0]}; valid: {-count} to {count - 1}")
        for place in options.places or ():
            degrees_of(place)
        layers = options.layers or tuple(range(count))
        runs = latents.dated_runs(
            records, window_steps=trained.window.time, num_dates=options.num_dates, shown=time
        )
        of_last = [run for run in runs if run.split == runs[-1].split]
        times = np.concatenate([run.times for run in of_last])
        shown = times[len(times) // 2] if time is None else time
        if not any(shown in run.times for run in runs):
            when = runs[0].segment.calendar.show(shown)
            raise ValueError(f"init_time={when} ends no whole window of any record")
        layers = tuple(dict.fromkeys(layer % count for layer in layers))
        return cls(trained, options, layers, tuple(runs), shown)

    @property
    def num_dates(self) -> int:
        return sum(len(run.steps) for run in self.runs)

    @property
    def warning(self) -> str | None:
        """What few dates do to the page; None where there are enough."""
        return few_dates(self.num_dates)

    def run(self, advance: Callable[[float], object] = float) -> FeatureResults:
        """Encode all dates, and the shown one once more for its attention."""
        embedders = [self._embedder(run) for run in self.runs]
        numbers = np.repeat(np.arange(len(self.runs)), [len(run.steps) for run in self.runs])
        times = np.concatenate([run.times for run in self.runs])
        shown = int(np.flatnonzero(times == self.time)[-1])
        showing = embedders[numbers[shown]]
        first = next(iter(showing.fields(self.time).values()))
        places, names = self._places(first)
        left_out: dict[str, str] = {}
        attended = self._attention(showing, places, left_out)
        grid = _token_places(first, len(times), showing.first_lon)
        (features,) = encoded(
            embedders, self.runs, (self.options.layer % self.trained.model.num_encoder_layers,),
            grid, "latents", advance,
        )  # fmt: skip
        assert features.tokens is not None and features.pooled is not None
        return FeatureResults(
            trained=self.trained, options=self.options, times=times, run=numbers,
            run_names=tuple(run_names(self.runs)), shown=shown, names=names, places=places,
            attention=attended, token_latitude=grid.latitude[:: grid.every],
            token_longitude=grid.longitude[:: grid.every], tokens=features.tokens,
            pooled=features.pooled, fields=self._fields(left_out),
            filters=self._filters(left_out),
            step_hours=self.runs[0].segment.step_hours, calendar=self.runs[0].segment.calendar,
            left_out=left_out,
        )  # fmt: skip

    def _embedder(self, run: Run) -> Embedder:
        options = self.options
        return Embedder(
            trained=self.trained, segments=(run.segment,), layer=options.layer,
            overlap=options.overlap, batch_size=options.batch_size, device=options.device,
        )  # fmt: skip

    def _places(self, stream: StreamField) -> tuple[Places, tuple[str, ...]]:
        """Evenly spread tokens, as many as maps of attention leave room for; then the places that
        the user named."""
        shape = len(stream.latitude), len(stream.longitude)
        model = self.trained.checkpoint_record["model"]
        maps = len(self.layers) * model.get("num_heads", model.get("encoder_heads", 1))
        most = np.clip(_MAP_VALUES // (maps * shape[0] * shape[1]), 24, _MOST_PLACES)
        every = int(np.ceil(np.sqrt(shape[0] * shape[1] / most)))
        rows, columns = np.meshgrid(
            np.arange(0, shape[0], every), np.arange(0, shape[1], every), indexing="ij"
        )
        chosen = self.options.places
        chosen = places_within(stream) if chosen is None else chosen
        named = [_token_of(place, stream) for place in chosen]
        rows = np.concatenate([rows.ravel(), [row for row, _ in named]]).astype(int)
        columns = np.concatenate([columns.ravel(), [column for _, column in named]]).astype(int)
        return Places.of(stream, rows, columns), tuple(map(shown_name, chosen))

    def _attention(
        self, embedder: Embedder, places: Places, left_out: dict[str, str]
    ) -> dict[tuple[str, str], xr.Dataset]:
        try:
            check_attention(self.trained.model)
        except ValueError as error:
            left_out["attention"] = str(error)
            return {}
        middle = replace(embedder, overlap=max(self.options.overlap, 0.5))
        return attention(middle, self.time, places, self.layers)

    def _filters(self, left_out: dict[str, str]) -> tuple[Filters, ...]:
        try:
            return tuple(first_layer(self.trained))
        except ValueError as error:
            left_out["filters"] = str(error)
            return ()

    def _fields(self, left_out: dict[str, str]) -> xr.Dataset:
        """Those of `FIELDS` that the checkpoint's data have, at all dates."""
        have = levels_by_variable(self.trained.own_specs)
        wanted = [(name, level) for name, level in FIELDS if level in have.get(name, ())]
        if HEIGHT not in wanted:
            left_out["analogues"] = "the checkpoint's fields lack geopotential at 500 hPa"
        if JET not in wanted:
            left_out["jet"] = "the checkpoint's fields lack zonal wind at 850 hPa"
        if not wanted:  # one that the map to click on can show
            name, there = next(iter(have.items()))
            wanted = [(name, there[len(there) // 2])]
        levels: dict[str, tuple[int, ...]] = {}
        for name, level in wanted:
            levels[name] = (*levels.get(name, ()), level)
        parts = [state_of(run, 0, levels) for run in self.runs]
        read = xr.concat(parts, "case", combine_attrs="override")
        return xr.Dataset(
            {name_of(of): read[of[0]].sel(level=of[1], drop=True) for of in wanted}
        ).transpose("case", "latitude", "longitude")


def degrees_of(place: Place) -> tuple[float, float]:
    """Degrees north and east of a place.

    Raises:
        ValueError: a name that is not known, or no place on the globe.
    """
    if isinstance(place, str):
        if place not in NAMED_PLACES:
            raise ValueError(
                f"places: {place!r} is no place that is known; valid: {', '.join(NAMED_PLACES)}, "
                "or [latitude,longitude]"
            )
        return NAMED_PLACES[place]
    latitude, longitude = place
    if not (-90.0 <= latitude <= 90.0 and -180.0 <= longitude <= 360.0):
        raise ValueError(
            f"places: [{latitude:g},{longitude:g}] is not on the globe; valid: latitudes from -90 "
            "to 90, longitudes from -180 to 360"
        )
    return latitude, longitude


def shown_name(place: Place) -> str:
    """A place as the page shows it: its name, or its latitude and longitude."""
    if isinstance(place, str):
        return place.replace("_", " ")
    north, east = place
    east = degrees_east_of(0.0, east)
    return f"{abs(north):g}° {'SN'[north >= 0]}, {abs(east):g}° {'WE'[east >= 0]}"


def places_within(stream: StreamField) -> tuple[str, ...]:
    """Named places that the data reach, three of them or fewer; those first that show most."""
    names = dict.fromkeys((*_SHOWN_FIRST, *NAMED_PLACES))
    return tuple(name for name in names if _nearest_token(name, stream) is not None)[:3]


def _token_of(place: Place, stream: StreamField) -> tuple[int, int]:
    """Row and column of the token that holds a place.

    Raises:
        ValueError: a place outside of the data's region.
    """
    token = _nearest_token(place, stream)
    if token is None:
        raise ValueError(
            f"places: {shown_name(place)} is outside of the data, which reach from "
            f"{stream.latitude.min():g} to {stream.latitude.max():g} N and from "
            f"{stream.longitude.min():g} to {stream.longitude.max():g} E; valid: "
            "places=[[LATITUDE,LONGITUDE]] there, places=null for named places there, or places=[] "
            "for none"
        )
    return token


def _nearest_token(place: Place, stream: StreamField) -> tuple[int, int] | None:
    """Row and column of the token nearest to a place; None if it lies more than one token away."""
    latitude, longitude = degrees_of(place)
    south = np.abs(stream.latitude - latitude)
    east = np.abs(degrees_east_of(longitude, stream.longitude))
    row, column = int(south.argmin()), int(east.argmin())
    steps = [float(np.diff(np.sort(x)).min()) if len(x) > 1 else 360.0
             for x in (stream.latitude, stream.longitude)]  # fmt: skip
    return None if south[row] > steps[0] or east[column] > steps[1] else (row, column)


def _token_places(stream: StreamField, num_dates: int, first_lon: int) -> TokenPlaces:
    """The tokens of a stream; `encoded` wants places of every date, of which nothing is used."""
    nowhere = np.zeros((num_dates, 1), int)
    return TokenPlaces(stream.latitude, stream.longitude, nowhere, nowhere, first_lon)


def run_names(runs: Sequence[Run]) -> list[str]:
    """The record's name, with its split where it is in several."""
    names = [run.segment.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({run.split})"
        for name, run in zip(names, runs, strict=True)
    ]


def at_tokens(results: FeatureResults, name: str) -> Float[np.ndarray, "date token"]:
    """A field at the cells nearest to the tokens."""
    field = results.fields[name]
    latitude, longitude = (field[axis].to_numpy() for axis in ("latitude", "longitude"))
    tokens = results.token_latitude, results.token_longitude
    rows, columns = nearest_cells(latitude, longitude, *tokens)
    values = field.isel(latitude=rows, longitude=columns).to_numpy()
    return rearrange(values, "date row column -> date (row column)")
