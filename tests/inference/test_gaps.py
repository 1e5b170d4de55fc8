"""Missing values of the store filled by the model; several records in one prediction."""

from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
import torch

from atmossl.batch import PRIMARY, detokenise
from atmossl.data.forcings import FORCINGS
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.windows import Normaliser
from atmossl.inference.cases import predict_fields
from atmossl.inference.plan import Plan
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.places import Inpainting, LatLonBox
from atmossl.masking.tasks import Downscaling, Forecast
from tests.inference.oracle_models import NAMES, STORE, Known, predictor, run_at, segment
from tests.inference.test_tasks import TWO_STREAMS, Spy
from tests.synthetic import dataset, spec

GAPS = Inpainting((), missing=True)
FILLED = 7.0  # what the known network answers, normalised


def with_gaps():
    """A box without temperature at all times, wind missing in some cells at one step."""
    store = STORE.copy(deep=True)
    store["temperature"].values[:, 1:, 2:5, 3:9] = np.nan
    store["u_component_of_wind"].values[6, :, [1, 4], [5, 12]] = np.nan
    return store


def constant(stream) -> torch.Tensor:
    return torch.full_like(stream.target, FILLED)


@pytest.mark.parametrize(
    "task",
    [GAPS, Combined((GAPS, Inpainting((LatLonBox(60, 90, 0, 360),)))), Counterfactual(GAPS, 720.0)],
    ids=lambda task: type(task).__name__,
)
@pytest.mark.parametrize("specs", [TWO_STREAMS, None], ids=["streams", "one"])
def test_what_is_missing_is_filled_and_all_else_stays(task, specs) -> None:
    """Also where one variable of a token is missing and the other is known."""
    store = with_gaps()
    changes = {} if specs is None else {"specs": specs}
    used = predictor(task, Known(constant, (0.0, 1.0)), store=store, window=(5, 8, 8), **changes)
    fields = run_at(used, 6)
    polar = isinstance(task, Combined) & (STORE["latitude"].values > 60)[:, None]
    for name in NAMES:
        truth = store[name].values[6]
        spread = fields[name][0].std(axis=0)
        hidden = np.isnan(truth) | polar
        assert 0 < hidden.sum() < hidden.size
        assert (spread[hidden] > 0.1).all()
        given = np.broadcast_to(truth, fields[name][0].shape)[:, ~hidden]
        np.testing.assert_allclose(fields[name][0][:, ~hidden], given, atol=2e-5)


def test_the_network_sees_means_of_what_is_known_and_nothing_of_the_rest() -> None:
    """A token in a gap shows the mean of its observed cells, one without any its first guess."""
    spy, store = Spy(), with_gaps()
    used = predictor(GAPS, spy, store=store, specs=TWO_STREAMS, window=(5, 8, 16))
    run_at(used, 6)
    assert all(bool(torch.isfinite(seen).all()) for seen in spy.seen)
    shown = spy.seen[0][0, 1, 2]  # temperature at 500 hPa, the written step: [nlat nlon patch]
    fields = torch.from_numpy(store["temperature"].values[6][None, :, None])
    normal = used.trained.normaliser.forward(fields, TWO_STREAMS[0])[0, 1, 0]
    weight = torch.from_numpy(used.grid.weights[2:4]).float()
    known = normal[2:4, 2]  # of rows 2 and 3 and columns 2 and 3; the gap begins at column 3
    filled = torch.stack([known, known.mean().expand(2)], dim=1)  # then averaged by area
    mean = (filled.mean(dim=1) * weight).sum() / weight.sum()
    torch.testing.assert_close(shown[1, 1], mean.expand(4))
    torch.testing.assert_close(shown[1, 2], torch.zeros(4))  # never observed: the climate
    torch.testing.assert_close(shown[0, 0], normal[:2, :2].flatten())


def test_gaps_are_refused_without_the_task_that_fills_them() -> None:
    box = Inpainting((LatLonBox(60, 90, 0, 360),))
    for task in (box, Downscaling(2)):
        with pytest.raises(
            ValueError, match=r"missing values.*inpainting of missing=true.*combined"
        ):
            run_at(predictor(task, Known(attrgetter("target")), store=with_gaps()), 6)
    with pytest.raises(ValueError, match=r"task\.missing=false"):
        Inpainting(())


@pytest.mark.parametrize("order", [1, -1])
def test_a_store_with_gaps_is_downscaled_in_a_union_with_the_task_that_fills_them(order) -> None:
    parts = (Downscaling(2), GAPS)[::order]
    fields = run_at(predictor(Combined(parts), Known(constant), store=with_gaps()), 6)
    for name in NAMES:
        assert np.isfinite(fields[name]).all()
        assert (fields[name].std(axis=1) > 0.1).all()  # all is predicted


@pytest.mark.parametrize("task", [Forecast(12), Forecast(36, 12), GAPS])
def test_what_is_computed_has_its_true_values_at_every_date(task) -> None:
    """Also after the init time, in every pass of a rollout, and beyond the end of the record; a
    static field stays."""
    spy, name = Spy(), "toa_incident_solar_radiation"
    height = 1e-3 * (STORE["temperature"].isel(time=0, level=0, drop=True).drop_attrs() - 250)
    store = STORE.assign(specific_humidity=height.rename("geopotential"))
    specs = (
        spec("air", variables=NAMES, token=(1, 2, 2)),
        spec("sun", variables=(name,), levels=(), token=(1, 2, 2), role="forcing"),
        spec("land", variables=("specific_humidity",), levels=(), token=(1, 2, 2), role="static"),
    )
    record = open_segment(
        "waves",
        store,
        "memory",
        variables=[*NAMES, "specific_humidity", name],
        levels=(300, 500, 850),
    )
    used = predictor(task, spy, window=(5, 8, 16), batch_size=1)
    trained = replace(
        used.trained, specs=specs, normaliser=Normaliser({PRIMARY: compute_statistics([record])})
    )
    used = replace(used, trained=trained, segments=(record,))
    time = record.times[6 if task is GAPS else -1]
    list(predict_fields(used, [time]))
    shown = zip(spy.seen[0::12], spy.seen[4::12], spy.seen[8::12], spy.seen[6::12], strict=True)
    calls = list(shown)
    assert len(calls) == 1 + 2 * (getattr(task, "lead_hours", 0) == 36) * 2  # two members go on
    for _, sun, land, hours in calls:
        times = np.datetime64(0, "ns") + (hours[0].numpy() * 3600e9).astype("timedelta64[ns]")
        expected = FORCINGS[name](times, store["latitude"].values, store["longitude"].values)
        found = trained.normaliser.inverse(detokenise(sun, specs[1])[0], specs[1])[0, 0]
        np.testing.assert_allclose(found, expected, atol=20.0)  # of up to 4e6 J m-2
        same = trained.normaliser.inverse(detokenise(land, specs[2])[0], specs[2])[0, 0]
        np.testing.assert_allclose(same, np.stack([height.values] * 5), atol=1e-5)


def test_a_rollout_of_inputs_that_nothing_tells_is_refused() -> None:
    specs = (spec("t", variables=NAMES[:1], token=(1, 2, 2)),
             spec("u", variables=NAMES[1:], token=(1, 2, 2), role="input"))  # fmt: skip
    with pytest.raises(ValueError, match=r"streams u are input only"):
        run_at(predictor(Forecast(24, 12), Known(attrgetter("target")), specs=specs), 6)


def two_records(**changes) -> Plan:
    """A record and a later one."""
    later = dataset(steps=12, start="2002-01-01", seed=3)
    known = Known(attrgetter("target"))
    return predictor(
        changes.pop("task", Forecast(12)), known, others=(segment(later, name="later"),), **changes
    )


@pytest.mark.parametrize("task", [Forecast(12), Forecast(30, 12), Downscaling(2)])
def test_several_records_are_one_prediction(task) -> None:
    """The fields of each date are those of its own record alone, whatever comes before it."""
    both = two_records(task=task)
    times = both.possible_times()
    assert (np.diff(times) > np.timedelta64(0)).all()
    alone = [
        predictor(task, both.trained.model, store=store)
        for store in (STORE, dataset(steps=12, start="2002-01-01", seed=3))
    ]
    assert times.tolist() == [t for one in alone for t in one.possible_times().tolist()]
    chosen = times[[0, -1]]
    for fields, one, time in zip(predict_fields(both, chosen), alone, chosen, strict=True):
        (expected,) = predict_fields(one, [time])
        for name in NAMES:
            np.testing.assert_array_equal(fields[name], expected[name])


def test_dates_of_no_record_or_of_two_are_named() -> None:
    with pytest.raises(ValueError, match=r"2001-12-01T00 .*2001-01-01T12 to .*2002-01-01T12 to"):
        two_records().find(np.datetime64("2001-12-01", "ns"))
    twice = predictor(Forecast(12), Known(attrgetter("target")), others=(segment(name="again"),))
    with pytest.raises(ValueError, match=r"several segments.*segment=NAME, valid: waves, again"):
        twice.find(np.datetime64("2001-01-02", "ns"))
