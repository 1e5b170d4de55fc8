"""What is said of a plugin that does not keep its contract, or whose own code fails."""

import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atmossl.checkpoint_files import save_contents
from atmossl.cli import main
from atmossl.plain_values import check_plain

PARTS = """
import datetime
from dataclasses import dataclass

import lightning as L
import numpy as np

from atmossl.objectives.masked import MaskedModelling


class Dated(L.Callback):
    def state_dict(self):
        return {"steps": [1], "when": datetime.datetime(2001, 1, 31)}


class DatedLater(L.Callback):
    def __init__(self):
        self.when = None

    def on_train_batch_end(self, *args):
        self.when = datetime.datetime(2001, 1, 31)

    def state_dict(self):
        return {"at": {"end": self.when}}


class ExtraState(MaskedModelling):
    def get_extra_state(self):
        return {"scale": np.float64(2.0)}

    def set_extra_state(self, state):
        pass


class Unpacks(MaskedModelling):
    def forward(self, network, batch):
        first, second = batch.views


@dataclass(frozen=True)
class Refuses:
    width: int

    def __post_init__(self):
        if self.width > 3:
            raise ValueError("width is above 3")

    def __call__(self, layouts, rng):
        raise ValueError("no rain")
"""
NAME = "faulty_parts"


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The module of faulty classes, on the path."""
    folder = tmp_path_factory.mktemp("package")
    (folder / f"{NAME}.py").write_text(PARTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop(NAME, None)


def training(output: Path, *words: str) -> list[str]:
    """A tiny run of two steps."""
    return [
        "train", "model=tiny", "data.window={time: 5, lat: 16, lon: 16}", "data.batch_size=2",
        "data.num_workers=0", "optimizer.warmup_steps=0", "trainer.max_steps=2",
        "trainer.log_interval=1", "trainer.pictures=false", "trainer.validation_batches=1",
        "trainer.accelerator=cpu", f"paths.output={output}", *words,
    ]  # fmt: skip


def told(arguments: list[str], capsys: Any, code: int) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main(arguments) == code
    return capsys.readouterr().err.splitlines()[-1]


STATES = [
    ("callbacks.mine._target_", "Dated", "state_dict of callback Dated holds when=2001-01-31", 0),
    ("callbacks.mine._target_", "DatedLater", "callback DatedLater holds at.end=2001-01-31", 0),
    ("objective._target_", "ExtraState", "ExtraState holds _extra_state.scale=2.0, a numpy", 0),
]


@pytest.mark.parametrize(("key", "kind", "message", "_"), STATES)
def test_a_state_that_no_checkpoint_can_hold_is_refused_when_it_is_first_seen(
    tmp_path: Path, capsys: Any, key: str, kind: str, message: str, _: int
) -> None:
    line = told(training(tmp_path / "run", f"{key}={NAME}.{kind}"), capsys, 2)
    assert message in line and "cannot be read from a checkpoint" in line
    assert not list((tmp_path / "run").rglob("*.ckpt"))


class Word(StrEnum):
    RAIN = "rain"


PLAIN = [
    None, True, 3, 2.5, 1j, "text", b"bytes", bytearray(b"b"), [1, (2, {3})], {"a": {1: None}},
    OrderedDict(a=1), Counter("aab"), torch.zeros(2), torch.nn.Parameter(torch.zeros(2)),
    torch.Size([2]), torch.float32, torch.device("cpu"), Word.RAIN, np.float64(1.0), np.zeros(2),
    Path("a"), slice(1), np.datetime64("2001-01-31"), {"a": [Path("b")]}, {Word.RAIN: 1}, range(3),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_exactly_what_torch_does_not_read_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"part": value}, tmp_path / "file")
    try:
        torch.load(tmp_path / "file", weights_only=True)
        is_read = True
    except Exception:
        is_read = False
    try:
        check_plain({"part": value}, "a state")
        is_plain = True
    except ValueError as error:
        is_plain = False
        assert str(error).startswith("a state holds part") and "\n" not in str(error)
        with pytest.raises(ValueError, match="callback Mine holds deep.part"):
            save_contents({"callbacks": {"Mine": {"deep": {"part": value}}}}, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
    assert is_plain == is_read


def masked_by(kind: str, *words: str) -> list[str]:
    """The words that choose a masking sampler of the faulty plugin."""
    without = ("~masking.samplers", "~masking.probabilities")
    return [*without, f"masking._target_={NAME}.{kind}", *words]


def test_the_line_of_a_plugin_that_raises_is_named(
    tmp_path: Path, package: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = PARTS.splitlines().index("        first, second = batch.views") + 1
    unpacks = training(tmp_path / "run", f"objective._target_={NAME}.Unpacks")
    line = told(unpacks, capsys, 1)
    assert "ValueError: not enough values to unpack (expected 2, got 1) (raised at" in line
    assert f"{package / NAME}.py:{number} in forward; ATMOSSL_TRACEBACK=1 shows" in line
    refuses = training(tmp_path / "refused", *masked_by("Refuses", "+masking.width=3"))
    line = told(refuses, capsys, 1)
    assert "ValueError: no rain (raised at" in line and "in __call__" in line
    monkeypatch.setenv("ATMOSSL_TRACEBACK", "1")
    assert main(refuses) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and 'raise ValueError("no rain")' in shown


def test_what_a_plugin_says_of_its_keys_stays_one_line(tmp_path: Path, capsys: Any) -> None:
    words = training(tmp_path / "run", *masked_by("Refuses", "+masking.width=4"))
    capsys.readouterr()
    assert main(words) == 2
    assert capsys.readouterr().err == "atmossl train: masking: width is above 3\n"
