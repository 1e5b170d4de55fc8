"""Tables of what probes found, as CSV files and one HTML page."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from atmossl.at_work import check_is_free
from atmossl.atomic_files import write_atomically
from atmossl.evaluation.verify import rows_where

_STYLE = """body { margin: 0 auto; max-width: 1200px; padding: 0 16px 48px; color: #1c2733;
  font: 16px/1.5 system-ui, "Segoe UI", Arial, sans-serif; }
p { max-width: 76ch; } div { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; border: 1px solid #d9dee4; text-align: right; white-space: nowrap; }
th { background: #f5f7f9; }"""
_MEANING = (
    "Skill is 1 - loss / loss of climatology on the test dates: 1 is always right, 0 is the mean "
    "of the training and validation dates. The loss is the squared error of a number or a class's "
    "Brier score. In brackets: 95 % intervals of a block bootstrap over the test dates. The layer, "
    "or all layers side by side, is what does best on runs that a fit lacks, for the random "
    "network too."
)


@dataclass(frozen=True)
class Summary:
    """Tables with one row for every score, comparison, layer or pair of checkpoints.

    num_cases: dates, by checkpoint and split.
    """

    scores: pd.DataFrame
    comparisons: pd.DataFrame
    rank: pd.DataFrame
    alignment: pd.DataFrame
    tuned: pd.DataFrame
    num_cases: Mapping[str, Mapping[str, int]]


def headline_table(summary: Summary) -> pd.DataFrame:
    """One row for every checkpoint and probe: its skill and every baseline's, with intervals; a
    baseline is in its own column, marked `*` where the interval of the difference to it excludes
    0 in favour of the latents."""
    rows = []
    for headline in rows_where(summary.scores, headline=True).to_dict("records"):
        of_probe = {name: headline[name] for name in ("checkpoint", "probe")}
        compared = rows_where(summary.comparisons, **of_probe)
        row = {
            **of_probe,
            "layer": headline["layer"],
            "skill": f"{headline['skill']:.2f} ({headline['low']:.2f} to {headline['high']:.2f})",
            "refits": f"{headline['refits_low']:.2f} to {headline['refits_high']:.2f}",
        }
        attentive = rows_where(summary.scores, **of_probe, source="latents", method="attentive")
        for record in attentive.to_dict("records"):
            row["attentive"] = (
                f"{record['skill']:.2f} ({record['low']:.2f} to {record['high']:.2f})"
            )
        for record in compared.to_dict("records"):
            beaten = " *" if record["low"] > 0 else ""
            row[record["baseline"]] = f"{record['baseline_skill']:.2f}{beaten}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def brief_table(summary: Summary) -> pd.DataFrame:
    """One row for every checkpoint and probe that fits 80 columns: its skill, the best baseline by
    skill, and the difference to it with its interval, `*` where it excludes 0 in favour of the
    latents."""
    rows = []
    for headline in rows_where(summary.scores, headline=True).to_dict("records"):
        of_probe = {name: headline[name] for name in ("checkpoint", "probe")}
        rivals = rows_where(summary.comparisons, **of_probe)
        best = rivals.loc[rivals["baseline_skill"].fillna(-float("inf")).idxmax()]
        beaten = " *" if best["low"] > 0 else ""
        limits = f"({best['low']:+.2f} to {best['high']:+.2f})"
        rows.append(
            {
                **of_probe,
                "skill": f"{headline['skill']:.2f}",
                "best baseline": f"{best['baseline']} {best['baseline_skill']:.2f}",
                "difference": f"{best['difference']:+.2f} {limits}{beaten}",
            }
        )
    return pd.DataFrame(rows)


def brief_text(summary: Summary) -> str:
    """The brief table of every checkpoint below its name, in lines of at most 80 columns."""
    parts = []
    for checkpoint, rows in brief_table(summary).groupby("checkpoint", sort=False):
        table = rows.drop(columns="checkpoint")
        widths = {name: max(len(name), *table[name].map(len)) for name in table}
        lines = [dict(zip(table, table, strict=True)), *table.to_dict("records")]
        parts += [f"checkpoint {checkpoint}"]
        parts += [
            "  ".join(f"{line[n]:<{w}}" for n, w in widths.items()).rstrip() for line in lines
        ]
    return "\n".join(parts)


def shares_beaten(comparisons: pd.DataFrame) -> pd.DataFrame:
    """By checkpoint and baseline: the share of probes with more skill than the baseline (`higher`),
    and with an interval of the difference above 0 (`certain`)."""
    marked = comparisons.assign(
        higher=comparisons["difference"] > 0, certain=comparisons["low"] > 0
    )
    columns = ["checkpoint", "baseline", "higher", "certain"]
    shares = marked[columns].groupby(["checkpoint", "baseline"], as_index=False, sort=False)
    return pd.DataFrame(shares.mean())


def write_summary(summary: Summary, output: Path) -> None:
    """Write all tables into a folder that appears when it is whole.

    Raises:
        ValueError: the folder exists.
    """
    check_is_free(output)

    def fill(folder: Path) -> None:
        folder.mkdir()
        for name in ("scores", "comparisons", "rank", "alignment", "tuned"):
            if len(table := getattr(summary, name)):
                table.to_csv(folder / f"{name}.csv", index=False)
        (folder / "index.html").write_text(page(summary), encoding="utf-8")

    write_atomically(output, fill)


def page(summary: Summary) -> str:
    """The tables as one HTML page that needs no other file."""
    dates = "; ".join(
        f"{name}: " + ", ".join(f"{count} {split}" for split, count in counts.items())
        for name, counts in summary.num_cases.items()
    )
    tables = {
        "Linear probes and baselines": headline_table(summary),
        "Fine-tuned on a fraction of the labels": summary.tuned,
        "Effective rank (RankMe) of pooled latents' anomalies": summary.rank,
        "Similarity of checkpoints (linear CKA of pooled latents)": summary.alignment,
        "Share of probes that beat a baseline": shares_beaten(summary.comparisons),
        "All scores": summary.scores,
    }
    parts = [
        f"<h2>{title}</h2>\n<div>{_table(table)}</div>"
        for title, table in tables.items()
        if len(table)
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Probes</title><style>{_STYLE}</style></head>\n<body><h1>Probes</h1>\n"
        f"<p>{_MEANING} A star marks a baseline below the latents by more than chance.</p>\n"
        f"<p>Dates: {html.escape(dates)}.</p>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(table: pd.DataFrame) -> str:
    shown = table.astype(object).where(table.notna(), "")  # integers would show <NA>
    return shown.to_html(index=False, border=0, float_format=lambda v: f"{v:.3f}")
