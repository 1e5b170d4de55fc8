"""The summary keys of the comparison of objectives are those of their definitions."""

import pandas as pd
import pytest

pytest.importorskip("sklearn")

from atmossl.probes.summary import Summary
from benchmarks.representations import figures_of


def made() -> Summary:
    """Two objectives, two probes, three baselines."""
    skills = {("a", "jet"): 0.6, ("a", "belt"): 0.2, ("b", "jet"): 0.1, ("b", "belt"): 0.4}
    baselines = {"random": 0.15, "pca": 0.3, "raw": 0.5}
    scores = [
        {"checkpoint": name, "probe": probe, "skill": skill, "low": skill - 0.25,
         "high": skill + 0.25, "headline": True}
        for (name, probe), skill in skills.items()
    ]  # fmt: skip
    comparisons = [
        {"checkpoint": name, "probe": probe, "baseline": baseline, "baseline_skill": other,
         "difference": skill - other, "low": skill - other - 0.25}
        for (name, probe), skill in skills.items()
        for baseline, other in baselines.items()
    ]  # fmt: skip
    rank = [
        {"checkpoint": "a", "source": "latents", "layer": layer, "rankme": value}
        for layer, value in enumerate((9.0, 1.5))
    ] + [{"checkpoint": "b", "source": "latents", "layer": 0, "rankme": 5.0}]
    alignment = [{"first": "a", "second": "b", "cka": 0.5}]
    tables = (pd.DataFrame(rows) for rows in (scores, comparisons, rank, alignment))
    return Summary(*tables, num_cases={})


def test_shares_and_ratios_follow_from_the_tables() -> None:
    figures = figures_of(made())
    assert figures["objectives_trained"] == 2
    assert figures["rankme"] == {"a": 1.5, "b": 5.0} and figures["objectives_collapsed"] == 1
    assert figures["probes_beating_random"] == 1.0  # a: both
    assert figures["probes_beating_random_certain"] == 0.5  # a: jet, b: none
    assert figures["probes_beating_pca"] == 0.5
    assert figures["probes_beating_raw_ridge"] == 0.5  # jet, by a
    assert figures["probes_beating_raw_ridge_certain"] == 0.0
    assert figures["skills"]["a"]["jet"]["loss_over_best_baseline"] == pytest.approx(0.8)
    assert figures["cka"] == {"a, b": 0.5}
