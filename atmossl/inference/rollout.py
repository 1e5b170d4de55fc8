"""Prediction in several passes of the model (a rollout), which each start from the members of the
pass before."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from atmossl.batch import PRIMARY
from atmossl.data.backends import OpenedStore
from atmossl.data.chunks import Access
from atmossl.data.forcings import FORCINGS
from atmossl.data.segment import DataSource, Segment
from atmossl.data.store import open_segment
from atmossl.geometry import Box, Nesting
from atmossl.inference.plan import BlendedPart, Coverage, Fields, Plan, Source

State = dict[str, np.ndarray]  # by variable, [level time lat lon]
OnePass = Callable[[Plan, Sequence[Source]], Iterable[BlendedPart]]
States = dict[str, State]  # by `data` of the streams; their last steps are the latest there are


def roll_out(plan: Plan, case: int, source: Source, one_pass: OnePass) -> Iterator[BlendedPart]:
    """Predict one init time by passes; the state that a member reaches is the start of its next
    pass. one_pass: `atmossl.inference.tiles.blended`.

    A draw of noise goes on with its own noise (`model.ensemble=noise`), which follows from pass to
    pass. A member of the tail has its own place in the distribution everywhere on the globe; going
    on with the same one would push it further out at each pass. So who takes which member of the
    next pass is drawn anew, by (seed, init time, pass), each member once.

    What is static stays, and what is computed from time and place is so at every date. Streams
    with data of their own go on at the steps of their own store.
    """
    steps, segment = plan.steps, source.segment
    step, total = plan.step, len(steps.offsets)
    init = segment.times[source.start + len(steps.read) - 1]
    sources, states = [source], [_states(plan, segment, source)]
    for number in range(steps.num_passes):
        begin = number * steps.steps_per_pass * step
        joined = _joined(plan, one_pass(plan, sources), len(sources))
        completes = number + 1 == steps.num_passes
        for data, joined_part in joined.items():
            leads = begin + joined_part.leads
            leads = leads[leads <= total * step]
            written = {name: values[: len(leads)] for name, values in joined_part.fields.items()}
            rows = slice(0, plan.grid_of(data).shape[0])
            yield BlendedPart(case, leads, rows, written, completes and data == PRIMARY, data=data)
        if completes:
            return
        num_members = next(iter(joined[PRIMARY].fields.values())).shape[1]
        states = states * num_members if number == 0 else states
        states = [_appended(plan, states[m], joined, m) for m in range(num_members)]
        latest = init + begin + steps.steps_per_pass * step
        order = _order(plan, init, number, num_members)
        sources = [
            _source(plan, segment, state, latest, member)
            for state, member in zip(states, order, strict=True)
        ]


def _order(plan: Plan, init: np.datetime64, number: int, num_members: int) -> list[int]:
    """Which member of the next pass each written member continues with."""
    members = plan.members or tuple(range(num_members))
    if plan.trained.model.any_member:
        return list(members)
    total = plan.trained.model.num_members or num_members
    places = _permutation(plan.options.seed, init, number, total)
    return [places[member] for member in members]


def _permutation(seed: int, init: np.datetime64, number: int, num_members: int) -> list[int]:
    hours = int((init - np.datetime64("0001-01-01")) / np.timedelta64(1, "h"))
    rng = np.random.default_rng(np.random.SeedSequence([seed, hours, number]))
    return rng.permutation(num_members).tolist()


@dataclass(frozen=True)
class Joined:
    """Whole fields of one pass, and the times of their steps from the start of the pass."""

    leads: np.ndarray
    fields: Fields


def _joined(plan: Plan, parts: Iterable[BlendedPart], num_sources: int) -> dict[str, Joined]:
    """The fields that a pass predicts, by the streams' `data`, with the members of all sources
    one after another."""
    joined: dict[str, Joined] = {}
    for part in parts:
        joined_part = joined.setdefault(part.data, Joined(part.leads, {}))
        fields, shape = joined_part.fields, plan.grid_of(part.data).shape
        for name, values in part.fields.items():
            num_members = values.shape[1]
            if name not in fields:
                size = (len(part.leads), num_members * num_sources, values.shape[2], *shape)
                fields[name] = np.zeros(size, np.float32)
            members = slice(part.case * num_members, (part.case + 1) * num_members)
            fields[name][:, members, :, part.rows] = values
    return joined


def _states(plan: Plan, segment: Segment, source: Source) -> States:
    """The steps of every record that the first pass reads, at all levels."""
    count = len(plan.steps.read)
    states = {}
    for data, read in segment.sources.items():
        steps = read.steps(segment.times[source.start], count * segment.step)
        num_read = max(1, len(steps))  # what is static is known even if none of the steps is
        start = max(0, steps.stop - num_read)
        states[data] = _read(read.segment, start, num_read, Coverage.of(segment, data).whole)
    return states


def _read(record: Segment, start: int, count: int, box: Box) -> State:
    return {
        name: record.read(name, record.levels_of(name), start, count, box)
        for name in record.variables
        if name not in FORCINGS
    }


def _appended(plan: Plan, states: States, joined: Mapping[str, Joined], member: int) -> States:
    """The states after a pass: old steps and predicted ones, of which the latest are kept."""
    segment, moved = plan.segment, {}
    for data, state in states.items():
        record = segment.sources[data].segment
        fields = joined[data].fields if data in joined else {}
        num_kept = _kept(plan, record)
        # static, or moved on below
        moved[data] = {name: _last(values[:, -1:], num_kept) for name, values in state.items()}
        for name, levels in plan.trained.predicted_levels(data).items():
            held = state[name]
            if name in fields:
                new = fields[name][:, member].swapaxes(0, 1)  # [level time lat lon]
                # levels that no stream predicts, of a static one say, stay as they are
                whole = np.repeat(held[:, -1:], new.shape[1], axis=1)
                whole[[record.levels.index(level) if level else 0 for level in levels]] = new
                held = np.concatenate([held, whole], axis=1)
            moved[data][name] = _last(held, num_kept)
    return moved


def _kept(plan: Plan, record: Segment) -> int:
    """How many steps of a record a pass can read; at least two, which make a record."""
    read = len(plan.steps.read) * plan.segment.step
    return max(2, -int(-read // record.step))


def _last(values: np.ndarray, count: int) -> np.ndarray:
    """The latest `count` steps of [level time lat lon]. If there are fewer, the first one is
    repeated; nothing before it is read."""
    return np.take(values, np.arange(-count, 0).clip(-values.shape[1]), axis=1)


def _source(
    plan: Plan, segment: Segment, states: States, latest: np.datetime64, member: int
) -> Source:
    """The states as records, whose last steps are the latest ones up to a time."""
    records: dict[str, Segment] = {}
    for data, read in segment.sources.items():
        record = replace(read.segment, grid=Coverage.of(segment, data).grid)
        last = latest - (latest - record.times[0]) % record.step
        records[data] = _rolled(record, states[data], last, _kept(plan, record))
    primary = records.pop(PRIMARY)
    auxiliaries = {
        data: DataSource(record, Nesting.of(primary.grid, record.grid))
        for data, record in records.items()
    }
    start = len(primary.times) - len(plan.steps.read)
    return Source(replace(primary, auxiliaries=auxiliaries), start, member)


def _rolled(record: Segment, state: State, last: np.datetime64, count: int) -> Segment:
    """A record of some steps that ends at a time."""
    times = last + record.step * (np.arange(count) + 1 - count)
    return open_segment(
        f"{record.name} rolled out",
        OpenedStore(
            record.dataset_of(state, times),
            pressure_levels=record.pressure_levels,
            model_levels=record.model_levels,
        ),
        record.location,
        variables=record.variables,
        levels=record.levels,
        access=Access(input_limits="off"),  # they are the model's own
        may_miss=sorted(record.may_miss),
    )
