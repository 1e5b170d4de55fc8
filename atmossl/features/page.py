"""The page of a checkpoint's features: one HTML file with everything in it.

Maps of attention and cosines are drawn by the page's own script (`page.js`) for the place that is
clicked. Their data are whole numbers of one byte, compressed. All other pictures are figures of
`atmossl.features.figures`.
"""

import base64
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from atmossl.atomic_files import write_atomically
from atmossl.batch import StreamSpec
from atmossl.coastlines import coastlines
from atmossl.data.variables import VARIABLES
from atmossl.evaluation.report.content import Provenance
from atmossl.evaluation.report.figures import readable
from atmossl.evaluation.report.maps import Panel, field_scale, panel_map, symmetric_scale
from atmossl.evaluation.report.page import Picture, map_picture, svg_picture, template_of
from atmossl.features import figures, latents
from atmossl.features.attention import AXES
from atmossl.features.run import FIELDS, FeatureResults, at_tokens, few_dates, name_of
from atmossl.geometry import ascending_longitudes, latitude_edges, nearest_cells
from atmossl.inference.checkpoint import TrainedModel

_OUTSIDE = 255  # of one byte, where a window does not reach
_LARGEST = 254
_MOST_ROWS = 180  # of the field on the map to click on
_NUM_DAYS = 8  # in the colours of their components
_COLOURS = ("red", "green", "blue")


def features_page(results: FeatureResults, provenance: Provenance) -> str:
    """The whole page as one file without any reference to another."""
    return template_of("atmossl.features").render(
        style=_style_of_reports(),
        results=results,
        layer=results.options.layer % results.trained.model.num_encoder_layers,
        shown=results.title(results.shown),
        left_out=results.left_out,
        few=few_dates(len(results.times)),
        stills=_stills(results),
        data=json.dumps(interactive(results)),
        distances=_distances(results),
        components=_components(results),
        analogues=_analogues(results),
        planes=_planes(results),
        filters=_filter_groups(results),
        provenance=provenance,
    )


def write_features(results: FeatureResults, provenance: Provenance, output: Path) -> None:
    """index.html, dates.csv, attention_distance.csv and analogues.csv in a folder that appears when
    it is whole."""

    def fill(folder: Path) -> None:
        folder.mkdir()
        (folder / "index.html").write_text(features_page(results, provenance), encoding="utf-8")
        dates_table(results).to_csv(folder / "dates.csv", index=False)
        distance_table(results.attention).to_csv(folder / "attention_distance.csv", index=False)
        if results.height is not None:
            analogue_table(results).to_csv(folder / "analogues.csv", index=False)

    write_atomically(output, fill)


def _style_of_reports() -> str:
    """That of the pages of `atmossl evaluate`."""
    template = resources.files("atmossl.evaluation.report") / "page.html.jinja"
    style = re.search(r"<style>(.*?)</style>", template.read_text(), flags=re.DOTALL)
    assert style is not None, "the page of reports has no style"
    return style[1]


# What the page's script draws.


def interactive(results: FeatureResults) -> dict[str, Any]:
    """Numbers for the maps that change with the place that is clicked."""
    latitude, longitude = results.token_latitude, results.token_longitude
    order, grid = _grid(latitude, longitude)
    places = _nearest_tokens(results)
    cosines = {}
    for name, vectors in (
        ("latents", results.tokens[results.shown]),
        ("anomalies", results.anomalies[results.shown]),
    ):
        rows = latents.cosines(vectors, places)
        rows = rows.reshape(len(rows), len(latitude), -1)[:, :, order]
        cosines[name] = _packed(np.round(127 * rows).astype(np.int8))
    lines = coastlines()
    return {
        "coast": _packed(np.round(100 * np.concatenate(lines)).astype(np.int16)),
        "coastLengths": _packed(np.array([len(line) for line in lines], np.int16)),
        "palettes": {name: _palette(name) for name in ("viridis", "RdBu_r")},
        "background": _background(results),
        "places": {
            "latitude": results.places.latitude.round(2).tolist(),
            "longitude": results.places.longitude.round(2).tolist(),
            "names": list(results.names),
        },
        "spread": _spread_grid(results),
        "cosines": {**grid, **cosines},
        "pairs": [_pair(results, dataset) for dataset in results.attention.values()],
    }


def _packed(values: np.ndarray) -> dict[str, str]:
    """An array as text: its type, and its bytes, little-endian, deflated, in base 64."""
    content = values.astype(values.dtype.newbyteorder("<")).tobytes()
    return {
        "type": values.dtype.name,
        "bytes": base64.b64encode(zlib.compress(content, 9)).decode(),
    }


def _palette(name: str) -> dict[str, str]:
    colours = matplotlib.colormaps[name](np.linspace(0, 1, 255))[:, :3]
    return _packed(np.round(255 * colours).astype(np.uint8))


def _grid(latitude: np.ndarray, longitude: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Order of the columns from west to east, beginning near 180 W on a whole circle, and the
    grid's shape and edges in degrees."""
    order, ascending = ascending_longitudes(longitude)
    spacing = (ascending[-1] - ascending[0]) / max(1, len(ascending) - 1) or 360.0
    if len(ascending) * spacing > 360.0 - spacing / 2:
        first = int(np.searchsorted(ascending, 180.0))
        order, ascending = np.roll(order, -first), np.roll(ascending, -first) - 360.0
    edges = latitude_edges(latitude) if len(latitude) > 1 else np.array([-90.0, 90.0])
    west = float(ascending[0]) - spacing / 2
    return order, {
        "rows": len(latitude),
        "columns": len(longitude),
        "south": float(edges[0]),
        "north": float(edges[-1]),
        "west": west,
        "east": west + len(longitude) * spacing,
    }


def _bytes_of(values: np.ndarray, high: float) -> dict[str, str]:
    """From 0 to a largest value as one byte each; NaN is outside."""
    whole = np.round(_LARGEST * np.clip(values / max(high, 1e-30), 0.0, 1.0))
    return _packed(np.where(np.isnan(whole), _OUTSIDE, whole).astype(np.uint8))


def _background_field(results: FeatureResults) -> tuple[xr.DataArray, str, str]:
    """The field that the map to click on shows, its title and its units: 500 hPa height, or the
    first that there is."""
    name = str(next(iter(results.fields)))
    height = results.height
    if height is not None:
        field, title, units = height, "height at 500 hPa", "m"
    else:
        variable, _, level = name.rpartition("_")
        field, units = (
            results.fields[name],
            VARIABLES[variable].units if variable in VARIABLES else "",
        )
        title = readable(variable) + ("" if level == "0" else f" at {level} hPa")
    every = -(-field.sizes["latitude"] // _MOST_ROWS)
    thinned = slice(None, None, every)
    field = field.isel(case=results.shown, latitude=thinned, longitude=thinned)
    return field, title, units


def _background(results: FeatureResults) -> dict[str, Any]:
    """The map to click on."""
    field, title, units = _background_field(results)
    scale = field_scale(field)
    order, grid = _grid(field["latitude"].to_numpy(), field["longitude"].to_numpy())
    values = field.to_numpy()[:, order] - scale.low
    return {
        **grid, "title": title, "units": units, "low": scale.low, "high": scale.high,
        "palette": scale.colours, "values": _bytes_of(values, scale.high - scale.low),
    }  # fmt: skip


def _nearest_tokens(results: FeatureResults) -> np.ndarray:
    """Number of the token of the layer's latents that is nearest to every place."""
    rows, columns = nearest_cells(
        results.token_latitude,
        results.token_longitude,
        results.places.latitude,
        results.places.longitude,
    )
    return rows * len(results.token_longitude) + columns


def _spread_grid(results: FeatureResults) -> dict[str, Any]:
    """The evenly spread places as a grid of their own, by their numbers from west to east."""
    count = len(results.places) - len(results.names)
    latitude = results.places.latitude[:count]
    columns = int((latitude == latitude[0]).sum())
    order, grid = _grid(latitude[::columns], results.places.longitude[:columns])
    numbers = np.arange(count).reshape(-1, columns)[:, order]
    return {**grid, "numbers": _packed(numbers.astype(np.int16))}


def _pair(results: FeatureResults, dataset: xr.Dataset) -> dict[str, Any]:
    """Heads by which one stream sees another, layer by layer."""
    order, grid = _grid(dataset["latitude"].to_numpy(), dataset["longitude"].to_numpy())
    spec = next(s for s in results.trained.own_specs if s.name == dataset.attrs["other"])
    heads = []
    for layer, head in np.ndindex(dataset.sizes["layer"], dataset.sizes["head"]):
        chosen = dataset.isel(layer=layer, head=head)
        reach = str(chosen["reach"].to_numpy())
        times = chosen["by_time"].to_numpy()
        told = {
            "layer": int(chosen["layer"]), "head": head, "reach": reach,
            "times": _packed(np.round(10000 * times).astype(np.uint16)),
        }  # fmt: skip
        if reach == "column":
            hours = chosen["distance"].sel(unit="h").to_numpy()
            high = float(np.ptp(dataset["offset"].to_numpy())) or 1.0
            told |= {"high": high, "values": _bytes_of(hours, high)}
        else:
            maps = chosen["by_place"].to_numpy()[:, :, order]
            highest = np.nanmax(maps, axis=(1, 2), keepdims=True)
            # colours follow the root, so that what is a quarter of the largest is in the middle
            told |= {
                "high": [round(100 * float(high), 3) for high in highest.ravel()],
                "values": _bytes_of(np.sqrt(maps / highest), 1.0),
            }
        heads.append(told)
    return {
        **grid,
        "stream": readable(dataset.attrs["stream"]),
        "other": readable(dataset.attrs["other"]),
        "levels": level_names(spec, results.trained),
        "offsets": dataset["offset"].to_numpy().round(2).tolist(),
        "heads": heads,
    }


def level_names(spec: StreamSpec, trained: TrainedModel, size: int | None = None) -> list[str]:
    """Of the levels of a stream's tokens, or of each `size` levels together."""
    size = spec.token_size.level if size is None else size
    if not spec.levels:
        return ["surface"]
    unit = " hPa" if trained.pressure_levels else ""
    groups = np.reshape(spec.levels, (-1, size))
    return [f"{g[0]}{unit}" if size == 1 else f"{g.min()} to {g.max()}{unit}" for g in groups]


# Pictures of what the script draws, for the time before it has run and for pages without scripts.


def _stills(results: FeatureResults) -> dict[str, Any]:
    """The maps with which the page begins: of the first named place, or the middle one, and of the
    first layer's heads."""
    count, named = len(results.places), len(results.names)
    place = count - named if named else count // 2
    field, title, units = _background_field(results)
    panel = Panel(f"{title} on the date of the maps", field, field_scale(field), units)
    heads = []
    for dataset in list(results.attention.values())[:1]:
        layer = int(dataset["layer"][0])
        heads = [
            map_picture(_still_of_head(results, dataset, layer, head, place), f"head {head + 1}")
            for head in range(dataset.sizes["head"])
        ]
    token = _nearest_tokens(results)[[place]]
    cosines = []
    for name, vectors in (
        ("latents as they are", results.tokens),
        ("anomalies", results.anomalies),
    ):
        (row,) = latents.cosines(vectors[results.shown], token)
        axes = results.token_latitude, results.token_longitude
        cosines.append(map_picture(figures.cosine_map(row, *axes, name), f"cosines, {name}"))
    return {"background": map_picture(panel_map(panel), title), "heads": heads, "cosines": cosines}


def _still_of_head(
    results: FeatureResults, dataset: xr.Dataset, layer: int, head: int, place: int
) -> Figure:
    """Attention from a place; of a head that sees its own place alone, the lags of all places."""
    if str(dataset["reach"].sel(layer=layer).isel(head=head).to_numpy()) != "column":
        return figures.attention_map(dataset, layer, head, place)
    count = len(results.places) - len(results.names)
    return figures.lag_map(dataset.isel(place=slice(count)), layer, head)


# Pictures that stay as they are.


def _distances(results: FeatureResults) -> list[Picture]:
    """By kilometres, hours and pressure, as far as there is a head that can look further than 0."""
    table = distance_table(results.attention)
    return [
        svg_picture(
            figures.attention_distance(results.attention, unit), f"attention distance, {unit}"
        )
        for unit in AXES
        if table.loc[table["unit"] == unit, "uniform_distance"].any()
    ]


def _components(results: FeatureResults) -> dict[str, Any]:
    """Days in the colours of the token components, and what the colours go with."""
    latitude, _ = results.token_places
    components = latents.token_components(results.anomalies, latitude)
    colours = components.colours()
    axes = results.token_latitude, results.token_longitude
    days = np.linspace(0, len(results.times) - 1, _NUM_DAYS).round().astype(int)
    days = np.union1d(days[np.abs(days - results.shown) > 1], [results.shown])
    pictures = [
        map_picture(figures.colour_map(colours[day], *axes, results.title(day)), results.title(day))
        for day in (results.shown, *days[days != results.shown])
    ]
    table = []
    for variable, level in FIELDS:
        if name_of((variable, level)) in results.fields:
            field = at_tokens(results, name_of((variable, level)))
            values = latents.correlations(components.scores, field, latitude)
            title = f"{readable(variable)}, {level} hPa"
            table.append((title, [f"{value:+.2f}" for value in values]))
    shares = [f"{name} {share:.0%}" for name, share in
              zip(_COLOURS, components.share, strict=True)]  # fmt: skip
    return {"pictures": pictures, "table": table, "shares": ", ".join(shares)}


def _analogues(results: FeatureResults) -> dict[str, Any] | None:
    """The shown date, its analogues in latents and in height, and how good they are on average."""
    height = results.height
    if height is None:
        return None
    apart = results.distances["height"]
    departure = height - height.mean("case")
    scale = symmetric_scale(departure)

    def picture(date: int, title: str) -> Picture:
        figure = panel_map(Panel(title, departure.isel(case=date), scale, "m"))
        return map_picture(figure, f"departure of height at 500 hPa from its mean, {title}")

    groups, means = [], {}
    for name, nearest in results.analogues.items():
        asked = np.flatnonzero(nearest.number[:, 0] >= 0)
        means[name] = float(apart[asked, nearest.number[asked, 0]].mean())
        pictures = [
            picture(n, f"{results.title(n)}: {apart[results.shown, n]:.0f} m")
            for n in map(int, nearest.number[results.shown])
            if n >= 0
        ]
        groups.append({"name": name, "pictures": pictures})
    allowed = latents.admissible(results.times, results.run)
    means["any"] = float(apart[allowed].mean())
    own = picture(results.shown, results.title(results.shown))
    compared = latents.against_chance(
        apart, results.analogues["latents"], results.times, results.run
    )
    return {"shown": own, "groups": groups, "means": means, "verdict": chance_verdict(compared)}


def chance_verdict(compared: latents.AgainstChance) -> str:
    """Whether analogues by latents are nearer in height than dates drawn at random."""
    if not np.isfinite(compared.low):
        return "There are too few dates to say whether the latents do better than chance."
    by = (
        f"by {abs(compared.difference):.0f} m (95 % interval of the difference "
        f"{compared.low:+.0f} to {compared.high:+.0f} m)"
    )
    if compared.high < 0:
        return f"Analogues by latents are nearer than dates drawn at random, {by}."
    if compared.low > 0:
        return f"Analogues by latents are worse than dates drawn at random, {by}: do not use them."
    side = "nearer" if compared.difference < 0 else "farther"
    return f"Analogues by latents cannot be told from dates drawn at random: {side} {by}."


def _planes(results: FeatureResults) -> list[Picture]:
    colourings = {"run": np.array(results.run_names)[results.run], "date": results.times}
    if results.jet is not None:
        colourings["jet latitude"] = results.jet
    return [
        svg_picture(
            figures.plane(points, values, results.shown, plane, by), f"days in {plane}, {by}"
        )
        for plane, points in results.planes.items()
        for by, values in colourings.items()
    ]


def _filter_groups(results: FeatureResults) -> Iterator[dict[str, Any]]:
    for filters in results.filters:
        spec = next(s for s in results.trained.own_specs if s.name == filters.stream)
        levels = level_names(spec, results.trained, 1)
        if filters.patterns.shape[2] < len(levels):
            levels = [""]
        pictures = [
            map_picture(
                figures.filter_picture(filters, number, levels, results.step_hours),
                f"pattern {number + 1} of {filters.reads} of {filters.stream}",
            )
            for number in range(len(filters.patterns))
        ]
        yield {
            "title": f"{filters.reads} of {readable(filters.stream)}",
            "reads": filters.reads,
            "far": filters.patterns.shape[2] * filters.patterns.shape[3] > 5,
            "pictures": [
                {"picture": picture, "share": f"{share:.1%}"}
                for picture, share in zip(pictures, filters.share, strict=True)
            ],
        }


# Tables beside the page.


def dates_table(results: FeatureResults) -> pd.DataFrame:
    """Every date with its run, its place in the planes of days, and its jet latitude."""
    table = {"run": np.array(results.run_names)[results.run], "date": results.times}
    for name, points in results.planes.items():
        key = name.split()[0].lower()
        table |= {f"{key}_{number + 1}": points[:, number] for number in range(2)}
    return pd.DataFrame(table if results.jet is None else {**table, "jet_latitude": results.jet})


def distance_table(attended: Mapping[tuple[str, str], xr.Dataset]) -> pd.DataFrame:
    """One row for every stream, layer, head and unit: mean distance, and that of uniform attention,
    by the area of the places."""
    columns = ["stream", "other", "layer", "head", "unit", "distance", "uniform_distance"]
    rows = [
        figures.means_over_places(dataset).to_dataframe().reset_index().assign(**dataset.attrs)
        for dataset in attended.values()
    ]
    return pd.concat(rows).reindex(columns=columns) if rows else pd.DataFrame(columns=columns)


def analogue_table(results: FeatureResults) -> pd.DataFrame:
    """For every date its nearest ones by each distance, with the RMSE of 500 hPa height."""
    rows = [
        {
            "by": name, "date": results.title(date), "rank": rank + 1,
            "analogue": results.title(int(other)), "distance": nearest.distance[date, rank],
            "height_rmse_m": results.distances["height"][date, other],
        }
        for name, nearest in results.analogues.items()
        for (date, rank), other in np.ndenumerate(nearest.number)
        if other >= 0
    ]  # fmt: skip
    return pd.DataFrame(rows)
