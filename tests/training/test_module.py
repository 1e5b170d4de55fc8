"""Averaged weights, the resumed state and the early stop."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from atmossl.batch import (
    Batch,
    Prediction,
    StreamPrediction,
    TokenGrid,
    View,
    collate_views,
)
from atmossl.masking.base import make_view
from atmossl.masking.random import Mixture, RandomMasking, TimeBlockMasking
from atmossl.masking.tasks import Forecast
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Network
from atmossl.objectives.base import Monitor, Objective
from atmossl.objectives.masked import MaskedModelling
from atmossl.training.callbacks import LossByMask, StopOnNonFinite
from atmossl.training.distributed import clip_gradients
from atmossl.training.module import TrainingModule
from atmossl.training.optimizer import OptimizerSettings
from atmossl.training.resume import check_same_run, check_same_statistics
from tests.synthetic import spec, window

SETTINGS = OptimizerSettings(
    algorithm="adamw",
    learning_rate=1e-3,
    weight_decay=0.0,
    betas=(0.9, 0.95),
    schedule="constant",
    warmup_steps=1,
    final_fraction=1.0,
    decay_every=1,
    ema_decay=0.9,
    max_steps=10,
)


def module(steps: list[int]) -> TrainingModule:
    class Counted(TrainingModule):
        @property
        def global_step(self) -> int:  # pyright: ignore
            return steps[0]

    model = Network()
    model.weight = nn.Parameter(torch.zeros(1, 1))
    return Counted(
        model=model, objective=Objective(), optimizer=SETTINGS, checkpoint_record={}, task_names=()
    )  # pyright: ignore


def test_the_average_forgets_its_start() -> None:
    """Weights 1, 2, 3 after the steps."""
    tested = module([0])
    expected = 0.0
    for step in (1, 2, 3):
        nn.init.constant_(tested.model.weight, float(step))
        decay = min(0.9, step / (9 + step))  # the first update copies
        expected = step if step == 1 else decay * expected + (1 - decay) * step
        tested.update_ema(step)
    assert float(tested.ema.module.weight) == pytest.approx(expected)
    assert int(tested.ema.n_averaged) == 3


class Zeros(nn.Module):
    """A network that predicts 0 with two members."""

    def forward(self, view: View) -> Prediction:
        queries = [stream.queries for stream in view.streams if stream.queries is not None]
        patch = view.streams[0].spec.patch
        zeros = (StreamPrediction(torch.zeros(*q.index.shape, 2, patch), q) for q in queries)
        return Prediction(tuple(zeros))


def mixed(seeds: Sequence[int]) -> Batch:
    """Samples of which some hide times of both streams and others stream `b` alone."""
    streams = (spec("a"), replace(spec("b"), loss_weight=3.0))
    only_b = RandomMasking(rate=(0.0, 0.0), hide_stream=1.0, streams=["b"])
    mixture = Mixture([TimeBlockMasking((1, 2)), only_b, Forecast(6)], [0.5, 0.5, 0.0])
    views = [
        (make_view(tuple(window(s, seed=n) for s in streams), mixture, np.random.default_rng(n)),)
        for n in seeds
    ]
    return collate_views(views, list(seeds))


def test_the_loss_by_mask_is_that_of_a_batch_of_such_samples_alone() -> None:
    """Over all batches since the last log, one of them before a checkpoint."""
    batches, logged = [mixed(range(5)), mixed(range(5, 8))], {}
    objective = MaskedModelling(losses={"ensemble_mse": 1.0}, weighting="uniform")
    strategy = SimpleNamespace(reduce=lambda values, reduce_op: reduce_op and values)
    trainer: Any = SimpleNamespace(strategy=strategy, is_global_zero=True)
    log = SimpleNamespace(
        device=torch.device("cpu"),
        log_dict=lambda found, **_: logged.update(found),
    )
    callback, state = LossByMask(["time_block", "only_b", "forecast"], every=2), {}
    for idx, batch in enumerate(batches):
        callback.load_state_dict(state)
        callback.on_train_start(trainer, log)
        losses = objective(Zeros(), batch)
        outputs = {"by_sample": losses.by_sample, "factors": losses.factors}
        callback.on_train_batch_end(trainer, log, outputs, batch, idx)
        state, callback = callback.state_dict(), LossByMask(callback.kinds, every=2)
    drawn = torch.cat([batch.views[0].mask_kind for batch in batches])
    assert set(drawn.tolist()) == {0, 1}
    alone = [mixed([n for n in range(8) if drawn[n] == kind]) for kind in (0, 1)]
    (_, a), (_, b) = objective(Zeros(), alone[0]).terms
    assert logged["train/mask_loss/time_block"] == pytest.approx(float(a + 3 * b) / 4, rel=1e-5)
    (_, nothing), (_, b) = objective(Zeros(), alone[1]).terms
    assert float(nothing) == 0.0
    assert logged["train/mask_loss/only_b"] == pytest.approx(float(b), rel=1e-5)
    assert state == {}
    assert torch.isnan(logged["train/mask_loss/forecast"])  # which drew nothing


def test_a_checkpoint_brings_back_the_random_state(monkeypatch) -> None:
    tested = module([4])
    data = SimpleNamespace(samples_at=lambda step: 10 * step)
    trainer = SimpleNamespace(accumulate_grad_batches=1, datamodule=data)
    monkeypatch.setattr(TrainingModule, "trainer", trainer, raising=False)
    progress = {key: {"ready": 4, "completed": 4} for key in ("total", "current")}
    loops = {"fit_loop": {"epoch_loop.batch_progress": progress}}
    contents: dict = {"state_dict": {}, "global_step": 4, "loops": loops}
    tested.on_save_checkpoint(contents)
    expected = torch.rand(3)
    tested.on_load_checkpoint(contents)
    torch.rand(1)  # what loaders draw when they start
    tested.on_train_batch_start(None, 0)
    assert torch.equal(torch.rand(3), expected)
    assert contents["atmossl"]["step"] == 4 and contents["atmossl"]["samples"] == 40


def test_a_resumed_optimiser_takes_the_rates_of_the_configuration(monkeypatch) -> None:
    tested = module([4])
    monkeypatch.setattr(
        TrainingModule, "trainer", SimpleNamespace(precision="32-true"), raising=False
    )
    configured = tested.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    monkeypatch.setattr(TrainingModule, "lr_schedulers", lambda _: scheduler)
    for group in optimizer.param_groups:  # of a checkpoint, half way down its schedule
        group.update(lr=0.01, initial_lr=0.02, weight_decay=0.5, betas=(0.5, 0.6))
    scheduler.base_lrs = [0.02]
    tested.on_train_start()
    (group,) = optimizer.param_groups
    assert (group["initial_lr"], scheduler.base_lrs) == (1e-3, [1e-3])
    assert group["lr"] == pytest.approx(5e-4)
    assert (group["weight_decay"], group["betas"]) == (0.0, (0.9, 0.95))


STREAM = {"name": "air", "variables": ["t", "u"], "levels": [300, 500], "loss_weight": 1.0,
          "missing": "refuse"}  # fmt: skip
CONFIG = {
    "optimizer": {"algorithm": "adamw", "freeze": [], "factors": {}, "layer_decay": 1.0},
    "objective": {"train_only": None},
    "warm_start": {"low_rank": {"rank": 0}},
    "data": {"first_guess": True},
}
MODEL = {"dim": 16, "embedding_stencil": (1, 1, 1)}
RECORD = {"streams": [STREAM], "network": "multiformer", "model": MODEL, "config": CONFIG}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"stream": {"loss_weight": 2.0, "missing": "mask"}}, None),
        ({"stream": {"variables": ["u", "t"]}}, r"stream.air.variables=\[t,u\], not \[u"),
        ({"stream": {"levels": [500, 300]}}, r"stream.air.levels=\[300,500\], not \[500,300\]"),
        ({"stream": {"name": "sea"}}, r"streams air, not sea"),
        ({"model": {"dim": 32}}, r"model.dim=16, not 32.*warm_start.checkpoints=\[last.ckpt\]"),
        ({"model": {"embedding_stencil": [1, 1, 1], "added": 3}}, None),
        ({"model": {"_target_": "my.Net"}}, r"model._target_=multiformer, not my.Net"),
        ({"optimizer": {"freeze": ["tail.*"]}}, r"optimizer.freeze=\[\], not \[tail.\*\]"),
        ({"optimizer": {"learning_rate": 3.0}}, None),
    ],
)
def test_what_a_resumed_run_may_not_change_is_named(change: dict, message: str | None) -> None:
    config = {**CONFIG, "optimizer": {**CONFIG["optimizer"], **change.get("optimizer", {})}}
    model = {**RECORD["model"], **change.get("model", {})}
    stream = {**STREAM, **change.get("stream", {})}
    arguments = Path("last.ckpt"), RECORD, config, model, [stream]
    if message is None:
        check_same_run(*arguments)
        return
    with pytest.raises(ValueError, match=message):
        check_same_run(*arguments)


def test_a_resumed_run_keeps_its_statistics() -> None:
    numbers = {"mean": [[1.0]], "std": [[2.0]], "step_std": [[0.5]], "period": "2001"}
    numbers["fingerprint"] = "0123456789abcdef-01234567"
    before = {"primary": numbers, "coarse": numbers}

    def changed(source: str, **values: object) -> dict:
        return {**before, source: {**numbers, **values}}

    check_same_statistics(Path("last.ckpt"), before, changed("primary", mean=[[1.0 + 1e-9]]))
    for now in (
        changed("primary", mean=[[1.1]]),
        changed("primary", transforms={"t": {"kind": "log", "scale": 1.0}}),
        changed("coarse", std=[[2.1]]),
    ):
        with pytest.raises(ValueError, match="statistics or transforms differ"):
            check_same_statistics(Path("last.ckpt"), before, now)
    for now in (
        changed("primary", fingerprint="1123456789abcdef-01234567"),
        changed("coarse", fingerprint="0123456789abcdef-1"),
    ):
        with pytest.raises(ValueError, match="another state of the store"):
            check_same_statistics(Path("last.ckpt"), before, now)


def test_losses_that_are_not_finite_stop_the_run_by_name(tmp_path) -> None:
    callback = StopOnNonFinite(limit=2, folder=tmp_path)
    trainer = SimpleNamespace(
        global_step=7,
        global_rank=0,
        precision="32-true",
        datamodule=SimpleNamespace(identity=lambda ids: f"samples {ids}"),
    )
    grid = TokenGrid(*(torch.tensor([[0.0, 6.0]]),) * 4, *(torch.tensor([6.0]),) * 3)
    view = SimpleNamespace(streams=[SimpleNamespace(grid=grid)])
    batch = SimpleNamespace(sample_id=torch.tensor([5]), views=[view])

    def step(loss: float, norm: float = 1.0) -> None:
        pl_module = SimpleNamespace(gradient_norm=torch.tensor(norm))
        callback.on_train_batch_end(trainer, pl_module, {"loss": torch.tensor(loss)}, batch, 0)

    for loss in (float("nan"), 1.0, float("inf")):  # a finite one in between starts anew
        step(loss)
    assert not callback.healthy()
    with pytest.raises(FloatingPointError, match=r"step 7 on samples \[5\]"):
        step(1.0, norm=float("nan"))
    record = json.loads((tmp_path / "nonfinite-rank0.json").read_text())
    assert [entry["step"] for entry in record] == [7, 7]
    window = {"time": ["1970-01-01T00:00:00", "1970-01-01T06:00:00"], "lat": [0, 6], "lon": [0, 6]}
    assert record[0]["windows"] == [window]


def test_a_gradient_that_is_not_finite_counts_as_zero() -> None:
    one, two = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    one.grad, two.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert float(clip_gradients([one, two], 1.0)) == 5.0
    torch.testing.assert_close(torch.cat([one.grad, two.grad]), torch.tensor([0.6, 0, 0, 0.8]))
    one.grad = torch.tensor([float("nan"), 1.0])
    assert not clip_gradients([one, two], 1.0).isfinite()
    assert not one.grad.any() and not two.grad.any()


class Trainer(SimpleNamespace):
    """What a training step asks of Lightning's trainer."""

    accumulate_grad_batches = 2
    log_every_n_steps = 1000


def test_accumulated_batches_count_by_what_they_hide(monkeypatch) -> None:
    """The mean over a batch that hides little and one that hides much is that of both in one; so is
    every stream's, though the shares of the streams differ."""
    streams = (spec("air"), spec("wind", variables=("u_component_of_wind",), token=(2, 4, 4)))
    torch.manual_seed(0)
    network = Multiformer(
        streams=streams, dim=16, num_layers=1, num_decoder_layers=1, num_heads=2, num_members=3
    )
    windows = [window(s, seed=n) for n, s in enumerate(streams)]
    views = [
        (make_view(windows, RandomMasking((share, share)), np.random.default_rng(0)),)
        for share in (0.1, 0.8)
    ]
    objective = MaskedModelling(losses={"fair_crps": 1.0})
    tested = TrainingModule(
        model=network, objective=objective, optimizer=SETTINGS, checkpoint_record={}, task_names=()
    )
    monkeypatch.setattr(TrainingModule, "trainer", Trainer(), raising=False)
    batches = [collate_views([view], [0]) for view in views]
    tested.expect(batches)
    terms = [tested.training_step(batch, number)["loss"] for number, batch in enumerate(batches)]
    loss = torch.stack(terms).mean()
    loss.backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    together = objective(network, collate_views(views, [0, 1])).total
    together.backward()
    assert loss.item() == pytest.approx(together.item(), rel=1e-5)
    assert terms[0].item() != pytest.approx(terms[1].item(), rel=0.5)
    for name, gradient in found.items():
        expected = network.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_a_monitor_knows_what_is_better() -> None:
    for direction, better in (("min", 1.0), ("max", 3.0)):
        monitor = Monitor("m", direction)
        assert monitor.is_better(2.0, None) and monitor.is_better(better, 2.0)
        assert not monitor.is_better(2.0, 2.0) and not monitor.is_better(4.0 - better, 2.0)
        assert monitor.cost(better) < monitor.cost(2.0)


class Taught(Objective):
    """A head that learns, a teacher that does not, and a buffer."""

    centre: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head, self.teacher = (nn.Linear(1, 1, bias=False) for _ in range(2))
        self.teacher.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(1))

    def after_step(self, network: Network, step: int) -> None:
        del network
        self.teacher.weight.fill_(step)
        self.centre += step


def test_heads_are_averaged_as_the_network_is_and_teachers_taken_as_they_are() -> None:
    model = Network()
    model.weight, objective = nn.Parameter(torch.zeros(1, 1)), Taught()
    tested = TrainingModule(
        model=model, objective=objective, optimizer=SETTINGS, checkpoint_record={}, task_names=()
    )
    assert "objective.head.weight" in tested.trained
    averaged = tested.averaged_objective
    assert isinstance(averaged, Taught) and not any(p.requires_grad for p in averaged.parameters())
    for step in (1, 2, 3):
        for parameter in (model.weight, objective.head.weight):
            nn.init.constant_(parameter, float(step))
        with torch.no_grad():
            objective.after_step(model, step)
        tested.update_ema(step)
    assert float(averaged.head.weight) == float(tested.ema.module.weight) < 3.0
    assert (float(averaged.teacher.weight), float(averaged.centre)) == (3.0, 6.0)
    names = set(tested.state_dict())
    owned = {"objective.teacher.weight", "objective.centre", "averaged_objective.head.weight"}
    assert owned <= names
