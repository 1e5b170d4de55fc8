"""Functions that several commands need: opening checkpoints and their data, notes to the user,
devices, folders."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from atmossl.batch import PRIMARY
from atmossl.data.catalog import CatalogEntry, catalog_entry, recalled
from atmossl.data.chunks import Access
from atmossl.data.segment import Segment
from atmossl.data.sources import open_records, paired
from atmossl.data.variables import InputLimits
from atmossl.inference.checkpoint import (
    TrainedModel,
    load_checkpoint,
    naming_network,
    read_checkpoint,
)
from atmossl.inference.out_of_training_warnings import out_of_training_warnings
from atmossl.inference.plan import Plan
from atmossl.masking.tasks import Task
from atmossl.model.kinds import network_class
from atmossl.model.network import Network
from atmossl.schema import CheckpointConfig, EncodingConfig, StoreChoice, checked, trained_sampler
from atmossl.schema.training import WarmStartConfig
from atmossl.settings import check_plugins
from atmossl.value_faults import listed


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a training as plain values, without the key `hydra`, which belongs to
    one launch only. With `warm_start.network` it has network, streams, window and first guess of
    that checkpoint."""
    values = {key: value for key, value in values.items() if key != "hydra"}
    warm = values.get("warm_start")
    if not isinstance(warm, Mapping) or warm.get("network") is not True:
        return values
    _, warm = checked(WarmStartConfig, warm, within=("warm_start",))
    if not warm["checkpoints"]:
        raise ValueError(
            "warm_start.network=true takes the network of the first of warm_start.checkpoints, "
            "which names none"
        )
    values["warm_start"] = warm
    checkpoint_record = read_checkpoint(warm["checkpoints"][0])["atmossl"]
    streams = {stream["name"]: stream for stream in checkpoint_record["streams"]}
    values["stream"] = {
        name: {key: value for key, value in stream.items() if key != "name"}
        for name, stream in streams.items()
    }
    plugins = check_plugins(values.get("plugins", ()))
    with naming_network(warm["checkpoints"][0]):  # the run will build what its record names
        network = network_class(checkpoint_record["network"], plugins)
    parameters = inspect.signature(network).parameters
    later = {  # keywords that the checkpoint's version did not have yet; () is one out of use
        name: setting if parameters[name].default == () else parameters[name].default
        for name, setting in values["model"].items()
        if name in parameters and name not in checkpoint_record["model"]
    }
    values["model"] = {
        **later,
        **checkpoint_record["model"],
        "_target_": checkpoint_record["network"],
    }
    window_settings = {key: checkpoint_record[key] for key in ("window", "first_guess")}
    values["data"] = {
        **values["data"],
        **window_settings,
        "transforms": checkpoint_record["statistics"][PRIMARY].get("transforms", {}),
    }
    tuned, layers = warm["low_rank"], list(Network.low_rank_layers)
    if tuned["layers"] == layers:
        tuned = {**tuned, "layers": list(network.low_rank_layers)}
        values["warm_start"] = {**warm, "low_rank": tuned}
    return values


def note(text: str) -> None:
    """Print a note in one line beside the output, on what a user may not expect."""
    console = Console(stderr=True)
    console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def note_out_of_training(plan: Plan, times: np.ndarray, printed: set[str] | None = None) -> None:
    """Note what the checkpoint was not trained for. printed: notes that were printed before, and
    are not repeated."""
    printed = set() if printed is None else printed
    sampler = trained_sampler(plan.trained.checkpoint_record, plan.trained.plugins)
    for caution in out_of_training_warnings(plan, times, sampler):
        if caution not in printed:
            printed.add(caution)
            note(f"this checkpoint was not trained for {caution}")


def make_folder(folder: Path) -> None:
    """Make the folder of a run; ValueError with the key `paths.output` if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"paths.output={folder} cannot be written: {error.strerror}") from error


def device_for(accelerator: str) -> str:
    """`cuda` or `cpu` for the configured accelerator; ValueError if a GPU is asked for in vain."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("accelerator=gpu but no GPU is visible; valid here: auto, cpu")
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def check_split(data: StoreChoice, split: str) -> None:
    """Raise ValueError for a catalog entry that does not exist or lacks the split; that of the
    checkpoint is not read here."""
    if data.name is not None:
        splits = catalog_entry(data.name, data.catalog).splits
        if split not in splits:
            raise ValueError(
                f"split={split} is not in data={data.name}; valid: {listed(sorted(splits))}"
            )


def open_checkpoint(
    config: CheckpointConfig, task: Task | None = None
) -> tuple[TrainedModel, tuple[Segment, ...]]:
    """The checkpoint that a command runs, and the segments that it runs on; see `open_for`."""
    check_split(config.data, config.split)
    trained = load_checkpoint(config.checkpoint, config.plugins)
    segments = open_for(
        trained,
        config.data,
        config.split,
        input_limits=config.input_limits,
        name=config.segment,
        task=task,
    )
    return trained, segments


def open_splits(
    trained: TrainedModel, config: EncodingConfig, splits: Sequence[str]
) -> dict[str, tuple[Segment, ...]]:
    """The segments of several splits that a checkpoint encodes; see `open_for`."""
    return {
        split: open_for(trained, config.data, split, input_limits=config.input_limits)
        for split in splits
    }


def entries_for(trained: TrainedModel, data: StoreChoice) -> dict[str, CatalogEntry]:
    """The catalog entries of every source of a checkpoint, by the streams' `data`: of the chosen
    store, else those that the checkpoint remembers of its training.

    Raises:
        ValueError: an unknown entry, or a store that is not where it was.
    """
    remembered = trained.checkpoint_record.get("catalog", {}) if data.catalog is None else {}
    names = {PRIMARY: data.name or trained.data}
    names |= {spec.data: spec.data for spec in trained.specs if spec.data != PRIMARY}
    chosen = {PRIMARY} if data.name is not None else set()
    return {
        source: recalled(remembered[source])
        if source in remembered and source not in chosen
        else catalog_entry(name, data.catalog)
        for source, name in sorted(names.items(), key=lambda pair: pair[0] != PRIMARY)
    }


def open_for(
    trained: TrainedModel,
    data: StoreChoice,
    split: Any,
    *,
    input_limits: InputLimits = "refuse",
    name: str | None = None,
    task: Task | None = None,
) -> tuple[Segment, ...]:
    """The segments of a split with the variables and levels of a checkpoint.

    input_limits: what is done with values that no atmosphere has. name: of the only one that is
    wanted. task: which may fill missing values.
    Raises:
        ValueError: unknown entry or segment, or a store that lacks what the checkpoint needs.
    """
    access = Access(input_limits=input_limits)
    entries = entries_for(trained, data)
    records = open_records(trained.specs_for(task), entries, split, access=access)
    segments = paired(records)
    for segment in segments:
        trained.check_levels(segment)
    chosen = tuple(segment for segment in segments if segment.is_called(name))
    if not chosen:
        have = sorted({segment.name for segment in segments})
        raise ValueError(f"segment={name} is not in split={split}; valid: {listed(have)}")
    return chosen
