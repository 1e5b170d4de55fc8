"""Old names of configuration keys work for one release, with a line that has the new name."""

import pytest

from atmossl import composition
from atmossl.api import find_task
from atmossl.cli import compose_config, main
from atmossl.masking.tasks import Forecast, TemporalInterpolation
from atmossl.renamed_keys import renamed, renamed_override
from atmossl.schema import TrainConfig, parse

OLD = {
    "model.stencil=[5,3,3]": "model.embedding_stencil=[5,3,3]",
    "model.neighbourhood=5": "model.kernel_size=5",
    "++model.details=false": "++model.gradient_features=false",
    "objective.weighting=departure": "objective.weighting=residual",
    "tasks.0.name=forecast": "tasks.0._target_=forecast",
    "task.task.name=forecast": "task.task._target_=forecast",
    "catalog=my.yaml": "data.catalog=my.yaml",
    "masking.samplers.2.hidden_hours=6": "masking.samplers.2.hidden_time=6h",
    "objective.lag_hours=[6, 12]": "objective.lag_time=[6h,12h]",
    "objective.no_negatives_within_days=2.5": "objective.no_negatives_within=2.5d",
    "data.read.retry_wait_s=0.5": "data.read.retry_wait=0.5s",
    "data.read.engine=tensorstore": "data.read.engine=auto",
}
PRESENT = ("data.name=sample", "-m", "--force", "NAME", "stream.s.variables=[a=b]", "a..b=c", "~x")


@pytest.mark.parametrize("old", OLD)
def test_the_command_line_takes_old_names_and_says_the_new_ones(old: str, caplog) -> None:
    assert renamed_override(old) == OLD[old]
    (line,) = caplog.messages
    assert line.startswith(f"note: {old.lstrip('+').split('=')[0]}")
    assert OLD[old].lstrip("+").split("=")[0] in line


@pytest.mark.parametrize("word", PRESENT)
def test_present_names_stay_without_a_word(word: str, caplog) -> None:
    assert renamed_override(word) == word and not caplog.messages


def test_a_file_with_old_names_is_the_same_configuration(caplog) -> None:
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
    assert renamed(old)[0] == present
    assert parse(TrainConfig, old) == parse(TrainConfig, present)
    assert len(caplog.messages) == 3 + len(present["tasks"]) + 1


def test_a_task_is_the_same_object_in_a_file_and_in_a_mixture() -> None:
    config = parse(TrainConfig, compose_config("train", []))
    assert TemporalInterpolation(6.0) in config.masking.samplers
    assert TemporalInterpolation(6.0) in config.tasks
    assert find_task("forecast", {"lead_time": "90min"}) == Forecast(1.5, 12.0)


def test_an_old_name_is_noted_in_one_line_of_a_command(capsys) -> None:
    assert main(["config", "validate", "model.neighbourhood=5"]) == 0
    assert main(["config", "validate", "model.neighbourhood=4"]) == 2
    assert "model.kernel_size=4 must be odd" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["waves", {"name": "waves"}])
def test_data_may_be_a_name_beside_an_old_catalog(data) -> None:
    present, notes = renamed({"data": data, "catalog": "my.yaml", "every": 2})
    assert present == {"data": {"name": "waves", "catalog": "my.yaml"}, "every": 2}
    assert len(notes) == 1


def test_data_names_a_catalog_entry_in_every_command(monkeypatch) -> None:
    monkeypatch.setattr(composition, "_unknown_entry", lambda _: [])  # nor is the file there
    needed = ["checkpoint=x", "output=o"]
    for command, more in (("train", []), ("stats", []), ("inspect", []), ("predict", needed),
                          ("embed", needed), ("probe", needed), ("evaluate", needed)):  # fmt: skip
        data = compose_config(command, ["data=mine", "data.catalog=my.yaml", *more])["data"]
        assert (data["name"], data["catalog"]) == ("mine", "my.yaml"), command
    by_file = compose_config("train", ["data=weatherbench2_64x32"])["data"]
    assert by_file["name"] == "weatherbench2_64x32" and by_file["batch_size"] == 16


def test_a_task_file_with_old_names_is_noted_once(tmp_path, caplog, capsys) -> None:
    (tmp_path / "old.yaml").write_text("{name: hindcast, lead_time: 12h}")
    command = ["predict", f"task={tmp_path}/old.yaml", f"checkpoint={tmp_path}/none.ckpt",
               f"output={tmp_path}/o.zarr"]  # fmt: skip
    assert main(command) == 2 and "none.ckpt" in capsys.readouterr().err
    assert [line.partition(";")[0] for line in caplog.messages] == [
        "note: task.name is now task._target_"
    ]


def test_durations_that_were_numbers_are_the_same_with_their_unit(caplog) -> None:
    objective = ("experiment=contrastive", "objective.lag_time=[6h,1d]")
    present = compose_config("train", [*objective, "data.read.retry_wait=1.5s"])
    old = {**present, "data": {**present["data"], "read": {**present["data"]["read"]}}}
    old["objective"] = {**present["objective"], "lag_hours": [6, 24], "no_negatives_within_days": 5}
    del old["objective"]["lag_time"], old["objective"]["no_negatives_within"]
    old["data"]["read"]["retry_wait_s"] = float(old["data"]["read"].pop("retry_wait")[:-1])
    parsed = parse(TrainConfig, old)
    assert parsed == parse(TrainConfig, present)
    assert parsed.objective.arguments["lag_hours"] == (6.0, 24.0)
    assert parsed.objective.arguments["no_negatives_hours"] == 120.0
    assert parsed.data.read.retry_wait_s == 1.5
    assert len(caplog.messages) == 3
