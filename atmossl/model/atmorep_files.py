"""Reads settings and weights of AtmoRep's published models, from files of 2023 and of 2024.

A model is a folder (or its `.tar.gz`) with `model_idX.json` and `AtmoRep_idX.mod`. Weights are read
as tensors alone, never as a pickle that could run code. Every tensor of the file finds its place
and every weight of the network its tensor, or the reading ends with an error that names it.
"""

import json
import math
import pickle
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atmossl.checkpoint_files import UnsoundError, verified_digest
from atmossl.model.atmorep import AtmoRep, AtmoRepField, AtmoRepSettings
from atmossl.value_faults import listed

_REFUSED = {
    "encoder_att_type": ("dense",),
    "decoder_att_type": ("dense",),
    "decoder_self_att": (False,),
}
_OLD_HEAD = re.compile(r"(.*)\.(heads_self|heads_other|heads)\.(\d+)\.proj_(qs|ks|vs)\.weight")


@contextmanager
def model_folder(location: Path) -> Iterator[Path]:
    """The folder that holds a model's two files. An archive is unpacked into a temporary folder;
    the archive may also lie alone in a folder.

    Raises:
        ValueError: neither a folder nor an archive that can be read.
    """
    if location.is_dir():
        archives = sorted(location.glob("*.tar.gz"))
        if any(location.rglob("model_id*.json")) or len(archives) != 1:
            yield location
            return
        location = archives[0]
    if not location.is_file():
        raise ValueError(f"{location}: no such folder or archive")
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            with tarfile.open(location) as archive:
                archive.extractall(unpacked, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"{location}: no archive that can be read ({why})") from error
        yield Path(unpacked)


def load_atmorep(location: Path) -> AtmoRep:
    """The network in a model's folder or archive, with its weights, in evaluation mode.

    Raises:
        ValueError: a file that is missing, damaged or ambiguous, an option that the public code
            cannot run either, a tensor that is missing, left over or of another shape.
    """
    with model_folder(location) as folder:
        settings_file = _only(folder, "model_id*.json", location)
        weights_file = _newest(folder, settings_file.stem.removeprefix("model_"), location)
        raw = _read_settings(settings_file)
        tensors = _read_tensors(weights_file)
    is_of_2023 = any(_OLD_HEAD.fullmatch(key) for key in tensors)
    settings = settings_of(raw, str(settings_file.name), is_of_2023=is_of_2023)
    if is_of_2023:
        tensors = joined_heads(tensors)
    if raw.get("with_cls"):  # the class token has no effect on what is predicted
        tensors = {key: value for key, value in tensors.items() if "cls" not in key}
    _check_coupling(raw, settings, tensors, settings_file.name)
    settings = _with_two_maps(settings, tensors)
    with torch.device("meta"):  # nothing is drawn, and no size of the settings takes memory
        network = AtmoRep(settings)
    state = state_of(settings, tensors, weights_file.name)
    if is_of_2023:  # norms of heads had no parameters then
        norms = {k: v for k, v in network.state_dict().items() if "_norm." in k}
        ones = {k: torch.full(v.shape, float(k.endswith("weight"))) for k, v in norms.items()}
        state = ones | state
    _fill(network, state, weights_file.name)
    return network.eval()


def _fill(network: AtmoRep, state: dict[str, Tensor], file: str) -> None:
    """Load every weight of the network; ValueError for a tensor that is missing, left over or of
    another shape."""
    parameters = network.state_dict()
    missing = sorted(set(parameters) - set(state))
    if missing:
        raise ValueError(f"{file}: {len(missing)} tensors are missing, {missing[0]} the first")
    for name, value in state.items():
        if name not in parameters:
            raise ValueError(f"{file}: the network of these settings has no {name}")
        if value.shape != parameters[name].shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(value.shape)}; its settings need "
                f"{tuple(parameters[name].shape)}"
            )
    network.load_state_dict(state, assign=True)


def _only(folder: Path, pattern: str, location: Path) -> Path:
    files = sorted(folder.rglob(pattern))
    if len(files) != 1:
        names = [file.name for file in files] or "none"
        raise ValueError(f"{location}: one file {pattern} is needed there; found {names}")
    return files[0]


def _newest(folder: Path, name: str, location: Path) -> Path:
    """The file with the weights of a model: `AtmoRep_idX.mod`, else that of its last epoch."""
    files = {file.name: file for file in folder.rglob(f"AtmoRep_{name}*.mod")}
    if f"AtmoRep_{name}.mod" in files:
        return files[f"AtmoRep_{name}.mod"]
    epochs = {
        int(match[1]): file
        for key, file in files.items()
        if (match := re.fullmatch(rf"AtmoRep_{re.escape(name)}_epoch(\d+)\.mod", key))
    }
    if not epochs:
        raise ValueError(f"{location}: AtmoRep_{name}.mod, the weights, is not there")
    return epochs[max(epochs)]


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file.name}: no settings that can be read ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file.name}: no settings of AtmoRep: a mapping is needed")
    return raw


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if zipfile.is_zipfile(file):
            verified_digest(file)
        contents = torch.load(file, map_location="cpu", weights_only=True)
    except UnsoundError as error:
        raise ValueError(f"{file.name} {error}") from error
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file.name}: truncated, or no torch file of weights alone ({type(error).__name__})"
        ) from error
    if not isinstance(contents, dict) or not all(
        isinstance(value, Tensor) for value in contents.values()
    ):
        raise ValueError(f"{file.name}: holds other things than tensors by name")
    # a model that was saved while it was wrapped for several devices has one more name in front
    return {key.removeprefix("module."): value.float() for key, value in contents.items()}


def settings_of(raw: dict[str, Any], file: str, *, is_of_2023: bool) -> AtmoRepSettings:
    """The settings of the network, from those that AtmoRep wrote.

    Raises:
        ValueError: a key that is missing, of another form, or an option that the public code cannot
            run either; names file, key and what is valid.
    """
    for key, valid in _REFUSED.items():
        if key in raw and raw[key] not in valid:
            raise ValueError(
                f"{file}: {key}={raw[key]} is not known to work in AtmoRep's own code; valid: "
                f"{valid[0]}"
            )
    try:
        settings = _settings(raw, is_of_2023)
    except KeyError as error:
        raise ValueError(f"{file}: key {error} is missing: settings of another version?") from error
    except (TypeError, IndexError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file}: settings of another form than AtmoRep's ({error})") from error
    _check(settings, file)
    return settings


def _check_coupling(
    raw: dict[str, Any], settings: AtmoRepSettings, tensors: dict[str, Tensor], file: str
) -> None:
    """Raise ValueError if settings ask for several heads for every coupled field and the weights
    have them; the public code has one, whatever the settings say."""
    per_field = raw.get("coupling_num_heads_per_field", 1)
    for number, field in enumerate(settings.fields):
        queries = tensors.get(f"encoders.{number}.heads.0.proj_heads_other.0.weight")
        one_each = len(field.coupled) * (field.width // settings.encoder_heads)
        if per_field != 1 and queries is not None and len(queries) != one_each:
            raise ValueError(
                f"{file}: coupling_num_heads_per_field={per_field} is not known to work in "
                "AtmoRep's own code, which has one head for every coupled field; valid: 1"
            )


def _with_two_maps(settings: AtmoRepSettings, tensors: dict[str, Tensor]) -> AtmoRepSettings:
    """Perceptrons with "one" layer, which have a first and a last map in the file, as two: what
    AtmoRep's settings count are the layers between, and those two."""
    keys = {
        "encoder_mlp_layers": "encoders.0.mlps.0.blocks",
        "decoder_mlp_layers": "decoders.0.blocks.1.blocks",
    }
    stored = {
        name: sum(key.startswith(f"{start}.") and key.endswith(".weight") for key in tensors)
        for name, start in keys.items()
    }
    two = {n: 2 for n, count in stored.items() if count == 2 and getattr(settings, n) == 1}
    return replace(settings, **two)


def _settings(raw: dict[str, Any], is_of_2023: bool) -> AtmoRepSettings:
    heads = int(raw["decoder_num_heads"])
    return AtmoRepSettings(
        fields=tuple(_field(entry) for entry in raw["fields"]),
        predicted=tuple(str(entry[0]) for entry in raw["fields_prediction"]),
        info_entries=int(raw["size_token_info"]),
        info_width=int(raw["size_token_info_net"]),
        encoder_layers=int(raw["encoder_num_layers"]),
        encoder_heads=int(raw["encoder_num_heads"]),
        encoder_mlp_layers=int(raw["encoder_num_mlp_layers"]),
        decoder_layers=int(raw["decoder_num_layers"]),
        decoder_heads=heads,
        decoder_mlp_layers=int(raw["decoder_num_mlp_layers"]),
        cross_heads=int(heads * float(raw["decoder_cross_att_ratio"])),
        cross_rate=float(raw["decoder_cross_att_rate"]),
        members=int(raw["net_tail_num_nets"]),
        tail_layers=int(raw["net_tail_num_layers"]),
        normed=bool(raw["with_layernorm"]),
        normed_heads=bool(raw["with_qk_lnorm"]),
        # the code that wrote the files of 2023 normed a decoder's heads only if asked to
        decoder_normed_heads=bool(raw["with_qk_lnorm"]) if is_of_2023 else True,
    )


def _field(entry: list[Any]) -> AtmoRepField:
    name, (_, width, coupled, *_), levels, num_tokens, token_size, *more = entry
    steps, rows, columns = map(int, num_tokens)
    time, lat, lon = map(int, token_size)
    return AtmoRepField(
        name=str(name),
        width=int(width),
        coupled=tuple(map(str, coupled)),
        levels=tuple(map(int, levels)),
        num_tokens=(steps, rows, columns),
        token_size=(time, lat, lon),
        local="local" in more,
    )


def _check_sizes(settings: AtmoRepSettings, file: str) -> None:
    """Raise ValueError for sizes of which no network can be made, and for names given twice."""
    sizes = {key: value for key, value in vars(settings).items() if type(value) is int}
    may_be_zero = ("tail_layers", "cross_heads")
    faults = [f"{k}={v}" for k, v in sizes.items() if v < (0 if k in may_be_zero else 1)]
    for field in settings.fields:
        counts = (field.width, *field.num_tokens, *field.token_size)
        small = min(counts) < 1 or not field.levels or field.width <= settings.info_width
        if small or field.width % 2:  # positions are pairs of sine and cosine
            faults.append(
                f"{field.name}: width {field.width} (even, and above the {settings.info_width} for "
                f"token information), {len(field.levels)} levels, tokens {field.num_tokens} of "
                f"{field.token_size}"
            )
    if not math.isfinite(settings.cross_rate) or settings.cross_rate < 0:
        faults.append(f"decoder_cross_att_rate={settings.cross_rate}")
    for names in ([field.name for field in settings.fields], list(settings.predicted)):
        faults += [f"{name} is there twice" for name in set(names) if names.count(name) > 1]
    if faults:
        raise ValueError(f"{file}: no network can be made of {'; '.join(faults)}")


def _check(settings: AtmoRepSettings, file: str) -> None:
    _check_sizes(settings, file)
    names = [field.name for field in settings.fields]
    for field in settings.fields:
        unknown = sorted(set(field.coupled) - set(names))
        if unknown:
            raise ValueError(
                f"{file}: fields: {field.name} is coupled to {listed(unknown)}, not in "
                f"{listed(names)}"
            )
    unknown = sorted(set(settings.predicted) - set(names))
    if unknown or not settings.predicted:
        raise ValueError(
            f"{file}: fields_prediction names {listed(unknown)}; valid: some of {listed(names)}"
        )
    if settings.cross_heads < 1:
        raise ValueError(
            f"{file}: decoder_cross_att_ratio leaves no head of {settings.decoder_heads} that "
            "attends to the encoder; a decoder with self-attention alone does not run in AtmoRep's "
            "own code either"
        )
    if settings.encoder_layer_read_by(settings.decoder_layers - 1) < 0:
        raise ValueError(
            f"{file}: decoder_num_layers={settings.decoder_layers} at decoder_cross_att_rate="
            f"{settings.cross_rate:g} reaches beyond the {settings.encoder_layers} layers of the "
            "encoder; a deeper decoder does not run in AtmoRep's own code either"
        )


def joined_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file of 2023, which has matrices per head, under the names of 2024."""
    joined: dict[str, Tensor] = {}
    groups: dict[tuple[str, str], dict[int, dict[str, Tensor]]] = {}
    for key, value in tensors.items():
        match = _OLD_HEAD.fullmatch(key)
        if match is None:
            joined[key] = value
        else:
            heads = groups.setdefault((match[1], match[2]), {})
            heads.setdefault(int(match[3]), {})[match[4]] = value
    for (layer, group), heads in groups.items():
        if group != "heads_other":
            joined[f"{layer}.proj_heads.weight"] = _stacked(heads, ("qs", "ks", "vs"), layer)
        elif layer.startswith("decoders."):
            joined[f"{layer}.proj_heads_o_q.weight"] = _stacked(heads, ("qs",), layer)
            joined[f"{layer}.proj_heads_o_kv.weight"] = _stacked(heads, ("ks", "vs"), layer)
        else:
            joined[f"{layer}.proj_heads_other.0.weight"] = _stacked(heads, ("qs",), layer)
            for place, number in enumerate(sorted(heads), 1):
                coupled = _stacked({number: heads[number]}, ("ks", "vs"), layer)
                joined[f"{layer}.proj_heads_other.{place}.weight"] = coupled
    return joined


def _stacked(heads: dict[int, dict[str, Tensor]], kinds: tuple[str, ...], layer: str) -> Tensor:
    """Matrices of heads by their number, head after head, in each kind after kind."""
    for number, head in heads.items():
        for kind in kinds:
            if kind not in head:
                raise ValueError(f"tensor {layer}, head {number}: proj_{kind}.weight is missing")
    return torch.cat([heads[number][kind] for number in sorted(heads) for kind in kinds])


def state_of(settings: AtmoRepSettings, tensors: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """AtmoRep's tensors under the names of `AtmoRep`'s weights.

    Raises:
        ValueError: a tensor that has no place in the network of these settings.
    """
    state: dict[str, Tensor] = {}
    tails: dict[str, dict[int, Tensor]] = {}  # members of one weight, to be stacked
    maps = {"embed_token_info"} | {
        f"{name}.{number}"
        for name in ("embeds", "embeds_token_info")
        for number in range(len(settings.fields))
    }
    elsewhere = {f"{name}.{kind}" for name in maps for kind in ("weight", "bias")}
    rank = _ranks(tensors)
    for key, value in tensors.items():
        if key in elsewhere or not value.numel():
            continue  # see `_embeddings`; a decoder without self-attention has an empty matrix
        parts = key.split(".")
        name = _encoder_name(settings, parts, rank) or _decoder_name(settings, parts, rank)
        tail = _tail_name(settings, parts, rank)
        if name is not None:
            state[name] = value
        elif tail is not None:
            tails.setdefault(tail, {})[int(parts[3])] = value
        else:
            raise ValueError(f"{file}: tensor {key} has no place in the network of its settings")
    for name, members in tails.items():
        if len({value.shape for value in members.values()}) > 1:
            raise ValueError(f"{file}: tensors of {name} differ in shape from member to member")
        state[name] = torch.stack([members[number] for number in sorted(members)])
    return state | _embeddings(settings, tensors, state, file)


def _ranks(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The position of every numbered part among those of its sequence that have tensors.
    AtmoRep's numbers also count activations and dropout, which have no tensors."""
    numbers: dict[str, set[int]] = {}
    for key in tensors:
        before, _, number = key.rpartition(".")[0].rpartition(".")
        if number.isdigit():
            numbers.setdefault(before, set()).add(int(number))
    return {
        f"{before}.{number}": rank
        for before, have in numbers.items()
        for rank, number in enumerate(sorted(have))
    }


def _number(parts: list[str], kind: str, count: int) -> int | None:
    """The number of a field in a tensor's name; None if the name has another form or there are
    fewer fields."""
    is_one = len(parts) > 2 and parts[0] == kind and parts[1].isdigit()
    return int(parts[1]) if is_one and int(parts[1]) < count else None


def _encoder_name(settings: AtmoRepSettings, parts: list[str], rank: dict[str, int]) -> str | None:
    number = _number(parts, "encoders", len(settings.fields))
    if number is None:
        return None
    field, kind = f"encoders.{settings.fields[number].name}", parts[-1]
    match parts[2:-1]:
        case ["embed"]:
            return f"{field}.embed.{kind}"
        case ["heads", layer, "proj_heads"]:
            return f"{field}.attentions.{layer}.own.{kind}"
        case ["heads", layer, "proj_heads_other", "0"]:
            return f"{field}.attentions.{layer}.queries.{kind}"
        case ["heads", layer, "proj_heads_other", head] if head.isdigit():
            return f"{field}.attentions.{layer}.coupled.{int(head) - 1}.{kind}"
        case ["heads", layer, "proj_out"]:
            return f"{field}.attentions.{layer}.out.{kind}"
        case ["mlps", layer, "blocks", _]:
            return f"{field}.perceptrons.{layer}.layers.{rank['.'.join(parts[:-1])]}.{kind}"
    return None


_DECODER_HEADS = {
    "proj_heads": "own",
    "proj_heads_o_q": "queries",
    "proj_heads_o_kv": "encoded",
    "ln_q": "query_norm",
    "ln_k": "key_norm",
    "proj_out": "out",
}


def _decoder_name(settings: AtmoRepSettings, parts: list[str], rank: dict[str, int]) -> str | None:
    """The name of a decoder block. Attention and perceptrons alternate in AtmoRep's list of
    blocks."""
    number = _number(parts, "decoders", len(settings.predicted))
    if number is None or len(parts) < 5 or not parts[3].isdigit():
        return None
    field, kind = f"decoders.{settings.predicted[number]}", parts[-1]
    match parts[2:-1]:
        case ["blocks", block, name] if name in _DECODER_HEADS and int(block) % 2 == 0:
            return f"{field}.attentions.{int(block) // 2}.{_DECODER_HEADS[name]}.{kind}"
        case ["blocks", block, "blocks", _] if int(block) % 2 == 1:
            layer = rank[".".join(parts[:-1])]
            return f"{field}.perceptrons.{int(block) // 2}.layers.{layer}.{kind}"
    return None


def _tail_name(settings: AtmoRepSettings, parts: list[str], rank: dict[str, int]) -> str | None:
    """The name of a part of the tail. The first part of every member is its norm, the others are
    linear maps."""
    match parts:
        case ["tails", _, "tail_nets", member, _, kind] if member.isdigit():
            number = _number(parts, "tails", len(settings.predicted))
            if number is None:
                return None
            layer = rank[".".join(parts[:-1])]
            tail = f"decoders.{settings.predicted[number]}.tail"
            if layer == 0:
                return f"{tail}.{'scale' if kind == 'weight' else 'shift'}"
            return f"{tail}.{'weights' if kind == 'weight' else 'biases'}.{layer - 1}"
    return None


def _embeddings(
    settings: AtmoRepSettings, tensors: dict[str, Tensor], state: dict[str, Tensor], file: str
) -> dict[str, Tensor]:
    """The maps of values, where `encoders` has none, and of token information. The map of token
    information is the shared one if that of the first field is zero or missing."""
    first_map = tensors.get("embeds_token_info.0.weight")
    shared = first_map is None or not bool(first_map.any())
    embeddings = {}
    for number, field in enumerate(settings.fields):
        source = "embed_token_info" if shared else f"embeds_token_info.{number}"
        for kind in ("weight", "bias"):
            keys = {f"encoders.{field.name}.embed_info.{kind}": f"{source}.{kind}"}
            if f"encoders.{field.name}.embed.{kind}" not in state:
                keys[f"encoders.{field.name}.embed.{kind}"] = f"embeds.{number}.{kind}"
            for name, key in keys.items():
                if key not in tensors:
                    raise ValueError(f"{file}: tensor {key} is missing")
                embeddings[name] = tensors[key].clone()  # fields that share it train it apart
    return embeddings
