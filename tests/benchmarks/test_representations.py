"""The summary keys of the comparison of objectives are those of their definitions."""

import pandas as pd
import pytest
import torch

pytest.importorskip("sklearn")

from atmossl.probes.summary import Summary
from benchmarks.representations import changes_for, differing, figures_of


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
    tuned = [
        {"checkpoint": name, "probe": probe, "start": "trained", "fraction": fraction, "dates": 3,
         "skill": 0.5, "validation": validation - worse, "loss_over_scratch": ratio + worse,
         "ratio_low": 0.1, "ratio_high": 2.0, "loss_over_plain": ratio / 2 - worse,
         "plain_low": 0.05, "plain_high": 1.0, "head": head, "learning_rate": 1e-3}
        for name, validation, ratios in (("a", 0.3, (0.7, 0.8)), ("b", 0.4, (0.8, 1.0)))
        for probe, ratio in zip(("jet", "belt"), ratios, strict=True)
        for fraction in (0.1, 1.0)
        for head, worse in (("probe", 0.0), ("zeros", 0.2))
    ]  # fmt: skip
    tables = (pd.DataFrame(rows) for rows in (scores, comparisons, rank, alignment, tuned))
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
    assert figures["labels_10pct_best"] == "b"  # by validation, not by what it is to be scored on
    assert figures["labels_10pct_vs_scratch_100pct"] == pytest.approx(0.9)
    assert figures["labels_10pct_vs_plain_scratch_100pct"] == pytest.approx(0.45)
    assert figures["labels"]["a"]["belt"]["1"]["interval"] == [0.1, 2.0]


def test_a_change_may_be_to_some_objectives() -> None:
    lags = "objective.lag_time=[18h,24h]"
    given = ["model=tiny", f"contrastive:{lags}", "data.window={time: 3, lon: 0}"]
    assert changes_for("contrastive", given) == [
        "model=tiny",
        lags,
        "data.window={time: 3, lon: 0}",
    ]
    assert changes_for("mae", given) == ["model=tiny", "data.window={time: 3, lon: 0}"]
    for name, taken in (("mae", ["a=1"]), ("jepa", ["a=1"]), ("dino", [])):
        assert changes_for(name, ["mae,jepa:a=1"]) == taken


def test_leaves_that_differ_are_named() -> None:
    one = {"a": [torch.zeros(2), 1], "b": "x"}
    assert differing(one, {"a": [torch.zeros(2), 1], "b": "x"}) == []
    assert differing(one, {"a": [torch.tensor([0.0, 1e-30]), 1], "b": "x"}) == ["['a'][0]"]
    assert len(differing(one, {"a": [torch.zeros(2), 1, 2], "b": "y"})) == 2
