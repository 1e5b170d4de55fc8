"""The benchmark's reading of a report, and its specialists' configurations."""

import dataclasses
import json
from pathlib import Path

import pytest

from atmossl.inference.checkpoint import load_checkpoint
from atmossl.schema import TrainConfig, parse
from benchmarks.zero_shot import SPECIALISTS, against_baselines, refusals, specialist_values


def as_json(mask) -> str:
    return json.dumps(dataclasses.asdict(mask))


@pytest.mark.parametrize("task", SPECIALISTS)
def test_a_specialist_is_the_checkpoint_s_run_with_one_mask(task, tmp_path: Path):
    record = load_checkpoint("default").checkpoint_record["config"]
    alone: TrainConfig = parse(
        TrainConfig, specialist_values(task, record, tmp_path, generalist=None)
    )
    tuned: TrainConfig = parse(
        TrainConfig, specialist_values(task, record, tmp_path, generalist="default")
    )
    assert alone.trainer.max_steps == record["trainer"]["max_steps"]
    assert alone.model.arguments["dim"] == record["model"]["dim"]
    assert list(alone.stream) == list(record["stream"])
    sampler = alone.tasks[0]
    assert type(alone.masking) is type(sampler)
    assert [*map(as_json, (alone.masking, tuned.masking))] == [as_json(sampler)] * 2
    assert tuned.trainer.max_steps == alone.trainer.max_steps // 10
    assert tuned.warm_start.checkpoints == ("default",)


def test_a_task_that_a_checkpoint_cannot_do_is_said_to_be_so():
    """The reference has all variables in the tokens of one stream."""
    refused = refusals("default")
    assert set(refused) == {"cross_variable"}
    assert "share tokens of stream atmosphere with other variables" in refused["cross_variable"]
    assert "checkpoint=default_streams" in refused["cross_variable"]
    assert refusals("default_streams") == {}


def test_best_baseline_is_the_one_that_is_hardest_to_beat():
    found = {
        "forecast_vs_persistence": 0.5,
        "forecast_vs_ridge": 0.9,
        "forecast_vs_ridge_interval": [0.8, 0.95],
        "forecast_6h_vs_ridge": 0.7,
        "spread_skill_forecast_6h": 0.8,
        "spread_skill_forecast_12h": 1.0,
    }
    figures = against_baselines(found, "forecast")
    assert figures["forecast_vs_best_baseline"] == 0.9
    assert figures["forecast_best_baseline"] == "ridge"
    assert figures["forecast_vs_best_baseline_interval"] == [0.8, 0.95]
    assert figures["forecast_spread_skill"] == pytest.approx(0.9)
    assert figures["forecast_vs_all"] == {"persistence": 0.5, "ridge": 0.9}
