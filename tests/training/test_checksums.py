"""No damage to a checkpoint passes: every read fails in one line, or brings what was written."""

import hashlib
import os
import pickle
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils import _pytree as pytree

from atmossl.checkpoint_files import (
    FORMAT,
    MANIFEST,
    METADATA,
    read_contents,
    read_record_to_go_on,
    read_with_digest,
    save_contents,
    verified_digest,
    write_manifest,
)

RNG = random.Random(0)
TENSORS = {
    "state_dict": {"w": torch.linspace(0, 1, 30), "n": torch.arange(5)},
    "optimizer_0": {
        "state": {"w": {"step": torch.tensor(1.0), "m": torch.linspace(1, 2, 30)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["w"]}],
    },
}
CONTENTS = {
    "atmossl": dict.fromkeys(("rng", "streams", "model", "statistics"), 0)
    | {"step": 3, "format": FORMAT},
    "state_dict": TENSORS["state_dict"],
    "optimizer_states": [],
    "lr_schedulers": [],
    "loops": {},
    "global_step": 3,
}


@pytest.fixture(scope="module", params=["sealed", "earlier version"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "step-3.ckpt"
    write = save_contents if request.param == "sealed" else torch.save
    write(CONTENTS, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint as one device writes it."""
    path = tmp_path_factory.mktemp("folders") / "step-3.ckpt"
    with warnings.catch_warnings():  # that nothing is distributed
        warnings.simplefilter("ignore")
        save(TENSORS, checkpoint_id=path)
    rest = {k: v for k, v in CONTENTS.items() if k not in ("state_dict", "optimizer_states")}
    save_contents(rest, path / METADATA)
    write_manifest(path)
    return path


def is_same(one: Any, two: Any) -> bool:
    first, second = (pytree.tree_flatten(tree) for tree in (one, two))
    return first[1] == second[1] and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(first[0], second[0], strict=True)
    )


def outcome(path: Path, expected: Any) -> str:
    """`refused` in one line that names the file, `harmless`, or `unnoticed`."""
    try:
        contents = read_contents(path)
    except ValueError as error:
        line = str(error)
        assert line.isprintable() and str(path) in line, line
        with pytest.raises(ValueError, match="step-3"):
            read_record_to_go_on(path)
        return "refused"
    return "harmless" if is_same(contents, expected) else "unnoticed"


def flipped(content: bytes, position: int) -> bytes:
    changed = content[position] ^ (1 << RNG.randrange(8))
    return content[:position] + bytes([changed]) + content[position + 1 :]


def test_a_flipped_bit_anywhere_in_a_file_is_noticed_or_harmless(
    file: Path, tmp_path: Path
) -> None:
    content, expected = file.read_bytes(), read_contents(file)
    path = tmp_path / file.name
    ends = {*range(40), *range(len(content) - 110, len(content))}  # headers, directory, seal
    outcomes = []
    for position in sorted(ends | set(RNG.sample(range(len(content)), 150))):
        path.write_bytes(flipped(content, position))
        outcomes.append(outcome(path, expected))
    assert "unnoticed" not in outcomes and "refused" in outcomes
    if content.endswith(seal_of(content)):
        assert set(outcomes) == {"refused"}


def seal_of(content: bytes) -> bytes:
    """What a file's seal must be."""
    return b"atmossl sha256 " + hashlib.sha256(content[:-79]).hexdigest().encode()


def test_a_cut_file_is_refused(file: Path, tmp_path: Path) -> None:
    content, path = file.read_bytes(), tmp_path / file.name
    lengths = {0, 1, 100, len(content) - 79, len(content) - 1, *RNG.sample(range(len(content)), 20)}
    for length in lengths:
        path.write_bytes(content[:length])
        assert outcome(path, None) == "refused", length


def test_the_digest_is_that_of_sha256sum(file: Path) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert read_with_digest(file)[1] == verified_digest(file) == digest


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_damaged_folder_of_shards_is_refused(
    has_manifest: bool, folder: Path, tmp_path: Path
) -> None:
    """Every file flipped, cut and missing. Without a manifest, as earlier versions wrote folders,
    a flipped weight cannot be seen, but nothing ends in a traceback."""
    expected = read_contents(folder)
    assert is_same(expected["state_dict"], TENSORS["state_dict"])
    for name in sorted(path.name for path in folder.iterdir()):
        if name == MANIFEST and not has_manifest:
            continue
        content = (folder / name).read_bytes()
        damaged = [flipped(content, RNG.randrange(len(content))) for _ in range(12)]
        damaged += [content[: len(content) // 2], b"", None]
        for number, changed in enumerate(damaged):
            path = tmp_path / f"{name}{number}" / folder.name
            shutil.copytree(folder, path)
            (path / name).unlink()
            if not has_manifest:
                (path / MANIFEST).unlink()
            if changed is not None:
                (path / name).write_bytes(changed)
            if has_manifest or changed in (None, b""):
                assert outcome(path, expected) != "unnoticed", name
                assert has_manifest or outcome(path, expected) == "refused"
            else:
                outcome(path, expected)  # raises nothing but one line


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


def test_the_index_of_a_folder_cannot_run_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / folder.name
    shutil.copytree(folder, path)
    (path / MANIFEST).unlink()
    (path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"step-3.ckpt is unsafe: .*mkdir"):
        read_contents(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 2], "not written by atmossl"),
        ({"state_dict": {}}, "not written by atmossl"),
        ({"atmossl": 3, "state_dict": {}}, "not written by atmossl"),
        ({"atmossl": {}}, "incomplete"),
        ({"atmossl": Harmful(), "state_dict": {}}, "newer"),
        ({"atmossl": {"step": 1}, "state_dict": {}}, "holds weights alone"),
        ({**CONTENTS, "atmossl": {"step": 1, "rng": [], "model": {}}}, "streams, statistics"),
    ],
)
def test_foreign_and_incomplete_files_are_refused(contents, message, tmp_path: Path) -> None:
    path = tmp_path / "step-3.ckpt"
    torch.save(contents, path)
    with pytest.raises(ValueError, match=f"step-3.ckpt.*{message}"):
        read_record_to_go_on(path)
