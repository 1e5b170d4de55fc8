"""The part of a report on single members."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from atmossl.evaluation.report.content import Example, Plume, Provenance, TaskReport
from atmossl.evaluation.report.maps import first_members
from atmossl.evaluation.report.members import (
    member_panels,
    most_varied,
    spread_rows,
    spread_table,
    what_members_are,
)
from atmossl.evaluation.report.panels import plume_panel
from atmossl.evaluation.report.plumes import plume_of
from atmossl.evaluation.report.write import write_report
from atmossl.names import ENSEMBLE
from tests.evaluation.conftest import STEP, make_dataset

SPREADS = {"spread_skill": (0.5, 2.0), "spread_skill_mean_4x4": (0.9, 0.4)}


def truth_and_members(num_members: int = 4) -> tuple[xr.DataArray, xr.DataArray]:
    """Some lead times of 32 x 64 cells, [lead_time, latitude, longitude]."""
    run = make_dataset(num_times=3, num_lat=32, num_lon=64)["temperature"].isel(level=0)
    run = run.rename(time="lead_time").assign_coords(lead_time=np.arange(1, 4) * STEP)
    noise = np.random.default_rng(1).standard_normal((num_members, *run.shape))
    return run, run + xr.DataArray(noise, dims=("member", *run.dims))


def example_with(num_members: int = 4, *, kind: str = "noise", size: float = 1.0) -> Example:
    truth, members = truth_and_members(num_members)
    prediction = truth + size * (members - truth)
    prediction = prediction.assign_coords(member=np.arange(num_members))
    prediction["member"].attrs[ENSEMBLE] = kind
    plume = plume_of(prediction, truth)
    last = {"lead_time": -1}
    name = f"wind_{size:g}"
    shown = prediction.isel(last).assign_coords(init_time=np.datetime64("2020-01-01", "ns"))
    return Example(name, 500.0, truth.isel(last), shown.rename(name), plume=plume)


def spreads_of(leads: tuple[float, ...] = (6.0, 12.0)) -> pd.DataFrame:
    """Rows of two variables, spread over error a tenth larger at each later lead time."""
    labels = {"task": "t", "source": "model", "region": "global", "season": "all", "units": "K"}
    labels |= {"low": np.nan, "high": np.nan, "p_value": np.nan, "num_times": 3, "level": 500.0}
    rows = [
        labels | {"score": score, "variable": name, "lead_hours": lead, "value": value * 1.1**n}
        for score, values in SPREADS.items()
        for name, value in zip("ab", values, strict=True)
        for n, lead in enumerate(leads)
    ]
    others = [row | {"source": "other", "value": 100.0} for row in rows]
    outside = [row | {"region": "tropics", "value": 100.0} for row in rows]
    return pd.DataFrame([*rows, *others, *outside])


def report_of(*examples: Example, leads: tuple[float, ...] = (6.0, 12.0)) -> TaskReport:
    columns = ["score", "baseline", "value", "low", "high", "p_value"]
    overall = pd.DataFrame([("spread_skill", "", 1.0, np.nan, np.nan, np.nan)], columns=columns)
    return TaskReport("t", "model", spreads_of(leads), overall, {}, examples, "About.", ())


@pytest.mark.parametrize("southwards", [False, True])
def test_a_plume_is_the_area_mean_of_the_cells_around_northern_europe(southwards: bool):
    truth, members = truth_and_members()
    rows = slice(None, None, -1) if southwards else slice(None)
    plume = plume_of(members.isel(latitude=rows), truth.isel(latitude=rows))
    assert plume is not None
    assert plume.place == "4 x 4 cells, 45 to 68 °N, 3 °W to 20 °E"
    np.testing.assert_array_equal(plume.positions, [6.0, 12.0, 18.0])
    box = {"latitude": slice(45.0, 67.5), "longitude": slice(0.0, 19.0)}
    edges = np.sin(np.deg2rad(45.0 + 5.625 * np.arange(5)))
    weights = xr.DataArray(np.diff(edges), dims="latitude")

    def mean(field: xr.DataArray) -> np.ndarray:
        cells = field.sel(box)
        assert cells.sizes["latitude"] == cells.sizes["longitude"] == 4
        return (cells * weights).sum("latitude").mean("longitude").to_numpy() / weights.sum().item()

    np.testing.assert_allclose(plume.truth, mean(truth), atol=1e-6)
    np.testing.assert_allclose(plume.members, mean(members), atol=1e-6)


def test_without_lead_times_there_is_a_row_of_boxes_of_which_only_hidden_ones_are_drawn():
    truth, members = (field.isel(lead_time=0, drop=True) for field in truth_and_members())
    hidden = np.zeros(truth.shape, dtype=bool)
    hidden[3:9, 7:17] = True  # two whole boxes of 4 x 4 cells, in the far south
    plume = plume_of(members, truth, xr.DataArray(hidden, dims=truth.dims))
    assert plume is not None and plume.place == "4 x 4 cells, 68 to 45 °S"
    drawn = np.isfinite(plume.truth)
    np.testing.assert_allclose(plume.positions[drawn], [9.5 * 5.625, 13.5 * 5.625])
    np.testing.assert_array_equal(np.isfinite(plume.members).all(axis=1), drawn)
    nothing_whole = xr.DataArray(np.eye(32, 64, dtype=bool), dims=truth.dims)
    assert plume_of(members, truth, nothing_whole) is None
    assert plume_of(members.isel(member=[0]), truth) is None


def test_boxes_lie_across_the_blocks_whose_means_were_given():
    """Members that have every given mean differ in such boxes."""
    truth, members = (field.isel(lead_time=0, drop=True) for field in truth_and_members())
    rows = np.cos(np.deg2rad(truth["latitude"].to_numpy()))  # proportional to the area of a cell
    members = members.transpose("member", ...)
    weighted = ((members - truth).to_numpy() * rows[:, None]).reshape(4, 8, 4, 16, 4)
    error = weighted.mean(axis=(2, 4)) / rows.reshape(8, 4).mean(axis=1)[:, None]
    given = members - xr.DataArray(np.kron(error, np.ones((4, 4))), dims=members.dims)
    across, along = (plume_of(given, truth, box_shift=shift) for shift in (2, 0))
    assert across is not None and along is not None
    np.testing.assert_allclose(along.members.T, np.tile(along.truth, (4, 1)), atol=1e-5)
    assert across.place == "4 x 4 cells, 34 to 56 °N"
    np.testing.assert_allclose(across.positions[0] - along.positions[0], 2 * 5.625)
    assert float(across.members.std(axis=1).min()) > 0.01


def test_fine_grids_have_boxes_of_8_by_8_cells():
    truth = make_dataset(num_times=1, num_lat=64, num_lon=128)["temperature"].isel(level=0, time=0)
    plume = plume_of(xr.concat([truth, truth + 1.0], "member"), truth)
    assert plume is not None and plume.place.startswith("8 x 8 cells")
    np.testing.assert_allclose(plume.members - plume.truth[:, None], [[0.0, 1.0]] * 16, atol=1e-5)


def test_members_are_their_mean_and_a_departure_from_it():
    example = example_with()
    panels = {panel.title: panel for panel in member_panels(example)}
    assert len(panels) == 9
    mean = panels["ensemble mean"].field
    for name in ("truth", "member 0", "member 1", "member 2"):
        departure = panels[f"{name} minus ensemble mean"]
        np.testing.assert_allclose(mean + departure.field, panels[name].field, atol=1e-6)
        assert departure.scale == panels["truth minus ensemble mean"].scale
        assert panels[name].scale == panels["truth"].scale
    hidden = xr.DataArray(np.eye(32, 64, dtype=bool), dims=("latitude", "longitude"))
    shown = member_panels(replace(example, hidden=hidden))
    assert int(shown[2].field.notnull().sum()) == 32
    assert len(member_panels(example_with(2))) == 7


def test_the_variable_whose_members_differ_most_is_shown():
    small, large = example_with(size=0.5), example_with(size=2.0)
    assert most_varied([small, large, small]) is large


def test_spread_over_error_is_a_geometric_mean_with_its_ends():
    table = spread_table(report_of())
    assert list(table["quantity"].unique()) == ["single values", "means over 4 x 4 cells"]
    first = table[table["lead_hours"] == 6.0].set_index("quantity")
    np.testing.assert_allclose(first.loc["single values", ["value", "low", "high"]].astype(float),
                               [1.0, 0.5, 2.0])  # fmt: skip
    np.testing.assert_allclose(first.loc["means over 4 x 4 cells", "value"], 0.6)
    rows = spread_rows(table)
    assert rows["columns"] == ["6 h", "12 h"]
    assert rows["rows"][0]["cells"] == ["1.00 (0.50 to 2.00)", "1.10 (0.55 to 2.20)"]


def test_a_long_forecast_has_some_columns_and_no_lead_time_has_one():
    many = spread_rows(spread_table(report_of(leads=tuple(6.0 * n for n in range(1, 41)))))
    assert many["columns"] == [f"{6 + 42 * n} h" for n in range(6)]
    single = spread_rows(spread_table(report_of(leads=(np.nan,))))
    assert single["columns"] == ["spread over error"]
    assert [row["cells"] for row in single["rows"]] == [
        ["1.00 (0.50 to 2.00)"],
        ["0.60 (0.40 to 0.90)"],
    ]


def test_a_page_says_whether_members_are_fields(tmp_path):
    def members_of(*examples: Example) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_report([report_of(*examples)], Provenance("p", {}, "atmossl", {}), folder)
        page = (folder / "index.html").read_text()
        section = page[page.index("<section>") :]
        return section.partition("<h3>members</h3>")[2].partition("<h3>example cases</h3>")[0]

    draws = members_of(example_with(), example_with(size=0.5))
    assert "A member is one draw, a whole field" in draws
    assert draws.count('alt="member ') == 6  # three of them, and their departures from the mean
    assert draws.count('alt="means over boxes') == 2
    assert draws.count('alt="spread over error') == 1
    assert "1.00 (0.50 to 2.00)" in draws
    tail = members_of(example_with(kind="tail"))
    assert "not a field of weather" in tail and "whole field" not in tail
    assert members_of(example_with(1)) == ""


def test_members_without_a_kind_are_taken_for_draws():
    example = example_with()
    example.prediction["member"].attrs.clear()
    assert what_members_are(example).startswith("A member is one draw")


@pytest.mark.parametrize(
    ("there", "is_joined"),
    [([0, 1], False), ([0, 1, 2], False), ([0, 1, 2, 3], True), ([0, 1, 4, 5, 6], False),
     ([0, 3, 4, 5, 6], True)],
)  # fmt: skip
def test_few_neighbours_are_drawn_as_markers_not_as_a_course(there: list[int], is_joined: bool):
    truth = np.full(8, np.nan)
    truth[there] = 1.0
    plume = Plume("boxes", "lead time (h)", np.arange(8.0), truth[:, None] + np.arange(4), truth)
    (axes,) = plume_panel(plume, "title", "K").axes
    lines = axes.get_lines()
    assert len(lines) == 4 + 2
    assert {line.get_linestyle() != "None" for line in lines} == {is_joined}
    if not is_joined:  # else a value without neighbours could not be seen
        assert all(line.get_marker() not in ("None", "", None) for line in lines)
    if len(there) < 4:
        np.testing.assert_array_equal(axes.get_xticks(), there)


def test_members_are_numbered_as_in_files_and_as_they_are_asked_for() -> None:
    _, members = truth_and_members()
    chosen = members.isel(member=[1, 3], lead_time=0).assign_coords(member=[1, 3])
    assert list(first_members(chosen, 3)) == ["member 1", "member 3"]
    assert list(first_members(chosen.drop_vars("member"), 1)) == ["member 0"]


def test_a_plume_of_shifted_boxes_starts_further_north_and_east() -> None:
    truth, members = truth_and_members()
    plain, shifted = (plume_of(members, truth, box_shift=shift) for shift in (0, 2))
    cut = {dim: slice(2, None) for dim in ("latitude", "longitude")}
    further = plume_of(members.isel(cut), truth.isel(cut))
    assert plain and shifted and further
    assert shifted.place == further.place != plain.place
    np.testing.assert_allclose(shifted.members, further.members, rtol=1e-6)
