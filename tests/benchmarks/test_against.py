"""Two processes take turns at the same work, and the ratio of their seconds is told."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.against import Runner, figures_of, unpack

ROOT = Path(__file__).parents[2]


def test_a_round_that_another_program_disturbs_does_not_move_the_ratio() -> None:
    before = np.array([1.0, 1.1, 0.9, 1.0])
    quiet = np.stack([before, 1.5 * before], axis=1)
    disturbed = np.stack([before[:1], 9.0 * before[:1]], axis=1)
    figures = figures_of([quiet, quiet, disturbed])
    assert figures["ratio"] == 1.5
    assert figures["rounds"] == [1.5, 1.5, 9.0]
    assert (figures["seconds_before"], figures["seconds_now"]) == (0.9, 1.35)


def test_files_are_those_of_the_commit(tmp_path: Path) -> None:
    name = unpack("HEAD", tmp_path)
    assert (tmp_path / "atmossl" / "__init__.py").is_file()
    assert not (tmp_path / ".git").exists()
    assert unpack(name, tmp_path / "again") == name
    with pytest.raises(SystemExit, match="'nothing' is no commit"):
        unpack("nothing", tmp_path)


def test_a_process_answers_with_its_seconds_until_it_cannot(tmp_path: Path) -> None:
    with Runner(ROOT, tmp_path / "no_store.zarr") as runner:
        assert 0.0 < runner.seconds("loader") < 60.0
        with pytest.raises(SystemExit, match="windows does not run with the package of"):
            runner.seconds("windows")
