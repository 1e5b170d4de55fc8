"""What every task shows the network, what it writes, and how members go on in a rollout."""

from dataclasses import replace
from itertools import pairwise
from operator import attrgetter

import numpy as np
import pytest
import torch
import xarray as xr

from atmossl.batch import PRIMARY
from atmossl.geometry import gaussian_latitudes
from atmossl.inference.plan import Plan
from atmossl.inference.regions import read_cell_mask, read_stations
from atmossl.inference.tiles import predict_parts
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.places import AllButStations, CellMask, CrossVariable, Inpainting, LatLonBox
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, Task, TemporalInterpolation
from tests.inference.oracle_models import (
    NAMES,
    STORE,
    Diffusing,
    Known,
    Oracle,
    predictor,
    run_at,
    segment,
)
from tests.synthetic import dataset, spec

BOX = LatLonBox(-40, 20, 300, 100)  # across Greenwich
TWO_STREAMS = (
    spec("t", variables=NAMES[:1], token=(1, 2, 2)),
    spec("u", variables=NAMES[1:], token=(1, 4, 4)),
)


class Spy(Oracle):
    """Returns the truth, and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.known = Known(attrgetter("target"))

    def forward(self, view):
        for stream in view.streams:
            self.seen += [stream.source, stream.guess, stream.grid.time_hours, stream.grid.lat]
        return self.known(view)


def hidden_in_store(task: Task) -> np.ndarray:
    """True [time lat lon] for the points of the whole store that a window at step 6 hides."""
    hidden = np.zeros((12, 8, 16), bool)
    cells = BOX.contains(STORE.latitude.values, STORE.longitude.values)
    match task:
        case Forecast():
            hidden[7:] = True
        case Hindcast():
            hidden[:6] = True
        case TemporalInterpolation():
            hidden[6] = True
        case Inpainting(hidden_hours=None):
            hidden[:, cells] = True
        case Inpainting(hidden_hours=hours):
            hidden[7 - int(hours) // 6 : 7, cells] = True
        case Combined():
            hidden[7:] = True
            hidden[:, cells] = True
    return hidden


@pytest.mark.parametrize(
    "task",
    [
        Forecast(12),
        Hindcast(12),
        TemporalInterpolation(6),
        Inpainting((BOX,)),
        Inpainting((BOX,), hidden_hours=6),
        Inpainting((BOX,), hidden_hours=12),
        Combined((Forecast(12), Inpainting((BOX,)))),
    ],
    ids=lambda task: type(task).__name__,
)
def test_nothing_hidden_is_seen(task: Task) -> None:
    """Other values where the task hides leave all that the network sees as it is."""
    spies = []
    changed = STORE.copy(deep=True)
    where = np.broadcast_to(hidden_in_store(task)[:, None], STORE["temperature"].shape)
    assert where.any() and not where.all()
    for name in NAMES:
        changed[name].values[where] += 7
    for store in (STORE, changed):
        spies.append(Spy())
        run_at(predictor(task, spies[-1], store=store, specs=TWO_STREAMS, window=(5, 8, 8)), 6)
    assert len(spies[0].seen) == len(spies[1].seen) > 0
    assert all(torch.equal(a, b) for a, b in zip(spies[0].seen, spies[1].seen, strict=True))


def test_cross_variable_hides_one_stream_and_needs_no_value_of_it() -> None:
    spies = []
    changed = STORE.copy(deep=True)
    changed["u_component_of_wind"] += 7
    for store in (STORE, changed):
        spies.append(Spy())
        used = predictor(
            CrossVariable(variables=NAMES[1:]), spies[-1], store=store, specs=TWO_STREAMS
        )
        fields = run_at(used, 6)
        truth = store["temperature"].values[6]  # given, so written as it is, in every member
        np.testing.assert_allclose(fields["temperature"][0, 0], truth, atol=2e-5)
        np.testing.assert_allclose(fields["temperature"][0, 1], truth, atol=2e-5)
        assert (fields["u_component_of_wind"][0, 0] < fields["u_component_of_wind"][0, 1]).all()
    assert all(torch.equal(a, b) for a, b in zip(spies[0].seen, spies[1].seen, strict=True))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (CrossVariable(variables=NAMES[:1]), "share tokens of stream air with other variables"),
        (CrossVariable(variables=("ozone",)), "ozone"),
        (CrossVariable(levels=(400,)), "400"),
        (CrossVariable(variables=NAMES), "leave at least one of them visible"),
        (Forecast(9), "no multiple of the data's step of 6 h"),
        (Forecast(30), "hides every one of the window's 5 steps"),
        (Forecast(48, 30), "rollout_time"),
        (Hindcast(30), "lead_time"),
        (TemporalInterpolation(6, steps=(0, 1)), "valid: 1 to 3"),
        (TemporalInterpolation(7), "hidden_time=7 h is no multiple"),
        (Inpainting((BOX,), hidden_hours=36), "longer than the window's 5 steps"),
        (Counterfactual(Forecast(6), levels=((510, 300),)), r"levels=\[510\] .*valid: 300, 500"),
        (Downscaling(3), r"task\.factor=3 does not .* 8 x 16 cells; valid: 2, 4, 8$"),
        (Inpainting((LatLonBox(10.0, 10.5, 0, 360),)), "holds no centre"),
        (Counterfactual(Forecast(6), shift_lat=45.0), "across a pole"),
    ],
)
def test_what_cannot_be_done_is_named(task: Task, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_at(predictor(task, Known(attrgetter("target"))), 6)


@pytest.mark.parametrize("key", ["consistent", "coarse_input"])
def test_a_union_takes_no_choice_that_it_would_drop(key: str) -> None:
    with pytest.raises(ValueError, match=rf"task\.parts\.0\.{key}=true"):
        Combined((Downscaling(2, **{key: True}), Inpainting((BOX,))))


@pytest.mark.parametrize("region", [BOX, AllButStations(0.3, seed=4)])
def test_inpainting_writes_given_cells_as_they_are(region) -> None:
    cells = region.contains(STORE.latitude.values, STORE.longitude.values)
    assert 0.1 < cells.mean() < 0.9
    used = predictor(Inpainting((region,)), Known(attrgetter("target"), (-3.0, 5.0)))
    fields = run_at(used, 6)["temperature"][0]  # [member level lat lon]
    truth = np.broadcast_to(STORE["temperature"].values[6], fields.shape)
    np.testing.assert_allclose(fields[..., ~cells], truth[..., ~cells], atol=2e-5)
    assert (np.abs(fields - truth)[..., cells] > 1e-2).all()


def test_stations_are_the_same_whatever_window_looks() -> None:
    region = AllButStations(0.2, seed=1)
    lat, lon = np.arange(-90, 90.1, 0.25), np.arange(0, 360, 0.25)
    whole = region.contains(lat, lon)
    part = region.contains(
        lat[100:200].astype(np.float32), (lon[1400:] - 360).astype(np.float32) % 360
    )
    np.testing.assert_array_equal(part, whole[100:200, 1400:])
    assert (~whole).mean() == pytest.approx(0.2, abs=0.005)  # six standard errors
    assert (region.contains(lat, lon) != AllButStations(0.2, seed=2).contains(lat, lon)).any()


def test_box_runs_eastwards_from_west_to_east() -> None:
    lat, lon = np.array([-50.0, 0.0, 50.0]), np.array([0.0, 90.0, 180.0, 270.0, 350.0])
    found = LatLonBox(-10, 60, 300, 100).contains(lat, lon)
    np.testing.assert_array_equal(found[0], False)
    np.testing.assert_array_equal(found[1], [True, True, False, False, True])
    assert LatLonBox(-90, 90, -180, 180).contains(lat, lon).all()
    rounded = np.array([20.1, 40.3]).astype(np.float32)  # of which one is larger
    assert LatLonBox(20.1, 40.3, 20.1, 40.3).contains(rounded, rounded).all()


def test_mask_file_hides_its_cells_whatever_its_order(tmp_path) -> None:
    cells = BOX.contains(STORE.latitude.values, STORE.longitude.values)
    mask = xr.DataArray(
        cells.astype(np.int8),
        coords={"lat": STORE.latitude.values, "lon": STORE.longitude.values},
        name="gap",
    )
    mask.isel(lat=slice(None, None, -1)).to_netcdf(tmp_path / "gap.nc")
    region = read_cell_mask(tmp_path / "gap.nc")
    region.check(segment().grid)
    found = region.contains(STORE.latitude.values[2:5], STORE.longitude.values[[15, 0, 1]])
    np.testing.assert_array_equal(found, cells[2:5][:, [15, 0, 1]])
    west = mask.isel(lon=[14, 15, 0, 1])  # of a region across Greenwich
    west.to_netcdf(tmp_path / "west.nc")
    edge = read_cell_mask(tmp_path / "west.nc")
    np.testing.assert_array_equal(edge.hidden, cells[:, [14, 15, 0, 1]])
    np.testing.assert_array_equal(edge.grid.longitude, [315.0, 337.5, 360.0, 382.5])
    (tmp_path / "stations.csv").write_text("latitude,longitude\n11.0,-1\n56.5,91\n")
    stations = read_stations(tmp_path / "stations.csv")
    assert len(repr(region)) + len(repr(stations)) < 400  # they stand in every output
    seen = ~stations.contains(STORE.latitude.values, STORE.longitude.values)
    np.testing.assert_array_equal(np.argwhere(seen), [[4, 0], [6, 4]])


def test_files_that_do_not_fit_are_named(tmp_path) -> None:
    other = dataset(num_lat=4)
    mask = CellMask(segment(other).grid, np.ones((4, 16), bool), "task.mask_file=gap.nc")
    with pytest.raises(ValueError, match=r"gap.nc.*: 4 latitudes .*, not 8 latitudes"):
        run_at(predictor(Inpainting((mask,)), Known(attrgetter("target"))), 6)
    nothing = replace(mask, grid=segment().grid, hidden=np.zeros((8, 16), bool))
    with pytest.raises(ValueError, match="gap.nc hides no cell"):
        nothing.check(segment().grid)
    STORE.to_netcdf(tmp_path / "fields.nc")
    one = STORE["temperature"].isel(time=0, level=0)
    one.where(one > 280).to_netcdf(tmp_path / "holes.nc")
    one.drop_vars("latitude").to_netcdf(tmp_path / "bare.nc")
    (tmp_path / "junk.nc").write_text("no NetCDF")
    (tmp_path / "stations.csv").write_text("lat,lon\n1,2\n")
    (tmp_path / "beyond.csv").write_text("latitude,longitude\n1,2\n95,3\n")
    for read, name, message in (
        (read_cell_mask, "none.nc", "does not exist"),
        (read_cell_mask, "fields.nc", "one variable on"),
        (read_cell_mask, "holes.nc", "has missing values"),
        (read_cell_mask, "bare.nc", r"no values of latitude;"),
        (read_cell_mask, "junk.nc", r"cannot be read as NetCDF or zarr: .*$"),
        (read_stations, "none.csv", "does not exist"),
        (read_stations, "stations.csv", r"not among lat, lon"),
        (read_stations, "beyond.csv", "station 2 at latitude 95"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


def members_of(used: Plan, step: int, name: str = "temperature") -> np.ndarray:
    return run_at(used, step)[name]  # [step member level lat lon]


def test_rollout_continues_every_member_by_its_own() -> None:
    """A network that adds fixed numbers to the last state: in each pass every member goes on from
    its own state, and each number is taken by one member."""
    offsets = (-1.0, 0.5, 2.0)
    used = predictor(Forecast(24, 6), Known(attrgetter("guess"), offsets))
    assert used.steps.offsets == (1, 2, 3, 4) and used.steps.num_passes == 4
    fields = members_of(used, 6)
    scale = used.trained.normaliser.statistics[PRIMARY].std[0][:, None, None]
    states = [np.broadcast_to(STORE["temperature"].values[6], fields[0].shape), *fields]
    steps = [(after - before) / scale for before, after in pairwise(states)]
    orders = []
    for step in steps:
        np.testing.assert_allclose(step.std(axis=(1, 2, 3)), 0, atol=1e-4)
        taken = step.mean(axis=(1, 2, 3))
        np.testing.assert_allclose(sorted(taken), offsets, atol=1e-4)
        orders.append(tuple(taken.round(1)))
    assert len(set(orders)) > 1  # not the same member each time
    np.testing.assert_array_equal(members_of(used, 6), fields)  # by seed alone


def test_rollout_members_diffuse_as_far_where_tiles_overlap_as_in_one() -> None:
    """Variances of independent Gaussian steps add up: k after k passes."""
    used = predictor(Forecast(12, 6), Diffusing(12), window=(5, 4, 8), batch_size=100)
    assert len(used.tiles.tiles) > 8  # every cell lies in several
    scale = used.trained.normaliser.statistics[PRIMARY].std[0][:, None, None]
    variance = (members_of(used, 6) / scale).var(axis=1, ddof=1).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(variance, [1, 2], rtol=0.1)


@pytest.mark.parametrize(("lead", "rollout"), [(30, 12), (18, 18), (24, 6)])
def test_rollout_writes_all_lead_times(lead: float, rollout: float) -> None:
    """Persistence stays persistence over any number of passes."""
    used = predictor(Forecast(lead, rollout), Known(attrgetter("guess"), (0.0, 0.0)))
    for name, fields in run_at(used, 7).items():
        assert fields.shape[0] == lead / 6
        expected = np.broadcast_to(STORE[name].values[7], fields.shape)
        np.testing.assert_allclose(fields, expected, atol=5e-5)


def test_rollout_shows_the_network_dates_that_go_on() -> None:
    class Clock(Spy):
        def forward(self, view):
            self.seen.append(view.streams[0].grid.time_hours)
            return self.known(view)

    clock = Clock()
    used = predictor(Forecast(24, 12), clock, batch_size=100)
    run_at(used, 6)
    start = used.segment.time_hours(6, 1)[0]
    first, *rest = (times[0].numpy() - start for times in clock.seen)
    np.testing.assert_allclose(first, [-12, -6, 0, 6, 12])
    for times in rest:
        np.testing.assert_allclose(times, [0, 6, 12, 18, 24])


def test_refining_gives_the_line_between_the_steps() -> None:
    """Of a record that is linear in time, the first guess is exact at any step between."""
    slope = xr.ones_like(STORE) * (STORE.time - STORE.time[0]) / np.timedelta64(6, "h")
    store = (STORE.isel(time=0, drop=True) + slope.astype(np.float32)).astype(np.float32)
    store = store.transpose("time", "level", "latitude", "longitude")
    used = predictor(
        TemporalInterpolation(6, refine=3), Known(attrgetter("guess"), (0.0,)), store=store
    )
    assert used.step == np.timedelta64(2, "h")
    fields = members_of(used, 5)
    expected = store["temperature"].values[5] + np.arange(3)[:, None, None, None, None] / 3
    np.testing.assert_allclose(fields, expected, atol=1e-4)


def coarse_store() -> xr.Dataset:
    """4 x 8 cells, exact area means of the waves."""
    weight = xr.DataArray(segment().grid.weights, dims="latitude")
    blocks = {"latitude": 2, "longitude": 2}
    total = (STORE * weight).coarsen(blocks).sum() / (xr.ones_like(STORE) * weight).coarsen(
        blocks
    ).sum()
    return total.astype(np.float32)


def test_a_coarse_store_gives_what_coarsening_gives() -> None:
    model = Known(attrgetter("source"), (0.0,))
    fine = predictor(Downscaling(2), model)
    coarse = predictor(Downscaling(2, coarse_input=True), model, store=coarse_store())
    assert coarse.grid.matches(fine.grid)
    np.testing.assert_allclose(members_of(coarse, 6), members_of(fine, 6), atol=5e-5)


@pytest.mark.parametrize(
    "latitude", [gaussian_latitudes(4)[0], np.linspace(-90, 90, 4)], ids=["gaussian", "poles"]
)
def test_a_coarse_store_in_which_no_even_grid_nests_is_refused(latitude: np.ndarray) -> None:
    """Bands between rows of a Gaussian grid, or of one with rows on the poles, differ in height;
    the same rows coarsened from a fine store are no trouble."""
    task, model = Downscaling(2, coarse_input=True), Known(attrgetter("source"), (0.0,))
    uneven = coarse_store().assign_coords(latitude=latitude)
    with pytest.raises(ValueError, match=r"coarse_input: .* degrees.*does not nest.*of one height"):
        predictor(task, model, store=uneven)
    fine = STORE.assign_coords(latitude=gaussian_latitudes(8)[0])
    used = predictor(replace(task, coarse_input=False), model, store=fine, window=(5, 8, 8))
    (part,) = predict_parts(used, [STORE.time.values[6]])
    assert part.departure["temperature"] < 1e-8


def test_consistency_is_measured_and_enforced() -> None:
    model = Known(attrgetter("guess"), (-1.0, 0.5))
    given = coarse_store()["temperature"].values[6]
    weight = segment().grid.weights[:, None]

    def coarse_means(fields: np.ndarray) -> np.ndarray:
        shape = (*fields.shape[:-2], 4, 2, 8, 2)
        sums = (fields * weight).reshape(shape).sum(axis=(-3, -1))
        return sums / (2 * weight.reshape(4, 2).sum(axis=1)[:, None])

    free = predictor(Downscaling(2, consistent=False), model, window=(5, 8, 8), overlap=0.0)
    (part,) = predict_parts(free, [free.segment.times[6]])
    unforced = {name: values[0] for name, values in part.fields.items()}
    lack = given - coarse_means(unforced["temperature"].mean(axis=0))
    area = weight.reshape(4, 2).sum(axis=1)[:, None]
    expected = (lack**2 * area).mean() / area.mean()
    assert part.departure["temperature"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01
    for task in (Downscaling(2), Counterfactual(Downscaling(2, True), 720.0)):
        (part,) = predict_parts(replace(free, task=task), [free.segment.times[6]])
        assert part.departure["temperature"] < 1e-8  # of what is written
        fields = part.fields["temperature"][0]
        np.testing.assert_allclose(coarse_means(fields.mean(axis=0)), given, atol=1e-4)
        # members of a tail keep their distance
        spread = unforced["temperature"][1] - unforced["temperature"][0]
        np.testing.assert_allclose(fields[1] - fields[0], spread, atol=1e-4)
    only = replace(free, task=Downscaling(2), options=replace(free.options, members=(1,)))
    (part,) = predict_parts(only, [free.segment.times[6]])  # the mean is that of all members
    np.testing.assert_allclose(part.fields["temperature"][0, 0], fields[1], atol=1e-4)


def test_combined_writes_the_filled_init_time_and_the_leads() -> None:
    task = Combined((Forecast(12), Inpainting((BOX,))))
    used = predictor(task, Known(attrgetter("target"), (0.0,)))
    assert used.steps.offsets == (0, 1, 2) and used.steps.is_forecast
    cells = BOX.contains(STORE.latitude.values, STORE.longitude.values)
    fields, now = members_of(used, 8), STORE["temperature"].values[8]
    np.testing.assert_allclose(fields[0, 0][:, ~cells], now[:, ~cells], atol=2e-5)


def test_counterfactual_changes_what_is_told_and_nothing_else() -> None:
    plain, told = Spy(), Spy()
    run_at(predictor(Inpainting((BOX,)), plain), 6)
    task = Counterfactual(Inpainting((BOX,)), shift_hours=100 * 24.0, shift_lon=30.0)
    fields = run_at(predictor(task, told), 6)
    for number, (a, b) in enumerate(zip(plain.seen, told.seen, strict=True)):
        if number % 4 == 2:
            assert torch.equal(a + 2400, b)
        else:
            assert torch.equal(a, b)
    assert fields["temperature"].shape[0] == 1


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_bands_come_once_each_and_in_order(overlap: float) -> None:
    store = dataset(num_lat=40, steps=8, variables=NAMES)
    used = predictor(
        TemporalInterpolation(6), Known(attrgetter("target"), (0.0,)), store=store,
        statistics=store, overlap=overlap, window=(5, 8, 8),
    )  # fmt: skip
    parts = list(predict_parts(used, used.segment.times[3:5]))
    for case in (0, 1):
        rows = [part.rows for part in parts if part.case == case]
        assert rows[0].start == 0 and rows[-1].stop == 40
        assert all(a.stop == b.start for a, b in pairwise(rows))
        assert max(r.stop - r.start for r in rows) <= 8 + used.row_chunk
        completes = [part.completes for part in parts if part.case == case]
        assert completes == [False] * (len(rows) - 1) + [True]
        for part in parts:
            truth = store["temperature"].values[3 + part.case][:, part.rows]
            np.testing.assert_allclose(part.fields["temperature"][0, 0], truth, atol=1e-4)


def test_a_mask_file_of_another_kind_is_told_in_our_words(tmp_path) -> None:
    (tmp_path / "mask.csv").write_text("1,0,1")
    with pytest.raises(ValueError, match="the file is neither GRIB nor NetCDF by its first bytes$"):
        read_cell_mask(tmp_path / "mask.csv")
