"""What `python -m benchmarks.hostile` counts: its tables are whole, and nothing bad passes it."""

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.hostile import flips, inputs, kills
from benchmarks.hostile.inputs.rows import COUNTERS, LATE_CPU_S, Row, judge
from benchmarks.hostile.processes import Ended

ROWS = inputs.all_rows()


def test_the_tables_are_whole() -> None:
    assert len(ROWS) >= 150
    assert sum(row.name.startswith("configuration:") for row in ROWS) >= 40
    twice = [name for name, count in Counter(row.name for row in ROWS).items() if count > 1]
    assert twice == []
    for row in ROWS:
        assert set(row.expect.split("|")) <= {"refused", "right", "told"}, row.name
        assert row.arguments or row.act or row.program, row.name
        if row.expect == "told":
            assert row.words, row.name
    whole = kills.scenarios(Path("fix"))
    assert sum(one.sequences * one.kills_each for one in whole) >= 150  # some come too late
    assert sum(target.flips for target in flips.targets(Path("fix"))) >= 300


def ended(code: int | None, stderr: str = "", cpu_s: float = 0.1) -> Ended:
    return Ended(code, "", stderr, cpu_s, cpu_s)


TRACE = "Traceback (most recent call last):\n  File\nTypeError: no\n"


@pytest.mark.parametrize(
    ("expect", "left", "wrong", "faults"),
    [
        ("refused", ended(2, "atmossl train: model.dim=1 is small\n"), "", ()),
        ("refused", ended(2, "note: slow\nSIGINT: saving\natmossl train: model.dim=1\n"), "", ()),
        ("refused", ended(2, "atmossl train: it does not fit\n"), "", ("not_as_expected",)),
        ("refused", ended(2, "atmossl train: model.dim=1\nand more\n"), "", ("not_as_expected",)),
        ("refused", ended(2, "atmossl train: model.dim=1: odd\nseed='x': no\n"), "", ()),
        ("refused", ended(1, "atmossl train: model.dim=1\n"), "", ("not_as_expected",)),
        ("refused", ended(0), "", ("silent_wrong",)),
        ("refused", ended(1, TRACE), "", ("tracebacks",)),
        ("refused", ended(-11), "", ("not_as_expected",)),
        ("refused", ended(None), "", ("not_as_expected",)),
        ("refused", ended(2, "model.dim=1\n", LATE_CPU_S + 1), "", ("late_refusals",)),
        ("right", ended(0), "", ()),
        ("right", ended(0), "half of the values are off", ("silent_wrong",)),
        ("right", ended(2, "model.dim=1\n"), "", ("not_as_expected",)),
        ("right", ended(0, TRACE), "", ("tracebacks",)),
        ("told", ended(0, "note: model.dim=1\n"), "", ()),
        ("told", ended(0, "note: well done\n"), "", ("silent_wrong",)),
        ("told", ended(0, "note: model.dim=1\n"), "a value is off", ()),
        ("right|refused", ended(0), "a value is off", ("silent_wrong",)),
        ("right|refused", ended(2, "model.dim=1\n"), "", ()),
    ],
)
def test_what_a_row_counts(expect: str, left: Ended, wrong: str, faults: Sequence[str]) -> None:
    row = Row("a row", expect, ("train",), ("model.dim",))
    verdict = judge(row, left, wrong)
    assert verdict.faults == tuple(faults)
    assert bool(verdict.text) == bool(faults)
    figures, failures = inputs.count([verdict])
    assert {name: figures[name] for name in COUNTERS} == {n: int(n in faults) for n in COUNTERS}
    assert len(failures) == bool(faults)


def traceback(arguments: Sequence[str]) -> int:
    raise TypeError(f"no such thing as {arguments}")


def refusal(arguments: Sequence[str]) -> int:
    sys.stderr.write(f"atmossl: {arguments[0]} is unknown\n")
    return 2


@pytest.mark.parametrize(
    ("program", "counter"), [(traceback, "tracebacks"), (refusal, None), (len, "silent_wrong")]
)
def test_a_row_is_tried_in_a_process_of_its_own(
    tmp_path: Path, program: Callable, counter: str | None
) -> None:
    """`len` of no arguments is 0: all is well, it says."""
    arguments = () if program is len else ("paint",)
    row = Row("a row", "refused", arguments, (), lambda folder: (folder / "made").touch())
    figures, failures = inputs.measure([row], tmp_path, tmp_path / "rows", 1, program)
    assert figures["bad_inputs"] == 1 and len(failures) == bool(counter)
    assert sum(figures[name] for name in COUNTERS) == (figures[counter] if counter else 0)


def read_text(folder: str) -> str:
    return (Path(folder) / "kept").read_text().split("#")[0]


def trusting(arguments: Sequence[str]) -> int:
    return 0 * len(arguments)


def careful(arguments: Sequence[str]) -> int:
    if Path(arguments[0]).read_text() != "abcdefgh#":
        sys.stderr.write("kept is damaged\n")
        return 2
    return 0


@pytest.mark.parametrize(("program", "unnoticed"), [(trusting, True), (careful, False)])
def test_a_flip_that_nobody_notices_is_counted(
    tmp_path: Path, program: Callable, unnoticed: bool
) -> None:
    (tmp_path / "kept").write_bytes(b"abcdefgh#")
    target = flips.Target("text", "kept", ["kept"], read_text, 1, program)
    seed = next(s for s in map(str, range(99)) if random.Random(s).random() < 0.9)
    answer = flips.damage(target, tmp_path, "abcdefgh", "", tmp_path / "copy", seed)
    assert bool(answer["wrong"]) == unnoticed
    assert (tmp_path / "kept").read_bytes() == b"abcdefgh#" and not (tmp_path / "copy").exists()


def slow_writer(arguments: Sequence[str]) -> int:
    """Counts to 12 in a file, going on where it was; `forgetful` begins with what it finds there
    twice."""
    path = Path("count")
    lines = path.read_text().split() if path.exists() else []
    if arguments[0] == "forgetful":
        lines += lines[-1:]
    for number in range(len(lines), 12):
        partial = Path("partial")
        partial.write_text("\n".join([*lines, str(number)]))
        partial.replace(path)
        lines.append(str(number))
    return 0


def lines_of(path: str) -> dict[str, str]:
    return {"lines": Path(path).read_text()}


@pytest.mark.parametrize("kind", ["exact", "forgetful"])
def test_a_result_that_a_kill_has_changed_is_counted(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = kills.start
    monkeypatch.setattr(kills, "start", lambda *a, **k: start(*a, **k, main=slow_writer))
    scenario = kills.Scenario("count", [kind], "count", lines_of, 1)
    whole = kills.unbroken(scenario, tmp_path / "whole", 0)
    assert whole.events >= 24  # every line is a file that is written and one that is renamed
    # seeds whose first kill comes at an operation; one that comes after a time may come too late
    at_event = (n for n in range(99) if random.Random(f"count-{n}").random() < 0.5)
    seeds = list(islice(at_event, 3))
    results = [kills.break_off(scenario, whole, tmp_path / f"{n}", n, 0) for n in seeds]
    assert all(result["kills"] >= 1 for result in results)
    assert any(result["wrong"] for result in results) == (kind == "forgetful")
