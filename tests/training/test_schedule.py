"""Learning-rate factors against their closed forms."""

import math

import pytest

from atmossl.training.optimizer import learning_rate_factor

COMMON = {"warmup_steps": 10, "max_steps": 110, "final_fraction": 0.1, "decay_every": 20}


@pytest.mark.parametrize("kind", ["cosine", "exponential", "constant"])
def test_warm_up_is_a_straight_line_to_the_peak(kind) -> None:
    factor = learning_rate_factor(kind, **COMMON)
    assert [factor(step) for step in range(10)] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert factor(10) == pytest.approx(1.0)


def test_cosine_passes_its_middle_and_ends_at_the_final_fraction() -> None:
    factor = learning_rate_factor("cosine", **COMMON)
    assert factor(60) == pytest.approx(0.55)
    assert factor(35) == pytest.approx(0.1 + 0.45 * (1 + math.sqrt(0.5)))
    assert factor(110) == factor(1000) == pytest.approx(0.1)


def test_exponential_divides_by_its_base_every_epoch_and_stops_falling() -> None:
    factor = learning_rate_factor("exponential", **COMMON)
    assert factor(29) == 1.0
    assert factor(30) == pytest.approx(1 / 1.025)
    assert factor(10 + 20 * 7) == pytest.approx(1.025**-7)
    assert factor(10**6) == 0.1
