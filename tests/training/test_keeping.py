"""Through any history of saves, tears, kills and resumes, no good checkpoint goes before a later
one of its line is there, branches do not mix, and no run begins anew over what is there."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atmossl.training import keeping, resume
from atmossl.training.keeping import (
    Kept,
    TidyPlan,
    leave_branch,
    renew_last,
    tidy,
    to_keep,
    to_set_aside,
)

TORN = "torn"


class Killed(BaseException):
    """The process ends between two changes of the folder."""


class Run:
    """A run's folder and what a training does to it. A checkpoint is a file that names itself and
    those it was trained on from; a kill comes before the change of number `kill_at`."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.kill_at: int | None = None
        self.alive = False
        self.step, self.line, self.start, self.saved = 0, (), None, 0
        for module in (keeping, resume):
            patch.setattr(module, "read_record_to_go_on", read)
        for name in ("link_atomically", "remove", "_copy"):
            patch.setattr(keeping, name, self.counted(getattr(keeping, name)))
        for name in ("mkdir", "replace"):
            patch.setattr(Path, name, self.counted(getattr(Path, name)))

    def counted(self, change: Any) -> Any:
        def or_killed(*args: Any, **kwargs: Any) -> Any:
            if self.kill_at is not None:
                self.kill_at -= 1
                if self.kill_at < 0:
                    raise Killed
            return change(*args, **kwargs)

        return or_killed

    def save(self, *, keep: int, best: bool) -> None:
        """The order of `KeepCheckpoints`: the best one, then the step, then what is old goes."""
        self.step += 1
        self.saved += 1
        own = {"step": self.step, "id": self.saved, "line": [*self.line, self.saved]}
        self.line = tuple(own["line"])
        if best:
            (self.folder / "best.ckpt").write_text(json.dumps(own))
        (self.folder / f"step-{self.step}.ckpt").write_text(json.dumps(own))
        tidy(self.folder, self.start, keep)

    def go_on(self, path: Path, *, keep: int) -> None:
        record = read(path)
        self.step, self.line = record["step"], tuple(record["line"])
        self.start = leave_branch(self.folder, path, self.step).start
        tidy(self.folder, self.start, keep)

    def good(self) -> dict[int, dict[str, Any]]:
        """Every good checkpoint anywhere in the folder, by its identity."""
        files = [p for p in self.folder.rglob("*.ckpt") if not p.is_symlink()]
        texts = [p.read_text() for p in files if not p.name.startswith(".partial")]
        records = [json.loads(text) for text in texts if text != TORN]
        return {record["id"]: record for record in records}


def read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    if text == TORN:
        raise ValueError(f"checkpoint={path} is damaged")
    return json.loads(text)


def check_nothing_lost(before: dict[int, dict], after: dict[int, dict]) -> None:
    for lost in before.keys() - after.keys():
        assert any(lost in record["line"] for record in after.values()), before[lost]


def check_one_line(run: Run) -> None:
    """After a start or a save all checkpoints in the folder belong to the line in progress, and
    `last.ckpt` is its newest."""
    steps = {int(p.name[5:-5]): p for p in run.folder.glob("step-*.ckpt")}
    for path in steps.values():
        if path.read_text() != TORN:  # torn behind the run's back, and older
            assert read(path)["id"] in run.line
    last = run.folder / "last.ckpt"
    assert last.read_text() == TORN or read(last)["step"] == run.step
    assert max(steps, default=0) <= run.step


def resumed(run: Run, rng: random.Random, keep: int) -> None:
    """`resume=auto` now and then, else from any good checkpoint in the folder or elsewhere."""
    files = [p for p in run.folder.rglob("*.ckpt") if p.exists()]  # a link may point nowhere
    candidates = [p for p in files if p.read_text() != TORN]
    if candidates and rng.random() < 0.4:
        path = rng.choice(sorted(candidates))
        if rng.random() < 0.3:
            elsewhere = run.folder.parent / "copy.ckpt"
            elsewhere.write_text(path.read_text())
            path = elsewhere
        run.go_on(path, keep=keep)
        return
    here = [p for p in (*run.folder.glob("step-*.ckpt"), *run.folder.glob("best.ckpt"))]
    try:
        start = resume.newest_start(run.folder)
    except ValueError as error:
        assert "resume=PATH" in str(error)
        assert not [p for p in here if p.read_text() != TORN] or [*run.folder.glob(".leaving-*")]
        run.folder = run.folder.parent / f"anew-{run.saved}"  # what the user does then
        run.kill_at = None
        run.folder.mkdir()
        start = None
    if start is None:
        assert not any(run.folder.iterdir())
        run.step, run.line, run.start = 0, (), None
        run.save(keep=keep, best=False)
        return
    if not any(run.folder.glob(".leaving-*")):
        good = [p for p in here if p.read_text() != TORN]
        steps = [read(p)["step"] for p in good if p.name != "best.ckpt"]
        assert start.checkpoint_record["step"] == max(
            steps, default=start.checkpoint_record["step"]
        )
    run.go_on(start.path, keep=keep)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), keep=st.integers(1, 3))
def test_no_history_loses_the_last_good_checkpoint(
    seed: int, keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        run = Run(tmp_path_factory.mktemp("run") / "checkpoints", patch)
        run.folder.mkdir()
        for _ in range(25):
            before, run.kill_at = run.good(), rng.choice([None, None, 0, 1, 2, 3, 4])
            folder = run.folder
            try:
                if run.alive and rng.random() < 0.7:
                    run.save(keep=keep, best=rng.random() < 0.3)
                else:
                    resumed(run, rng, keep)
                    run.alive = True
                check_one_line(run)
            except Killed:
                run.alive = False
            run.kill_at = None
            if run.folder == folder:
                check_nothing_lost(before, run.good())
            present = [p for p in run.folder.glob("*.ckpt") if not p.is_symlink()]
            if present and rng.random() < 0.2:
                rng.choice(sorted(present)).write_text(TORN)
                run.alive = False  # found at the next start


def test_what_is_set_aside() -> None:
    good = [Kept(f"step-{step}.ckpt", step, good=True) for step in (2, 4, 6)]
    torn, best = Kept("step-8.ckpt", 8, good=False), Kept("best.ckpt", 5, good=True)
    everything = [*good, torn, best]
    assert to_set_aside(everything, good[2]) == ("step-8.ckpt",)
    assert to_set_aside(everything, good[1]) == ("step-6.ckpt", "step-8.ckpt", "best.ckpt")
    assert to_set_aside(everything, best) == ("step-6.ckpt", "step-8.ckpt")
    assert len(to_set_aside(everything, None)) == len(everything)


@pytest.mark.parametrize(
    ("steps", "start", "keep", "expected"),
    [
        ((), None, 1, None),
        ((), (3, "best.ckpt"), 1, TidyPlan("best.ckpt", ())),
        ((2,), (3, "best.ckpt"), 1, TidyPlan("best.ckpt", ())),
        ((2, 4), (3, "best.ckpt"), 1, TidyPlan("step-4.ckpt", ("step-2.ckpt",))),
        ((2, 10, 4), None, 2, TidyPlan("step-10.ckpt", ("step-2.ckpt",))),
    ],
)
def test_what_is_kept(steps, start, keep, expected) -> None:
    assert to_keep(steps, start, keep) == expected


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("step-4.ckpt", "step-4.ckpt"),
        ("last.ckpt", "step-2.ckpt"),  # the link itself
        ("best.ckpt", "step-2.ckpt"),
        ("../elsewhere/step-4.ckpt", "step-2.ckpt"),
    ],
)
def test_a_run_with_nothing_left_to_train_renews_its_link(
    start: str, expected: str, tmp_path: Path
) -> None:
    """It was killed between the save of step 4 and the link to it; no hook of training is called
    any more. Starts that are no step of this folder leave the link alone."""
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for path in (folder / "step-2.ckpt", folder / "step-4.ckpt", folder / "best.ckpt",
                 elsewhere / "step-4.ckpt"):  # fmt: skip
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (folder / "last.ckpt").symlink_to("step-2.ckpt")
    renew_last(folder, folder / start)
    assert (folder / "last.ckpt").readlink() == Path(expected)
