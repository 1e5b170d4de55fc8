"""Long leads: passes of the model that each go on from the members of the pass before."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from atmossl.data.forcings import FORCINGS
from atmossl.data.segment import Segment
from atmossl.data.store import open_segment
from atmossl.inference.blend import Fields, Part
from atmossl.inference.windows import Source

if TYPE_CHECKING:
    from atmossl.inference.predict import Predictor

State = dict[str, np.ndarray]  # by variable, [level time lat lon]


def roll_out(predictor: "Predictor", case: int, source: Source) -> Iterator[Part]:
    """One init time: every member's state is the start of its own next pass.

    A member of the tail has its own place in the distribution everywhere on the globe; going on
    with the same one would push it further out at each pass. So who takes which member of the next
    pass is drawn anew, by (seed, init time, pass), each member once.

    What is static stays, and what is computed from time and place is so at every date.

    Raises:
        ValueError: an input stream that no pass predicts.
    """
    _check_streams(predictor)
    plan, segment, start = predictor.plan, source.segment, source.start
    count, total = plan.steps_per_pass, len(plan.offsets)
    init = segment.times[start + len(plan.read) - 1]
    sources = [source]
    states = [_read(segment, start, len(plan.read))]
    for number in range(plan.num_passes):
        fields = _joined(predictor, sources)
        left = min(count, total - number * count)
        written = {name: values[:left] for name, values in fields.items()}
        completes = number + 1 == plan.num_passes
        rows = slice(0, predictor.grid.shape[0])
        yield Part(case, number * count, rows, written, completes, {})
        if completes:
            return
        num_members = next(iter(fields.values())).shape[1]
        states = states * num_members if number == 0 else states
        states = [_appended(predictor, states[m], fields, m) for m in range(num_members)]
        latest = init + segment.step * (number + 1) * count
        order = _order(predictor.seed, init, number, num_members)
        sources = [
            _source(predictor, segment, state, latest, member)
            for state, member in zip(states, order, strict=True)
        ]


def _order(seed: int, init: np.datetime64, number: int, num_members: int) -> list[int]:
    hours = int((init - np.datetime64("0001-01-01")) / np.timedelta64(1, "h"))
    rng = np.random.default_rng(np.random.SeedSequence([seed, hours, number]))
    return rng.permutation(num_members).tolist()


def _check_streams(predictor: "Predictor") -> None:
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


def _joined(predictor: "Predictor", sources: list[Source]) -> Fields:
    """Whole fields of one pass; those of several sources are joined along the members."""
    shape, joined = predictor.grid.shape, {}
    for part in predictor.blended(sources):
        for name, values in part.fields.items():
            own = values.shape[1]
            if name not in joined:
                size = (len(values), own * len(sources), values.shape[2], *shape)
                joined[name] = np.zeros(size, np.float32)
            members = slice(part.case * own, (part.case + 1) * own)
            joined[name][:, members, :, part.rows] = values
    return joined


def _read(segment: Segment, start: int, count: int) -> State:
    """The steps of the first pass, at all levels of the record."""
    return {
        name: segment.read(name, segment.levels_of(name), start, count, segment.whole())
        for name in segment.variables
        if name not in FORCINGS
    }


def _appended(predictor: "Predictor", state: State, fields: Fields, member: int) -> State:
    """The state moved on: its steps and those of the pass, of which the latest are kept; two at
    least, which make a record."""
    kept = max(2, len(predictor.plan.read))
    moved = {
        name: np.repeat(values[:, -1:], kept, axis=1)  # static, or moved on below
        for name, values in state.items()
    }
    for spec in predictor.trained.specs:
        levels = predictor.segment.levels
        rows = [levels.index(level) if level else 0 for level in spec.level_values]
        for name in spec.variables if spec.role == "predict" else ():
            new = fields[name][:, member].swapaxes(0, 1)  # [level time lat lon]
            held = state[name]
            whole = np.zeros((held.shape[0], *new.shape[1:]), np.float32)
            whole[rows] = new
            moved[name] = np.concatenate([held, whole], axis=1)[:, -kept:]
    return moved


def _source(
    predictor: "Predictor", segment: Segment, state: State, latest: np.datetime64, member: int
) -> Source:
    """The state as a record whose last step is `latest`."""
    num_steps = next(iter(state.values())).shape[1]
    times = latest + segment.step * (np.arange(num_steps) + 1 - num_steps)
    record = open_segment(
        f"{segment.name} rolled out",
        segment.dataset_of(state, times),
        segment.location,
        variables=segment.variables,
        levels=segment.levels,
        may_miss=sorted(segment.may_miss),
    )
    return Source(record, num_steps - len(predictor.plan.read), member)
