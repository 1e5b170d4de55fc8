"""What a run says about itself: FLOPs, memory, traces, pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from atmossl.batch import (
    PRIMARY,
    Batch,
    Corruption,
    StreamPrediction,
    StreamSpec,
    TokenSize,
    collate_views,
    tokenise,
)
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.variables import VARIABLES
from atmossl.data.windows import Normaliser, read_window
from atmossl.geometry import Box
from atmossl.masking.base import make_view
from atmossl.masking.random import BlockMasking, RandomMasking
from atmossl.masking.tasks import Forecast
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.masked import MaskedModelling, level_sums
from atmossl.training.cost import StepCost, measure_step
from atmossl.training.optimizer import freeze
from atmossl.training.pictures import draw, reconstructions
from atmossl.training.throughput import TraceSteps, model_flops
from tests.synthetic import dataset, spec, window

STREAM = spec(token=(1, 2, 4))
SIZES = {"dim": 16, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2, "num_members": 4}


def batch(size: int = 2) -> Batch:
    sampler = RandomMasking((0.5, 0.5), {"mask": 1.0})
    views = [
        (make_view((window(STREAM, seed=n),), sampler, np.random.default_rng(n)),)
        for n in range(size)
    ]
    return collate_views(views, list(range(size)))


def test_flops_of_a_step_are_three_times_the_matrix_products_of_the_forward_pass() -> None:
    """Counted by hand, without the small ends of the network: 2 x rows x in x out each."""
    torch.manual_seed(0)
    (view,) = batch().views
    given, hidden = view.streams[0].grid.num_tokens, view.streams[0].queries.index.shape[1]
    dim, patch, samples = 16, STREAM.patch, 2
    linear = 2 * dim * dim
    encoder = 2 * (given * 12 * linear + 4 * given * given * dim)
    decoder = hidden * (4 + 2 + 8) * linear + given * 2 * linear
    decoder += 4 * hidden * hidden * dim + 4 * hidden * given * dim
    tail = 2 * hidden * dim * patch * (SIZES["num_members"] + 1)
    body = samples * (encoder + decoder + tail)
    found = model_flops(Multiformer(streams=(STREAM,), **SIZES), view) / 3
    ends = 2 * samples * 2 * given * (patch * dim + 51 * dim + 2 * dim * dim)
    assert body < found < body + 1.05 * ends


def test_the_estimate_counts_what_a_real_step_holds() -> None:
    def build() -> Multiformer:
        torch.manual_seed(0)
        return Multiformer(streams=(STREAM,), **SIZES)

    objective = MaskedModelling(losses={"fair_crps": 1.0})
    cost = measure_step(
        lambda: (build(), objective), lambda m, _: torch.optim.AdamW(m.parameters()), batch(),
        precision="32-true",
    )  # fmt: skip
    model = build()
    count = sum(p.numel() for p in model.parameters())
    assert sum(cost.parameters.values()) == count
    assert cost.gradients == cost.averaged == 4 * count
    assert cost.optimizer == pytest.approx(8 * count, rel=0.01)  # and a step count for each
    kept = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(model, batch()).total.backward()
    assert 0.5 * kept < cost.activations < 2.0 * kept  # `kept` has weights, and views twice


def test_what_is_frozen_costs_neither_gradients_nor_states() -> None:
    def build(*only: str) -> Multiformer:
        model = Multiformer(streams=(STREAM,), **SIZES)
        freeze(dict(model.named_parameters()), (), only=only)
        return model

    def cost(*only: str) -> StepCost:
        return measure_step(
            lambda: (build(*only), MaskedModelling(losses={"fair_crps": 1.0})),
            lambda m, _: torch.optim.AdamW(p for p in m.parameters() if p.requires_grad), batch(),
            precision="32-true",
        )  # fmt: skip

    whole, tail = cost(), cost("tail.*")
    size = sum(p.numel() for p in build().tail.parameters())
    assert tail.gradients == 4 * size
    assert tail.optimizer == pytest.approx(8 * size, rel=0.05)
    assert tail.weights == whole.weights and tail.flops == whole.flops
    assert tail.activations < whole.activations


def test_shards_and_replicas_need_what_they_hold() -> None:
    objective = MaskedModelling(losses={"fair_crps": 1.0})
    cost = measure_step(
        lambda: (Multiformer(streams=(STREAM,), **SIZES), objective),
        lambda model, _: torch.optim.AdamW(model.parameters()), batch(), precision="32-true",
    )  # fmt: skip
    whole = cost.per_device(1, 1.0)
    assert whole == cost.peak + cost.averaged + cost.batch
    many = cost.per_device(10**6, 1.0)
    rest = cost.weights - sum(cost.units) + 2 * max(cost.units)
    assert many == pytest.approx(cost.activations + cost.batch + rest, rel=0.01)
    assert many < cost.per_device(8, 1.0) < whole
    kept = cost.per_device(8, 1.0, accumulates=True)
    assert kept == cost.per_device(8, 1.0) + cost.gradients
    assert cost.per_device(1, 1.0, offloads=True) == pytest.approx(many, rel=0.01)


def test_a_trace_of_chosen_steps_is_written(tmp_path) -> None:
    callback = TraceSteps(tmp_path, first=1, count=2)
    trainer, module = SimpleNamespace(global_rank=0), torch.nn.Linear(4, 4)
    module.device = torch.device("cpu")
    for idx in range(4):
        callback.on_train_batch_start(trainer, module, None, idx)
        module(torch.ones(2, 4)).sum().backward()
        callback.on_train_batch_end(trainer, module, None, None, idx)
    assert (tmp_path / "trace-rank0.json").stat().st_size > 1000
    (calls,) = (
        line.split()[-1]
        for line in (tmp_path / "costs-rank0.txt").read_text().splitlines()
        if line.strip().startswith("aten::linear ")
    )
    assert calls == "2"


def test_a_reconstruction_shows_physical_fields_and_blanks_what_is_hidden() -> None:
    """A prediction that is the truth plus one standard deviation with members 0.5 apart."""
    store = dataset()
    segment = open_segment(
        "waves", store, "memory", variables=STREAM.variables, levels=STREAM.levels
    )
    normaliser = Normaliser({PRIMARY: compute_statistics([segment])})
    (here,) = read_window(segment, (STREAM,), normaliser, 0, 4, Box(0, 0, 8, 16))
    view = make_view((here,), Forecast(6), np.random.default_rng(0))
    (stream,) = collate_views([(view,)], [0]).views[0].streams
    index = stream.queries.index[..., None].expand(-1, -1, STREAM.patch)
    truth = stream.target.flatten(1, 4).gather(1, index)[:, :, None] + 1.0
    predicted = SimpleNamespace(
        members=torch.cat([truth - 0.25, truth + 0.25], dim=2), queries=stream.queries
    )
    rows = reconstructions(stream, predicted, normaliser)
    level, time = 1, 3
    for row, name in zip(rows, STREAM.variables, strict=True):
        expected = store[name].isel(time=time, level=level).values
        std = normaliser.values(STREAM, "std")[STREAM.variables.index(name), level]
        np.testing.assert_allclose(row.truth, expected, atol=1e-5)
        np.testing.assert_allclose(row.error, float(std), rtol=1e-3)
        np.testing.assert_allclose(row.spread, float(std) * 0.5 / 2**0.5, rtol=1e-3)
        before = store[name].isel(time=time - 1, level=level).values
        np.testing.assert_allclose(row.source, before, atol=1e-4)
        np.testing.assert_allclose(row.baseline, before, atol=1e-4)  # the last that is seen
        weight = np.cos(np.deg2rad(store["latitude"].values))[:, None] * np.ones_like(expected)
        squared = np.average((before - expected) ** 2, weights=weight)
        assert row.rmse(row.baseline) == pytest.approx(squared**0.5, rel=1e-3)
        assert (row.source_offset, row.place) == (-6.0, "500 hPa")
        assert row.date == "2001-01-01 18:00 UTC"
        np.testing.assert_allclose(row.lat, store["latitude"].values, atol=1e-4)
        np.testing.assert_allclose(row.lon, store["longitude"].values, atol=1e-4)
    assert (stream.corruption[:, :, time] == Corruption.MASK).all()
    shown = draw(rows, "forecast")
    maps = [axes for axes in shown.axes if axes.get_title()]
    assert len(maps) == 6 * len(rows) and len(shown.axes) == 9 * len(rows)  # three colour bars
    coasts = [c for axes in maps for c in axes.collections if isinstance(c, LineCollection)]
    assert len(coasts) == len(maps)
    bars = [axes.get_xlabel() for axes in shown.axes if axes not in maps]
    assert bars == [VARIABLES[row.variable].units for row in rows for _ in range(3)]
    for row, cells in zip(rows, (axes.collections[0] for axes in maps[1::6]), strict=True):
        low, high = cells.get_clim()
        assert (low == -high) == row.variable.endswith("wind")


def test_hidden_parts_of_a_picture_are_blank_at_the_time_that_is_shown() -> None:
    """Boxes that are hidden at all times: their cells alone are blank."""
    one = StreamSpec("air", ("temperature",), (500,), TokenSize(1, 2, 4))
    sampler = BlockMasking(num_blocks=1, share=(0.5, 0.5))
    view = make_view((window(one),), sampler, np.random.default_rng(0))
    (stream,) = collate_views([(view,)], [0]).views[0].streams
    index = stream.queries.index[..., None].expand(-1, -1, one.patch)
    truth = stream.target.flatten(1, 4).gather(1, index)[:, :, None]
    members = truth.expand(-1, -1, 2, -1)
    store = dataset(variables=("temperature",), levels=(500,))
    segment = open_segment("waves", store, "memory", variables=one.variables, levels=one.levels)
    normaliser = Normaliser({PRIMARY: compute_statistics([segment])})
    (row,) = reconstructions(stream, StreamPrediction(members, stream.queries), normaliser)
    assert row.source_offset == 0.0
    assert 0 < row.hidden.mean() < 1
    np.testing.assert_array_equal(np.isnan(row.source), row.hidden)
    np.testing.assert_allclose(row.source[~row.hidden], row.truth[~row.hidden])
    assert row.rmse(row.prediction) == 0.0


@pytest.mark.parametrize("inside", [1, 3])
def test_errors_are_told_apart_by_level(inside: int) -> None:
    """Level k is off by k + 1, in tokens that hold one level or all three."""
    stream_spec = StreamSpec(
        "air", ("temperature", "u"), (300, 500, 850), TokenSize(1, 2, 4, inside)
    )
    view = make_view((window(stream_spec),), Forecast(6), np.random.default_rng(0))
    (stream,) = collate_views([(view,)], [0]).views[0].streams
    shift = torch.arange(1.0, 4)[None, None, :, None, None, None].expand(1, 2, 3, 4, 8, 16)
    shifted = stream.target + tokenise(shift, stream_spec.token_size)
    index = stream.queries.index[..., None].expand(-1, -1, stream_spec.patch)
    members = shifted.flatten(1, 4).gather(1, index)[:, :, None].expand(-1, -1, 4, -1)
    total = level_sums(stream, StreamPrediction(members, stream.queries))
    torch.testing.assert_close((total[0] / total[1]).sqrt(), torch.tensor([1.0, 2.0, 3.0]))
