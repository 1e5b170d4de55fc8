"""Every file of conf/ composes and validates; everything wrong is named, all at once."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from atmossl.build import build_model
from atmossl.cli import compose_config
from atmossl.commands.common import plain
from atmossl.composition import compose_training
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.schema import ConfigError, EvaluateConfig, PredictConfig, TrainConfig, checked, parse
from atmossl.settings import hours

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = ("data", "stream", "masking", "tasks", "model", "objective", "optimizer", "trainer")
CHOICES = [
    f"{group}={file.stem}"
    for group in (
        *GROUPS,
        "callbacks",
        "logger",
        "paths",
        "experiment",
        "debug",
        "hparams_search",
        "launcher",
    )
    for file in sorted((CONF / group).glob("*.yaml"))
]
FIELDS = (
    "temperature",
    "u_component_of_wind",
    "v_component_of_wind",
    "specific_humidity",
    "geopotential",
)
# choices that need others beside them
WITH = {
    "data=arco_era5": ["stream=dynamics_humidity"],
    "masking=autoregression": ["model.causal=true"],
    **{
        f"stream={name}": ["experiment=atmorep_temperature"]
        for name in ("arco_atmosphere", "atmorep_three_fields", *(f"atmorep_{f}" for f in FIELDS))
    },
    "optimizer=atmorep": ["trainer.max_steps=100000"],
}


def composed(*overrides: str) -> TrainConfig:
    return parse(TrainConfig, compose_config("train", overrides))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_validates(choice: str) -> None:
    composed(choice, *WITH.get(choice, []))


@pytest.mark.parametrize("task", [file.stem for file in sorted((CONF / "task").glob("*.yaml"))])
def test_every_task_can_be_predicted(task: str) -> None:
    values = compose_config("predict", [f"task={task}", "checkpoint=x", "output=o.zarr"])
    assert parse(PredictConfig, values).task.name == task


def test_evaluation_validates() -> None:
    values = compose_config("evaluate", ["checkpoint=x", "output=o"])
    assert len(parse(EvaluateConfig, values).tasks) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_heads=5", "num_heads"),
        ("+data.transforms.ozone={kind: log, scale: 1.0}", "no stream has ozone"),
        ("model.embedding_stencil=[2,3,3]", "embedding_stencil"),
        ("model.num_members=1", "num_members"),
        ("model.kernel_size=4", "kernel_size"),
        ("+objective.losses.spectral_crps=1", "data.window.lon=0"),
        ("+objective.losses.relative_spectral_crps=1", "relative_spectral_crps needs whole"),
        ("model.attention=sparse", "factorised"),
        ("model.attention_window=[2,0,2]", "attention_window"),
        ("data.window.lat=15", "token_size.lat"),
        ("optimizer.warmup_steps=1000", "warmup_steps"),
        ("optimizer.schedule=linear", "cosine"),
        ("+objective.losses.hinge=1", "fair_crps"),
        ("objective._target_=os.system", "masked_modelling"),
        ("+objective.momentum=0.9", "unknown key objective.momentum"),
        ("objective.weighting=equal", "objective.weighting=equal.*residual"),
        ("objective.train_only=encoder", "tail"),
        ("data.name=era6", "era6"),
        ("stream.temperature.variables=[ozone]", "ozone"),
        ("stream.temperature.levels=[13]", "13"),
        ("tasks.0.lead_time=soon", "soon"),
        ("tasks.0._target_=oracle", "oracle"),
        ("masking.probabilities=[1.0]", "probabilities"),
        ("+masking.samplers.0.rates=[0,1]", "rates"),
        ("trainer.precision=8", "bf16-mixed"),
        ("+trainer.gpus=2", "gpus"),
        ("trainer.checkpoint_format=sharded", "strategy=fsdp"),
        ("optimizer.layer_decay=0", "layer_decay"),
        ("trainer.cpu_offload=true", "strategy=fsdp"),
        ("objective.train_only=tail", "warm_start.checkpoints"),
        ("warm_start.low_rank.rank=4", "warm_start.checkpoints"),
    ],
)
def test_what_does_not_fit_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composed("stream=five_fields", override)


def test_keys_of_another_objective_are_its_own() -> None:
    assert composed("objective=jepa").objective.arguments["momentum"] == (0.996, 1.0)
    for override, message in (
        ("objective.momentum=[0.9,1.5]", "objective.momentum.1=1.5: valid: 1 or below"),
        ("+objective.losses={crps: 1.0}", "unknown key objective.losses"),
        ("objective.train_only=tail", "reconstructs nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            composed("objective=jepa", override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.lag_time=[]", "objective.lag_time"),
        ("objective.lag_time=[0h,6h]", "objective.lag_time.0=0h: valid: above 0"),
        ("objective.lag_time=[12h,6h]", "objective.lag_time=.*the shortest first"),
        ("objective.loss=triplet", "objective.loss=triplet.*nt_xent"),
        ("data.batch_size=1", "data.batch_size=1 but objective=contrastive compares .* at least 2"),
        ("data.unreadable=skip", "data.unreadable=skip but objective=contrastive"),
    ],
)
def test_pairs_that_do_not_fit_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed("experiment=contrastive", override)


def test_one_lag_cannot_be_told_apart() -> None:
    with pytest.raises(ConfigError, match=r"objective.lag_time=\[6h\].* at least 2"):
        composed("experiment=atmodist", "objective.lag_time=[6h]")


def test_temporal_attention_wants_convolutions_beside_it() -> None:
    with pytest.raises(ValueError, match="kernel_size"):
        composed("model.attention=temporal", "model.kernel_size=1")


def test_two_kinds_of_heads_want_an_even_number() -> None:
    for kind in ("factorised", "windowed"):
        with pytest.raises(
            ValueError, match=f"num_heads=3 must be even for model.attention={kind}"
        ):
            composed(f"model.attention={kind}", "model.num_heads=3", "model.dim=96")


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        composed("trainer.max_steps=0", "data.batch_size=no", "+model.depth=3")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for key in ("trainer.max_steps", "data.batch_size", "model.depth"):
        assert any(key in line for line in lines), lines


@pytest.mark.parametrize(
    ("duration", "value"),
    [
        ("6h", 6),
        ("90min", 1.5),
        ("1800s", 0.5),
        ("2d", 48),
        (" 1.5 h ", 1.5),
        (np.timedelta64(12, "h"), 12),
        (pd.Timedelta("90min"), 1.5),
        (timedelta(days=2), 48),
    ],
)
def test_durations(duration: Any, value: float) -> None:
    assert hours(duration) == value


@pytest.mark.parametrize(
    "duration",
    [
        np.timedelta64("NaT"),
        np.timedelta64(1, "M"),
        np.timedelta64(6),
        pd.NaT,
        -timedelta(1),
        "6",
        6,
    ],
)
def test_what_is_no_duration_is_refused(duration: Any) -> None:
    with pytest.raises(ValueError, match="is no duration|is negative"):
        hours(duration)


def test_a_run_takes_network_streams_and_window_of_a_checkpoint_of_an_earlier_version() -> None:
    """Keys that the checkpoint does not know yet have the network's own defaults."""
    checkpoint = str(CONF.parent / "tests" / "checkpoints" / "format_2.ckpt")
    over = ["warm_start.network=true", f"warm_start.checkpoints=[{checkpoint}]"]
    config = parse(TrainConfig, plain(compose_config("train", over)))
    trained = load_checkpoint(checkpoint)
    assert config.specs == trained.specs and config.data.window == trained.window
    network = build_model(config, {})
    assert network.load_state_dict(trained.model.state_dict())
    assert [p.shape for p in network.parameters()] == [p.shape for p in trained.model.parameters()]


def test_the_checkpoint_of_a_warm_start_is_checked_before_it_is_read() -> None:
    checkpoint = str(CONF.parent / "tests" / "checkpoints" / "format_2.ckpt")
    over = ["warm_start.network=true", f"warm_start.checkpoints={checkpoint}"]
    assert plain(compose_config("train", over))["warm_start"]["checkpoints"] == [checkpoint]
    with pytest.raises(
        ConfigError, match=r"^warm_start\.checkpoints\.0=5: valid: a text; 5 without quotes"
    ):
        plain(compose_config("train", ["warm_start.network=true", "warm_start.checkpoints=5"]))


def test_all_that_a_causal_network_lacks_is_told_at_once() -> None:
    over = ["model.causal=true", "model.attention=windowed", "masking=bert"]
    with pytest.raises(ConfigError) as info:
        parse(TrainConfig, compose_config("train", over))
    lines = str(info.value).splitlines()
    assert [line for line in lines if "attention=windowed, which sees later steps" in line]
    assert [line for line in lines if "masking=autoregression needs" in line]


def test_a_single_word_is_stored_as_the_list_that_it_means() -> None:
    """Whatever calls `train`: a run that goes on compares its settings with the stored ones."""
    words = ["experiment=quickstart", "optimizer.freeze=encoder.*", "paths.output=o"]
    values = compose_config("train", words)
    config, listed = checked(TrainConfig, {key: values[key] for key in values if key != "hydra"})
    assert values["optimizer"]["freeze"] == "encoder.*"
    assert listed["optimizer"]["freeze"] == ["encoder.*"] == list(config.optimizer.freeze)
    assert checked(TrainConfig, listed)[1] == listed


def test_a_trainer_moves_a_run_that_goes_on_and_leaves_its_steps_and_precision(
    tmp_path: Path,
) -> None:
    folder = f"paths.output={tmp_path}"
    start = ["experiment=quickstart", folder, "trainer.max_steps=7", "trainer.devices=2"]
    before = compose_training(start)[0]
    before.pop("hydra", None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    words = [folder, "resume=auto", "trainer=fsdp", "trainer.devices=4", "optimizer=adamw"]
    after, note = compose_training(words)
    moved = {"strategy": "fsdp", "checkpoint_format": "sharded", "accelerator": "gpu", "devices": 4}
    assert after["trainer"] == before["trainer"] | moved
    _, _, changed = note.partition("changed: ")
    told = dict(text.split(" (was ") for text in changed.split(", ") if " (was " in text)
    assert told["trainer.strategy=fsdp"] == "auto)" and told["trainer.devices=4"] == "2)"
    assert "optimizer.algorithm=adamw (was muon)" in changed
    assert "max_steps" not in changed and "precision" not in changed
    assert compose_training([folder, "resume=auto", "trainer.devices=2"])[1].endswith("config.yaml")
