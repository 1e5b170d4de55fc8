"""The learning rate as a function of the step, as a factor of its peak."""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["cosine", "exponential", "constant"]


def learning_rate_factor(
    kind: Schedule, *, warmup_steps: int, max_steps: int, final_fraction: float, decay_every: int
) -> Callable[[int], float]:
    """The factor of the peak learning rate at a step: linear warm-up, then the schedule.

    `cosine` falls to `final_fraction` at max_steps. `exponential` is AtmoRep's: divided by 1.025
    every `decay_every` steps (an epoch there), not below `final_fraction`. `constant` stays.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        after = step - warmup_steps
        if kind == "constant":
            return 1.0
        if kind == "exponential":
            return max(final_fraction, 1.025 ** -(after // decay_every))
        share = min(1.0, after / max(1, max_steps - warmup_steps))
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * share))

    return factor
