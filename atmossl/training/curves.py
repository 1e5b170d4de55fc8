"""Draws a run's curves from its CSV log."""

import io
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from atmossl.atomic_files import write_atomically

_RANKS = [f"collapse/{kind}_{of}" for kind in ("rank", "lidar") for of in ("tokens", "pooled")]


@rank_zero_only
def keep_metrics(folder: Path) -> None:
    """Rename `metrics.csv` of an interrupted run to `metrics-N.csv`, since Lightning's logger
    deletes the file that it finds."""
    metrics = folder / "metrics.csv"
    if metrics.exists():
        metrics.rename(folder / f"metrics-{len(list(folder.glob('metrics-*.csv')))}.csv")


def read_metrics(metrics: Path) -> pd.DataFrame:
    """The log of a run and of the runs that it resumed; where logs overlap the later one counts."""
    earlier = sorted(metrics.parent.glob("metrics-*.csv"), key=lambda path: int(path.stem[8:]))
    tables: list[Any] = []
    for path in (*earlier, metrics):
        table = _read_table(path)
        if table.empty:
            continue
        start = table["step"].min()
        tables = [before[before["step"] < start] for before in tables]
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["step"])


def _read_table(path: Path) -> pd.DataFrame:
    """The complete lines of one log. A killed run may leave a log that is empty, or whose last
    line is cut."""
    lines, _, _ = path.read_text(errors="replace").rpartition("\n")
    header, _, _ = lines.partition("\n")
    if "step" not in header.split(","):
        return pd.DataFrame(columns=["step"])
    table = pd.read_csv(io.StringIO(lines), on_bad_lines="skip")
    numbers: Any = table.apply(pd.to_numeric, errors="coerce")
    return numbers[numbers["step"].notna()]


def plot_curves(metrics: Path, folder: Path) -> list[Path]:
    """Write `loss.png`, `mask_loss.png`, `skill.png`, `collapse.png` and `learning_rate.png` of the
    log; a later call draws them anew."""
    table = read_metrics(metrics)
    pictures = {
        "loss": (["train/loss"], "validation/", "/loss", "loss"),
        "mask_loss": ([], "train/mask_loss/", "", "training loss by kind of mask"),
        "skill": ([], "rmse_ratio/", "", "RMSE / RMSE of first guess"),
        "collapse": (_RANKS, None, "", "effective rank of latents' anomalies"),
        "learning_rate": (["learning_rate"], None, "", "learning rate"),
    }
    written = []
    for name, (columns, prefix, suffix, label) in pictures.items():
        chosen = [c for c in columns if c in table]
        if prefix is not None:
            slashes = prefix.count("/") + bool(suffix)
            matching = [c for c in table if c.startswith(prefix) and c.endswith(suffix)]
            chosen += sorted(c for c in matching if c.count("/") == slashes)
        if chosen:
            written.append(_plot(table, chosen, label, folder / f"{name}.png"))
    return written


def _plot(table: pd.DataFrame, columns: list[str], label: str, path: Path) -> Path:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for column in columns:
        points: Any = table[["step", column]].dropna()
        smooth = points[column].rolling(max(1, len(points) // 100), min_periods=1).mean()
        axes.plot(
            points["step"], smooth, label=column.removeprefix("train/mask_loss/"), linewidth=1.2
        )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    return path
