"""CPU seconds of loader, training step and inference, over those of an earlier commit.

    python -m benchmarks.against COMMIT
    python -m benchmarks.against COMMIT --rounds 5 --turns 20 --only step inference

The files of the commit are unpacked into a temporary folder. This file then runs in two processes,
one with the package of the commit and one with that of this worktree, which take turns: each does
the same work, with one thread, and answers with the CPU seconds of its process. Every round starts
both anew, because the same code can run some per cent slower in one process than in another, by
where its memory lies. Other programs on the machine take the same from both.

`loader`: two batches of `experiment=quickstart`, from the sample store to views with masks.
`windows`: samples of 36 h x 54 x 108 points from a chunked hourly store of 1 degree, which
`benchmarks.data_loader` describes. `step`: one optimiser step of the quickstart. `inference`: a
forecast of one date by a checkpoint, from an open store to the written file. All go through the
public interface and through functions of `benchmarks.train_step` and `benchmarks.data_loader`,
which the commit has to have.

`ratio` is the median over all turns of the seconds now over the seconds before: 1.03 is 3 % slower.
`quartiles` are those of the same ratios, `rounds` the median of each round.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).resolve().parents[1]
_KINDS = ("loader", "windows", "step", "inference")
_DAYS = 6  # of the store of `windows`
_DATE = "1959-02-12T00"
_WARM_UP = 2  # turns that are not counted
_RUN = ("experiment=quickstart", "seed=0", "trainer.accelerator=cpu", "data.num_workers=0")


def loader() -> Callable[[], object]:
    """Two batches, and the next two at the next call."""
    from benchmarks.train_step import configuration, from_data

    batches = iter(from_data(configuration(_RUN))[0])
    return lambda: [next(batches) for _ in range(2)]


def windows() -> Callable[[], object]:
    """One sample with masks and tokens, at another place at each call."""
    from atmossl.data.loader import SampleKey
    from benchmarks.data_loader import masked

    dataset = masked(Path(os.environ["WINDOW_STORE"]))
    numbers = iter(np.random.default_rng(0).integers(0, len(dataset), 100_000))
    return lambda: dataset[SampleKey(0, int(next(numbers)))]


def step() -> Callable[[], object]:
    """Always on the first batch."""
    import torch

    from benchmarks.train_step import configuration, from_data, step_of_run

    torch.manual_seed(0)
    config = configuration(_RUN)
    batches, scales = from_data(config)
    batch = next(iter(batches))
    _, one_step = step_of_run(config, scales, torch.device("cpu"))
    return lambda: one_step(batch)


def inference() -> Callable[[], object]:
    """A forecast of one date, written as zarr."""
    import atmossl

    model, dataset = atmossl.load(device="cpu"), atmossl.open_data("sample")

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            model.predict("forecast", dataset, _DATE, output=Path(folder) / "one.zarr")

    return write


def answer() -> None:
    """Do one piece of work for every line of the standard input, which names its kind."""
    import torch

    import atmossl

    torch.set_num_threads(1)
    assert Path.cwd() in Path(atmossl.__file__).parents, (Path.cwd(), atmossl.__file__)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the package prints must not come between the answers
    makers = {"loader": loader, "windows": windows, "step": step, "inference": inference}
    prepared: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        kind = line.strip()
        if kind not in prepared:
            prepared[kind] = makers[kind]()
        start = time.process_time()
        prepared[kind]()
        answers.write(f"{time.process_time() - start}\n")
        answers.flush()


class Runner:
    """A process that has the package of one folder, and does one piece of work when asked."""

    def __init__(self, folder: Path, store: Path) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        paths = {"PYTHONPATH": str(folder), "WINDOW_STORE": str(store)}
        # -P: modules come from the folder alone, not from that of this file
        command = [sys.executable, "-P", "-W", "ignore", __file__, "--answer"]
        self.folder = folder
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **threads, **paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def seconds(self, kind: str) -> float:
        """CPU seconds of one piece of work."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{kind}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{kind} does not run with the package of {self.folder}; see above")
        return float(line)


def one_round(before: Path, store: Path, kind: str, turns: int) -> np.ndarray:
    """Seconds [turn, before and now] of two fresh processes."""
    with ExitStack() as running:
        runners = [running.enter_context(Runner(folder, store)) for folder in (before, _ROOT)]
        for runner in runners:
            for _ in range(_WARM_UP):
                runner.seconds(kind)
        times = []
        for turn in range(turns):
            order = (0, 1) if turn % 2 else (1, 0)
            pair = {number: runners[number].seconds(kind) for number in order}
            times.append([pair[0], pair[1]])
    return np.array(times)


def figures_of(rounds: list[np.ndarray]) -> dict[str, Any]:
    """The ratio with its spread, and the least seconds of both."""
    times = np.concatenate(rounds)
    ratios = times[:, 1] / times[:, 0]
    return {
        "ratio": round(float(np.median(ratios)), 4),
        "quartiles": [round(float(q), 4) for q in np.quantile(ratios, (0.25, 0.75))],
        "rounds": [round(float(np.median(r[:, 1] / r[:, 0])), 4) for r in rounds],
        "seconds_before": round(float(times[:, 0].min()), 4),
        "seconds_now": round(float(times[:, 1].min()), 4),
    }


def unpack(commit: str, folder: Path) -> str:
    """Write the files of a commit; its short name.

    Raises:
        SystemExit: git knows no such commit.
    """
    named = subprocess.run(
        ["git", "rev-parse", "--short", "--verify", f"{commit}^{{commit}}"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    if named.returncode:
        raise SystemExit(f"{commit!r} is no commit of {_ROOT}: {named.stderr.strip()}")
    packed = subprocess.Popen(["git", "archive", commit], cwd=_ROOT, stdout=subprocess.PIPE)
    with tarfile.open(fileobj=packed.stdout, mode="r|") as files:
        files.extractall(folder, filter="data")
    packed.communicate()
    return named.stdout.strip()


def measured(folder: Path, store: Path, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    for kind in options.only:
        rounds = []
        for number in range(options.rounds):
            sys.stderr.write(f"{kind}, round {number + 1} of {options.rounds}\n")
            rounds.append(one_round(folder, store, kind, options.turns))
        yield kind, figures_of(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=_KINDS, default=_KINDS)
    options = parser.parse_args()
    from benchmarks.report import finish
    from benchmarks.window_store import make_store

    with tempfile.TemporaryDirectory() as folder:
        before, store = Path(folder) / "before", Path(folder) / "store.zarr"
        commit = unpack(options.commit, before)
        make_store(store, _DAYS)
        figures = dict(measured(before, store, options))
    settings = {"commit": commit, "rounds": options.rounds, "turns": options.turns}
    finish("against", {**figures, **settings})


if __name__ == "__main__":
    answer() if sys.argv[1:] == ["--answer"] else main()
