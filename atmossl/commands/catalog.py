"""`atmossl data list`. It has a module of its own, since it needs none of the libraries that
open stores."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from atmossl.data.catalog import load_catalog


def list_catalog(path: Path | None = None) -> None:
    """Print a table of the entries of a catalog file, by default the one of the package."""
    table = Table("name", "levels", "segments", "description", "licence")
    for name, entry in load_catalog(path).items():
        table.add_row(
            name, str(len(entry.levels)), str(len(entry.segments)), entry.description, entry.licence
        )
    Console(markup=False).print(table)
