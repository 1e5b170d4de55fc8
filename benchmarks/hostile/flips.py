"""Single bytes changed in what the program wrote: refused in one line, or without effect.

Without effect means that an independent reader (torch, zarr, json) finds the same content: a byte
of padding, of white space, of a second copy, or a cache that was seen to be damaged and made anew.
"""

import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hostile import comparing
from benchmarks.hostile.inputs.rows import Program, refusal_lines
from benchmarks.hostile.processes import Ended, call, in_turns, run
from benchmarks.hostile.stores import training

_ENDS_BYTES = 4096


@dataclass(frozen=True)
class Target:
    """Something that is written once and then damaged copy by copy.

    path: of the file or folder, below the folder of targets; a copy has the same name. reads:
    arguments of a command that reads the whole of it. content: what is there, read without the
    program, from the folder that holds it. program: instead of the command line.
    """

    name: str
    path: str
    reads: Sequence[str]
    content: Callable[[str], Any]
    flips: int
    program: Program | None = None
    own_cache: bool = False


def verify_store(arguments: Sequence[str]) -> int:
    """Compare an ingested store with its checksums, as a user would from Python."""
    from atmossl.data.ingest import verify

    try:
        verify(Path(arguments[0]))
    except ValueError as error:
        print(f"python: {error}", file=sys.stderr)
        return 2
    return 0


def file_contents(folder: str) -> str:
    return comparing.contents_of(f"{folder}/file.ckpt")


def small_contents(folder: str) -> str:
    return comparing.contents_of(f"{folder}/small.ckpt")


def shard_contents(folder: str) -> str:
    return comparing.contents_of(f"{folder}/shards.ckpt")


def cache_contents(folder: str) -> dict[str, str]:
    return comparing.statistics_of(f"{folder}/cache")


def plain_store(folder: str) -> dict[str, str]:
    return comparing.store_of(f"{folder}/plain.zarr")


def sharded_store(folder: str) -> dict[str, str]:
    return comparing.store_of(f"{folder}/sharded.zarr")


def targets(fixtures: Path) -> list[Target]:
    stats = ["data", "stats", *training(fixtures, "run")[1:]]

    def export(name: str) -> list[str]:
        return ["export", f"checkpoint={name}", "output=out.ckpt"]

    return [
        Target("checkpoint", "file.ckpt", export("file.ckpt"), file_contents, 110),
        Target("exported checkpoint", "small.ckpt", export("small.ckpt"), small_contents, 40),
        Target("shards", "shards.ckpt", export("shards.ckpt"), shard_contents, 60),
        Target("statistics", "cache", stats, cache_contents, 40, own_cache=True),
        Target("ingested store", "plain.zarr", ["plain.zarr"], plain_store, 40, verify_store),
        Target("ingested store of shards", "sharded.zarr", ["sharded.zarr"], sharded_store, 30,
               verify_store),
    ]  # fmt: skip


def make(fixtures: Path, folder: Path) -> None:
    """Write all targets into a folder."""
    folder.mkdir(parents=True)
    shutil.copy(fixtures / "tiny.ckpt", folder / "file.ckpt")
    sharded = ("trainer.strategy=fsdp", "trainer.checkpoint_format=sharded")
    ingest = ["data", "ingest", f"input={fixtures}/train.zarr", "layout.time=3"]
    cache = {"ATMOSSL_CACHE": str(folder / "cache")}
    for arguments in (
        ["export", "checkpoint=file.ckpt", "output=small.ckpt"],
        training(fixtures, "run", *sharded, "trainer.max_steps=2"),
        ["data", "stats", *training(fixtures, "run")[1:]],
        [*ingest, "output=plain.zarr"],
        [*ingest, "output=sharded.zarr", "layout.shard=2"],
    ):
        ended = run(arguments, folder, environment=cache)
        if ended.code != 0:
            raise RuntimeError(f"{arguments[:2]}: exit {ended.code}: {ended.stderr[-500:]}")
    shutil.copytree(folder / "run" / "checkpoints" / "step-2.ckpt", folder / "shards.ckpt")


def flip(path: Path, rng: random.Random) -> str:
    """Change one byte of a file, or of one of a folder's files; says which."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    file = rng.choice([one for one in files if one.stat().st_size])
    content = bytearray(file.read_bytes())
    places = (range(len(content)), range(max(0, len(content) - _ENDS_BYTES), len(content)),
              range(min(len(content), _ENDS_BYTES)))  # fmt: skip
    position = rng.choice(rng.choices(places, weights=(2, 1, 1))[0])
    content[position] ^= rng.randint(1, 255)
    file.write_bytes(content)
    return f"byte {position} of {len(content)} in {file.relative_to(path.parent)}"


def judge(ended: Ended, read: Callable[[], Any], content: Any, output: str = "") -> str:
    """What is wrong with how a damaged copy was taken, empty if nothing is.

    read: its content afterwards, by an independent reader. content: of the sound one. output: how
    what the command made of it differs from what it made of the sound one.
    """
    lines = refusal_lines(ended)
    last = lines[-1][:200] if lines else ""
    if ended.has_traceback:
        return f"a traceback: {last}"
    if ended.code:
        one = ended.code in (1, 2) and len(lines) == 1
        return "" if one else f"exit {ended.code} with {len(lines)} lines: {last}"
    if output:
        return f"not noticed: the output differs in {output}"
    try:
        content_read = read()
    except RuntimeError as error:
        return f"not noticed, though others cannot read it: {str(error).splitlines()[-1][:200]}"
    if content_read == content:
        return ""
    names = (
        comparing.differences(content, content_read) if isinstance(content, dict) else "its content"
    )
    return f"not noticed: {names} differs"


def damage(
    target: Target, source: Path, content: Any, sound: str, place: Path, seed: str
) -> dict[str, Any]:
    """Flip one byte of a copy, read it, and say what is wrong with that: {wrong}.

    sound: digest of what the command makes of the sound one.
    """
    place.mkdir(parents=True)
    try:
        if (source / target.path).is_dir():
            shutil.copytree(source / target.path, place / target.path)
        else:
            shutil.copy(source / target.path, place / target.path)
        where = flip(place / target.path, random.Random(seed))
        cache = {"ATMOSSL_CACHE": str(place / "cache")} if target.own_cache else {}
        ended = run(target.reads, place, environment=cache, main=target.program)
        output = ""
        if ended.code == 0 and sound and made_of(place) != sound:
            output = "the exported checkpoint"
        wrong = judge(ended, lambda: call(target.content, str(place)), content, output)
        return {"wrong": f"flips: {target.name}, {where}: {wrong}" if wrong else ""}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def made_of(folder: Path) -> str:
    """Digest of what `export` has written, empty for commands that write nothing."""
    path = folder / "out.ckpt"
    return call(comparing.contents_of, str(path)) if path.exists() else ""


def measure(
    fixtures: Path, folder: Path, num_processes: int, seed: int, quick: bool, match: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Figures of all flips, and a line for each that nobody noticed."""
    source = folder / "targets"
    make(fixtures, source)
    chosen = [target for target in targets(fixtures) if match in target.name]
    contents = [call(target.content, str(source)) for target in chosen]
    sounds = []
    for target in chosen:
        ended = run(target.reads, source, main=target.program)
        if ended.code:
            raise RuntimeError(f"{target.name}, sound: exit {ended.code}: {ended.stderr[-500:]}")
        sounds.append(made_of(source))
        (source / "out.ckpt").unlink(missing_ok=True)
    turns = [
        (number, turn)
        for number, target in enumerate(chosen)
        for turn in range(max(3, target.flips // 10) if quick else target.flips)
    ]

    def work(index: int) -> dict[str, Any]:
        number, turn = turns[index]
        target, place = chosen[number], folder / f"flip-{index}"
        name = f"{target.name}-{seed}-{turn}"
        return damage(target, source, contents[number], sounds[number], place, name)

    answers = [a or {"error": "no answer"} for a in in_turns(work, len(turns), num_processes)]
    failures = [str(a.get("wrong") or a.get("error")) for a in answers if a.get("wrong", "error")]
    return {"flipped_bytes": len(turns), "flips_unnoticed": len(failures)}, failures
