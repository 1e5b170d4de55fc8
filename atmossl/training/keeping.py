"""Decides which checkpoints of a run stay, and where.

A run's folder `checkpoints/` holds one line of checkpoints `step-N.ckpt`, each trained on from the
one before, `best.ckpt` of the same line, and `last.ckpt`, a link to the newest. When training goes
on from an older checkpoint, the later ones form a branch that is left: they move into
`abandoned-step-N-K/`, as do damaged ones, and nothing of them is deleted.

The rule itself, `to_set_aside` and `to_keep`, is pure. `leave_branch` and `tidy` look at the folder
and do what the rule says, in steps of which each leaves a folder that training can go on from.
"""

import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from atmossl.atomic_files import partial_path, remove, write_atomically
from atmossl.checkpoint_files import read_record_to_go_on

BEST = "best.ckpt"
ABANDONED = "abandoned-step-"
_LEAVING = ".leaving-"  # and a step: checkpoints of later steps are being moved into this folder
_STEP = re.compile(r"step-(\d+)\.ckpt")
_LAST = "last.ckpt"


def step_of(name: str) -> int | None:
    """The number N of a file `step-N.ckpt`; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def steps_in(folder: Path) -> dict[int, Path]:
    """The checkpoints `step-N.ckpt` of a run by their step, without those that are just being
    moved aside."""
    limit = min((int(mark.name.removeprefix(_LEAVING)) for mark in marks_in(folder)), default=None)
    steps = {path: step_of(path.name) for path in folder.glob("*.ckpt")}
    return {
        step: path
        for path, step in steps.items()
        if step is not None and (limit is None or step <= limit)
    }


def marks_in(folder: Path) -> list[Path]:
    """The folders `.leaving-N` of a killed run, which was moving later checkpoints there."""
    return sorted(folder.glob(f"{_LEAVING}*"))


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, the newest step first, then the best one."""
    steps, best = steps_in(folder), folder / BEST
    best_counts = best.exists() and not marks_in(folder)
    return [steps[step] for step in sorted(steps, reverse=True)] + [best] * best_counts


@dataclass(frozen=True)
class Kept:
    """A checkpoint in the folder of a run. good: it can be read and its checksums agree."""

    name: str
    step: int
    good: bool


@dataclass(frozen=True)
class TidyPlan:
    """What to do in the folder once a checkpoint is on the disk. link: the checkpoint to which
    `last.ckpt` shall point."""

    link: str
    remove: tuple[str, ...]


def to_set_aside(present: Collection[Kept], start: Kept | None) -> tuple[str, ...]:
    """Names of the checkpoints that do not belong to the line which ends at `start`, the checkpoint
    that training goes on from: later and damaged ones. None: it lies in another folder, so that
    none of them belong to its line."""
    return tuple(
        checkpoint.name
        for checkpoint in present
        if start is None
        or (checkpoint.name != start.name and (checkpoint.step > start.step or not checkpoint.good))
    )


def to_keep(steps: Collection[int], start: tuple[int, str] | None, keep: int) -> TidyPlan | None:
    """The newest `keep` of a line's steps stay. Its newest one must be known to be good: it was
    compared with memory when it was written, or training went on from it.

    start: step and name of the checkpoint that training went on from, which may be `best.ckpt`.
    None: there is nothing to keep yet.
    """
    newest_first = sorted(steps, reverse=True)
    if start is not None and (not newest_first or newest_first[0] < start[0]):
        return TidyPlan(start[1], ())
    if not newest_first:
        return None
    names = [f"step-{step}.ckpt" for step in newest_first]
    return TidyPlan(names[0], tuple(names[max(1, keep) :]))


def link_atomically(link: Path, target: str) -> None:
    """Point a symbolic link to a neighbour, by one rename."""
    partial = partial_path(link)
    remove(partial)
    partial.symlink_to(target)
    partial.replace(link)


def tidy(folder: Path, start: tuple[int, str] | None, keep: int) -> None:
    """Point `last.ckpt` to the newest checkpoint, then remove all but the newest `keep`."""
    plan = to_keep(steps_in(folder), start, keep)
    if plan is None:
        return
    link_atomically(folder / _LAST, plan.link)
    for name in plan.remove:
        remove(folder / name)


def renew_last(folder: Path, start: Path) -> None:
    """Point `last.ckpt` to `start`, if that is a checkpoint `step-N.ckpt` of the folder.

    A run that was killed before it renewed the link may have nothing left to train when it goes on,
    and then no hook of training calls `leave_branch`.
    """
    start = start.resolve()
    if start.parent == folder.resolve() and step_of(start.name) is not None:
        link_atomically(folder / _LAST, start.name)


@dataclass(frozen=True)
class Departure:
    """How the folder of a run was made ready for training to go on.

    start: step and name, in the folder, of the checkpoint that training goes on from.
    aside: names of the checkpoints that moved into the folder `into`.
    """

    start: tuple[int, str]
    aside: tuple[str, ...]
    into: Path | None


def leave_branch(folder: Path, start: Path, step: int) -> Departure:
    """Make `start`, of this step, the newest checkpoint of the folder; later, damaged and foreign
    ones move aside. A start that lies elsewhere is copied into the folder.

    A folder `.leaving-S` marks all checkpoints of steps after S as left. Where a kill comes before
    all of them have moved there, the next call finishes the move.
    """
    start = start.resolve()
    present = _look(folder, start, step)
    begun = next(
        (checkpoint for checkpoint in present if folder.resolve() / checkpoint.name == start), None
    )
    aside = to_set_aside(present, begun)
    if begun is None:
        remove(folder / _LAST)
    else:  # first, so that it never points to what has moved
        link_atomically(folder / _LAST, begun.name)
    newest = max((checkpoint.step for checkpoint in present if checkpoint.name in aside), default=0)
    into = _move_aside(folder, aside, limit=step if begun else 0, newest=newest)
    if begun is None:
        moved = start.parent.name.startswith(_LEAVING) and into is not None
        begun = Kept(f"step-{step}.ckpt", step, good=True)
        _copy(into / start.name if moved and into else start, folder / begun.name)
        link_atomically(folder / _LAST, begun.name)
    return Departure((step, begun.name), aside, into)


def _look(folder: Path, start: Path, step: int) -> list[Kept]:
    """The checkpoints in the folder. Those of the same line before the start are taken as good,
    since training relies on the start alone."""
    on_line = start.parent == folder.resolve() and step_of(start.name) is not None
    present = []
    for path in sorted(folder.glob("*.ckpt")):
        number = step_of(path.name)
        if number is None and path.name != BEST:
            continue
        if number is not None and on_line and number <= step:
            present.append(Kept(path.name, number, good=True))
            continue
        saved_step = _step_of_good(path)
        last_step = saved_step if number is None else number
        present.append(Kept(path.name, last_step or 0, good=saved_step is not None))
    return present


def _step_of_good(path: Path) -> int | None:
    """The step of a checkpoint that can be read and whose checksums agree; else None."""
    try:
        return read_record_to_go_on(path)["step"]
    except ValueError:
        return None


def _move_aside(folder: Path, names: Collection[str], limit: int, newest: int) -> Path | None:
    """Move checkpoints, of which the newest has step `newest`, into a new folder; returns the
    folder, which gets its name when all have moved."""
    marks = marks_in(folder)
    if not names and not marks:
        return None
    mark = marks[0] if marks else folder / f"{_LEAVING}{limit}"
    mark.mkdir(exist_ok=True)
    for name in names:
        (folder / name).replace(mark / name)
    newest = max([newest, *(step_of(path.name) or 0 for path in mark.iterdir())])
    number = 1
    while (into := folder / f"{ABANDONED}{newest}-{number}").exists():
        number += 1
    mark.replace(into)
    return into


def _copy(source: Path, target: Path) -> None:
    copy = shutil.copytree if source.is_dir() else shutil.copyfile
    write_atomically(target, lambda partial: copy(source, partial))
