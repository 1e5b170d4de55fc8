"""The log of a resumed run is whole."""

import pandas as pd

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
