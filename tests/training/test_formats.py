"""Checkpoints of every format that ever was load for good, and say what they can do."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from atmossl.api import load, open_data
from atmossl.checkpoint_files import FORMAT, migrated, read_contents
from atmossl.cli import main
from atmossl.inference.checkpoint import load_checkpoint, objective_name

FOLDER = Path(__file__).parents[1] / "checkpoints"
# the mean prediction in K of every file, as the version that wrote it made it
MEANS = {1: 251.7087, 2: 251.7087, 3: 251.7087, 4: 251.7087}


def test_every_format_has_a_file() -> None:
    assert sorted(MEANS) == list(range(1, FORMAT + 1))
    assert sorted(path.stem for path in FOLDER.glob("*.ckpt")) == [f"format_{n}" for n in MEANS]


@pytest.mark.parametrize("version", MEANS)
def test_a_file_of_every_format_predicts_what_it_did(version: int) -> None:
    path = FOLDER / f"format_{version}.ckpt"
    stored = torch.load(path, weights_only=True)["atmossl"]
    assert stored.get("format", 1) == version
    record = read_contents(path)["atmossl"]
    assert record["format"] == FORMAT and record["network"] == "multiformer"
    assert record["objective"]["kind"].endswith(".MaskedModelling")
    found = load(path, device="cpu").predict("forecast", open_data("sample"), "1959-02-12T00")
    assert float(found["temperature"].mean()) == pytest.approx(MEANS[version], abs=1e-3)
    latents = load(path, device="cpu").embed(open_data("sample"), "1959-02-12T00")["latents"]
    assert np.isfinite(latents).all()


def test_a_later_format_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    contents = torch.load(FOLDER / "format_1.ckpt", weights_only=True)
    contents["atmossl"]["format"] = FORMAT + 1
    path = tmp_path / "later.ckpt"
    torch.save(contents, path)
    assert main(["predict", f"checkpoint={path}", f"output={tmp_path / 'o.zarr'}"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"format {FORMAT + 1} is newer" in told and str(path) in told


def test_a_checkpoint_that_cannot_reconstruct_is_refused_in_one_line(tmp_path, capsys) -> None:
    contents = torch.load(FOLDER / f"format_{FORMAT}.ckpt", weights_only=True)
    kind = "atmossl.objectives.jepa.JointEmbedding"
    contents["atmossl"]["objective"] = {"kind": kind, "provides": ["embed"]}
    path = tmp_path / "contrastive.ckpt"
    torch.save(contents, path)
    output = f"output={tmp_path / 'o.zarr'}"
    for command in (["predict", output], ["evaluate", f"output={tmp_path / 'report'}"]):
        assert main([*command, f"checkpoint={path}"]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "trained with objective=jepa, from which it did not learn to reconstruct" in told
    trained = load_checkpoint(str(path))
    with pytest.raises(ValueError, match="it can embed"):
        trained.require("distance")
    replace(trained, provides=frozenset({"distance"})).require("distance")
    assert objective_name("atmossl.objectives.masked.MaskedModelling") == "masked"
    assert objective_name("my_package.huber.HuberLoss") == "my_package.huber.HuberLoss"


def test_a_migrated_record_stays_as_it_is() -> None:
    record = read_contents(FOLDER / "format_1.ckpt")["atmossl"]
    assert migrated(record) == record
