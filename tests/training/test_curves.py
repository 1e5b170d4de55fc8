"""The log of a resumed run is whole."""

from pathlib import Path

import pandas as pd
import pytest

from atmossl.training.curves import keep_metrics, plot_curves, read_metrics


def test_a_resumed_run_keeps_the_log_of_what_came_before(tmp_path) -> None:
    metrics = tmp_path / "metrics.csv"
    runs = ([0, 10, 20, 30], [20, 30, 40], [40, 50])  # killed after 30 and 40, checkpoints before
    for number, steps in enumerate(runs):
        keep_metrics(tmp_path)
        losses = [100 * number + step for step in steps]
        pd.DataFrame({"step": steps, "train/loss": losses}).to_csv(metrics, index=False)
    table = read_metrics(metrics)
    assert table["step"].tolist() == [0, 10, 20, 30, 40, 50]
    assert table["train/loss"].tolist() == [0, 10, 120, 130, 240, 250]
    (picture,) = plot_curves(metrics, tmp_path / "curves")
    assert picture.name == "loss.png" and picture.stat().st_size > 1000


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_a_log_that_a_kill_cut_gives_its_whole_lines(cut: int, tmp_path: Path) -> None:
    content = "step,train/loss\n0,0.125\n1,0.25\n2,0.375\n"
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(content[:cut])
    table = read_metrics(metrics)
    whole = content[:cut].count("\n") - 1
    assert table["step"].tolist() == list(range(max(0, whole)))
    keep_metrics(tmp_path)
    pd.DataFrame({"step": [1, 2], "train/loss": [0.5, 0.75]}).to_csv(metrics, index=False)
    assert read_metrics(metrics)["step"].tolist() == [0, 1, 2][whole < 1 :]
    assert [path.name for path in plot_curves(metrics, tmp_path / "curves")] == ["loss.png"]


def test_losses_by_mask_are_drawn_together(tmp_path: Path) -> None:
    table = {"step": [0, 1], "train/loss": [1.0, 0.5], "train/mask_loss/forecast": [2.0, None],
             "train/mask_loss/random": [None, 0.2]}  # fmt: skip
    pd.DataFrame(table).to_csv(tmp_path / "metrics.csv", index=False)
    names = [path.name for path in plot_curves(tmp_path / "metrics.csv", tmp_path / "curves")]
    assert names == ["loss.png", "mask_loss.png"]


def test_an_empty_log_has_no_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").touch()
    assert plot_curves(tmp_path / "metrics.csv", tmp_path / "curves") == []
