"""`atmossl features`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atmossl import __version__
from atmossl.api import chosen_times
from atmossl.at_work import check_is_free, keeping, owned
from atmossl.commands.common import open_splits
from atmossl.data.catalog import check_split
from atmossl.data.segment import Segment
from atmossl.evaluation.report.content import Provenance
from atmossl.features.page import write_features
from atmossl.features.run import FeatureOptions, FeatureRun
from atmossl.inference.checkpoint import TrainedModel, load_checkpoint
from atmossl.inference.embed import Embedder
from atmossl.progress import console_of_output, note, telling
from atmossl.schema import FeaturesConfig, device_for, parse


def features(values: Mapping[str, Any], command: str = "atmossl features") -> Path:
    """Write the page of a checkpoint's features; returns its folder.

    command: the line that the page gives for making it again.
    """
    config: FeaturesConfig = parse(FeaturesConfig, values)
    with owned(config.output, "output"), keeping("nothing was written"):
        check_is_free(config.output)
        run = _prepared(config)
        if run.warning is not None:
            note(run.warning)
        with telling(f"latents, {run.num_dates} dates", run.num_dates) as advance:
            results = run.run(advance)
        write_features(results, _provenance(config, run.trained, command), config.output)
    console_of_output().print(f"page: {config.output / 'index.html'}")
    return config.output


def _prepared(config: FeaturesConfig) -> FeatureRun:
    for split in config.splits:
        check_split(config.data, split)
    trained = load_checkpoint(config.checkpoint, config.plugins)
    trained.require("embed")
    records = open_splits(trained, config, config.splits)
    options = FeatureOptions(
        layer=config.layer,
        layers=config.layers,
        num_dates=config.num_dates,
        places=config.places,
        overlap=config.overlap,
        batch_size=config.batch_size,
        device=device_for(config.accelerator),
    )
    time = None
    if config.init_time is not None:
        segments: tuple[Segment, ...] = sum(map(tuple, records.values()), ())
        served = Embedder(
            trained=trained, segments=segments, layer=config.layer, overlap=config.overlap,
            batch_size=config.batch_size, device=options.device,
        )  # fmt: skip
        (time, *others) = chosen_times(served, config.init_time)
        if others:
            raise ValueError(f"init_time={config.init_time} names several dates; valid: one")
    return FeatureRun.prepare(trained, records, options, time)


def _provenance(config: FeaturesConfig, trained: TrainedModel, command: str) -> Provenance:
    """The command and what the page depends on."""
    data = config.data.name or trained.data
    summary = {"checkpoint": config.checkpoint, "data": f"{data}, {', '.join(config.splits)}"}
    facts = {"checkpoint": trained.digest, "versions": f"atmossl {__version__}"}
    return Provenance("Features", summary, command, facts)
