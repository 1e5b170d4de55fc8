"""The mean of several checkpoints' weights."""

import resource
from pathlib import Path

import pytest
import torch

from atmossl.atomic_files import check_room
from atmossl.checkpoint_files import FORMAT
from atmossl.commands.export import export
from atmossl.inference.checkpoint import load_checkpoint, read_checkpoint


def saved(path: Path, weight: torch.Tensor, **changes) -> str:
    same = {key: 0 for key in ("streams", "model", "statistics", "window", "first_guess")}
    state = {"ema.module.weight": weight, "ema.n_averaged": torch.tensor(3), "weight": weight + 9}
    record = {
        **same,
        "format": FORMAT,
        "network": "multiformer",
        "objective": {},
        "step": 7,
        "rng": [1, 2],
        **changes,
    }
    torch.save({"state_dict": state, "atmossl": record}, path)
    return str(path)


def test_exported_weights_are_the_mean_of_the_averaged_ones(tmp_path: Path) -> None:
    weights = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = [saved(tmp_path / f"{n}.ckpt", own.float()) for n, own in enumerate(weights)]
    export(names, tmp_path / "mean.ckpt")
    contents = read_checkpoint(str(tmp_path / "mean.ckpt"))
    assert list(contents["state_dict"]) == ["ema.module.weight"]
    found = contents["state_dict"]["ema.module.weight"].double()
    torch.testing.assert_close(found, weights.mean(dim=0), atol=2e-3, rtol=1e-3)
    assert len(set(contents["atmossl"]["mean_of"])) == 3 and "rng" not in contents["atmossl"]


def test_a_checkpoint_named_twice_counts_twice_and_the_last_one_s_first_guess_is_kept(
    tmp_path: Path,
) -> None:
    first = saved(tmp_path / "a.ckpt", torch.full((2,), 3.0), first_guess=True)
    last = saved(tmp_path / "b.ckpt", torch.full((2,), 6.0), first_guess="surroundings")
    export([first, last, last], tmp_path / "mean.ckpt")
    contents = read_checkpoint(str(tmp_path / "mean.ckpt"))
    assert contents["state_dict"]["ema.module.weight"].tolist() == [5.0, 5.0]
    assert contents["atmossl"]["first_guess"] == "surroundings"
    none = saved(tmp_path / "c.ckpt", torch.zeros(2), first_guess=False)
    with pytest.raises(ValueError, match=r"c\.ckpt: its first_guess"):
        export([none, last], tmp_path / "other.ckpt")


def test_checkpoints_of_different_models_have_no_mean(tmp_path: Path) -> None:
    names = [
        saved(tmp_path / "a.ckpt", torch.zeros(2), model={"dim": 8}),
        saved(tmp_path / "b.ckpt", torch.zeros(2), model={"dim": 16}),
    ]
    with pytest.raises(ValueError, match=r"a\.ckpt: its model"):
        export(names, tmp_path / "mean.ckpt")
    assert not (tmp_path / "mean.ckpt").exists()


def test_places_that_cannot_be_written_are_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"output=.*file/x\.ckpt cannot be written"):
        export([str(tmp_path / "missing.ckpt")], tmp_path / "file" / "x.ckpt")


def test_a_full_disk_is_named_with_key_and_file(tmp_path: Path) -> None:
    """Either before the work, where room for all of it can be asked for, or at the write."""
    weights = saved(tmp_path / "a.ckpt", torch.zeros(100_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"output=.*b\.ckpt cannot be written: File too large"):
            check_room(tmp_path / "b.ckpt", 60_000)
        with pytest.raises(OSError, match=r"output=.*b\.ckpt could not be written: File too large"):
            export([weights], tmp_path / "b.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_record_that_lacks_something_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", torch.zeros(2))
    with pytest.raises(ValueError, match=r"a\.ckpt is incomplete: its record lacks data$"):
        load_checkpoint(path)
