"""`atmossl probe`: fits small models on frozen latents, and writes a report."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from atmossl.at_work import check_is_free, keeping, owned
from atmossl.commands.common import open_splits
from atmossl.data.catalog import check_split
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.probes.cases import SPLITS
from atmossl.probes.finetuning import FinetuneSettings
from atmossl.probes.run import (
    Baselines,
    Probed,
    ProbeOptions,
    ProbeRun,
    comparisons,
    linear_cka,
    scores,
    tunings,
)
from atmossl.probes.summary import Summary, brief_text, write_summary
from atmossl.progress import note, telling
from atmossl.schema import ProbeConfig, device_for, parse


def probe(values: Mapping[str, Any]) -> Path:
    """Fit and score the probes of one or more checkpoints; returns the report's folder."""
    config: ProbeConfig = parse(ProbeConfig, values)
    with owned(config.output, "output"), keeping("nothing was written"):
        check_is_free(config.output)
        summary = summary_of(probed(config))
        write_summary(summary, config.output)
    console = Console(markup=False, highlight=False)
    console.print(brief_text(summary), soft_wrap=True)
    console.print(f"report: {config.output / 'index.html'}", soft_wrap=True)
    return config.output


def probed(config: ProbeConfig, shared: dict[str, Baselines] | None = None) -> dict[str, Probed]:
    """The results of the probes of every checkpoint. shared: baselines that are there already,
    see `ProbeRun.run`.

    Raises:
        ValueError: whatever is wrong with any of the checkpoints, before the first is encoded.
    """
    for split in SPLITS:
        check_split(config.data, split)
    prepared = {name: _prepared(name, config) for name in dict.fromkeys(config.checkpoint)}
    for line in dict.fromkeys(line for run in prepared.values() for line in run.notes):
        note(line)
    results: dict[str, Probed] = {}
    shared = {} if shared is None else shared
    for name in list(prepared):
        run = prepared.pop(name)  # its fields are not kept in memory
        with telling(f"probes of {name}", run.num_windows) as advance:
            results[name] = run.run(advance, shared)
    return results


def summary_of(results: Mapping[str, Probed]) -> Summary:
    """The tables of all checkpoints, by their names."""
    return Summary(
        scores=pd.concat([scores(outcome, name) for name, outcome in results.items()]),
        comparisons=pd.concat([comparisons(outcome, name) for name, outcome in results.items()]),
        rank=_rank_table(results),
        alignment=_alignment(results),
        tuned=pd.concat([tunings(outcome, name) for name, outcome in results.items()]),
        num_cases={name: outcome.num_cases for name, outcome in results.items()},
    )


def _prepared(name: str, config: ProbeConfig) -> ProbeRun:
    trained = load_checkpoint(name, config.plugins)
    trained.require("embed")
    return ProbeRun.prepare(trained, open_splits(trained, config, SPLITS), _options(config))


def _options(config: ProbeConfig) -> ProbeOptions:
    return ProbeOptions(
        probes=config.probes,
        layers=config.layers,
        every=config.every,
        places=config.places,
        withheld=config.withheld,
        block_days=config.block_days,
        finetune=FinetuneSettings(**config.finetune.model_dump()),
        resamples=config.bootstrap,
        seed=config.seed,
        overlap=config.overlap,
        batch_size=config.batch_size,
        device=device_for(config.accelerator),
    )


def _rank_table(probed: Mapping[str, Probed]) -> pd.DataFrame:
    return pd.DataFrame(
        {"checkpoint": name, "source": source, "layer": layer, "rankme": rank}
        for name, outcome in probed.items()
        for (source, layer), rank in outcome.rank.items()
    )


def _alignment(probed: Mapping[str, Probed]) -> pd.DataFrame:
    """CKA of every pair of checkpoints, of their last layers' pooled latents on the test dates;
    NaN where the dates are not the same."""
    rows = []
    for first, second in combinations(probed, 2):
        x, y = (outcome.test_latents[max(outcome.test_latents)] for outcome in
                (probed[first], probed[second]))  # fmt: skip
        cka = linear_cka(x, y) if len(x) == len(y) else float("nan")
        rows.append({"first": first, "second": second, "cka": cka})
    return pd.DataFrame(rows, columns=["first", "second", "cka"])
