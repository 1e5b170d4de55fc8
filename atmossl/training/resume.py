"""Chooses the checkpoint that a run continues from, and checks that the run is still the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atmossl.batch import PRIMARY
from atmossl.checkpoint_files import read_record_to_go_on
from atmossl.data.fingerprint import agree
from atmossl.settings import target_name
from atmossl.training.keeping import ABANDONED, checkpoints_in, marks_in
from atmossl.value_faults import as_written, listed

# Keys of the configuration that weights and states of the optimiser depend on.
_FIXED = (
    ("optimizer", ("algorithm", "freeze", "factors", "layer_decay")),
    ("objective", ("_target_", "train_only")),
    ("warm_start", ("low_rank",)),
    ("data", ("first_guess",)),
)
_FREE_OF_STREAMS = ("loss_weight", "missing")
_NUMBERS = ("mean", "std", "step_std")


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run continues from, its record, and why newer ones were passed over."""

    path: Path
    checkpoint_record: dict[str, Any]
    passed_over: tuple[str, ...] = ()


def start_from(path: Path) -> Start:
    """The checkpoint that the user names, as a start.

    Raises:
        ValueError: it cannot be read, is damaged, or holds weights alone.
    """
    try:
        return Start(path, read_record_to_go_on(path))
    except ValueError as error:
        advice = ""
        if "weights alone" in str(error):
            advice = (
                "; a run goes on from a step-N.ckpt of its own, and a new one starts from weights "
                f"with warm_start.checkpoints=[{path}]"
            )
        raise ValueError(f"resume={path}: {error}{advice}") from error


def newest_start(folder: Path) -> Start | None:
    """The newest good `step-N.ckpt` of a run, or `best.ckpt` if there is none; None where the run
    has saved nothing yet.

    Raises:
        ValueError: there are checkpoints, but no good one.
    """
    reasons: list[str] = []
    for path in checkpoints_in(folder):
        try:
            return Start(path, read_record_to_go_on(path), tuple(reasons))
        except ValueError as error:
            reasons.append(str(error))
    abandoned = [path.name for path in (*folder.glob(f"{ABANDONED}*"), *marks_in(folder))]
    if not reasons and not abandoned:
        return None
    why = "; ".join(reasons) or f"only branches that were left: {', '.join(sorted(abandoned))}"
    raise ValueError(
        f"resume=auto: {folder} holds no checkpoint to go on from ({why}). Name another one with "
        "resume=PATH, or move the folder away to start anew"
    )


def check_same_run(
    path: Path,
    checkpoint_record: Mapping[str, Any],
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    streams: Sequence[Mapping[str, Any]],
) -> None:
    """Check that a run is the one whose checkpoint it continues from.

    config, streams: what the record of this run's checkpoints will hold. model: the arguments of
        its network, with the network's name as `_target_`.

    Raises:
        ValueError: names every key that has changed though it may not.
    """
    before = {stream["name"]: stream for stream in checkpoint_record["streams"]}
    now = {stream["name"]: stream for stream in streams}
    faults = []
    if set(before) != set(now):
        faults.append(f"streams {listed(sorted(before))}, not {listed(sorted(now))}")
    for name in sorted(set(before) & set(now)):
        free = {key: now[name][key] for key in _FREE_OF_STREAMS}
        faults += _differences(f"stream.{name}", {**before[name], **free}, now[name])
    faults += _differences(
        "model", {"_target_": checkpoint_record["network"], **checkpoint_record["model"]}, model
    )
    old = checkpoint_record.get("config", {})
    for group, keys in _FIXED:
        both = [key for key in keys if key in old.get(group, {}) and key in config[group]]
        faults += _differences(
            group, {key: old[group][key] for key in both}, {k: config[group][k] for k in both}
        )
    if faults:
        raise ValueError(
            f"resume: {path} was trained with {'; '.join(faults)}. Leave these as they were, or "
            f"start a new run from its weights: warm_start.checkpoints=[{path}]"
        )


def _differences(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """The differences in keys that both configurations have, one line each; later versions add
    keys."""
    for key in (key for key in before if key in now):
        old, new = _plain(before[key]), _plain(now[key])
        if old != new:
            yield f"{where}.{key}={as_written(old)}, not {as_written(new)}"


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return target_name(value)  # a class may be named with its module
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def check_same_statistics(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that values of every source are normalised as before. before, now: statistics by
    source, as in a checkpoint's record.

    Raises:
        ValueError: other numbers or transforms.
    """
    for data in [name for name in now if name in before]:
        entry = "data.name" if data == PRIMARY else data
        _check_same_numbers(path, before[data], now[data], entry)


def _check_same_numbers(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], entry: str
) -> None:
    same = all(
        np.shape(before[key]) == np.shape(now[key])
        and np.allclose(before[key], now[key], rtol=1e-5, atol=0, equal_nan=True)
        for key in _NUMBERS
    )
    if not same or before.get("transforms", {}) != now.get("transforms", {}):
        raise ValueError(
            f"resume: {path} was trained on {before['period']}, whose statistics or transforms "
            f"differ from those of {entry} now, {now['period']}; go on with the same data, or "
            f"start a new run from its weights: warm_start.checkpoints=[{path}]"
        )
    if not agree(before["fingerprint"], now["fingerprint"]):
        raise ValueError(
            f"resume: {path} was trained on another state of the store of {entry} (fingerprint "
            f"{before['fingerprint']}, now {now['fingerprint']}); go on with the same data, or "
            f"start a new run from its weights: warm_start.checkpoints=[{path}]"
        )


def samples_seen(checkpoint_record: Mapping[str, Any]) -> int:
    """How many samples of its sequence a run had learned from, on all ranks, when it saved this
    record. Older records do not hold the number; their batches had the size that the
    configuration names."""
    if "samples" in checkpoint_record:
        return checkpoint_record["samples"]
    config, ranks = checkpoint_record["config"], len(checkpoint_record["rng"])
    batches = checkpoint_record["step"] * config["trainer"].get("accumulate", 1) * ranks
    return batches * config["data"]["batch_size"]


def regroup_batches(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Count the batches of Lightning's training loop as if each optimiser step had taken
    `accumulate` of them from the start.

    Lightning decides by the number of batches when a step, a validation and a line of the log are
    due. After a change of `trainer.accumulate` that number would no longer match the steps.
    """
    step = checkpoint["global_step"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    batches = progress["total"]["ready"]
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"]
        steps = ready * step // batches if batches else 0  # of the epoch, or of the whole run
        for key, count in counts.items():  # while a batch is in work, stages differ by one
            counts[key] = steps * accumulate + count - ready
