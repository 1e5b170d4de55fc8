"""`atmossl info` of a checkpoint: what is in it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from atmossl.batch import PRIMARY
from atmossl.inference.checkpoint import load_checkpoint, objective_name
from atmossl.plugins import check_plugins


def show_checkpoint(checkpoint: str, plugins: Sequence[str] = ()) -> None:
    """Print what is in a checkpoint. plugins: packages whose code it may run."""
    trained = load_checkpoint(checkpoint, check_plugins(plugins))
    record = trained.record
    table = Table("what", "value", show_header=False)
    count = sum(parameter.numel() for parameter in trained.model.parameters())
    origin = record.get("imported_from")
    imported = {} if origin is None else {"imported from": origin}
    rows = {
        "written by": f"atmossl {record['atmossl']}, torch {record['torch']}",
        "optimiser steps": str(record["step"]),
        "parameters": f"{count:,}",
        "window (time, lat, lon)": str(tuple(record["window"].values())),
        **imported,
        "normalised by" if imported else "trained on": (
            f"{record['data']}: {record['statistics'][PRIMARY]['period']}"
        ),
        **_objective(record),
        "digest": trained.digest,
        **({"hub": record["hub"]} if "hub" in record else {}),
        **{f"plugin of {key}": name for key, name in record.get("plugins", {}).items()},
        **{f"model.{key}": str(value) for key, value in record["model"].items()},
    }
    for spec in trained.specs:
        unit = "hPa" if trained.pressure_levels else "of the model levels"
        rows[f"stream {spec.name}"] = f"{', '.join(spec.variables)} at {list(spec.levels)} {unit}"
    for key, value in rows.items():
        table.add_row(key, value)
    Console(markup=False).print(table)


def _objective(record: dict[str, Any]) -> dict[str, str]:
    """Lines on what the model learned to do, and what it can be asked for."""
    objective = record.get("objective")
    if objective is None:  # an imported network
        return {}
    provides = f" (can {', '.join(objective['provides'])})" if objective["provides"] else ""
    return {"objective": objective_name(objective["kind"]) + provides}
