"""Figures that `python -m benchmarks.joint` reads from reports."""

import math

import pandas as pd

from benchmarks.joint import hours_until, worst


def test_skill_lasts_until_the_lead_time_before_the_first_without() -> None:
    skill = pd.Series({18.0: 0.7, 6.0: 0.9, 12.0: 0.5, 24.0: 0.1})  # it comes back at 18 h
    assert hours_until(skill <= 0.6) == 6.0
    assert hours_until(skill <= 0.0) == 24.0
    assert hours_until(skill <= 1.0) == 0.0


def test_the_worst_ratio_is_farthest_from_one_either_way() -> None:
    ratios = pd.Series({("temperature", 500): 1.5, ("temperature", 850): 0.5, ("v", 500): 1.9})
    assert worst(ratios) == (0.5, "temperature 850")
    assert worst(pd.Series({("q", 300): 0.0, ("q", 500): math.inf}))[1] == "q 300"
