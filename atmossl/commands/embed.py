"""`atmossl embed`: writes the latents of an encoder layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atmossl.at_work import keeping, owned
from atmossl.atomic_files import partial_path, size_on_disk
from atmossl.inference.checkpoint import open_checkpoint
from atmossl.inference.embed import Embedder, check_embedding_output, write_embeddings
from atmossl.inference.plan import chosen_times
from atmossl.progress import EarlyEstimate, console_of_output, counted, telling
from atmossl.schema import EmbedConfig, device_for, parse


def embed(values: Mapping[str, Any]) -> Path:
    """Encode every chosen time and write the latents; returns the path of the zarr store."""
    config: EmbedConfig = parse(EmbedConfig, values)
    with owned(config.output, "output"), keeping("nothing was written"):
        check_embedding_output(config.output)
        _embed(config)
    console_of_output().print(f"latents: {config.output}")
    return config.output


def _embed(config: EmbedConfig) -> None:
    trained, segments = open_checkpoint(config)
    embedder = Embedder(
        trained=trained,
        segments=segments,
        layer=config.layer,
        overlap=config.overlap,
        batch_size=config.batch_size,
        device=device_for(config.accelerator),
    )
    times = chosen_times(embedder, config.dates, config.every)
    partial = partial_path(config.output)
    with telling(f"latents, {counted(len(times), 'time')}", len(times)) as advance:
        estimate = EarlyEstimate(
            advance, config.output, len(times), 1, lambda: size_on_disk(partial),
            "choose fewer times (init_time=START/END/STEP, every=N), or make room",
        )  # fmt: skip
        write_embeddings(embedder, times, config.output, advance=estimate)
