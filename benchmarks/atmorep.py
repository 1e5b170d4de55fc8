"""AtmoRep's network here against outputs of AtmoRep's public code, network by network.

python -m benchmarks.atmorep --reference FOLDER

FOLDER holds one subfolder a network, or is one: `model_idX.json` and `AtmoRep_idX.mod`, as AtmoRep
writes them, and `forward.npz`: inputs `source/FIELD` [batch level nt nlat nlon time lat lon],
`token_info/FIELD` [batch level token entry], `masked_idx/FIELD/LEVEL`, and the public code's
`ensemble/FIELD` [token member value], `mean/FIELD` and `std/FIELD` of the masked tokens. Prints the
largest absolute difference of each network and of all.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from atmossl.model.atmorep import AtmoRep, AtmoRepInput
from atmossl.model.atmorep_files import load_atmorep
from benchmarks.report import finish


def reference_folders(reference: Path) -> list[Path]:
    return sorted(path.parent for path in reference.rglob("forward.npz"))


def stored_inputs(network: AtmoRep, stored: dict[str, np.ndarray]) -> dict[str, AtmoRepInput]:
    return {
        field.name: AtmoRepInput(
            torch.from_numpy(stored[f"source/{field.name}"]).float(),
            torch.from_numpy(stored[f"token_info/{field.name}"]).float(),
        )
        for field in network.settings.fields
    }


def largest_difference(folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """Of members, mean and standard deviation, all predicted fields of one network."""
    try:
        network = load_atmorep(folder)
    except ValueError as error:
        raise SystemExit(f"{folder}: {error}") from error
    stored = dict(np.load(folder / "forward.npz"))
    enabled = dtype != torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        outputs = network(stored_inputs(network, stored))
    differences = []
    for name, output in outputs.items():
        levels = range(len(network.settings.field(name).levels))
        nothing = np.zeros(0, np.int64)  # of a level without a masked token
        of_level = {n: stored.get(f"masked_idx/{name}/{n}", nothing) for n in levels}
        index = {n: torch.from_numpy(values).long() for n, values in of_level.items()}
        members = output.of_tokens(index).float()
        spread = members.std(dim=1) if members.shape[1] > 1 else torch.zeros_like(members[:, 0])
        for key, value in (("ensemble", members), ("mean", members.mean(dim=1)), ("std", spread)):
            expected = torch.from_numpy(stored[f"{key}/{name}"])
            assert value.shape == expected.shape, (key, value.shape, expected.shape)
            differences.append(float((value - expected).abs().max()))
    return max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True)
    folders = reference_folders(parser.parse_args().reference)
    if not folders:
        raise SystemExit("--reference: no folder with a forward.npz there")
    by_network = {folder.name: largest_difference(folder) for folder in folders}
    half = {folder.name: largest_difference(folder, torch.bfloat16) for folder in folders}
    finish(
        "atmorep",
        {
            "max_abs_difference": max(by_network.values()),
            "max_abs_difference_bf16": max(half.values()),
            "by_network": by_network,
        },
    )


if __name__ == "__main__":
    main()
