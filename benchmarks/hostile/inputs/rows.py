"""One row of the tables: a wrong file or setting, what must happen, and whether it did.

A row names what a user would see, never how the program does it. `refused` is exit code 2 and one
line on the standard error that names what is wrong; `right` is exit code 0 and values equal to an
independent reference; `told` is exit code 0 and a line that names what the user must know. A row
may allow several of them.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hostile import processes
from benchmarks.hostile.processes import Ended, call, run, start

LATE_CPU_S = 5.0
Program = Callable[[Sequence[str]], int]
_FAULT_OF_A_KEY = re.compile(
    r"(atmossl \w+: )?(unknown key )?[\w./'\[\]]+(=.*)?[:;] "
)  # one line for each of them
_NOTE = re.compile(r"note:|warning|SIG\w+: ", re.IGNORECASE)
COUNTERS = ("tracebacks", "late_refusals", "silent_wrong", "not_as_expected")


@dataclass(frozen=True)
class Place:
    """Where a row is tried: a folder of its own, the working directory of its commands, in which
    `fix` leads to what all rows share. program: stands for `atmossl`, in tests."""

    folder: Path
    program: Program | None = None

    def run(self, arguments: Sequence[str], **options: Any) -> Ended:
        return run(arguments, self.folder, **{"main": self.program, **options})

    def start(self, arguments: Sequence[str], **options: Any) -> processes.Started:
        return start(arguments, self.folder, **{"main": self.program, **options})


@dataclass(frozen=True)
class Row:
    """expect: `refused`, `right`, `told`, or several of them with `|` between. words: patterns
    that the line must hold, each in it. make: fills the folder. check: what is wrong with the
    values that came out, empty if nothing is. act: does something else than run the arguments,
    and returns what its decisive command left. program: instead of the command line, such as a
    few lines of Python. codes: of a refusal."""

    name: str
    expect: str
    arguments: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    make: Callable[[Path], object] | None = None
    check: Callable[[Path], str] | None = None
    act: Callable[[Place], Ended] | None = None
    before: Callable[[], object] | None = None
    environment: Mapping[str, str | None] = field(default_factory=dict)
    program: Program | None = None
    codes: tuple[int, ...] = (2,)


@dataclass(frozen=True)
class Verdict:
    """faults: which counters the row adds to. text: what happened instead, in one line."""

    row: str
    faults: tuple[str, ...]
    text: str = ""


def try_row(row: Row, folder: Path, fixtures: Path, program: Program | None = None) -> Verdict:
    """Do what a row says, in a folder that is removed afterwards."""
    folder.mkdir(parents=True)
    (folder / "fix").symlink_to(fixtures)
    try:
        if row.make is not None:
            call(row.make, folder)
        place = Place(folder, program or row.program)
        if row.act is not None:
            ended = row.act(place)
        else:
            ended = place.run(row.arguments, before=row.before, environment=row.environment)
        wrong = ""
        if ended.code == 0 and row.check is not None:
            try:
                wrong = call(row.check, folder)
            except RuntimeError as error:
                wrong = f"the output cannot be compared: {str(error).splitlines()[-1]}"
        return judge(row, ended, wrong)
    except Exception as error:
        return Verdict(row.name, ("not_as_expected",), f"the row fails itself: {error!r}"[:300])
    finally:
        make_writable(folder)
        shutil.rmtree(folder, ignore_errors=True)


def make_writable(folder: Path) -> None:
    for path, folders, _ in os.walk(folder):
        for name in folders:
            child = Path(path) / name
            if not child.is_symlink():
                child.chmod(0o755)


def judge(row: Row, ended: Ended, wrong: str = "") -> Verdict:
    """wrong: what the check says of the values, empty where they are right."""
    allowed = row.expect.split("|")
    faults, text = [], _last_line(ended)
    if ended.has_traceback:
        faults.append("tracebacks")
    if ended.code is None or ended.code < 0:
        faults.append("not_as_expected")
        text = f"ended with {ended.code} (None: it hung); {text}"
    elif ended.code:
        if ended.cpu_s > LATE_CPU_S:
            faults.append("late_refusals")
            text = f"after {ended.cpu_s:.1f} s of work: {text}"
        if not ended.has_traceback and (problem := _refusal_fault(row, ended, allowed)):
            faults.append("not_as_expected")
            text = f"{problem}: {text}"
    else:
        told = _names(row.words, ended.stderr + ended.stdout)
        if wrong and not ("told" in allowed and told and "right" not in allowed):
            faults.append("silent_wrong")
            text = f"wrong values: {wrong}"
        elif "told" in allowed and not told and "right" not in allowed:
            faults.append("silent_wrong")
            text = f"exit 0 without a line that names {row.words}: {text}"
        elif not {"right", "told"} & set(allowed):
            faults.append("silent_wrong")
            text = f"exit 0, where it must be {row.expect}: {text}"
    return Verdict(row.name, tuple(faults), text[:400] if faults else "")


def _refusal_fault(row: Row, ended: Ended, allowed: Sequence[str]) -> str:
    lines = refusal_lines(ended)
    if "refused" not in allowed:
        return f"exit {ended.code}, where it must be {row.expect}"
    if ended.code not in row.codes:
        return f"exit {ended.code}, needed {row.codes}"
    if len(lines) != 1 and not all(map(_FAULT_OF_A_KEY.match, lines)):
        return f"{len(lines)} lines instead of one"
    if not _names(row.words, " ".join(lines)):
        return f"the line does not name {row.words}"
    return ""


def refusal_lines(ended: Ended) -> list[str]:
    """Lines of the standard error other than notes, of which the answer to a signal is one."""
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    return [line for line in lines if not _NOTE.match(line)]


def _names(words: Sequence[str], text: str) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in words)


def _last_line(ended: Ended) -> str:
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:330] if lines else f"exit {ended.code} without a word"
