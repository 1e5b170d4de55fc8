"""Long leads: passes of the model that each go on from the members of the pass before."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from atmossl.batch import PRIMARY
from atmossl.data.backends import OpenedStore
from atmossl.data.chunks import Access
from atmossl.data.forcings import FORCINGS
from atmossl.data.segment import DataSource, Segment
from atmossl.data.store import open_segment
from atmossl.geometry import Box, Nesting
from atmossl.inference.blend import BlendedPart, Fields
from atmossl.inference.coverage import Coverage
from atmossl.inference.tiles import blended
from atmossl.inference.windows import Source

if TYPE_CHECKING:
    from atmossl.inference.predict import Predictor

State = dict[str, np.ndarray]  # by variable, [level time lat lon]
States = dict[str, State]  # by `data` of the streams; their last steps are the latest there are


def roll_out(predictor: "Predictor", case: int, source: Source) -> Iterator[BlendedPart]:
    """One init time: every member's state is the start of its own next pass.

    A member of the tail has its own place in the distribution everywhere on the globe; going on
    with the same one would push it further out at each pass. So who takes which member of the next
    pass is drawn anew, by (seed, init time, pass), each member once.

    What is static stays, and what is computed from time and place is so at every date. Streams
    with data of their own go on at the steps of their own store.
    """
    plan, segment = predictor.plan, source.segment
    step, total = predictor.step, len(plan.offsets)
    init = segment.times[source.start + len(plan.read) - 1]
    sources, states = [source], [_states(predictor, segment, source)]
    for number in range(plan.num_passes):
        begin = number * plan.steps_per_pass * step
        joined = _joined(predictor, sources)
        completes = number + 1 == plan.num_passes
        for data, found in joined.items():
            leads = begin + found.leads
            leads = leads[leads <= total * step]
            written = {name: values[: len(leads)] for name, values in found.fields.items()}
            rows = slice(0, predictor.grid_of(data).shape[0])
            yield BlendedPart(case, leads, rows, written, completes and data == PRIMARY, data=data)
        if completes:
            return
        num_members = next(iter(joined[PRIMARY].fields.values())).shape[1]
        states = states * num_members if number == 0 else states
        states = [_appended(predictor, states[m], joined, m) for m in range(num_members)]
        latest = init + begin + plan.steps_per_pass * step
        order = _order(predictor.seed, init, number, num_members)
        sources = [
            _source(predictor, segment, state, latest, member)
            for state, member in zip(states, order, strict=True)
        ]


def _order(seed: int, init: np.datetime64, number: int, num_members: int) -> list[int]:
    hours = int((init - np.datetime64("0001-01-01")) / np.timedelta64(1, "h"))
    rng = np.random.default_rng(np.random.SeedSequence([seed, hours, number]))
    return rng.permutation(num_members).tolist()


def check_inputs(predictor: "Predictor") -> None:
    """Raise ValueError for input streams that no pass of a rollout predicts or computes."""
    unknown = [
        spec.name
        for spec in predictor.trained.specs
        if spec.role not in ("predict", "static") and not set(spec.variables) <= set(FORCINGS)
    ]
    if unknown:
        raise ValueError(
            f"task.rollout_time={predictor.plan.steps_per_pass * predictor.segment.step_hours:g} h "
            f"is shorter than task.lead_time, but streams {unknown} are input only and nothing "
            "predicts or computes them; valid: a lead time within one pass"
        )


@dataclass(frozen=True)
class Joined:
    """Whole fields of one pass, and times of their steps from its start."""

    leads: np.ndarray
    fields: Fields


def _joined(predictor: "Predictor", sources: list[Source]) -> dict[str, Joined]:
    """By the streams' `data`, what a pass predicts; members of all sources one after another."""
    joined: dict[str, Joined] = {}
    for part in blended(predictor, sources):
        found = joined.setdefault(part.data, Joined(part.leads, {}))
        fields, shape = found.fields, predictor.grid_of(part.data).shape
        for name, values in part.fields.items():
            own = values.shape[1]
            if name not in fields:
                size = (len(part.leads), own * len(sources), values.shape[2], *shape)
                fields[name] = np.zeros(size, np.float32)
            members = slice(part.case * own, (part.case + 1) * own)
            fields[name][:, members, :, part.rows] = values
    return joined


def _states(predictor: "Predictor", segment: Segment, source: Source) -> States:
    """The steps of every record that the first pass reads, at all its levels."""
    count = len(predictor.plan.read)
    states = {}
    for data, read in segment.sources.items():
        steps = read.steps(segment.times[source.start], count * segment.step)
        known = max(1, len(steps))  # what is static is known even if none of the steps is
        start = max(0, steps.stop - known)
        states[data] = _read(read.segment, start, known, Coverage.of(segment, data).whole)
    return states


def _read(record: Segment, start: int, count: int, box: Box) -> State:
    return {
        name: record.read(name, record.levels_of(name), start, count, box)
        for name in record.variables
        if name not in FORCINGS
    }


def _appended(
    predictor: "Predictor", states: States, joined: Mapping[str, Joined], member: int
) -> States:
    """The states moved on: their steps and those of the pass, of which the latest are kept."""
    segment, moved = predictor.segment, {}
    for data, state in states.items():
        record = segment.sources[data].segment
        fields = joined[data].fields if data in joined else {}
        kept = _kept(predictor, record)
        # static, or moved on below
        moved[data] = {name: _last(values[:, -1:], kept) for name, values in state.items()}
        for name, levels in predictor.trained.predicted_levels(data).items():
            held = state[name]
            if name in fields:
                new = fields[name][:, member].swapaxes(0, 1)  # [level time lat lon]
                # levels that no stream predicts, of a static one say, stay as they are
                whole = np.repeat(held[:, -1:], new.shape[1], axis=1)
                whole[[record.levels.index(level) if level else 0 for level in levels]] = new
                held = np.concatenate([held, whole], axis=1)
            moved[data][name] = _last(held, kept)
    return moved


def _kept(predictor: "Predictor", record: Segment) -> int:
    """Steps of a record that a pass can read; two at least, which make a record."""
    read = len(predictor.plan.read) * predictor.segment.step
    return max(2, -int(-read // record.step))


def _last(values: np.ndarray, count: int) -> np.ndarray:
    """The latest steps of [level time lat lon], the first one repeated if they are fewer: before
    it nothing is read."""
    return np.take(values, np.arange(-count, 0).clip(-values.shape[1]), axis=1)


def _source(
    predictor: "Predictor", segment: Segment, states: States, latest: np.datetime64, member: int
) -> Source:
    """The states as records whose last steps are the latest ones up to a time."""
    records: dict[str, Segment] = {}
    for data, read in segment.sources.items():
        record = replace(read.segment, grid=Coverage.of(segment, data).grid)
        last = latest - (latest - record.times[0]) % record.step
        records[data] = _rolled(record, states[data], last, _kept(predictor, record))
    primary = records.pop(PRIMARY)
    auxiliaries = {
        data: DataSource(record, Nesting.of(primary.grid, record.grid))
        for data, record in records.items()
    }
    start = len(primary.times) - len(predictor.plan.read)
    return Source(replace(primary, auxiliaries=auxiliaries), start, member)


def _rolled(record: Segment, state: State, last: np.datetime64, count: int) -> Segment:
    """A record of some steps that ends at a time."""
    times = last + record.step * (np.arange(count) + 1 - count)
    return open_segment(
        f"{record.name} rolled out",
        OpenedStore(record.dataset_of(state, times), pressure_levels=record.pressure_levels),
        record.location,
        variables=record.variables,
        levels=record.levels,
        access=Access(input_limits="off"),  # they are the model's own
        may_miss=sorted(record.may_miss),
    )
