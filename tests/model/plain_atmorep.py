"""AtmoRep's network written as plainly as can be, token by token and head by head in float64, from
the published description; and files of random weights in the layout of 2024 or 2023.

Nothing here is shared with `atmossl.model.atmorep`, whose reference it is.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import erf

SETTINGS: dict[str, Any] = {
    "fields_targets": [],
    "size_token_info": 8,
    "size_token_info_net": 4,
    "with_cls": False,
    "with_layernorm": True,
    "with_qk_lnorm": False,
    "coupling_num_heads_per_field": 1,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_num_mlp_layers": 2,
    "encoder_att_type": "dense",
    "decoder_num_layers": 2,
    "decoder_num_heads": 4,
    "decoder_num_mlp_layers": 2,
    "decoder_self_att": False,
    "decoder_cross_att_ratio": 0.5,
    "decoder_cross_att_rate": 1.0,
    "decoder_att_type": "dense",
    "net_tail_num_nets": 3,
    "net_tail_num_layers": 0,
}


def field(name: str, width: int, coupled=(), levels=(123, 137), tokens=(2, 2, 3), size=(1, 2, 2)):
    """One entry of `fields`, as AtmoRep writes it."""
    return [name, [1, width, list(coupled), 0], list(levels), list(tokens), list(size), [0.5]]


def write_model(
    folder: Path,
    fields: list,
    predicted: list[str],
    *,
    seed: int = 0,
    name: str = "test",
    **changes,
) -> dict[str, np.ndarray]:
    """A model's two files with random weights; returns the tensors in float64."""
    settings = SETTINGS | {"fields": fields, "fields_prediction": [[p, 1.0] for p in predicted]}
    settings |= changes
    rng = np.random.default_rng(seed)
    tensors = {
        key: (rng.standard_normal(shape) * (0.4 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3))
        + (1.0 if "ln_" in key and "weight" in key else 0.0)
        for key, shape in shapes(settings).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"model_id{name}.json").write_text(json.dumps(settings))
    stored = {key: torch.tensor(value, dtype=torch.float32) for key, value in tensors.items()}
    torch.save(stored, folder / f"AtmoRep_id{name}.mod")
    return {key: value.double().numpy() for key, value in stored.items()}


def as_of_2023(folder: Path, name: str = "test") -> None:
    """Rewrite a model's weights in the layout of 2023: matrices per head, one shared map of token
    information, and no parameters in the norms of heads."""
    file = folder / f"AtmoRep_id{name}.mod"
    settings = json.loads((folder / f"model_id{name}.json").read_text())
    new, old = torch.load(file, weights_only=True), {}
    for key, value in new.items():
        if ".proj_heads" in key:
            old |= {head: matrix.clone() for head, matrix in heads_of(key, value, settings)}
        elif ".ln_" not in key and "embeds_token_info" not in key:
            old[key] = value
    torch.save(old, file)


def heads_of(key: str, value: torch.Tensor, settings: dict[str, Any]):
    """Names and matrices of single heads that one joined matrix of 2024 holds."""
    part, number, *_ = key.split(".")
    layer, _, kind = key.removesuffix(".weight").partition(".proj_heads")
    by_name = {entry[0]: entry[1] for entry in settings["fields"]}
    predicted = [settings["fields_prediction"][int(number)][0]] if part == "decoders" else []
    own = by_name[predicted[0]] if predicted else settings["fields"][int(number)][1]
    size = own[1] // settings[f"{part.removesuffix('s')}_num_heads"]
    group, kinds, first = {
        "": ("heads" if part == "decoders" else "heads_self", ("qs", "ks", "vs"), 0),
        "_o_q": ("heads_other", ("qs",), 0),
        "_o_kv": ("heads_other", ("ks", "vs"), 0),
        "_other.0": ("heads_other", ("qs",), 0),
    }.get(kind) or ("heads_other", ("ks", "vs"), int(kind.rpartition(".")[2]) - 1)
    for row, matrix in enumerate(value.split(size) if len(value) else ()):
        head, which = divmod(row, len(kinds))
        yield f"{layer}.{group}.{first + head}.proj_{kinds[which]}.weight", matrix


def shapes(s: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a file of 2024."""
    entries, info = s["size_token_info"], s["size_token_info_net"]
    shape = linear("embed_token_info", info, entries)
    for n, entry in enumerate(s["fields"]):
        shape |= linear(f"embeds_token_info.{n}", info, entries)
        shape |= linear(f"encoders.{n}.embed", entry[1][1] - info, math.prod(entry[4]))
        for layer in range(s["encoder_num_layers"]):
            shape |= encoder_layer(s, n, layer)
    by_name = {entry[0]: entry for entry in s["fields"]}
    for n, (name, _) in enumerate(s["fields_prediction"]):
        width, values = by_name[name][1][1], math.prod(by_name[name][4])
        for layer in range(s["decoder_num_layers"]):
            shape |= decoder_layer(s, n, layer, width)
        for member in range(s["net_tail_num_nets"]):
            key, deep = f"tails.{n}.tail_nets.{member}", s["net_tail_num_layers"]
            shape |= {f"{key}.0.weight": (width,), f"{key}.0.bias": (width,)}
            for layer in range(deep):
                shape |= linear(f"{key}.{1 + 2 * layer}", width, width)
            shape |= linear(f"{key}.{1 + 2 * deep}", values, width)
    return shape


def linear(key: str, after: int, before: int) -> dict[str, tuple[int, ...]]:
    return {f"{key}.weight": (after, before), f"{key}.bias": (after,)}


def perceptron(key: str, width: int, count: int) -> dict[str, tuple[int, ...]]:
    sizes = [width, *[2 * width] * (count - 1), width]
    shape: dict[str, tuple[int, ...]] = {}
    for n in range(count):
        shape |= linear(f"{key}.{3 * n}", sizes[n + 1], sizes[n])
    return shape


def encoder_layer(s: dict[str, Any], n: int, layer: int) -> dict[str, tuple[int, ...]]:
    widths = {entry[0]: entry[1][1] for entry in s["fields"]}
    _, (_, width, coupled, *_), *_ = s["fields"][n]
    key, heads = f"encoders.{n}.heads.{layer}", s["encoder_num_heads"]
    head = width // heads
    shape = {
        f"{key}.proj_heads.weight": (3 * heads * head, width),
        f"{key}.proj_out.weight": (width, (heads + len(coupled)) * head),
    }
    if coupled:
        shape[f"{key}.proj_heads_other.0.weight"] = (len(coupled) * head, width)
    for c, other in enumerate(coupled, 1):
        shape[f"{key}.proj_heads_other.{c}.weight"] = (2 * head, widths[other])
    mlp = perceptron(f"encoders.{n}.mlps.{layer}.blocks", width, s["encoder_num_mlp_layers"])
    return shape | mlp


def decoder_layer(s: dict[str, Any], n: int, layer: int, width: int) -> dict[str, tuple[int, ...]]:
    key, heads = f"decoders.{n}.blocks.{2 * layer}", s["decoder_num_heads"]
    head, cross = width // heads, int(heads * s["decoder_cross_att_ratio"])
    norms = {f"{key}.ln_{q}.{kind}": (head,) for q in "qk" for kind in ("weight", "bias")}
    mlp = perceptron(
        f"decoders.{n}.blocks.{2 * layer + 1}.blocks", width, s["decoder_num_mlp_layers"]
    )
    return {
        f"{key}.proj_heads.weight": (3 * (heads - cross) * head, width),
        f"{key}.proj_heads_o_q.weight": (cross * head, width),
        f"{key}.proj_heads_o_kv.weight": (2 * cross * head, width),
        f"{key}.proj_out.weight": (width, heads * head),
        **norms,
        **mlp,
    }


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def norm(x):
    mean = x.mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + 1e-5)


def attend(q, k, v):
    """One head [token feature]."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


class PlainAtmoRep:
    """The network of one file, for one sample at a time. is_of_2023: the tensors were those of a
    file of 2023: one map of token information, and norms of heads without parameters."""

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, np.ndarray],
        name: str = "test",
        *,
        is_of_2023: bool = False,
    ) -> None:
        self.is_of_2023 = is_of_2023
        self.s = json.loads((folder / f"model_id{name}.json").read_text())
        self.t = tensors
        self.order = [entry[0] for entry in self.s["fields"]]

    def linear(self, key: str, x):
        bias = self.t.get(f"{key}.bias")
        return x @ self.t[f"{key}.weight"].T + (0.0 if bias is None else bias)

    def affine_norm(self, key: str, x):
        return norm(x) * self.t[f"{key}.weight"] + self.t[f"{key}.bias"]

    def embed(self, n: int, values, info):
        """values [level nt nlat nlon time lat lon], info [level token entry]."""
        _, (_, width, *_), levels, (steps, rows, columns), *_ = self.s["fields"][n]
        info_map = "embed_token_info" if self.is_of_2023 else f"embeds_token_info.{n}"
        tokens = []
        for v, _ in enumerate(levels):
            for number in range(steps * rows * columns):
                t, place = divmod(number, rows * columns)
                row, column = divmod(place, columns)
                patch = values[v, t, row, column].ravel()
                x = np.concatenate(
                    [
                        self.linear(f"encoders.{n}.embed", patch),
                        self.linear(info_map, info[v, number]),
                    ]
                )
                a, o = place // rows, place % columns
                for j in range(width // 2):
                    w = 2 * math.pi * 2 * j / width
                    x[2 * j] += 0.5 * math.sin(8 * a * w) + math.sin(t * w)
                    x[2 * j + 1] += 0.5 * math.cos(8 * o * w) + math.cos(v * w)
                tokens.append(x)
        return np.array(tokens)

    def perceptron(self, key: str, x, count: int, *, normed: bool):
        hidden = norm(x) if normed else x
        for n in range(count):
            hidden = gelu(self.linear(f"{key}.{3 * n}", hidden))
        return x + hidden

    def encode(self, values: dict, info: dict) -> dict[str, list]:
        s = self.s
        pre = norm if s["with_layernorm"] else lambda x: x
        qk = norm if s["with_qk_lnorm"] else lambda x: x
        state = {f: self.embed(n, values[f], info[f]) for n, f in enumerate(self.order)}
        layers: dict[str, list] = {f: [] for f in self.order}
        for layer in range(s["encoder_num_layers"]):
            after = {}
            for n, (f, (_, width, coupled, *_), *_) in enumerate(s["fields"]):
                key, size = f"encoders.{n}.heads.{layer}", width // s["encoder_num_heads"]
                own = pre(state[f])
                joint = self.linear(f"{key}.proj_heads", own)
                outputs = []
                for h in range(s["encoder_num_heads"]):
                    q, k, v = (
                        joint[:, (3 * h + kind) * size : (3 * h + kind + 1) * size]
                        for kind in range(3)
                    )
                    outputs.append(attend(qk(q), qk(k), v))
                for c, other in enumerate(coupled):
                    q = self.linear(f"{key}.proj_heads_other.0", own)[:, c * size : (c + 1) * size]
                    kv = self.linear(f"{key}.proj_heads_other.{c + 1}", pre(state[other]))
                    outputs.append(attend(q, qk(kv[:, :size]), kv[:, size:]))
                after[f] = state[f] + self.linear(
                    f"{key}.proj_out", np.concatenate(outputs, axis=-1)
                )
            for n, f in enumerate(self.order):
                key = f"encoders.{n}.mlps.{layer}.blocks"
                state[f] = self.perceptron(
                    key, after[f], s["encoder_num_mlp_layers"], normed=s["with_layernorm"]
                )
                layers[f].append(state[f])
        return layers

    def decode(self, n: int, layers: list):
        """Members [token member value] of predicted field n."""
        s = self.s
        x, heads = layers[-1], s["decoder_num_heads"]
        size, cross = x.shape[-1] // heads, int(heads * s["decoder_cross_att_ratio"])
        for layer in range(s["decoder_num_layers"]):
            key = f"decoders.{n}.blocks.{2 * layer}"
            read = s["encoder_num_layers"] - 1 - int(s["decoder_cross_att_rate"] * layer)
            ln_q, ln_k = (partial(self.affine_norm, f"{key}.ln_{q}") for q in "qk")
            if self.is_of_2023:
                ln_q = ln_k = norm if s["with_qk_lnorm"] else lambda x: x
            own, encoded, outputs = norm(x), norm(layers[read]), []
            for h in range(heads - cross):
                joint = self.linear(f"{key}.proj_heads", own)[:, 3 * h * size : 3 * (h + 1) * size]
                q, k, v = np.split(joint, 3, axis=-1)
                outputs.append(attend(ln_q(q), ln_k(k), v))
            for h in range(cross):
                q = self.linear(f"{key}.proj_heads_o_q", own)[:, h * size : (h + 1) * size]
                kv = self.linear(f"{key}.proj_heads_o_kv", encoded)
                k, v = np.split(kv[:, 2 * h * size : 2 * (h + 1) * size], 2, axis=-1)
                outputs.append(attend(ln_q(q), ln_k(k), v))
            x = x + self.linear(f"{key}.proj_out", np.concatenate(outputs, axis=-1))
            key = f"decoders.{n}.blocks.{2 * layer + 1}.blocks"
            x = self.perceptron(key, x, s["decoder_num_mlp_layers"], normed=True)
        members = []
        for member in range(s["net_tail_num_nets"]):
            key = f"tails.{n}.tail_nets.{member}"
            y = self.affine_norm(f"{key}.0", x)
            for layer in range(s["net_tail_num_layers"]):
                y = gelu(self.linear(f"{key}.{1 + 2 * layer}", y))
            members.append(self.linear(f"{key}.{1 + 2 * s['net_tail_num_layers']}", y))
        return np.stack(members, axis=1)

    def __call__(self, values: dict, info: dict) -> dict[str, np.ndarray]:
        layers = self.encode(values, info)
        predicted = [name for name, _ in self.s["fields_prediction"]]
        return {name: self.decode(n, layers[name]) for n, name in enumerate(predicted)}
