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
from pydantic import ConfigDict, TypeAdapter

from atmossl.batch import StreamMask, token_grid
from atmossl.checkpoint_files import save_contents
from atmossl.cli import main
from atmossl.losses import Losses
from atmossl.masking.base import TokenLayout, check_masks
from atmossl.masking.random import Mixture
from atmossl.masking.tasks import TimePlan, check_plan
from atmossl.objectives.base import Monitor, Objective, check_built, check_class, check_losses
from atmossl.plain_values import check_plain
from atmossl.schema.targets import ChosenTask, objectives
from tests.synthetic import spec, window

PARTS = """
import datetime
from dataclasses import dataclass, replace

import lightning as L
import numpy as np

from atmossl.masking.tasks import Task
from atmossl.objectives.base import Monitor
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


class HidesNothing:
    def __call__(self, layouts, rng):
        return tuple(layout.nothing_hidden() for layout in layouts)


class ReturnsNothing:
    def __call__(self, layouts, rng):
        pass


class Mistyped(MaskedModelling):
    monitor = Monitor("rmse_ratio/maen")


class NotFinite(MaskedModelling):
    def forward(self, network, batch):
        losses = super().forward(network, batch)
        terms = tuple((name, value * float("nan")) for name, value in losses.terms)
        return replace(losses, terms=terms)


class ReturnsTensor(MaskedModelling):
    def forward(self, network, batch):
        return super().forward(network, batch).total


class NoPlan(Task):
    def __call__(self, layouts, rng):
        return tuple(layout.nothing_hidden() for layout in layouts)


class PlansTuple(NoPlan):
    def plan(self, num_steps, step_hours):
        return (0, (0,), (0,))
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


def layouts_of_a_window() -> tuple[TokenLayout, ...]:
    stream = spec()
    return (TokenLayout(stream, token_grid(window(stream))),)


MASKS = [
    (
        lambda _: None,
        "returned nothing; it must return a tuple with one atmossl.batch.Stream",
    ),
    (lambda layouts: layouts[0].nothing_hidden(), "returned an object of the class StreamMask;"),
    (lambda _: (), "returned 0 masks for 1 streams"),
    (lambda layouts: (torch.zeros(layouts[0].grid.shape),), "the class Tensor for stream air"),
    (lambda _: (StreamMask(torch.zeros(1, 2, dtype=torch.int64)),), "a mask of shape [1,2]"),
    (lambda layouts: (StreamMask(layouts[0].nothing_hidden().corruption + 7),), "from 7 to 7 for"),
    (lambda layouts: (StreamMask(layouts[0].nothing_hidden().hidden),), "a mask of torch.bool"),
]


@pytest.mark.parametrize(("sampler", "message"), MASKS)
def test_a_sampler_that_returns_no_masks_is_named(sampler: Any, message: str) -> None:
    class Mine:
        def __call__(self, layouts: Any, rng: Any) -> Any:
            del rng
            return sampler(layouts)

    layouts, rng = layouts_of_a_window(), np.random.default_rng(0)
    for drawn in (Mine(), Mixture((Mine(),), (1.0,))):
        with pytest.raises(ValueError, match="masking sampler .*Mine returned") as told:
            check_masks(drawn, drawn(layouts, rng), layouts)
        assert message in str(told.value) and "\n" not in str(told.value)


class NoForward(Objective):
    monitor = Monitor("loss")
    provides = frozenset({"embed"})


class NothingProvided(Objective):
    monitor = Monitor("loss")

    def forward(self, network: Any, batch: Any) -> Any: ...


class WordProvided(NothingProvided):
    provides: Any = "embed"


class NoSuper(NothingProvided):
    provides = frozenset({"embed"})

    def __init__(self) -> None:
        self.delta = 1.0


class WordMonitor(NothingProvided):
    provides = frozenset({"embed"})
    monitor: Any = "loss"


CLASSES = [
    (NoForward, "NoForward has no method forward"),
    (NothingProvided, "NothingProvided has provides=null; valid: a frozenset"),
    (WordProvided, "WordProvided has provides=embed; valid: a frozenset"),
    (NoSuper, "NoSuper must call super"),
    (WordMonitor, "WordMonitor has monitor=loss; valid: an atmossl.objectives.base.Monitor"),
]


@pytest.mark.parametrize(("kind", "message"), CLASSES)
def test_an_objective_without_what_a_run_asks_for_is_named(kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        check_class(kind)
        check_built(kind())
    assert "\n" not in str(told.value)


def test_every_objective_of_the_package_keeps_the_contract() -> None:
    for kind in objectives().values():
        check_class(kind)


TERM = torch.zeros((), requires_grad=True)
LOSSES = [
    (TERM, "an object of the class Tensor; it must return atmossl.losses.Losses"),
    (Losses((("a", TERM),), (1.0, 2.0)), "1 terms and 2 factors"),
    (Losses((("a", TERM.expand(2)),), (1.0,)), r"is \[2\]; valid: a tensor"),
    (Losses((("a", 2.0),), (1.0,)), "is float; valid"),  # pyright: ignore[reportArgumentType]
    (Losses((("a", TERM.detach()),), (1.0,)), "has no gradient"),
]  # fmt: skip


@pytest.mark.parametrize(("losses", "message"), LOSSES)
def test_an_objective_that_returns_no_loss_is_named(losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"objective WordMonitor.*{message}"):
        check_losses(losses, WordMonitor(), trains=True)


def test_a_task_without_a_plan_is_named() -> None:
    adapter = TypeAdapter(ChosenTask, config=ConfigDict(arbitrary_types_allowed=True))
    with pytest.raises(ValueError, match="the task NoPlan has no method plan, which"):
        adapter.validate_python({"_target_": f"{NAME}.NoPlan"})
    task = adapter.validate_python({"_target_": f"{NAME}.PlansTuple"})
    with pytest.raises(
        ValueError, match="PlansTuple returned an object of the class tuple; it must"
    ):
        check_plan(task, task.plan(5, 6.0), 5)

    class Beyond(type(task)):
        def plan(self, num_steps: int, step_hours: float) -> TimePlan:
            del step_hours
            return TimePlan(0, (0,), (0, num_steps))

    with pytest.raises(ValueError, match="reads step 5; the window has the steps 0 to 4"):
        check_plan(Beyond(), Beyond().plan(5, 6.0), 5)


def test_a_run_tells_what_it_does_not_learn_from_and_does_not_score(
    tmp_path: Path, capsys: Any
) -> None:
    words = [*masked_by("HidesNothing"), f"objective._target_={NAME}.Mistyped"]
    assert main(training(tmp_path / "run", *words, "trainer.validation_interval=1")) == 0
    lines = capsys.readouterr().err.splitlines()
    (hidden,) = [line for line in lines if "hid nothing" in line]
    (monitor,) = [line for line in lines if "rmse_ratio/maen, was not logged" in line]
    assert hidden.startswith("note: masking=HidesNothing") and "rmse_ratio/mean" in monitor
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            [f"objective._target_={NAME}.NotFinite"],
            1,
            "not finite 2 times in a row, last at step 2",
        ),
        ([f"objective._target_={NAME}.ReturnsTensor"], 2, "ReturnsTensor returned an object of"),
        (masked_by("ReturnsNothing"), 2, "the masking sampler ReturnsNothing returned nothing"),
    ],
)
def test_a_run_that_cannot_train_says_so(
    tmp_path: Path, capsys: Any, words: list[str], code: int, message: str
) -> None:
    capsys.readouterr()
    assert main(training(tmp_path / "run", *words)) == code
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1] and "checkpoint:" not in captured.out
    assert not list((tmp_path / "run").rglob("*.ckpt"))
