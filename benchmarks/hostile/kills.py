"""SIGKILL at random moments: what goes on afterwards must end as if nothing had happened.

Half of the moments are drawn from the time that an unbroken run takes, half from its operations on
files, since what tears is what is being opened, renamed or removed.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.hostile import comparing
from benchmarks.hostile.processes import Ended, Started, call, in_turns, start
from benchmarks.hostile.stores import evaluating, predicting, training

_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.symlink", "os.mkdir", "os.rmdir")
RANKS_END_WITHIN_S = 90.0


@dataclass(frozen=True)
class Scenario:
    """arguments: which start the command and let it go on. result: of what it leaves under
    `output`, in a folder. sequences: how often it is broken off `kills_each` times and then
    finished. ranks: processes that train together."""

    name: str
    arguments: Sequence[str]
    output: str
    result: Callable[[str], dict[str, str]]
    sequences: int
    kills_each: int = 3
    ranks: int = 1


def scenarios(fixtures: Path) -> list[Scenario]:
    auto = "resume=auto"

    def train(name: str, sequences: int, *more: str, ranks: int = 1) -> Scenario:
        arguments = training(fixtures, "run", auto, *more)
        return Scenario(f"train {name}", arguments, "run", comparing.state_of, sequences,
                        kills_each=2 if ranks > 1 else 3, ranks=ranks)  # fmt: skip

    ddp = ("trainer.strategy=ddp", "trainer.devices=2", "data.batch_size=1")
    sharded = ("trainer.strategy=fsdp", "trainer.checkpoint_format=sharded")
    stats = ["data", "stats", *training(fixtures, "run")[1:], "climatologies=[month]", "output=c"]
    ingest = ["data", "ingest", f"input={fixtures}/train.zarr", "output=o.zarr", "layout.time=4"]
    return [
        train("adamw", 7),
        train("muon", 5, "optimizer=muon", "optimizer.warmup_steps=1"),
        train("with workers", 4, "data.num_workers=2"),
        train("with accumulation", 4, "trainer.accumulate=2"),
        train("with asynchronous saves", 4, "trainer.async_checkpoint=true"),
        train("sharded, asynchronous", 2, *sharded, "trainer.async_checkpoint=true"),
        train("of two ranks", 4, *ddp, ranks=2),
        Scenario("predict", predicting(fixtures, "o.zarr", "resume=true", "batch_size=1"),
                 "o.zarr", comparing.store_of, 8),
        Scenario("predict to NetCDF", predicting(fixtures, "o.nc", "resume=true", "every=2"),
                 "o.nc", comparing.store_of, 2),
        Scenario("ingest", ingest, "o.zarr", comparing.store_of, 8),
        Scenario("stats", stats, "cache", comparing.statistics_of, 4),
        Scenario("climatologies", stats, "c", comparing.stores_in, 4),
        Scenario("evaluate", evaluating(fixtures, "r"), "r", comparing.scores_of, 2, kills_each=2),
    ]  # fmt: skip


@dataclass(frozen=True)
class Unbroken:
    """The run that nothing ended: what it left, how long it took, how many operations on files."""

    result: dict[str, str]
    seconds: float
    events: int


def count_events(into: str, limit: int = -1) -> None:
    """Count this process's operations on files, into a file at its end; at the operation number
    `limit` the process is killed before it is done."""
    count, process = 0, os.getpid()

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in _FILE_EVENTS or os.getpid() != process or _reads(event, arguments):
            return
        count += 1
        if count == limit:
            os.kill(process, signal.SIGKILL)
        os.pwrite(handle, f"{count:12d}".encode(), 0)

    handle = os.open(into, os.O_RDWR | os.O_CREAT)
    sys.addaudithook(hook)


def _reads(event: str, arguments: tuple) -> bool:
    """Whether a file is opened only to be read."""
    if event != "open":
        return False
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return not set(mode) & set("wax+")
    return isinstance(flags, int) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def launch(scenario: Scenario, folder: Path, port: int, limit: int = -1) -> list[Started]:
    """All ranks of a command; the first one counts its operations on files."""
    started = []
    for rank in range(scenario.ranks):
        environment: dict[str, str | None] = {"ATMOSSL_CACHE": str(folder / "cache")}
        if scenario.ranks > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0,
                       "WORLD_SIZE": scenario.ranks, "LOCAL_WORLD_SIZE": scenario.ranks,
                       "MASTER_PORT": port}  # fmt: skip
            environment |= {name: str(number) for name, number in numbers.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "hostile"}
        before = partial(count_events, str(folder / "events"), limit) if rank == 0 else None
        started.append(start(scenario.arguments, folder, environment=environment, before=before))
    return started


def unbroken(scenario: Scenario, folder: Path, port: int) -> Unbroken:
    folder.mkdir(parents=True)
    begin = time.monotonic()
    ended = [process.wait() for process in launch(scenario, folder, port)]
    seconds = time.monotonic() - begin
    if any(one.code for one in ended):
        raise RuntimeError(f"{scenario.name}, unbroken: {_words(ended)}")
    result = call(scenario.result, str(folder / scenario.output))
    return Unbroken(result, seconds, int((folder / "events").read_text() or 0))


def break_off(
    scenario: Scenario, whole: Unbroken, folder: Path, seed: int, port: int
) -> dict[str, Any]:
    """Kill a command several times, let it finish, and compare: {kills, wrong}."""
    rng = random.Random(f"{scenario.name}-{seed}")
    folder.mkdir(parents=True)
    kills, moments = 0, []
    while kills < scenario.kills_each and len(moments) < 3 * scenario.kills_each:
        at_event = rng.random() < 0.5
        limit = rng.randint(1, max(1, whole.events)) if at_event else -1
        delay = 1e9 if at_event else rng.uniform(0.02, 1.0) * whole.seconds
        processes = launch(scenario, folder, port + len(moments), limit)
        was_killed = _kill(processes, delay)
        kills += was_killed
        moments.append(f"operation {limit}" if at_event else f"{delay:.2f} s")
        if not was_killed:
            break  # it was faster and is done
    try:
        wrong = _finish(scenario, whole, folder, port + 50, done=not was_killed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = f"{scenario.name}, seed {seed}, killed at {', '.join(moments)}: {wrong}"
    return {"kills": kills, "wrong": text if wrong else ""}


def _kill(processes: Sequence[Started], delay: float) -> bool:
    """Kill the first process after a delay, or wait until it kills itself; then all others."""
    first, *others = processes
    if not first.is_over(min(delay, RANKS_END_WITHIN_S)):
        first.send(signal.SIGKILL)
    ended = first.wait()
    for other in others:
        other.send(signal.SIGKILL)
        other.wait()
    return ended.code == -signal.SIGKILL


def _finish(scenario: Scenario, whole: Unbroken, folder: Path, port: int, done: bool) -> str:
    """What is wrong with the end of a broken command, empty if nothing is."""
    if not done:
        ended = [process.wait() for process in launch(scenario, folder, port)]
        is_there = "exists" in _words(ended)  # the kill came after the output had got its name
        if any(one.code for one in ended) and not is_there:
            return f"does not go on: {_words(ended)}"
    try:
        result = call(scenario.result, str(folder / scenario.output))
    except RuntimeError as error:
        return f"leaves nothing to compare: {str(error).splitlines()[-1]}"
    names = comparing.differences(whole.result, result)
    return f"differs in {names}" if names else ""


def _words(ended: Sequence[Ended]) -> str:
    bad = next((one for one in ended if one.code), ended[0])
    lines = [line for line in bad.stderr.splitlines() if line.strip()]
    return f"exit {bad.code}: {lines[-1][:300] if lines else 'without a word'}"


def measure(
    fixtures: Path, folder: Path, num_processes: int, seed: int, quick: bool, match: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Figures of all scenarios, and a line for each kill that is not exact."""
    chosen = [one for one in scenarios(fixtures) if match in one.name]
    if quick:
        chosen = [one for one in chosen if one.name in ("train adamw", "predict", "ingest")]

    def whole(number: int) -> dict[str, Any]:
        return vars(unbroken(chosen[number], folder / f"whole-{number}", 29000 + 100 * number))

    answers = in_turns(whole, len(chosen), num_processes)
    failures = [
        f"kills: {one.name}: {str(a)[-300:]}"
        for one, a in zip(chosen, answers, strict=True)
        if a is None or "error" in a
    ]
    runs = [
        (one, Unbroken(**answer), turn)
        for one, answer in zip(chosen, answers, strict=True)
        if answer is not None and "error" not in answer
        for turn in range(1 if quick else one.sequences)
    ]

    def broken(number: int) -> dict[str, Any]:
        scenario, reference, turn = runs[number]
        place, port = folder / f"broken-{number}", 31000 + 100 * number
        return break_off(scenario, reference, place, 1000 * seed + turn, port)

    results: list[dict[str, Any]] = [
        answer or {"error": "no answer"} for answer in in_turns(broken, len(runs), num_processes)
    ]
    bad = [result for result in results if result.get("wrong") or "error" in result]
    failures += [f"kills: {result.get('wrong') or result['error']}" for result in bad]
    kills = sum(result.get("kills", 0) for result in results)
    not_exact = sum(max(1, result.get("kills", 1)) for result in bad)
    whole_failed = len(chosen) - len({one.name for one, _, _ in runs})
    return {"kills": kills, "kills_not_exact": not_exact + whole_failed}, failures
