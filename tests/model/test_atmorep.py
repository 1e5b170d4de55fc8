"""AtmoRep's network against a plain one in float64, and against outputs of the public code."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from atmossl.model.atmorep import AtmoRep, AtmoRepInput
from atmossl.model.atmorep_files import load_atmorep
from benchmarks.atmorep import largest_difference, reference_folders
from tests.model.plain_atmorep import PlainAtmoRep, as_of_2023, field, write_model

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "atmorep_reference"
FOLDERS = reference_folders(REFERENCE) if REFERENCE.exists() else []
ONE = [field("temperature", 8)]
TWO = [field("temperature", 8, ("velocity_u",)), field("velocity_u", 8)]
THREE = [
    field("velocity_u", 10, ("temperature", "specific_humidity")),
    field("temperature", 12, ("velocity_u",), (137,), (1, 2, 2), (2, 2, 3)),
    field("specific_humidity", 20, (), (96, 105, 114), (2, 3, 2)),
]


def inputs_of(network: AtmoRep, batch: int = 2) -> dict[str, AtmoRepInput]:
    rng = np.random.default_rng(1)
    found = {}
    for f in network.settings.fields:
        shape = (batch, len(f.levels), *f.num_tokens, *f.token_size)
        info = (batch, len(f.levels), int(np.prod(f.num_tokens)), network.settings.info_entries)
        values, entries = rng.standard_normal(shape), rng.standard_normal(info)
        found[f.name] = AtmoRepInput(
            torch.tensor(values, dtype=torch.float32), torch.tensor(entries, dtype=torch.float32)
        )
    return found


@pytest.mark.parametrize(
    ("fields", "predicted", "changes"),
    [
        (ONE, ["temperature"], {}),
        (ONE, ["temperature"], {"net_tail_num_layers": 2, "net_tail_num_nets": 1}),
        (ONE, ["temperature"], {"with_layernorm": False, "encoder_num_mlp_layers": 3}),
        (ONE, ["temperature"], {"decoder_cross_att_ratio": 1.0, "decoder_num_layers": 1}),
        (THREE, ["temperature", "velocity_u"], {"with_qk_lnorm": True}),
        (
            THREE,
            ["specific_humidity"],
            {"encoder_num_layers": 4, "decoder_num_layers": 3, "decoder_cross_att_rate": 1.5},
        ),
    ],
    ids=["one", "deep-tail", "no-norms", "cross-only", "three-coupled", "shallow-decoder"],
)
def test_network_is_the_plain_one(tmp_path, fields, predicted, changes):
    tensors = write_model(tmp_path, fields, predicted, **changes)
    assert_plain(load_atmorep(tmp_path), PlainAtmoRep(tmp_path, tensors), predicted)


def assert_plain(network: AtmoRep, plain: PlainAtmoRep, predicted: list[str]) -> None:
    """Members of a batch of two are those of the plain network, sample by sample."""
    inputs = inputs_of(network)
    with torch.no_grad():
        outputs = network(inputs)
    assert set(outputs) == set(predicted)
    for sample in range(2):
        expected = plain(
            {name: given.values[sample].double().numpy() for name, given in inputs.items()},
            {name: given.token_info[sample].double().numpy() for name, given in inputs.items()},
        )
        for name, members in expected.items():
            own = outputs[name].members[sample].flatten(0, 1).numpy()
            np.testing.assert_allclose(own, members, atol=2e-5, rtol=0)


def test_chosen_tokens_have_the_members_and_gradients_of_all(tmp_path):
    """A network computes the tail and the decoder's last layer of hidden tokens alone; in float64,
    since what is compared is the same sum in another order. Two samples choose other tokens."""
    write_model(tmp_path, THREE, ["temperature"], net_tail_num_layers=1)
    network = load_atmorep(tmp_path).double()
    inputs = {
        name: AtmoRepInput(given.values.double(), given.token_info.double())
        for name, given in inputs_of(network).items()
    }
    chosen = torch.tensor([[3, 0, 2], [1, 1, 3]])
    results = []
    for alone in (True, False):
        latents = network.encode(inputs)["temperature"]
        if alone:
            decoded = network.decoded("temperature", latents, chosen)
            members = network.members("temperature", latents, chosen)
        else:
            decoded = torch.stack(
                [x[i] for x, i in zip(network.decoded("temperature", latents), chosen, strict=True)]
            )
            everywhere = network.decode("temperature", latents).members.flatten(1, 2)
            members = torch.stack([x[i] for x, i in zip(everywhere, chosen, strict=True)])
        network.zero_grad()
        (members.square().sum() + decoded.pow(3).sum()).backward()
        gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        results.append((decoded, members, gradients))
    assert results[0][1].shape == (2, 3, 3, 12)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def drawn_model(rng: np.random.Generator) -> tuple[list, list[str], dict]:
    """Fields, predicted ones and settings, whatever the public code runs."""
    names = ["velocity_u", "temperature", "specific_humidity"][: rng.integers(1, 4)]
    heads = int(rng.choice([2, 4]))
    fields = []
    for name in names:
        others = [other for other in names if other != name]
        coupled = rng.permutation(others)[: rng.integers(0, len(others) + 1)].tolist()
        fields.append(
            field(name, int(rng.choice([8, 16, 24])), coupled, (96, 114, 137)[: rng.integers(1, 4)],
                  rng.integers(1, 4, 3).tolist(), rng.integers(1, 4, 3).tolist())
        )  # fmt: skip
    predicted = rng.permutation(names)[: rng.integers(1, len(names) + 1)].tolist()
    layers, rate = int(rng.integers(1, 4)), float(rng.choice([0.5, 1.0, 1.5]))
    deepest = max(n for n in range(1, layers + 1) if int(rate * (n - 1)) < layers)
    changes = {
        "size_token_info": int(rng.choice([6, 8])),
        "size_token_info_net": int(rng.choice([2, 4])),
        "with_cls": bool(rng.integers(2)),
        "with_layernorm": bool(rng.integers(2)),
        "with_qk_lnorm": bool(rng.integers(2)),
        "encoder_num_layers": layers,
        "encoder_num_heads": heads,
        "encoder_num_mlp_layers": int(rng.integers(1, 4)),
        "decoder_num_layers": int(rng.integers(1, deepest + 1)),
        "decoder_num_heads": int(rng.choice([2, 4])),
        "decoder_num_mlp_layers": int(rng.integers(1, 4)),
        "decoder_cross_att_ratio": float(rng.choice([0.5, 0.75, 1.0])),
        "decoder_cross_att_rate": rate,
        "net_tail_num_nets": int(rng.integers(1, 4)),
        "net_tail_num_layers": int(rng.integers(0, 3)),
        "grad_checkpointing": bool(rng.integers(2)),
        "attention": bool(rng.integers(2)),
        "dropout_rate": 0.3,
    }
    return fields, predicted, changes


@pytest.mark.parametrize("is_of_2023", [False, True], ids=["2024", "2023"])
@pytest.mark.parametrize("seed", range(8))
def test_networks_of_drawn_settings_are_the_plain_ones(tmp_path, seed, is_of_2023):
    fields, predicted, changes = drawn_model(np.random.default_rng(seed))
    tensors = write_model(tmp_path, fields, predicted, seed=seed, **changes)
    if is_of_2023:
        as_of_2023(tmp_path)
    plain = PlainAtmoRep(tmp_path, tensors, is_of_2023=is_of_2023)
    assert_plain(load_atmorep(tmp_path), plain, predicted)


def without_numbers_of_dropout(tensors: dict[str, torch.Tensor]) -> None:
    """Number maps of perceptrons 0, 2, 4, as where no dropout stands between them."""
    for key in [key for key in tensors if re.search(r"(mlps\.\d|blocks\.\d)\.blocks\.", key)]:
        before, number, kind = key.rsplit(".", 2)
        tensors[f"{before}.{2 * int(number) // 3}.{kind}"] = tensors.pop(key)


def with_class_tokens(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {f"encoders.{n}.cls_token": torch.randn(1, 1, 8) for n in range(3)}


def with_names_of_several_devices(tensors: dict[str, torch.Tensor]) -> None:
    for key in list(tensors):
        tensors[f"module.{key}"] = tensors.pop(key)


def with_embeddings_twice(tensors: dict[str, torch.Tensor]) -> None:
    """The copies differ: those of the encoders count."""
    for key in [key for key in tensors if re.fullmatch(r"encoders\.\d\.embed\.\w+", key)]:
        tensors[key.replace("encoders.", "embeds.").replace(".embed.", ".")] = -tensors[key]


def with_embeddings_outside(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if re.fullmatch(r"encoders\.\d\.embed\.\w+", key)]:
        tensors[key.replace("encoders.", "embeds.").replace(".embed.", ".")] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (without_numbers_of_dropout, {"dropout_rate": 0.0, "encoder_num_mlp_layers": 3}),
        (with_class_tokens, {"with_cls": True}),
        (with_names_of_several_devices, {"with_ddp": True, "num_accs_per_task": 4}),
        (with_embeddings_twice, {"with_mixed_precision": True, "grad_checkpointing": True}),
        (with_embeddings_outside, {"attention": True, "losses": ["stats"], "years_val": []}),
        (lambda _: None, {"coupling_num_heads_per_field": 2}),  # the public code has one
        (lambda _: None, {"encoder_num_layers": 3, "decoder_cross_att_rate": 0.4}),
        (lambda _: None, {"decoder_num_heads": 2, "decoder_cross_att_ratio": 0.7}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_of_2023", [False, True], ids=["2024", "2023"])
def test_what_has_no_effect_changes_nothing(tmp_path, change, settings, is_of_2023):
    predicted = ["specific_humidity", "velocity_u"]
    tensors = write_model(tmp_path, THREE, predicted, with_qk_lnorm=True, **settings)
    if is_of_2023:
        as_of_2023(tmp_path)
    change_tensors(tmp_path, change)
    plain = PlainAtmoRep(tmp_path, tensors, is_of_2023=is_of_2023)
    assert_plain(load_atmorep(tmp_path), plain, predicted)


def test_a_perceptron_of_one_layer_has_the_first_and_the_last_map(tmp_path):
    """Settings count the layers between, and those two."""
    tensors = write_model(tmp_path, ONE, ["temperature"])
    file = tmp_path / "model_idtest.json"
    raw = json.loads(file.read_text())
    plain = PlainAtmoRep(tmp_path, tensors)
    file.write_text(json.dumps(raw | {"encoder_num_mlp_layers": 1, "decoder_num_mlp_layers": 1}))
    assert_plain(load_atmorep(tmp_path), plain, ["temperature"])


def test_several_heads_for_every_coupled_field_are_refused(tmp_path):
    write_model(tmp_path, TWO, ["temperature"], coupling_num_heads_per_field=2)
    key = "encoders.0.heads.0.proj_heads_other.0.weight"
    change_tensors(tmp_path, lambda t: t.update({key: torch.cat([t[key], t[key]])}))
    with pytest.raises(ValueError, match="coupling_num_heads_per_field=2"):
        load_atmorep(tmp_path)


@pytest.mark.parametrize(
    ("files", "newest"),
    [
        (["AtmoRep_idtest_epoch3.mod", "AtmoRep_idtest_epoch00012.mod"], 1),
        (["AtmoRep_idtest_epoch0.mod"], 0),
        (["AtmoRep_idtest_epoch7.mod", "AtmoRep_idtest.mod", "AtmoRep_idother.mod"], 1),
    ],
)
def test_newest_weights_of_a_folder_are_taken(tmp_path, files, newest):
    write_model(tmp_path, ONE, ["temperature"])
    tensors = torch.load(tmp_path / "AtmoRep_idtest.mod", weights_only=True)
    (tmp_path / "AtmoRep_idtest.mod").unlink()
    for number, name in enumerate(files):
        torch.save({key: value + number for key, value in tensors.items()}, tmp_path / name)
    weight = load_atmorep(tmp_path).encoders["temperature"].embed.weight
    assert torch.equal(weight, tensors["encoders.0.embed.weight"] + newest)


def test_missing_head_of_a_file_of_2023_is_named(tmp_path):
    write_model(tmp_path, THREE, ["temperature"])
    as_of_2023(tmp_path)
    change_tensors(tmp_path, lambda t: t.pop("encoders.0.heads.1.heads_other.1.proj_ks.weight"))
    with pytest.raises(ValueError, match=r"encoders\.0\.heads\.1, head 1: proj_ks\.weight"):
        load_atmorep(tmp_path)


@pytest.mark.skipif(not FOLDERS, reason="outputs of the public code lie beside the project")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_network_is_that_of_the_public_code(folder):
    assert largest_difference(folder) <= 2e-5


def test_every_weight_gets_a_finite_gradient(tmp_path):
    write_model(tmp_path, THREE, ["temperature", "velocity_u", "specific_humidity"])
    network = load_atmorep(tmp_path)
    outputs = network(inputs_of(network))
    torch.stack([output.members.pow(2).mean() for output in outputs.values()]).sum().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None and torch.isfinite(weight.grad).all(), name
        assert weight.grad.abs().max() > 0 or "key_norm.bias" in name, name


def test_archive_is_read_as_its_folder(tmp_path):
    write_model(tmp_path / "model", ONE, ["temperature"])
    archive = tmp_path / "model_idtest.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "model", "model_idtest")
    unpacked = load_atmorep(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    for packed in (load_atmorep(archive), load_atmorep(tmp_path)):
        for name, value in unpacked.state_dict().items():
            assert torch.equal(value, packed.state_dict()[name])


def change_tensors(folder: Path, change) -> None:
    file = folder / "AtmoRep_idtest.mod"
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)


def test_shared_token_map_serves_all_fields_where_the_first_ones_is_zero(tmp_path):
    write_model(tmp_path, THREE, ["temperature"])
    change_tensors(tmp_path, lambda t: t["embeds_token_info.0.weight"].zero_())
    shared = torch.load(tmp_path / "AtmoRep_idtest.mod", weights_only=True)
    network = load_atmorep(tmp_path)
    for f in network.settings.fields:
        weight = network.get_parameter(f"encoders.{f.name}.embed_info.weight")
        assert torch.equal(weight, shared["embed_token_info.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("decoders.0.blocks.2.proj_out.weight"), "attentions.1.out.weight"),
        (lambda t: t.update({"encoders.0.extra": torch.ones(2)}), "encoders.0.extra"),
        (lambda t: t.update({"encoders.7.embed.weight": torch.ones(2)}), "encoders.7"),
        (lambda t: t.update({"encoders.x.embed.weight": torch.ones(2)}), "encoders.x"),
        (lambda t: t.update({"encoders": torch.ones(2)}), "encoders has no place"),
        (lambda t: t.update({"decoders.0.blocks.x.proj_out.weight": torch.ones(2)}), "blocks.x"),
        (lambda t: t.update({"tails.0.tail_nets.x.0.weight": torch.ones(2)}), "tail_nets.x"),
        (lambda t: t.update({"encoders.0.heads.9.proj_out.weight": torch.ones(2)}), "attentions.9"),
        (lambda t: t.update({"tails.0.tail_nets.0.0.bias": torch.ones(9)}), "tail.shift"),
        (lambda t: t.pop("embeds_token_info.0.bias"), "embeds_token_info.0.bias"),
        (lambda t: t.update({"embeds.0.other": torch.ones(2)}), "embeds.0.other"),
        (lambda t: t.pop("tails.0.tail_nets.1.1.weight"), "tail"),
    ],
)
def test_tensor_that_is_missing_left_over_or_odd_is_named(tmp_path, change, words):
    write_model(tmp_path, ONE, ["temperature"])
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        load_atmorep(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_att_type": "axial"}, "encoder_att_type=axial"),
        ({"decoder_self_att": True}, "decoder_self_att=True"),
        ({"decoder_cross_att_ratio": 0.0}, "decoder_cross_att_ratio"),
        ({"decoder_num_layers": 3}, "decoder_num_layers=3"),
        ({"fields": [["temperature", [1, 9, [], 0], [137], [2, 2, 3], [1, 2, 2]]]}, "width 9"),
        ({"fields": ONE * 2}, "temperature is there twice"),
        ({"encoder_num_heads": 0}, "encoder_heads=0"),
        ({"net_tail_num_nets": -1}, "members=-1"),
        ({"size_token_info_net": 8}, r"width 8 \(even, and above the 8 "),
        ({"fields": [["temperature", [1, 8, [], 0], [], [2, 2, 3], [1, 2, 2]]]}, "0 levels"),
        ({"decoder_cross_att_rate": float("nan")}, "decoder_cross_att_rate"),
        ({"encoder_num_layers": float("inf")}, "another form"),
        ({"fields_prediction": [["vorticity", 1.0]]}, "fields_prediction"),
        ({"fields": [["temperature", [1, 8]]]}, "another form"),
    ],
)
def test_settings_that_cannot_run_are_refused_by_name(tmp_path, changes, words):
    write_model(tmp_path, ONE, ["temperature"])
    file = tmp_path / "model_idtest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        load_atmorep(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_atmorep(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"model_id\*\.json"):
        load_atmorep(tmp_path)
    write_model(tmp_path, ONE, ["temperature"])
    weights = tmp_path / "AtmoRep_idtest.mod"
    whole = weights.read_bytes()
    number = whole.index(torch.load(weights, weights_only=True)["tails.0.tail_nets.1.1.weight"]
                         .numpy().tobytes()[:16])  # fmt: skip
    weights.write_bytes(whole[:number] + b"x" + whole[number + 1 :])
    with pytest.raises(ValueError, match=r"AtmoRep_idtest\.mod is damaged"):
        load_atmorep(tmp_path)
    weights.write_bytes(whole[:-4000])
    with pytest.raises(ValueError, match="truncated"):
        load_atmorep(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"AtmoRep_idtest\.mod"):
        load_atmorep(tmp_path)
    settings = tmp_path / "model_idtest.json"
    settings.write_text(json.dumps({"fields": []}))
    torch.save({}, weights)
    with pytest.raises(ValueError, match="another version"):
        load_atmorep(tmp_path)


def test_half_precision_rounds_no_date_or_place(tmp_path):
    """Year 2017 and day 201 are no numbers of 8 bits."""
    write_model(tmp_path, ONE, ["temperature"])
    network = load_atmorep(tmp_path)
    given = inputs_of(network)["temperature"]
    numbers = torch.tensor([2017.0, 201.0, 17.0, 123.0, 41.25, 271.75, 123.0, 0.25])
    given = AtmoRepInput(given.values, numbers.expand(given.token_info.shape))
    encoder, width = network.encoders["temperature"], network.settings.info_width
    whole = encoder.embedded(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder.embedded(given)
    assert torch.equal(half[..., -width:].float(), whole[..., -width:])
