"""Configurations that earlier versions stored are read by the present names of their keys."""

import pytest

from atmossl import composition
from atmossl.api import find_task
from atmossl.cli import compose_config, main
from atmossl.masking.tasks import Forecast, TemporalInterpolation
from atmossl.renamed_keys import renamed
from atmossl.schema import TrainConfig, parse


def test_a_stored_file_with_old_names_is_the_same_configuration() -> None:
    present = compose_config("train", [])
    old = {**present, "model": dict(present["model"]), "masking": dict(present["masking"])}
    for now, before in (
        ("kernel_size", "neighbourhood"),
        ("embedding_stencil", "stencil"),
        ("gradient_features", "details"),
    ):
        old["model"][before] = old["model"].pop(now)
    old["tasks"] = [
        {("name" if key == "_target_" else key): value for key, value in task.items()}
        for task in present["tasks"]
    ]
    old["masking"]["samplers"] = [
        {"_target_": "atmossl.masking.tasks.TemporalInterpolation", "hidden_hours": 6}
        if sampler["_target_"] == "temporal_interpolation"
        else sampler
        for sampler in present["masking"]["samplers"]
    ]
    old["logger"] = {**present["logger"], "wandb_project": present["logger"]["project"]}
    del old["logger"]["project"]
    assert renamed(old) == present


def test_a_task_is_the_same_object_in_a_file_and_in_a_mixture() -> None:
    config = parse(TrainConfig, compose_config("train", []))
    assert TemporalInterpolation(6.0) in config.masking.samplers
    assert TemporalInterpolation(6.0) in config.tasks
    assert find_task("forecast", {"lead_time": "90min"}) == Forecast(1.5, 12.0)


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("model.stencil", "model.embedding_stencil"),
        ("logger.wandb_project", "logger.project"),
        ("masking.samplers.2.hidden_hours", "masking.samplers.2.hidden_time"),
        ("tasks.0.lead_hours", "tasks.0.lead_time"),
        ("data.read.retry_wait_s", "data.read.retry_wait"),
        ("catalog", "data.catalog"),
    ],
)
def test_an_old_name_is_refused_in_a_line_that_names_the_present_one(old, now, capsys) -> None:
    assert main(["config", "validate", f"{old}=3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"unknown key {old}: it is {now} now")


@pytest.mark.parametrize("data", ["waves", {"name": "waves"}])
def test_data_may_be_a_name_beside_an_old_catalog(data) -> None:
    present = renamed({"data": data, "catalog": "my.yaml", "every": 2})
    assert present == {"data": {"name": "waves", "catalog": "my.yaml"}, "every": 2}


def test_data_names_a_catalog_entry_in_every_command(monkeypatch) -> None:
    monkeypatch.setattr(composition, "_unknown_entry", lambda _: [])  # nor is the file there
    needed = ["checkpoint=x", "output=o"]
    for command, more in (("train", []), ("stats", []), ("inspect", []), ("predict", needed),
                          ("embed", needed), ("probe", needed), ("evaluate", needed)):  # fmt: skip
        data = compose_config(command, ["data=mine", "data.catalog=my.yaml", *more])["data"]
        assert (data["name"], data["catalog"]) == ("mine", "my.yaml"), command
    by_file = compose_config("train", ["data=weatherbench2_64x32"])["data"]
    assert by_file["name"] == "weatherbench2_64x32" and by_file["batch_size"] == 16


def test_durations_that_were_numbers_are_the_same_with_their_unit() -> None:
    objective = ("experiment=contrastive", "objective.lag_time=[6h,1d]")
    present = compose_config("train", [*objective, "data.read.retry_wait=1.5s"])
    old = {**present, "data": {**present["data"], "read": {**present["data"]["read"]}}}
    old["objective"] = {**present["objective"], "lag_hours": [6, 24], "no_negatives_within_days": 5}
    del old["objective"]["lag_time"], old["objective"]["no_negatives_within"]
    old["data"]["read"]["retry_wait_s"] = float(old["data"]["read"].pop("retry_wait")[:-1])
    parsed = parse(TrainConfig, renamed(old))
    assert parsed == parse(TrainConfig, present)
    assert parsed.objective.arguments["lag_hours"] == (6.0, 24.0)
    assert parsed.objective.arguments["no_negatives_hours"] == 120.0
    assert parsed.data.read.retry_wait_s == 1.5
