"""What a model saw, what it predicted, what was true and what the best baseline says of one case,
side by side on the globe. Fields that can be compared share their colours, and every scale reaches
from the smallest to the largest value that is drawn with it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from atmossl.evaluation.regions import REGIONS, area_mean
from atmossl.evaluation.report.content import Example, Given
from atmossl.evaluation.report.figures import encoded, pixels_of, readable, units_text
from atmossl.evaluation.report.globe import Scale, draw_globe
from atmossl.value_faults import listed

_DIVERGING, _SEQUENTIAL, _SPREAD = "RdBu_r", "viridis", "magma_r"
_NUM_MEMBERS = 2
_COLUMNS = 3
_WIDTH, _HEIGHT, _TOP = 3.6, 2.35, 0.62  # of a panel and of the titles, inches
_DPI = 120  # at which panels begin and end between two pixels


@dataclass(frozen=True)
class Panel:
    """One map with its colours."""

    title: str
    field: xr.DataArray
    scale: Scale
    units: str


def case_panels(example: Example, baseline: str | None = None) -> list[Panel]:
    """Maps of one case: the input, truth, the (ensemble mean of the) prediction, a baseline, the
    errors of both, the spread of more than one member, and the first members.

    Errors and spread are left blank where nothing was hidden, and so are the input where the model
    saw nothing and all that is missing.

    Raises:
        ValueError: arrays of other dims.
    """
    truth, prediction, hidden = example.truth, example.prediction, example.hidden
    _require_one_case(truth, prediction)
    hidden = xr.ones_like(truth, dtype=bool) if hidden is None else hidden
    units = str(truth.attrs.get("units", ""))
    is_ensemble = prediction.sizes.get("member", 1) > 1
    has_members = "member" in prediction.dims
    mean = prediction.mean("member") if has_members else prediction
    fields = {"prediction (ensemble mean)" if has_members else "prediction": mean}
    fields |= {} if baseline is None else {f"baseline {baseline}": example.baselines[baseline]}
    errors = {name: (field - truth).where(hidden) for name, field in fields.items()}
    members = first_members(prediction, _NUM_MEMBERS) if is_ensemble else {}
    inputs = [] if example.given is None else [example.given]
    alike = [given.field for given in inputs if given.is_predicted]
    shared = field_scale(truth, *fields.values(), *members.values(), *alike)
    of_errors = replace(symmetric_scale(*errors.values()), rooted=True)
    panels = [_given_panel(given, shared, units) for given in inputs]
    panels.append(Panel("truth", truth, shared, units))
    for name, field in fields.items():
        score = float(area_mean(errors[name] ** 2, REGIONS["global"])) ** 0.5
        panels.append(Panel(f"{name}, RMSE {score:.3g}", field, shared, units))
    for name, error in errors.items():
        whose = name.removesuffix(" (ensemble mean)")
        panels.append(Panel(f"error of the {whose}", error, of_errors, units))
    if is_ensemble:
        spread = prediction.std("member", ddof=1).where(hidden)
        panels.append(Panel("ensemble spread", spread, spread_scale(spread), units))
    return panels + [Panel(name, member, shared, units) for name, member in members.items()]


def first_members(prediction: xr.DataArray, count: int) -> dict[str, xr.DataArray]:
    """The first members of an ensemble, or all of a smaller one, by the titles of their maps."""
    shown = range(min(count, prediction.sizes["member"]))
    numbers = prediction["member"].to_numpy()  # as `members=` and files have them, from 0 on
    return {f"member {numbers[n]}": prediction.isel(member=n) for n in shown}


def _given_panel(given: Given, shared: Scale, units: str) -> Panel:
    if given.is_predicted:
        return Panel(given.title, given.field, shared, units)
    units = str(given.field.attrs.get("units", ""))
    return Panel(given.title, given.field, field_scale(given.field), units)


def case_map(
    task: str, example: Example, *, baseline: str | None = None, about: str = ""
) -> Figure:
    """All panels of one case below its task, variable and times.

    about: what the task gives and asks for, in a sentence.

    Raises:
        ValueError: arrays of other dims.
    """
    return _figure_of(case_panels(example, baseline), case_title(task, example), about)


@dataclass(frozen=True)
class DrawnCase:
    """The pictures of one case. whole: all panels, PNG. panels: each of them by its title, WebP."""

    whole: bytes
    panels: dict[str, bytes]


def draw_case(
    task: str, example: Example, *, baseline: str | None = None, about: str = ""
) -> DrawnCase:
    """Draw the figure of `case_map` once, and cut its panels out of it.

    Raises:
        ValueError: arrays of other dims.
    """
    panels = case_panels(example, baseline)
    pixels = pixels_of(_figure_of(panels, case_title(task, example), about), _DPI)
    width, height = round(_WIDTH * _DPI), round(_HEIGHT * _DPI)
    top = len(pixels) - height * -(-len(panels) // _COLUMNS)  # the titles stand above the rows
    cut = {}
    for number, panel in enumerate(panels):
        y, x = top + number // _COLUMNS * height, number % _COLUMNS * width
        cut[panel.title] = encoded(pixels[y : y + height, x : x + width], "webp")
    return DrawnCase(encoded(pixels, "png"), cut)


def _figure_of(panels: Sequence[Panel], title: str, about: str) -> Figure:
    rows = -(-len(panels) // _COLUMNS)
    size = (_COLUMNS * _WIDTH, rows * _HEIGHT + _TOP)
    figure = Figure(figsize=size)
    for number, panel in enumerate(panels):
        west = number % _COLUMNS * _WIDTH / size[0]
        bottom = (rows - 1 - number // _COLUMNS) * _HEIGHT / size[1]
        _draw(figure, (west, bottom, _WIDTH / size[0], _HEIGHT / size[1]), panel)
    y = 1.0 - 0.2 / size[1]
    figure.text(0.5, y, title, fontsize=12, ha="center", va="center", parse_math=False)
    figure.text(0.5, y - 0.24 / size[1], about, fontsize=9, ha="center", va="center",
                parse_math=False)  # fmt: skip
    return figure


def panel_map(panel: Panel) -> Figure:
    """One panel alone, for pages that lay panels out themselves."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    _draw(figure, (0.0, 0.0, 1.0, 1.0), panel)
    return figure


def field_scale(*fields: xr.DataArray) -> Scale:
    """One scale for all; around zero if they take both signs about equally."""
    low, high = _range(fields)
    if low < 0 < high and min(-low, high) > 0.2 * max(-low, high):
        limit = max(-low, high)
        return Scale(_DIVERGING, -limit, limit)
    return _widened(_SEQUENTIAL, low, high)


def symmetric_scale(*fields: xr.DataArray) -> Scale:
    """One scale for all, centred on zero."""
    limit = max(map(abs, _range(fields)))
    return Scale(_DIVERGING, -(limit or 1.0), limit or 1.0)


def spread_scale(spread: xr.DataArray) -> Scale:
    """A scale from zero up."""
    return _widened(_SPREAD, 0.0, _range([spread])[1])


def _range(fields: Sequence[xr.DataArray]) -> tuple[float, float]:
    """Smallest and largest of what is there; a variable may be missing wherever a task hid it."""
    values = np.concatenate([field.to_numpy().ravel() for field in fields])
    there = values[np.isfinite(values)]
    return (float(there.min()), float(there.max())) if there.size else (0.0, 0.0)


def _widened(colours: str, low: float, high: float) -> Scale:
    """A constant field would give a scale without width."""
    return Scale(colours, low, high if high > low else low + 1.0)


def case_title(task: str, example: Example) -> str:
    """Task, variable, level, and init, lead and valid time as far as the case has them."""
    truth, prediction = example.truth, example.prediction
    parts = [readable(str(prediction.name or truth.name))]
    labels = {**truth.coords, **prediction.coords}
    if "level" in labels:
        parts.append(f"{float(labels['level']):g} hPa")
    if "init_time" in labels and "lead_time" in labels:
        init, lead = labels["init_time"].to_numpy(), labels["lead_time"].to_numpy()
        parts += [f"init {_minute(init)}", f"lead {lead / np.timedelta64(1, 'h'):g} h"]
        parts.append(f"valid {_minute(init + lead)}")
    elif "time" in labels:
        parts.append(f"valid {_minute(labels['time'].to_numpy())}")
    return f"{readable(task)}: {', '.join(parts)}"


def _minute(time: np.ndarray) -> str:
    return str(np.datetime_as_string(time, unit="m")).replace("T", " ") + " UTC"


def _require_one_case(truth: xr.DataArray, prediction: xr.DataArray) -> None:
    cell = {"latitude", "longitude"}
    if set(truth.dims) != cell or set(prediction.dims) - {"member"} != cell:
        raise ValueError(
            "a map shows one case with dims latitude, longitude (and member): select time, lead "
            f"and level first; got truth ({listed(truth.dims)}), prediction "
            f"({listed(prediction.dims)})"
        )


def _draw(figure: Figure, box: tuple[float, float, float, float], panel: Panel) -> None:
    """A map with its title and colour bar. box: left, bottom, width and height in the figure."""

    def axes(left: float, bottom: float, width: float, height: float) -> Axes:
        place = (box[0] + left * box[2], box[1] + bottom * box[3], width * box[2], height * box[3])
        return figure.add_axes(place)

    globe = axes(0.01, 0.19, 0.98, 0.7)
    cells = draw_globe(globe, panel.field, panel.scale)
    globe.set_title(panel.title, fontsize=9, y=1.0, parse_math=False)
    bar = figure.colorbar(cells, cax=axes(0.1, 0.165, 0.8, 0.03), orientation="horizontal")
    digits = ScalarFormatter()
    digits.set_powerlimits((-2, 4))  # humidity's many zeros would overlap
    # ticks of a rooted scale lie close together at its ends
    bar.locator, bar.formatter = MaxNLocator(4 if panel.scale.rooted else 6), digits
    bar.update_ticks()
    bar.ax.tick_params(labelsize=8)
    bar.ax.xaxis.get_offset_text().set_fontsize(8)
    explained = "  (colours by the square root)" if panel.scale.rooted else ""
    bar.set_label(units_text(panel.units) + explained, fontsize=8)
