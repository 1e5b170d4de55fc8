"""Prediction in several passes of the model (a rollout), which each start from the members of the
pass before."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from atmossl.batch import PRIMARY
from atmossl.data.backends import OpenedStore
from atmossl.data.chunks import Access
from atmossl.data.forcings import FORCINGS
from atmossl.data.segment import HOUR, DataSource, Segment
from atmossl.data.store import open_segment
from atmossl.geometry import Box, Nesting
from atmossl.inference.calibration import Calibration
from atmossl.inference.plan import BlendedPart, Coverage, Fields, Plan, Source

State = dict[str, np.ndarray]  # by variable, [level time lat lon]
OnePass = Callable[[Plan, Sequence[Source]], Iterable[BlendedPart]]
States = dict[str, State]  # by `data` of the streams; their last steps are the latest there are


@dataclass(frozen=True)
class Standing:
    """Where the rollout of one init time stands before a pass.

    number: of the pass, 0 being the first. segment: the record of the init time. sources: what the
    pass starts from: the record before the first pass, the state of every member before a later
    one. states: of every member, before the first pass a single one for all.
    """

    number: int
    segment: Segment
    init: np.datetime64
    sources: list[Source]
    states: list[States]

    def begin(self, plan: Plan) -> np.timedelta64:
        """The lead time at which the pass starts."""
        return self.number * plan.steps.steps_per_pass * plan.step


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
    running, total = _running(plan), plan.leads.max()
    standing = start(running, source)
    while True:
        joined = passed(running, standing, one_pass)
        if standing.number > 0:
            joined = calibrated(running, standing.number, joined)
        completes = standing.number + 1 == plan.steps.num_passes
        for data, joined_part in joined.items():
            leads = standing.begin(plan) + joined_part.leads
            leads = leads[leads <= total]
            written = {
                name: _written(plan, running, values[: len(leads)])
                for name, values in joined_part.fields.items()
            }
            rows = slice(0, plan.grid_of(data).shape[0])
            yield BlendedPart(case, leads, rows, written, completes and data == PRIMARY, data=data)
        if completes:
            return
        standing = followed(running, standing, joined)


def _running(plan: Plan) -> Plan:
    """The plan with all members that its passes need: where later passes are calibrated, those
    around whose mean they are, beside those that are written."""
    if not Calibration(plan.trained.checkpoint_record, plan.task, 1).factors:
        return plan
    members = plan.drawn if plan.trained.model.any_member else None
    return replace(plan, options=replace(plan.options, members=members))


def _written(plan: Plan, running: Plan, values: np.ndarray) -> np.ndarray:
    """The written ones of all members that were run, of fields [step member level lat lon]."""
    if plan is running or plan.members is None:
        return values
    numbers = [*(running.members or range(values.shape[1]))]
    return values[:, [numbers.index(member) for member in plan.members]]


def start(plan: Plan, source: Source) -> Standing:
    """Where a rollout stands before its first pass."""
    init = source.segment.times[source.start + len(plan.steps.read) - 1]
    return Standing(0, source.segment, init, [source], [_states(plan, source.segment, source)])


def passed(plan: Plan, standing: Standing, one_pass: OnePass) -> dict[str, "Joined"]:
    """What a pass predicts, by the streams' `data`. The first pass is calibrated, the members of a
    later one are not yet."""
    return _joined(plan, one_pass(plan, standing.sources), len(standing.sources))


def calibrated(plan: Plan, number: int, joined: Mapping[str, "Joined"]) -> dict[str, "Joined"]:
    """What a pass predicts, with all members calibrated together by the factors of the pass, if
    there are any. Streams with data of their own are not calibrated."""
    calibration = Calibration(plan.trained.checkpoint_record, plan.task, number)
    if not calibration.factors:
        return {**joined}
    part = joined[PRIMARY]
    lat, lon = plan.grid.latitude, plan.grid.longitude
    fields = calibration.apply(part.fields, part.leads / HOUR, lat, lon, centre=plan.centre)
    return {**joined, PRIMARY: replace(part, fields=fields)}


def followed(plan: Plan, standing: Standing, joined: Mapping[str, "Joined"]) -> Standing:
    """Where the rollout stands after a pass that predicted these fields."""
    segment, number = standing.segment, standing.number
    num_members = next(iter(joined[PRIMARY].fields.values())).shape[1]
    states = standing.states * num_members if number == 0 else standing.states
    states = [_appended(plan, states[m], joined, m) for m in range(num_members)]
    latest = standing.init + standing.begin(plan) + plan.steps.steps_per_pass * plan.step
    order = _order(plan, standing.init, number, num_members)
    sources = [
        _source(plan, segment, state, latest, member)
        for state, member in zip(states, order, strict=True)
    ]
    return replace(standing, number=number + 1, sources=sources, states=states)


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
