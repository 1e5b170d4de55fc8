"""Treat the program badly, and count what it should not have done.

    python -m benchmarks.hostile [--only kills|flips|inputs] [--seed N] [--quick] [--match TEXT]

`kills`: commands that SIGKILL ends at a random moment and that then go on; `kills_not_exact`: of
which the result differs from that of the unbroken run in any bit. `flipped_bytes`: single bytes
changed in checkpoints, shards, statistics and ingested stores; `flips_unnoticed`: neither refused
in one line nor without effect on what is read. `bad_inputs`: rows of the tables in
`benchmarks.hostile.inputs`; `tracebacks`, `late_refusals` (after more than 5 s of processor time),
`silent_wrong` (exit code 0, no word, and other values than an independent reader's) and
`not_as_expected` (anything else) count those that ended otherwise than they must.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.hostile import fixtures, flips, inputs, kills, processes
from benchmarks.report import finish

PARTS = ("kills", "flips", "inputs")
QUICK_ROWS = 24


def main() -> None:
    options = _options()
    begin = time.monotonic()
    figures: dict[str, Any] = {}
    failures: list[str] = []
    processes.prepare()
    with processes.temporary_folder() as folder:
        shared = fixtures.make(folder)
        for part in PARTS if options.only is None else (options.only,):
            counted, lines = _measure(part, shared, folder, options)
            figures |= counted
            failures += lines
            _tell(part, counted, lines)
    figures |= {"seed": options.seed, "seconds": round(time.monotonic() - begin)}
    figures["failures"] = failures
    if options.only is None and not options.quick and not options.match:
        finish("hostile", figures)
    else:  # a part does not take the place of the figures that are kept
        print(json.dumps({"benchmark": "hostile", "figures": figures}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.hostile", description=__doc__)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small part of each")
    parser.add_argument("--match", default="", help="only what has this text in its name")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


def _measure(
    part: str, shared: Path, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    count, seed, quick, match = options.processes, options.seed, options.quick, options.match
    if part == "kills":
        return kills.measure(shared, folder / part, count, seed, quick, match)
    if part == "flips":
        return flips.measure(shared, folder / part, count, seed, quick, match)
    rng = random.Random(options.seed)
    rows = [row for row in inputs.all_rows() if options.match in row.name]
    if options.quick and len(rows) > QUICK_ROWS:
        rows = rng.sample(rows, QUICK_ROWS)
    return inputs.measure(rows, shared, folder / "inputs", options.processes)


def _tell(part: str, figures: dict[str, Any], failures: list[str]) -> None:
    print(f"\n{part}: " + ", ".join(f"{k} {v}" for k, v in figures.items()), file=sys.stderr)
    for line in failures:
        print(f"  {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
