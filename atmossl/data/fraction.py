"""A part of the training records in unbroken blocks of time, for fine-tuning with few samples.

Neighbouring states are nearly the same weather. A part that were drawn step by step would hold
something of every week and cost hardly any accuracy, so that it says nothing about few data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from atmossl.batch import PRIMARY
from atmossl.data.segment import Segment


def blocks_of_time(lengths: Sequence[int], fraction: float, seed: int) -> dict[int, range]:
    """Steps of each record, by its number, that a fraction of all steps is: whole records in random
    order, and of the last one an unbroken block at a random place.

    A smaller fraction of the same seed lies within a larger one.
    """
    rng = np.random.default_rng(seed)
    steps_left, blocks = max(1, round(fraction * sum(lengths))), {}
    for number in rng.permutation(len(lengths)).tolist():
        length, place = min(steps_left, lengths[number]), rng.random()
        if length:
            start = int(place * (lengths[number] - length + 1))
            blocks[number] = range(start, start + length)
        steps_left -= length
    return dict(sorted(blocks.items()))


def part_of_records(
    records: Mapping[str, Sequence[Segment]], fraction: float, seed: int, window_steps: int
) -> dict[str, tuple[Segment, ...]]:
    """The same fraction of every source: a part of the primary records, and of the others what lies
    in these periods.

    Raises:
        ValueError: the fraction is shorter than a window.
    """
    primary = records[PRIMARY]
    blocks = blocks_of_time([len(segment.times) for segment in primary], fraction, seed)
    longest = max(map(len, blocks.values()))
    if longest < max(2, window_steps):
        raise ValueError(
            f"data.fraction={fraction:g} of {sum(len(s.times) for s in primary)} steps is a block "
            f"of {longest}, shorter than data.window.time={window_steps}; choose a larger fraction"
        )
    used = {
        PRIMARY: tuple(
            _cut(primary[number], steps.start, steps.stop)
            for number, steps in blocks.items()
            if len(steps) > 1
        )
    }
    for data in set(records) - {PRIMARY}:
        used[data] = tuple(_within(records[data], used[PRIMARY]))
    return used


def _within(segments: Sequence[Segment], primary: Sequence[Segment]) -> list[Segment]:
    """The parts of another source's records within the periods of the primary records: of those of
    the same name where there are such, as pairing does."""
    by_name = bool({o.record_name for o in segments} & {s.record_name for s in primary})
    parts = []
    for other in segments:
        for segment in primary:
            if by_name and other.record_name != segment.record_name:
                continue
            before, after = segment.times[0] - other.step, segment.times[-1] + segment.step
            inside = np.flatnonzero((other.times > before) & (other.times < after))
            if len(inside) > 1:
                parts.append(_cut(other, int(inside[0]), int(inside[-1]) + 1))
    return parts


def _cut(segment: Segment, start: int, stop: int) -> Segment:
    whole = stop - start == len(segment.times)
    return segment if whole else replace(segment.steps(start, stop), partial=True)
