"""Latents that tell nothing of the state are noticed, however rich they look."""

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from atmossl.batch import Batch, TokenIndex, View, collate_views
from atmossl.latent_losses import rankme
from atmossl.masking.base import make_view
from atmossl.masking.random import RandomMasking
from atmossl.model.embedding import absolute_features
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Latents, Network
from atmossl.training.collapse import (
    CollapseWatch,
    latent_rows,
    measures,
    num_free,
    shown,
    teacher_distance,
)
from tests.synthetic import spec, window

STREAM, NUM_STATES = spec(), 12


class PositionsOnly(Multiformer):
    """Rich latents of level, latitude and longitude, whatever the fields and the time."""

    def encode(self, view: View) -> Latents:
        latents = super().encode(view)
        features = absolute_features(view.streams[0].grid)[..., 28:31]  # level, not the time
        waves = absolute_features(view.streams[0].grid)[..., :24]
        mixed = torch.cat([features, waves], dim=-1) @ torch.randn(
            27, 16, generator=torch.Generator().manual_seed(0)
        )
        layer = replace(latents["air"].layers[-1], features=mixed.sin())
        return {"air": replace(latents["air"], layers=(layer,))}


class Constant(Multiformer):
    def encode(self, view: View) -> Latents:
        latents = super().encode(view)
        layer = latents["air"].layers[-1]
        layer = replace(layer, features=torch.full_like(layer.features, 3.0))
        return {"air": replace(latents["air"], layers=(layer,))}


def network(kind: type[Multiformer] = Multiformer) -> Multiformer:
    torch.manual_seed(0)
    return kind(
        streams=(STREAM,), dim=16, num_layers=1, num_decoder_layers=1, num_heads=2, num_members=2
    )


def batches(num_states: int = NUM_STATES) -> Iterator[Batch]:
    """States some days apart, of which half is hidden."""
    for first in range(0, num_states, 4):
        samples = []
        for number in range(first, first + 4):
            state = window(STREAM, seed=number)
            state = replace(state, time_hours=state.time_hours + 100.0 * number)
            rng = np.random.default_rng(number)
            samples.append((make_view((state,), RandomMasking((0.5, 0.5)), rng),))
        yield collate_views(samples, list(range(4)))


def watched(
    model: Network, *, below: float = 2.0, action: Any = "warn", objective: Any = None,
    rows: Any = None, **of_batches: Any,
) -> dict[str, float]:  # fmt: skip
    """What a validation of the network logs."""
    logged: dict[str, float] = {}
    module = SimpleNamespace(
        ema=SimpleNamespace(module=model), model=model, objective=objective or nn.Module(),
        log=lambda key, value, **_: logged.update({key: value}),
    )  # fmt: skip
    plugin = SimpleNamespace(forward_context=nullcontext)
    trainer = SimpleNamespace(precision_plugin=plugin, global_step=7)
    saved: list[Any] = []
    checkpoints: Any = SimpleNamespace(on_train_end=lambda *_: saved.append(trainer))
    tested = CollapseWatch(below, action, checkpoints)
    tested._rows = rows or {}
    for number, batch in enumerate([] if rows else batches(**of_batches)):
        for task in (0, 1):
            tested.on_validation_batch_end(trainer, module, None, batch, number, task)
    tested.on_validation_epoch_end(trainer, module)
    try:
        tested.on_validation_end(trainer, module)
    finally:
        assert bool(saved) == (sys.exc_info()[0] is FloatingPointError)
    return logged


@pytest.mark.parametrize("kind", [PositionsOnly, Constant])
def test_a_network_that_knows_no_state_is_told_in_one_line(
    kind: type[Multiformer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        logged = watched(network(kind))
    assert logged["collapse/rank_tokens"] == logged["collapse/std_mean"] == 0.0
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message and "collapse/rank_tokens=0.00" in message and "step 7" in message
    if kind is PositionsOnly:  # which looks rich, if it is not held against its positions
        rows = torch.cat([latent_rows(network(kind), b.views[0])["air"][0] for b in batches()])
        assert float(rankme(rows.flatten(0, 1))) > 8
    with pytest.raises(FloatingPointError, match="trainer.collapse_below=2"):
        watched(network(kind), action="stop")


def test_a_network_that_tells_states_apart_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        logged = watched(network(), action="stop")
    assert not caplog.records and logged["collapse/rank_tokens"] > 5
    assert watched(network(Constant), below=0.0)["collapse/rank_tokens"] == 0.0
    names = {name.removeprefix("collapse/") for name in logged}
    assert names == {
        "rank_tokens", "rank_pooled", "lidar_tokens", "lidar_pooled", "std_mean", "std_min",
        "alignment", "uniformity",
    }  # fmt: skip


def test_states_that_share_no_position_are_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        latents, bins = torch.ones(2, 16, 8), torch.arange(32).view(2, 16)
        logged = watched(network(), action="stop", rows={"air": [(latents, bins)]})
    assert not logged and not caplog.records


def test_a_rank_of_too_few_anomalies_is_not_held_to_the_bound() -> None:
    """Four states with 16 tokens each have 48 anomalies that are free."""
    assert num_free(torch.arange(16).expand(2, 16)) == 16
    assert num_free(torch.arange(32).view(2, 16)) == 0
    with pytest.raises(FloatingPointError, match=r"this step$"):
        watched(network(Constant), action="stop", num_states=4, below=12.0)  # of 48
    assert watched(network(Constant), action="stop", num_states=4, below=12.1)


def test_measures_of_known_latents() -> None:
    """A mean by position, and three directions of equal size in which states differ."""
    generator = torch.Generator().manual_seed(0)
    states, tokens, features = 4000, 4, 8
    position = 50 * torch.randn(1, tokens, features, generator=generator)
    signal = torch.randn(states, 1, 3, generator=generator)
    latents = position.repeat(states, 1, 1)
    latents[..., :3] += signal
    bins = torch.arange(tokens).expand(states, tokens)
    found = measures(latents, bins)
    assert found["rank_tokens"] == pytest.approx(3, abs=0.05)
    assert found["rank_pooled"] == pytest.approx(3, abs=0.05)
    assert found["lidar_tokens"] == pytest.approx(3, abs=0.05)
    size = float(latents.square().mean().sqrt())
    assert found["std_mean"] == pytest.approx(3 / 8 / size, rel=0.05)
    assert found["std_min"] == pytest.approx(0, abs=1e-6)
    assert found["alignment"] == pytest.approx(0, abs=1e-6)  # both halves are of the same state
    assert measures(latents[:1], bins[:1]) == {}  # positions that are seen once say nothing


def test_everything_is_shown_to_the_encoder() -> None:
    (batch, *_) = batches()
    whole = shown(batch.views[0])
    (stream,) = whole.streams
    assert torch.equal(stream.source, stream.target) and not stream.hidden.any()
    expected = TokenIndex.of(torch.ones_like(stream.hidden))
    assert stream.encoder_tokens is not None and stream.encoder_tokens.complete
    for name in ("index", "valid", "chosen"):
        assert torch.equal(getattr(stream.encoder_tokens, name), getattr(expected, name))
    assert torch.equal(stream.encoder_tokens.frames.numbers, expected.frames.numbers)
    assert torch.equal(stream.encoder_tokens.frames.slot, expected.frames.slot)


def test_the_distance_of_a_teacher_is_over_the_size_of_the_weights() -> None:
    model, objective = network(), nn.Module()
    assert teacher_distance(objective, model) is None
    objective.teacher = network()
    assert teacher_distance(objective, model) == 0.0
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter *= 1.5
    assert teacher_distance(objective, model) == pytest.approx(0.5, rel=1e-5)
    assert watched(model, objective=objective)["collapse/teacher_distance"] == pytest.approx(0.5)
