"""Functions that several commands need: the configuration of a training, its folder, and the splits
that a checkpoint encodes."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atmossl.batch import PRIMARY
from atmossl.data.segment import Segment
from atmossl.inference.checkpoint import (
    TrainedModel,
    naming_network,
    network_class,
    open_for,
    read_checkpoint,
)
from atmossl.model.network import Network
from atmossl.schema import EncodingConfig, checked
from atmossl.schema.training import WarmStartConfig
from atmossl.settings import check_plugins


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


def make_folder(folder: Path) -> None:
    """Make the folder of a run; ValueError with the key `paths.output` if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"paths.output={folder} cannot be written: {error.strerror}") from error


def open_splits(
    trained: TrainedModel, config: EncodingConfig, splits: Sequence[str]
) -> dict[str, tuple[Segment, ...]]:
    """The segments of several splits that a checkpoint encodes; see `open_for`."""
    return {
        split: open_for(trained, config.data, split, input_limits=config.input_limits)
        for split in splits
    }
