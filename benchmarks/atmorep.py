"""AtmoRep's network here against AtmoRep's public code: a training step, and stored outputs.

    python -m benchmarks.atmorep
    python -m benchmarks.atmorep --reference FOLDER

The step is of a network as `atmossl import atmorep` builds it, with random weights, in float32: one
field with 8.4 M parameters and AtmoRep's window and tokens (`_SETTINGS`). It is a forward pass, the
tail and AtmoRep's losses on the hidden tokens, a backward pass and AdamW, on one thread. Times are
CPU seconds of the process, the least of several steps and products in turns.
`samples_per_s_over_public` compares it with the public code's step, at equal ceiling: samples per
FLOP/s of a large product by `torch.mm`, over the same figure of the public code
(`public_samples_per_s`, `public_ceiling_flops_per_s`), which was timed elsewhere. `assumed` says
what is not known of that timing. `products_alone_over_public` is what a step reached whose needed
products ran at the ceiling and that did nothing else: no float32 step can be above it. With
`bf16_samples_per_s_over_public_fp32` the step here is in bfloat16, and the public one and the
ceiling stay in float32.

With --reference also outputs, network by network. FOLDER holds one subfolder a network, or is one:
`model_idX.json` and `AtmoRep_idX.mod`, as AtmoRep writes them, and `forward.npz`: inputs
`source/FIELD` [batch level nt nlat nlon time lat lon], `token_info/FIELD` [batch level token
entry], `masked_idx/FIELD/LEVEL`, and the public code's `ensemble/FIELD` [token member value],
`mean/FIELD` and `std/FIELD` of the masked tokens. Prints the largest absolute difference of each
network and of all.
"""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atmossl.build import build_objective, optimizer_settings
from atmossl.commands.cost import sample_batch
from atmossl.model.atmorep import AtmoRep, AtmoRepField, AtmoRepInput, AtmoRepSettings
from atmossl.model.atmorep_files import load_atmorep
from atmossl.model.atmorep_network import AtmoRepNetwork
from atmossl.model.network import half_is_fast
from atmossl.training.optimizer import make_optimizer
from atmossl.training.throughput import flop_counter
from benchmarks.report import finish
from benchmarks.train_step import configuration, in_turns, stepper

_PUBLIC_SAMPLES_PER_S = 1.42
_PUBLIC_CEILING = 142e9  # FLOP/s of a large float32 product on the two cores of that timing
_SIDE = 2048  # of the matrices whose product is the ceiling
_ASSUMED = (
    "settings of the public run: `_SETTINGS`, which give its window, tokens and number of "
    "parameters",
    "share of tokens that the public run hid: hidden_share; with fewer its tail has less to do",
    "ceiling of the public run: a product by torch.mm, as here",
)
_FIELD = AtmoRepField(
    name="temperature",
    width=256,
    coupled=(),
    levels=(300, 500, 700, 850, 1000),  # as many as AtmoRep's
    num_tokens=(12, 3, 6),
    token_size=(3, 18, 18),
)
_SETTINGS = AtmoRepSettings(
    fields=(_FIELD,),
    predicted=("temperature",),
    info_entries=8,
    info_width=16,
    encoder_layers=4,
    encoder_heads=8,
    encoder_mlp_layers=2,
    decoder_layers=4,
    decoder_heads=8,
    decoder_mlp_layers=2,
    cross_heads=4,
    cross_rate=1.0,
    members=16,
    tail_layers=0,
)


def step_against_public(repeats: int) -> dict[str, Any]:
    """Figures of a training step of the imported network, beside the public code's."""
    torch.set_num_threads(1)
    config = configuration(["experiment=atmorep_temperature", "data.batch_size=1"])
    batch = sample_batch(config)
    torch.manual_seed(config.seed)
    network = AtmoRepNetwork(streams=config.specs, **asdict(_SETTINGS))
    objective = build_objective(config, {}, network)
    optimizer = make_optimizer(network, objective, optimizer_settings(config), fused=True)
    square = torch.randn(_SIDE, _SIDE)
    dtypes = {"step": torch.float32}
    if half_is_fast(torch.device("cpu")):
        dtypes["half"] = torch.bfloat16
    steps = {
        key: partial(stepper(network, objective, optimizer, dtype), batch)
        for key, dtype in dtypes.items()
    }
    with flop_counter() as counter:
        steps["step"]()
    times = in_turns({"product": partial(torch.mm, square, square), **steps}, repeats)
    ceiling = 2 * _SIDE**3 / times["product"]
    flops = counter.get_total_flops()
    public = _PUBLIC_SAMPLES_PER_S / _PUBLIC_CEILING  # samples per FLOP of a large product
    (stream,) = batch.views[0].streams
    assert stream.queries is not None
    figures = {
        "samples_per_s_over_public": round(1 / times["step"] / ceiling / public, 3),
        "products_alone_over_public": round(1 / flops / public, 3),
        "samples_per_s": round(1 / times["step"], 3),
        "matmul_ceiling_flops_per_s": round(ceiling),
        "matmul_fraction": round(flops / times["step"] / ceiling, 4),
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "hidden_share": round(float(stream.queries.chosen.float().mean()), 3),
        "public_samples_per_s": _PUBLIC_SAMPLES_PER_S,
        "public_ceiling_flops_per_s": _PUBLIC_CEILING,
        "assumed": _ASSUMED,
    }
    if "half" in times:
        ratio = 1 / times["half"] / ceiling / public
        figures["bf16_samples_per_s_over_public_fp32"] = round(ratio, 3)
    return figures


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


def against_outputs(reference: Path) -> dict[str, Any]:
    """Largest differences from the stored outputs of every network in a folder."""
    folders = reference_folders(reference)
    if not folders:
        raise SystemExit("--reference: no folder with a forward.npz there")
    by_network = {folder.name: largest_difference(folder) for folder in folders}
    half = {folder.name: largest_difference(folder, torch.bfloat16) for folder in folders}
    return {
        "max_abs_difference": max(by_network.values()),
        "max_abs_difference_bf16": max(half.values()),
        "by_network": by_network,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    figures = {} if arguments.reference is None else against_outputs(arguments.reference)
    finish("atmorep", figures | step_against_public(arguments.repeats))


if __name__ == "__main__":
    main()
