"""What a long output is said to take, and the refusal of one that its disk cannot hold."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from atmossl import progress
from atmossl.cli import main
from atmossl.progress import EarlyEstimate, NoRoomError
from tests.inference.test_command import arguments
from tests.inference.test_command import folder as folder  # a fixture

MIB = 2**20


class Advance:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.lines: list[str] = []
        self.say = self.lines.append

    def __call__(self, count: float) -> None:
        self.shares.append(count)


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    def usage(path: Any) -> Any:
        assert Path(path).is_dir()
        return shutil._ntuple_diskusage(2**60, 0, num_bytes)  # pyright: ignore

    monkeypatch.setattr(progress.shutil, "disk_usage", usage)


def told(calls: list[tuple[float, float]], tmp_path: Path, **changes: Any) -> list[str]:
    """What is said of calls (seconds, share), in a case of which every part has 8 MiB."""
    advance, now, size = Advance(), [0.0], [0]
    given = {"cases": 10, "parts": 4, "smaller": "choose fewer", **changes}
    estimate = EarlyEstimate(
        advance, tmp_path / "o.zarr", size_now=lambda: size[0], clock=lambda: now[0], **given
    )
    for number, (seconds, share) in enumerate(calls):
        now[0] += seconds
        size[0] += 8 * MIB if number and share else 0
        estimate(share)
    assert advance.shares == [share for _, share in calls]
    return advance.lines


def test_time_and_size_are_those_of_the_first_parts_times_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten cases of four parts, 40 parts of 30 s and 8 MiB; the first part, in which libraries
    warm up, counts only where it has other work. What is there already costs no time."""
    free(monkeypatch, 5 * 2**30)
    calls = [(9.0, 0.0), (100.0, 0.25), (0.0, 0.0), (30.0, 0.25), (30.0, 0.25)]
    assert told(calls, tmp_path) == ["some 20 min and 320 MiB on the disk, where 5.0 GiB are free"]
    # 10 x (100 s + 3 x 30 s)
    assert told(calls, tmp_path, first_differs=True)[0].startswith("some 32 min and 320 MiB")
    assert told(calls, tmp_path, at_end=MIB * 1024)[0].startswith("some 20 min and 1.3 GiB")
    resumed = [(9.0, 8.0), *calls[1:]]  # 16 MiB of 8.5 cases, of which two are left
    assert told(resumed, tmp_path)[0].startswith("some 4 min and 19 MiB")
    assert told([(0.0, 0.0), (0.1, 0.25), (0.1, 0.25)], tmp_path) == []
    free(monkeypatch, 303 * MIB)
    with pytest.raises(NoRoomError, match=r"304 MiB more, but .* 303 MiB free; choose fewer"):
        told(calls, tmp_path)


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_what_does_not_fit_on_the_disk_is_refused_early(
    suffix: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    free(monkeypatch, 10_000)
    given = ["predict", "task=forecast", *arguments(folder, tmp_path / f"o.{suffix}")]
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"o.{suffix}: needs some 0." in line and "0.0 MiB free; choose fewer times" in line
    assert list(tmp_path.iterdir()) == []


def test_latents_that_do_not_fit_are_refused_early(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    free(monkeypatch, 10_000)
    given = [a for a in arguments(folder, tmp_path / "o.zarr") if not a.startswith("tilings")]
    assert main(["embed", *given]) == 2
    assert "0.0 MiB free; choose fewer times" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
