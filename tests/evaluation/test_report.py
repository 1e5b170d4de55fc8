import io
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

import atmossl
from atmossl.evaluation.baselines import climatology_forecast, persistence
from atmossl.evaluation.bootstrap import BlockBootstrap
from atmossl.evaluation.climate import Climate
from atmossl.evaluation.report.cards import RatioColours, colours_of
from atmossl.evaluation.report.content import Example, Given, Provenance, Span, TaskReport
from atmossl.evaluation.report.figures import pixels_of, png_bytes, score_label, units_text
from atmossl.evaluation.report.globe import Scale, draw_globe, project
from atmossl.evaluation.report.maps import (
    case_map,
    case_panels,
    case_title,
    draw_case,
    field_scale,
    panel_map,
    symmetric_scale,
)
from atmossl.evaluation.report.panels import lead_curve
from atmossl.evaluation.report.tables import (
    print_summary,
    summarise,
    to_markdown,
)
from atmossl.evaluation.report.verdicts import COLUMNS, calibration_table, verdicts
from atmossl.evaluation.report.write import write_report
from atmossl.evaluation.verify import verify

LEADS = np.array([6, 12], dtype="timedelta64[h]").astype("timedelta64[ns]")


def _ensemble(truth: xr.Dataset) -> xr.Dataset:
    rng = np.random.default_rng(0)
    still = persistence(truth, truth["time"][:10], LEADS).expand_dims(member=np.arange(3))
    return still.map(lambda field: field + 0.3 * rng.standard_normal(field.shape))


@pytest.fixture(scope="module")
def table(dataset) -> pd.DataFrame:
    truth = dataset(num_times=12)
    truth = truth.assign(
        surface_pressure=truth["temperature"].isel(level=0, drop=True).assign_attrs(units="Pa")
    )
    climate = Climate.of([truth], quantiles=(0.05, 0.95))
    baselines = {
        "persistence": persistence(truth, truth["time"][:10], LEADS),
        "climatology": climatology_forecast(climate.mean, truth["time"][:10], LEADS),
    }
    return verify(
        _ensemble(truth),
        truth,
        baselines,
        climate,
        task="forecast",
        rng=np.random.default_rng(0),
        bootstrap=BlockBootstrap(num_resamples=50),
    )


@pytest.fixture(scope="module")
def example(dataset) -> Example:
    record = dataset(num_times=12)
    name = "u_component_of_wind"
    prediction = _ensemble(record)[name].isel(init_time=0, lead_time=1, level=0)
    truth, state = (record[name].isel(time=time, level=0) for time in (2, 0))
    given = Given("input 12 h before", state, is_predicted=True)
    return Example(
        name,
        500.0,
        truth,
        prediction,
        given=given,
        baselines={"persistence": state, "ridge": truth},
    )


def _row(table: pd.DataFrame, source: str, score: str) -> pd.DataFrame:
    return table[(table["source"] == source) & (table["score"] == score)]


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_no_head_of_the_printed_table_is_cut(table, width: int) -> None:
    summary, text = summarise(table), io.StringIO()
    print_summary(summary, Console(file=text, width=width))
    head = text.getvalue().partition("┡")[0]
    words = " ".join(summary.columns).split()
    assert all(word in head for word in words if word not in ("low", "high"))
    lines = text.getvalue().splitlines()
    assert len({len(line) for line in lines if line}) == 1 and "…" not in text.getvalue()


def test_summary_has_one_row_per_field_and_the_table_s_numbers(table):
    summary = summarise(table)
    assert len(summary) == 2 * 2 * 2 + 2  # variables, levels, leads, and the surface
    assert not summary.duplicated(["variable", "level", "lead_hours"]).any()
    line = summary.query("variable == 'temperature' and level == 850 and lead_hours == 12").iloc[0]
    same = "variable == 'temperature' and level == 850 and lead_hours == 12"
    assert line["rmse model"] == _row(table, "model", "rmse").query(same)["value"].item()
    assert (
        line["rmse persistence"] == _row(table, "persistence", "rmse").query(same)["value"].item()
    )
    ratio = _row(table, "model", "rmse_ratio_vs_climatology").query(same)
    assert line["ratio climatology high"] == ratio["high"].item()
    surface = summary[summary["variable"] == "surface_pressure"]
    assert surface["level"].isna().all()
    assert surface[["rmse model", "rmse climatology", "crps", "acc"]].notna().all(axis=None)


def test_console_and_markdown_show_each_row(table):
    summary = summarise(table)
    text = io.StringIO()
    print_summary(summary, Console(file=text, width=300), title="forecast")
    assert text.getvalue().count("temperature") == 4
    lines = to_markdown(summary).splitlines()
    assert len(lines) == 2 + len(summary)
    assert len({line.count("|") for line in lines}) == 1
    assert "ratio persistence low" not in lines[0]


def _maps(figure: Figure) -> dict[str, QuadMesh]:
    """Coloured cells by the title of their map."""
    return {axes.get_title(): axes.collections[0] for axes in figure.axes if axes.get_title()}


def test_map_has_input_truth_prediction_and_baseline_with_their_errors(example):
    figure = case_map("forecast", example, baseline="persistence", about="Given: the last state.")
    maps = _maps(figure)
    assert [title.partition(", RMSE")[0] for title in maps] == [
        "input 12 h before",
        "truth",
        "prediction (ensemble mean)",
        "baseline persistence",
        "error of the prediction",
        "error of the baseline persistence",
        "ensemble spread",
        "member 0",
        "member 1",
    ]
    heading = [text.get_text() for text in figure.texts]
    assert heading[0].startswith("forecast: u component of wind, 500 hPa, init 2020-01-01")
    assert heading[1] == "Given: the last state."
    weight = np.cos(np.deg2rad(example.truth["latitude"].values))[:, None] * np.ones(16)
    for field, start in (
        (example.prediction.mean("member"), "prediction (ensemble mean), RMSE "),
        (example.baselines["persistence"], "baseline persistence, RMSE "),
    ):
        rmse = np.sqrt(np.average((field - example.truth).values ** 2, weights=weight))
        (title,) = [title for title in maps if title.startswith(start)]
        assert float(title.removeprefix(start)) == pytest.approx(rmse, rel=0.01)
    assert png_bytes(figure, 40).startswith(b"\x89PNG")


def test_colours_of_a_map_reach_from_its_least_to_its_largest_value(example):
    spikes = example.prediction.copy()
    spikes[0, 2, 3], spikes[1, 5, 1] = 40.0, -30.0  # of members, of which the mean has a third
    maps = _maps(case_map("forecast", replace(example, prediction=spikes), baseline="persistence"))
    for title, cells in maps.items():
        values, (low, high) = np.asarray(cells.get_array()), cells.get_clim()
        assert low <= np.nanmin(values) and np.nanmax(values) <= high, title
    shared = {cells.get_clim() for title, cells in maps.items() if "error" not in title}
    spread = maps["ensemble spread"].get_clim()
    assert shared == {(-40.0, 40.0), spread} and spread[0] == 0.0
    errors = {cells.get_clim() for title, cells in maps.items() if title.startswith("error")}
    ((low, high),) = errors
    mean = spikes.mean("member")
    largest = max(
        np.abs(field - example.truth).values.max()
        for field in (mean, example.baselines["persistence"])
    )
    assert -low == high == pytest.approx(largest)


def test_an_input_of_another_field_has_its_own_colours_and_blanks_are_no_values(example):
    humidity = (0.01 * abs(example.truth)).rename("specific_humidity").assign_attrs(units="kg/kg")
    humidity[:3] = np.nan
    given = Given("input at the same time: humidity", humidity, is_predicted=False)
    maps = _maps(case_map("cross_variable", replace(example, given=given)))
    cells = maps[given.title]
    assert cells.get_clim() == (np.nanmin(humidity), np.nanmax(humidity))
    assert np.ma.count_masked(cells.get_array()) == cells.get_array().size * 3 // 8
    assert maps["truth"].get_clim()[1] > 100 * cells.get_clim()[1]


def test_map_title_tells_task_variable_level_and_times(example):
    assert case_title("forecast", example) == (
        "forecast: u component of wind, 500 hPa, init 2020-01-01 00:00 UTC, lead 12 h, "
        "valid 2020-01-01 12:00 UTC"
    )
    still = replace(example, prediction=example.truth.rename("t"))
    title = case_title("temporal_interpolation", still)
    assert title == "temporal interpolation: t, 500 hPa, valid 2020-01-01 12:00 UTC"


def test_map_of_one_member_has_no_spread_panel(example):
    single = Example(
        example.variable, example.level, example.truth, example.prediction.isel(member=0)
    )
    titles = [title.partition(", RMSE")[0] for title in _maps(case_map("forecast", single))]
    assert titles == ["truth", "prediction", "error of the prediction"]


def test_map_of_many_cases_is_an_error(example, dataset):
    with pytest.raises(ValueError, match="select time, lead and level first"):
        case_map("forecast", replace(example, truth=dataset()["temperature"]))


@pytest.mark.parametrize("west", [0.0, -180.0, -168.75, 3.0])
def test_every_cell_of_the_globe_is_drawn_at_its_place(west):
    longitude = (west + 22.5 * np.arange(16)) % 360.0
    field = xr.DataArray(
        np.repeat(np.sort(longitude)[None], 8, axis=0),
        {"latitude": -78.75 + 22.5 * np.arange(8), "longitude": np.sort(longitude)},
        ("latitude", "longitude"),
    )
    axes = Figure().add_subplot()
    mesh = draw_globe(axes, field, Scale("viridis", 0.0, 360.0))
    middle = mesh.get_array().shape[0] // 2
    drawn, edges = mesh.get_array()[middle], mesh.get_coordinates()[middle, :, 0]
    east = project(np.array([180.0]), np.array([0.0]))[0, 0]
    centres = (edges[:-1] + edges[1:]) / 2 / east * 180.0
    distance = (drawn - centres + 180.0) % 360.0 - 180.0
    assert np.abs(distance).max() <= 11.25 + 1e-3  # within the cell
    assert edges[0] == pytest.approx(-edges[-1])
    assert len(axes.collections) == 3  # cells, graticule, coastlines


def test_colours_of_errors_grow_with_the_root_of_the_error() -> None:
    norm = Scale("RdBu_r", -400.0, 400.0, rooted=True).norm()
    values = np.array([-400.0, -100.0, 0.0, 100.0, 225.0, 400.0])
    np.testing.assert_allclose(norm(values), [0.0, 0.25, 0.5, 0.75, 0.875, 1.0], atol=1e-12)
    np.testing.assert_allclose(norm.inverse(norm(values)), values, atol=1e-9)


def test_the_pictures_of_a_case_are_cut_out_of_one_drawing(example) -> None:
    """Every panel of the page equals the panel drawn alone, up to the loss of WebP."""
    drawn = draw_case("forecast", example, baseline="persistence")
    panels = case_panels(example, "persistence")
    assert list(drawn.panels) == [panel.title for panel in panels]
    assert drawn.whole.startswith(b"\x89PNG")
    for panel in panels:
        alone = pixels_of(panel_map(panel), 120).astype(float)
        cut = np.asarray(Image.open(io.BytesIO(drawn.panels[panel.title])).convert("RGB"), float)
        assert cut.shape == alone.shape
        assert np.abs(cut - alone).mean() < 6.0  # of 255


def test_coastlines_lie_on_the_globe_and_jump_nowhere():
    with np.load(Path(atmossl.__file__).parent / "assets" / "coastlines.npz") as stored:
        degrees, lengths = stored["centidegrees"] / 100.0, stored["lengths"]
    assert np.abs(degrees[:, 0]).max() <= 180.0
    assert np.abs(degrees[:, 1]).max() <= 90.0
    assert sum(lengths) == len(degrees) > 4000
    lines = np.split(degrees, np.cumsum(lengths)[:-1])
    assert max(np.abs(np.diff(line, axis=0)).max() for line in lines) < 25.0


def test_cards_colour_by_ratio_and_mark_what_is_open():
    colours = RatioColours.of([0.5, 1.0, 4.0, np.nan])
    row = {"value": 0.5, "low": 0.4, "high": 0.6, "p_value": 0.01}
    better = colours.cell(pd.DataFrame([row]))
    assert (better.text, better.open) == ("0.50", False)
    even = colours.cell(pd.DataFrame([row | {"value": 1.0, "low": 0.9, "high": 1.1}]))
    assert (even.colour, even.open) == ("rgb(255,255,255)", True)
    worse = colours.cell(pd.DataFrame([row | {"value": 4.0, "low": 2.0, "high": 5.0}]))
    assert (worse.colour, worse.dark) == ("rgb(178,24,43)", True)
    assert colours.cell(pd.DataFrame([row]).iloc[:0]).text == ""
    unknown = colours.cell(pd.DataFrame([row | {"low": np.nan, "high": np.nan}]))
    assert not unknown.open and "interval" not in unknown.title


def test_colours_of_cards_reach_to_the_ratio_furthest_from_one(table):
    """No two ratios on one side of 1 share a colour for being far from it."""
    report = _report(table)
    colours = colours_of([report])
    shown = table[(table["region"] == "global") & (table["season"] == "all")]
    ratios = shown[shown["score"].str.contains("ratio_vs")]["value"]
    furthest = np.abs(np.log(ratios)).max()
    assert colours.limit == pytest.approx(max(furthest, np.log(1.25)))
    shares = np.linspace(0.1, 1.0, 10) * colours.limit
    for sign in (-1.0, 1.0):
        cells = [colours.cell(pd.DataFrame({"value": [np.exp(sign * s)] * 2})) for s in shares]
        assert len({cell.colour for cell in cells}) == len(shares)
    first, *_, last = colours.legend()
    assert float(last.title) == pytest.approx(np.exp(colours.limit), abs=1e-4)
    assert float(first.title) == pytest.approx(np.exp(-colours.limit), abs=1e-4)


def _report(table: pd.DataFrame, **changes) -> TaskReport:
    overall = pd.DataFrame(
        [
            ("rmse_ratio", "persistence", 0.7, 0.6, 0.8, 0.01),
            ("rmse_ratio", "climatology", 0.9, 0.85, 0.95, 0.01),
            ("crps_ratio", "persistence", 0.5, 0.4, 0.6, 0.01),
            ("crps_ratio", "climatology", 0.625, 0.5, 0.7, 0.01),
            ("spread_skill", "", 1.04, 1.0, 1.1, 0.04),
        ],
        columns=["score", "baseline", "value", "low", "high", "p_value"],
    )
    filled = {
        "task": "forecast",
        "model_name": "model",
        "table": table,
        "overall": overall,
        "diagnosed": {},
        "examples": (),
        "about": "Given: the last state.",
        "spans": (Span("run", "2020-01-01T00", "2020-01-03T06"),),
    }
    return TaskReport(**filled | changes)


def test_verdict_names_the_best_baseline_and_says_how_sure_it_is(table):
    report = _report(table)

    def verdict(**changes: float) -> str:
        overall = report.overall.copy()
        for column, value in changes.items():
            overall.loc[1, column] = value
        return verdicts([_report(table, overall=overall)])["verdict"].item()

    row = verdicts([report]).iloc[0]
    assert list(row.index) == list(COLUMNS)
    assert row["best baseline"] == "climatology"
    assert row["RMSE ratio"] == "0.90 [0.85, 0.95]"
    assert row["CRPS ratio"] == "0.62 [0.50, 0.70]"
    assert row["spread / skill"] == "1.04 [1.00, 1.10]"
    assert row["verdict"].startswith("better: RMSE 10 % below that of climatology; ensemble ")
    calibration = calibration_table(table).query("source == 'model'")["verdict"]
    good, total = (calibration == "calibrated").sum(), len(calibration)
    assert f"calibrated in {good or 'none'} of {total} fields" in row["verdict"]
    assert verdict(high=1.02).startswith("no clear difference from climatology; ")
    worse = verdict(value=1.2, low=1.1, high=1.3)
    assert worse.startswith("worse: RMSE 20 % above that of climatology; ")
    few = verdict(low=np.nan, high=np.nan)
    assert few.startswith("RMSE 10 % below that of climatology (too few cases for an interval)")
    deterministic = table[~table["score"].isin(["spread_skill", "outlier_ratio"])]
    alone = _report(deterministic, overall=report.overall.iloc[:4])
    assert verdicts([alone])["verdict"].item() == "better: RMSE 10 % below that of climatology"


def test_a_page_begins_with_model_data_verdicts_and_one_map(table, example, tmp_path):
    report = _report(table, examples=(example,))
    summary = {"checkpoint": "mine.ckpt, digest abc", "trained on": "era5, 1979 to 2017",
               "scored on": "era5, split test"}  # fmt: skip
    write_report([report], Provenance("Tasks of mine", summary, "atmossl", {"a": "b"}), tmp_path)
    scores = pd.read_csv(tmp_path / "scores.csv")
    pd.testing.assert_frame_equal(scores, table, check_dtype=False)
    page = (tmp_path / "index.html").read_text()
    header = page[page.index("<header>") : page.index("</header>")]
    places = [header.index(text) for text in (*summary.values(), "<table", "<img")]
    assert places == sorted(places)
    assert "better: RMSE 10 % below that of climatology" in header
    pictures = re.findall(r'<img [^>]*alt="([^"]*)"', header)
    assert [alt.partition(":")[0].partition(",")[0] for alt in pictures] == [
        "input 12 h before",
        "truth",
        "prediction (ensemble mean)",
        "error of the prediction",
    ]
    assert all("forecast, u component of wind, 500 hPa" in alt for alt in pictures)
    markdown = (tmp_path / "summary.md").read_text()
    assert markdown.index("mine.ckpt, digest abc") < markdown.index("better: RMSE 10 %")


def test_calibrated_rows_are_folded_and_others_are_shown(table, tmp_path):
    table = table.copy()
    spread = (table["score"] == "spread_skill") & (table["region"] == "global")
    fine = spread & (table["variable"] == "temperature")
    for rows, value in ((spread, 2.0), (fine, 1.0)):
        table.loc[rows, ["value", "low", "high"]] = value
    outliers = table["score"] == "outlier_ratio"
    table.loc[outliers, ["value", "low", "high"]] = 1.0
    summary = {"checkpoint": "mine"}
    write_report([_report(table)], Provenance("t", summary, "atmossl", {}), tmp_path)
    page = (tmp_path / "index.html").read_text()
    section = page[page.index("<h3>calibration</h3>") : page.index("<h3>example cases</h3>")]
    shown, folded = section.split("<details>")
    assert shown.count(">over-dispersive<") == 6 and ">calibrated<" not in shown
    assert folded.count(">calibrated<") == 4 and ">over-dispersive<" not in folded
    assert "4 of 10 rows are calibrated" in folded


def test_calibration_is_told_from_both_signs():
    def rows(score, value, low, high):
        labels = {"task": "t", "source": "model", "variable": "v", "level": 500.0}
        labels |= {"lead_hours": np.nan, "region": "global", "season": "all"}
        return labels | {"score": score, "value": value, "low": low, "high": high}

    def verdict(spread, outliers):
        both = [rows("spread_skill", *spread), rows("outlier_ratio", *outliers)]
        return calibration_table(pd.DataFrame(both)).iloc[0]

    assert verdict((1.02, 0.98, 1.06), (1.0, 0.95, 1.05))["verdict"] == "calibrated"
    wide = verdict((2.0, 1.9, 2.1), (0.1, 0.05, 0.15))
    assert (wide["verdict"], wide["inflation"]) == ("over-dispersive", 0.5)
    assert verdict((0.6, 0.5, 0.7), (2, 1.9, 2.1))["verdict"] == "under-dispersive"
    assert verdict((1, 0.98, 1.02), (1.5, 1.3, 1.7))["verdict"] == "tails too light"
    assert verdict((0.6, np.nan, np.nan), (2, np.nan, np.nan))["verdict"] == "under-dispersive"


def test_scales_fit_the_field():
    kelvin = xr.DataArray(np.linspace(250.0, 300.0, 1001))
    wind = xr.DataArray(np.linspace(-20.0, 30.0, 1001))
    assert (field_scale(kelvin).low, field_scale(kelvin).high) == (250.0, 300.0)
    assert field_scale(wind, wind).low == -field_scale(wind, wind).high
    nothing = symmetric_scale(kelvin * 0.0)
    assert nothing.high > nothing.low


def test_curves_draw_each_source_with_its_interval(table):
    figures = [
        lead_curve(table, variable="temperature", level=500.0, score=score)
        for score in ("rmse", "acc")
    ]
    rmse, acc = (figure.axes[0] for figure in figures)
    assert [line.get_label() for line in rmse.lines] == ["model", "persistence", "climatology"]
    assert len(rmse.collections) == 3
    assert rmse.get_ylabel() == "RMSE (K)"
    assert "climatology" not in [line.get_label() for line in acc.lines]
    assert all(figure.legends for figure in figures)
    same = _row(table, "persistence", "rmse").query("variable == 'temperature' and level == 500")
    np.testing.assert_allclose(rmse.lines[1].get_ydata(), same["value"])


def test_curves_of_a_record_too_short_for_intervals_are_lines_only(table):
    bare = table.assign(low=np.nan, high=np.nan)
    assert png_bytes(lead_curve(bare, variable="temperature", level=500.0, score="rmse"), 120)


def test_spread_skill_curve_marks_a_reliable_ensemble(table):
    figure = lead_curve(table, variable="temperature", level=500.0, score="spread_skill")
    assert any(set(line.get_ydata()) == {1.0} for line in figure.axes[0].lines)


def test_units_are_set_as_formulas():
    assert units_text("m s**-1") == r"$\mathrm{m\,s^{-1}}$"
    assert units_text("K") == "K"
    assert score_label("spread_skill", "K") == "spread-skill ratio"


def test_no_figure_enters_pyplot_s_state(table):
    assert isinstance(
        lead_curve(table, variable="surface_pressure", level=None, score="rmse"), Figure
    )
    pyplot = matplotlib.pyplot if hasattr(matplotlib, "pyplot") else None
    assert pyplot is None or pyplot.get_fignums() == []


def test_names_with_markup_are_text_in_the_report(table, example, tmp_path):
    evil = {
        "temperature": "<img src=x onerror=alert(1)>",
        "forecast": "../<script>alert(2)</script>",
    }
    renamed = table.replace({**evil, "persistence": "<b>$\\frac{$</b>"})
    renamed["score"] = renamed["score"].str.replace("persistence", "<b>$\\frac{$</b>")
    truth, prediction = (
        array.rename(evil["temperature"]) for array in (example.truth, example.prediction)
    )
    shown = replace(
        example, variable=evil["temperature"], truth=truth, prediction=prediction,
        given=Given("<b>in</b>", example.truth, is_predicted=True), baselines={"<b>r</b>": truth},
    )  # fmt: skip
    report = TaskReport(
        task=evil["forecast"],
        model_name="model",
        table=renamed,
        overall=pd.DataFrame({"score": ["rmse_ratio"], "baseline": ["<b>r</b>"], "value": [1.0],
                              "low": [np.nan], "high": [np.nan], "p_value": [np.nan]}),
        diagnosed={},
        examples=(shown,),
        about="<i>about</i>",
        spans=(Span("<u>run</u>", "<u>first</u>", "last"),),
    )  # fmt: skip
    facts = {"seed": "<script>alert(3)</script>"}
    summary = {"checkpoint": "<script>alert(4)</script>"}
    folder = tmp_path / "in" / "report"
    write_report(
        [report], Provenance("<b>t</b>", summary, "atmossl evaluate '<script>'", facts), folder
    )
    page = (folder / "index.html").read_text()
    body = page[page.index("<body") :] if "<body" in page else page
    for raw in (
        "<img src=x",
        "<script>alert",
        "<b>$",
        "<b>r",
        "<b>t",
        "<b>in",
        "<i>about",
        "<u>first",
    ):
        assert raw not in body, raw
    assert "&lt;script&gt;alert(3)" in body and "&lt;img src=x" in body
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["report"]
    (picture,) = (folder / "maps").iterdir()
    assert picture.suffix == ".png"


@pytest.mark.parametrize("west", [-30.0, 160.0, 170.0, 20.0])
def test_a_region_is_drawn_in_one_piece(west):
    """Across Greenwich and the date line, whatever the order of its longitudes."""
    longitude = west + 5.0 * np.arange(9)
    stored = np.sort(longitude % 360.0)
    field = xr.DataArray(
        np.repeat(stored[None], 4, axis=0),
        {"latitude": 2.0 + np.arange(4.0), "longitude": stored},
        ("latitude", "longitude"),
    )
    axes = Figure().add_subplot()
    mesh = draw_globe(axes, field, Scale("viridis", 0.0, 360.0))
    edges = mesh.get_coordinates()[0, :, 0]
    widths = np.diff(edges)
    assert widths.min() > 0.95 * widths.max()
    np.testing.assert_allclose(mesh.get_array()[0], longitude % 360.0)
    east = project(np.array([180.0]), np.array([0.0]))[0, 0]
    assert edges[-1] - edges[0] < 46.0 / 180.0 * east
    lines = [path for path in axes.collections[2].get_paths() if len(path.vertices) > 1]
    assert max(np.abs(np.diff(path.vertices[:, 0])).max() for path in lines) < east / 4
