"""Wrong files and settings, by table: what must happen to each, and what did."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.hostile.inputs import (
    configuration,
    files,
    forecasts,
    grib,
    metadata,
    places,
    tasks,
    times,
    values,
)
from benchmarks.hostile.inputs.rows import COUNTERS, Program, Row, Verdict, try_row
from benchmarks.hostile.processes import in_turns

TABLES = {
    "configuration": configuration,
    "metadata": metadata,
    "grib": grib,
    "times": times,
    "values": values,
    "tasks": tasks,
    "files": files,
    "places": places,
    "forecasts": forecasts,
}


def all_rows() -> list[Row]:
    """The rows of all tables, each under the name of its table."""
    return [
        replace(row, name=f"{name}: {row.name}")
        for name, table in TABLES.items()
        for row in table.rows()
    ]


def measure(
    rows: Sequence[Row],
    fixtures: Path,
    folder: Path,
    num_processes: int,
    program: Program | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Figures of all rows, and a line for each that is not as it should be."""

    def work(number: int) -> dict[str, Any]:
        verdict = try_row(rows[number], folder / f"row-{number}", fixtures, program)
        return {"faults": list(verdict.faults), "text": verdict.text}

    answers = in_turns(work, len(rows), num_processes)
    verdicts = [
        Verdict(row.name, tuple(a.get("faults", ("not_as_expected",))), a.get("text", str(a)))
        for row, a in zip(rows, (a or {"text": "no answer"} for a in answers), strict=True)
    ]
    return count(verdicts)


def count(verdicts: Sequence[Verdict]) -> tuple[dict[str, Any], list[str]]:
    figures: dict[str, Any] = {"bad_inputs": len(verdicts)}
    for counter in COUNTERS:
        figures[counter] = sum(counter in verdict.faults for verdict in verdicts)
    failures = [
        f"{verdict.row} [{', '.join(verdict.faults)}] {verdict.text}"
        for verdict in verdicts
        if verdict.faults
    ]
    return figures, failures
