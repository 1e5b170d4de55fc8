"""A trained model is tuned on few data of another climate, resolution or variable, through
`experiment=finetune`."""

from pathlib import Path

import numpy as np
import pytest
import torch

from atmossl.batch import PRIMARY
from atmossl.inference.checkpoint import TrainedModel, load_checkpoint
from atmossl.training.keeping import steps_in
from tests.processes import Ended, command
from tests.synthetic import catalog, dataset

pytestmark = pytest.mark.e2e
VARIABLES = ("temperature", "u_component_of_wind")
NO_STEP = "optimizer.learning_rate=1e-30"  # leaves float32 weights as they are, so none is better


def stream(*variables: str) -> str:
    return (
        f"+stream.air={{variables: {list(variables)}, levels: [300, 850], "
        "token_size: {time: 1, lat: 2, lon: 2, level: 2}, role: predict}"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of two grids and two climates, and a run that has seen one variable of one of them."""
    folder = tmp_path_factory.mktemp("tuning")
    for name, num_lat, seed in (("known", 8, 0), ("climate", 8, 5), ("fine", 16, 5)):
        (folder / name).mkdir()
        store = dataset(num_lat=num_lat, num_lon=2 * num_lat, steps=40, seed=seed)
        catalog(folder / name, train=store, validation=store, test=store)
    words = (*fresh("temperature"), "trainer.patience=0", "data.fraction=1.0")
    assert tune(folder, "start", "known", *words, "trainer.max_steps=2").returncode == 0
    return folder


def fresh(*variables: str) -> tuple[str, ...]:
    """A network of its own, without the weights of another."""
    return ("warm_start.network=false", "warm_start.checkpoints=[]", "model=tiny",
            "~stream.atmosphere", stream(*variables))  # fmt: skip


def start(folder: Path) -> str:
    return f"warm_start.checkpoints=[{folder}/start/checkpoints/last.ckpt]"


def tune(folder: Path, name: str, target: str, *more: str) -> Ended:
    words = [
        "train", "experiment=finetune", "data.name=waves",
        f"data.catalog={folder / target / 'catalog.yaml'}", "data.batch_size=2",
        "data.window={time: 5, lat: 8, lon: 0}", "data.fraction=0.25", "optimizer.warmup_steps=1",
        "trainer.max_steps=9", "trainer.validation_interval=2", "trainer.validation_batches=1",
        "trainer.log_interval=1", "trainer.accelerator=cpu", "trainer.pictures=false",
        f"paths.output={folder / name}", *more,
    ]  # fmt: skip
    return command(*words, cache=folder / "cache")


def result(folder: Path, name: str) -> TrainedModel:
    return load_checkpoint(str(folder / name / "checkpoints" / "last.ckpt"))


def steps(trained: TrainedModel) -> float:
    """Time steps of the training data that a run says to have seen."""
    first, last = (
        trained.checkpoint_record["statistics"][PRIMARY]["period"].split(" ", 1)[1].split(" to ")
    )
    return (np.datetime64(last) - np.datetime64(first)) / np.timedelta64(6, "h") + 1


def test_another_climate_until_no_validation_is_better(folder: Path) -> None:
    ended = tune(folder, "tuned", "climate", start(folder), NO_STEP, "trainer.patience=2")
    assert ended.returncode == 0, ended.stderr
    assert list(steps_in(folder / "tuned" / "checkpoints")) == [
        6
    ]  # the first is the best, then two more
    line = "ended at step 6 of 9; rmse_ratio/mean was best at the step of"
    assert line in ended.stderr and "best.ckpt (trainer.patience=2)" in ended.stderr
    tuned, known = result(folder, "tuned"), result(folder, "start")
    assert (
        tuned.checkpoint_record["statistics"] == known.checkpoint_record["statistics"]
    )  # what its network is used to
    assert tuned.checkpoint_record["seen"] != known.checkpoint_record["seen"]
    for name, value in known.model.state_dict().items():
        torch.testing.assert_close(tuned.model.state_dict()[name], value)


def test_another_resolution_by_thin_matrices(folder: Path) -> None:
    words = (start(folder), "warm_start.low_rank.rank=2", "trainer.max_steps=2")
    assert tune(folder, "fine_tuned", "fine", *words).returncode == 0
    record = result(folder, "fine_tuned").checkpoint_record
    assert record["warm_start"]["initialised"] == []
    old, new = (result(folder, name).model.state_dict() for name in ("start", "fine_tuned"))
    moved = {name for name, value in old.items() if not torch.equal(value, new[name])}
    assert moved and all(name.startswith(("encoder.", "decoder.")) for name in moved)


def test_a_variable_that_pretraining_never_saw_against_a_random_start(folder: Path) -> None:
    words = (*fresh(*VARIABLES), "trainer.max_steps=2")
    assert tune(folder, "scratch", "climate", *words).returncode == 0
    assert tune(folder, "wider", "climate", *words, start(folder)).returncode == 0
    scratch, wider = result(folder, "scratch"), result(folder, "wider")
    assert wider.specs[0].variables == VARIABLES
    grown = wider.checkpoint_record["warm_start"]["grown"]
    assert {name.split(".")[0] for name in grown} == {"embedding", "query", "tail"}
    assert (
        wider.checkpoint_record["statistics"] == scratch.checkpoint_record["statistics"]
    )  # of the part alone
    assert steps(wider) == 10 and steps(result(folder, "start")) == 40


def test_what_cannot_be_is_one_line(folder: Path) -> None:
    for word, message in (
        ("data.fraction=0.05", "data.fraction=0.05 of 40 steps is a block of 2, shorter than"),
        ("data.fraction=0", "data.fraction=0: valid: above 0"),
        ("trainer.patience=-1", "trainer.patience=-1"),
    ):
        ended = tune(folder, "none", "climate", start(folder), word)
        assert ended.returncode == 2 and message in ended.stderr, ended.stderr
