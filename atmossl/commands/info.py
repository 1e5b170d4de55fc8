"""`atmossl info` of a checkpoint: what is in it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from atmossl.batch import PRIMARY
from atmossl.inference.calibration import CalibrationFactors
from atmossl.inference.checkpoint import load_checkpoint, objective_name
from atmossl.settings import check_plugins, snake_case
from atmossl.value_faults import listed


def show_checkpoint(checkpoint: str, plugins: Sequence[str] = ()) -> None:
    """Print what is in a checkpoint. plugins: packages whose code it may run."""
    trained = load_checkpoint(checkpoint, check_plugins(plugins))
    checkpoint_record = trained.checkpoint_record
    table = Table("what", "value", show_header=False)
    count = sum(parameter.numel() for parameter in trained.model.parameters())
    origin = checkpoint_record.get("imported_from")
    imported = {} if origin is None else {"imported from": origin}
    rows = {
        "written by": f"atmossl {checkpoint_record['atmossl']}, torch {checkpoint_record['torch']}",
        "optimiser steps": str(checkpoint_record["step"]),
        "parameters": f"{count:,}",
        "window (time, lat, lon)": str(tuple(checkpoint_record["window"].values())),
        **imported,
        "normalised by" if imported else "trained on": (
            f"{checkpoint_record['data']}: {checkpoint_record['statistics'][PRIMARY]['period']}"
        ),
        **_objective(checkpoint_record),
        "digest": trained.digest,
        **_calibration(checkpoint_record),
        **({"hub": checkpoint_record["hub"]} if "hub" in checkpoint_record else {}),
        **{f"plugin of {key}": name for key, name in checkpoint_record.get("plugins", {}).items()},
        **{f"model.{key}": str(value) for key, value in checkpoint_record["model"].items()},
    }
    for spec in trained.specs:
        unit = "hPa" if trained.pressure_levels else "of the model levels"
        rows[f"stream {spec.name}"] = f"{', '.join(spec.variables)} at {listed(spec.levels)} {unit}"
    for key, value in rows.items():
        table.add_row(key, value)
    Console(markup=False).print(table)


def _calibration(checkpoint_record: dict[str, Any]) -> dict[str, str]:
    """A line for every kind of task whose spread `atmossl calibrate` has fitted: at which hours
    from the reference time, in how many passes of a rollout, from how many dates, and in which
    bands."""
    lines = {}
    for kind in checkpoint_record.get("spread", {}):
        factors = CalibrationFactors.of(checkpoint_record, kind)
        assert factors is not None
        words = ["calibrated", factors.described(), f"for {', '.join(factors.bands())}"]
        lines[f"spread of {snake_case(kind)}"] = " ".join(filter(None, words))
    return lines


def _objective(checkpoint_record: dict[str, Any]) -> dict[str, str]:
    """Lines on what the model learned to do, and what it can be asked for."""
    objective = checkpoint_record.get("objective")
    if objective is None:  # an imported network
        return {}
    provides = f" (can {', '.join(objective['provides'])})" if objective["provides"] else ""
    return {"objective": objective_name(objective["kind"]) + provides}
