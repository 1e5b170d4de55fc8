import io
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure
from rich.console import Console

import atmossl
from atmossl.evaluation.baselines import climatology_forecast, persistence
from atmossl.evaluation.bootstrap import BlockBootstrap
from atmossl.evaluation.calibration import calibration_table
from atmossl.evaluation.climate import Climate
from atmossl.evaluation.report.cards import ratio_cell
from atmossl.evaluation.report.content import Example, Provenance, TaskReport
from atmossl.evaluation.report.curves import lead_curves, spread_skill_curve
from atmossl.evaluation.report.figures import save_figure, score_label, units_text
from atmossl.evaluation.report.globe import Scale, draw_globe, project
from atmossl.evaluation.report.maps import case_map, case_title, field_scale, symmetric_scale
from atmossl.evaluation.report.tables import (
    print_summary,
    summarise,
    to_markdown,
    write_csv,
)
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
def case(dataset) -> tuple[xr.DataArray, xr.DataArray]:
    truth = dataset(num_times=12)
    name = "u_component_of_wind"
    prediction = _ensemble(truth)[name].isel(init_time=0, lead_time=1, level=0)
    return truth[name].isel(time=2, level=0), prediction


def _row(table: pd.DataFrame, source: str, score: str) -> pd.DataFrame:
    return table[(table["source"] == source) & (table["score"] == score)]


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


def test_summary_of_unknown_region_or_model_is_an_error(table):
    with pytest.raises(ValueError, match="region 'moon'.*global"):
        summarise(table, region="moon")
    with pytest.raises(ValueError, match="source 'best'.*model"):
        summarise(table, model_name="best")


def test_console_and_markdown_show_each_row(table):
    summary = summarise(table)
    text = io.StringIO()
    print_summary(summary, Console(file=text, width=300), title="forecast")
    assert text.getvalue().count("temperature") == 4
    lines = to_markdown(summary).splitlines()
    assert len(lines) == 2 + len(summary)
    assert len({line.count("|") for line in lines}) == 1
    assert "ratio persistence low" not in lines[0]


def test_files_are_not_overwritten_silently(table, tmp_path):
    path = tmp_path / "deep" / "scores.csv"
    write_csv(table, path)
    pd.testing.assert_frame_equal(pd.read_csv(path), table, check_dtype=False)
    with pytest.raises(FileExistsError, match=r"scores\.csv exists"):
        write_csv(table, path)
    write_csv(table.head(3), path, overwrite=True)
    assert len(pd.read_csv(path)) == 3
    assert [each.name for each in path.parent.iterdir()] == ["scores.csv"]  # nothing half done


def test_map_shares_colours_and_centres_the_error(case, tmp_path):
    truth, prediction = case
    figure = case_map(truth, prediction)
    meshes = [axes.collections[0] for axes in figure.axes if axes.get_title()]
    limits = [mesh.get_clim() for mesh in meshes]
    assert len(meshes) == 4
    assert limits[0] == limits[1]
    assert limits[2][0] == -limits[2][1]
    assert limits[3][0] == 0.0
    path = save_figure(figure, tmp_path / "map.png", dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError):
        save_figure(figure, path)


def test_map_title_tells_variable_level_and_times(case):
    assert case_title(*case) == (
        "u component of wind, 500 hPa, init 2020-01-01 00:00 UTC, lead 12 h, "
        "valid 2020-01-01 12:00 UTC"
    )
    truth, _ = case
    assert case_title(truth, truth.rename("t")) == "t, 500 hPa, valid 2020-01-01 12:00 UTC"


def test_map_of_one_member_has_no_spread_panel(case):
    truth, prediction = case
    figure = case_map(truth, prediction.isel(member=0))
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        "truth",
        "prediction",
        "error (prediction minus truth)",
    ]


def test_map_of_many_cases_is_an_error(case, dataset):
    _, prediction = case
    with pytest.raises(ValueError, match="select time, lead and level first"):
        case_map(dataset()["temperature"], prediction)


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


def test_coastlines_lie_on_the_globe_and_jump_nowhere():
    with np.load(Path(atmossl.__file__).parent / "assets" / "coastlines.npz") as stored:
        degrees, lengths = stored["centidegrees"] / 100.0, stored["lengths"]
    assert np.abs(degrees[:, 0]).max() <= 180.0
    assert np.abs(degrees[:, 1]).max() <= 90.0
    assert sum(lengths) == len(degrees) > 4000
    lines = np.split(degrees, np.cumsum(lengths)[:-1])
    assert max(np.abs(np.diff(line, axis=0)).max() for line in lines) < 25.0


def test_cards_colour_by_ratio_and_mark_what_is_open():
    row = {"value": 0.5, "low": 0.4, "high": 0.6, "p_value": 0.01}
    better = ratio_cell(pd.DataFrame([row]))
    assert (better.text, better.colour, better.open) == ("0.50", "rgb(33,102,172)", False)
    even = ratio_cell(pd.DataFrame([row | {"value": 1.0, "low": 0.9, "high": 1.1}]))
    assert (even.colour, even.open) == ("rgb(255,255,255)", True)
    worse = ratio_cell(pd.DataFrame([row | {"value": 3.0, "low": 2.0, "high": 4.0}]))
    assert (worse.colour, worse.dark) == ("rgb(178,24,43)", True)
    assert ratio_cell(pd.DataFrame([row]).iloc[:0]).text == ""
    unknown = ratio_cell(pd.DataFrame([row | {"low": np.nan, "high": np.nan}]))
    assert not unknown.open and "interval" not in unknown.title


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
    assert field_scale(kelvin, kelvin).low == pytest.approx(250.5)
    assert field_scale(wind, wind).low == -field_scale(wind, wind).high
    nothing = symmetric_scale(kelvin * 0.0)
    assert nothing.high > nothing.low


def test_curves_draw_each_source_with_its_interval(table):
    figure = lead_curves(table, variable="temperature", level=500.0)
    rmse, _, acc = figure.axes
    assert [line.get_label() for line in rmse.lines] == ["model", "persistence", "climatology"]
    assert len(rmse.collections) == 3
    assert rmse.get_ylabel() == "RMSE (K)"
    assert "climatology" not in [line.get_label() for line in acc.lines]
    assert figure.legends
    same = _row(table, "persistence", "rmse").query("variable == 'temperature' and level == 500")
    np.testing.assert_allclose(rmse.lines[1].get_ydata(), same["value"])


def test_curve_without_lead_time_is_a_point_per_source(table):
    hour = table[table["lead_hours"] == 6.0].assign(lead_hours=np.nan)
    figure = lead_curves(hour, variable="surface_pressure", scores=("rmse",))
    assert len(figure.axes[0].containers) == 3


def test_curves_of_a_record_too_short_for_intervals_are_lines_only(table, tmp_path):
    bare = table.assign(low=np.nan, high=np.nan)
    save_figure(lead_curves(bare, variable="temperature", level=500.0), tmp_path / "lines.png")
    points = bare[bare["lead_hours"] == 6.0].assign(lead_hours=np.nan)
    save_figure(lead_curves(points, variable="surface_pressure"), tmp_path / "points.png")


def test_spread_skill_curve_marks_a_reliable_ensemble(table, tmp_path):
    figure = spread_skill_curve(table, variable="temperature", level=500.0)
    assert any(set(line.get_ydata()) == {1.0} for line in figure.axes[0].lines)
    assert save_figure(figure, tmp_path / "curve.png").exists()
    with pytest.raises(ValueError, match=r"\.png"):
        save_figure(figure, tmp_path / "curve.pdf")


def test_curve_of_unknown_variable_or_level_is_an_error(table):
    with pytest.raises(ValueError, match="variable 'ozone'.*temperature"):
        lead_curves(table, variable="ozone")
    with pytest.raises(ValueError, match="level 10"):
        lead_curves(table, variable="temperature", level=10.0)


def test_units_are_set_as_formulas():
    assert units_text("m s**-1") == r"$\mathrm{m\,s^{-1}}$"
    assert units_text("K") == "K"
    assert score_label("spread_skill", "K") == "spread-skill ratio"


def test_no_figure_enters_pyplot_s_state(table):
    assert isinstance(lead_curves(table, variable="temperature", level=500.0), Figure)
    pyplot = matplotlib.pyplot if hasattr(matplotlib, "pyplot") else None
    assert pyplot is None or pyplot.get_fignums() == []


def test_names_with_markup_are_text_in_the_report(table, case, tmp_path):
    evil = {
        "temperature": "<img src=x onerror=alert(1)>",
        "forecast": "../<script>alert(2)</script>",
    }
    renamed = table.replace({**evil, "persistence": "<b>$\\frac{$</b>"})
    renamed["score"] = renamed["score"].str.replace("persistence", "<b>$\\frac{$</b>")
    truth, prediction = (array.rename(evil["temperature"]) for array in case)
    report = TaskReport(
        task=evil["forecast"],
        model_name="model",
        table=renamed,
        overall=pd.DataFrame({"score": ["rmse_ratio"], "baseline": ["<b>r</b>"], "value": [1.0],
                              "low": [np.nan], "high": [np.nan], "p_value": [np.nan]}),
        diagnosed={},
        examples=(Example(evil["temperature"], 500.0, truth, prediction),),
        about="<i>about</i>",
        period="<u>period</u>",
    )  # fmt: skip
    facts = {"what": "a test", "checkpoint": "<script>alert(3)</script>"}
    folder = tmp_path / "in" / "report"
    write_report([report], Provenance("atmossl evaluate '<script>'", facts), folder)
    page = (folder / "index.html").read_text()
    body = page[page.index("<body") :] if "<body" in page else page
    for raw in ("<img src=x", "<script>alert", "<b>$", "<b>r", "<i>about", "<u>period"):
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
