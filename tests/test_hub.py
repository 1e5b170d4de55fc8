"""Checkpoints as folders of a model hub: the same predictions, hashes, a hub on loopback."""

import hashlib
import json
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

import pytest
import torch

import atmossl
from atmossl.checkpoint_files import (
    CARD,
    CONFIG,
    WEIGHTS,
    downloaded,
    read_hub_folder,
    write_hub_folder,
    write_sealed,
)
from atmossl.cli import main
from atmossl.commands.export import exported
from atmossl.data.catalog import catalog_entry
from atmossl.inference.checkpoint import PACKAGED, checkpoint_path, load_checkpoint
from atmossl.value_faults import listed

hub_constants = pytest.importorskip("huggingface_hub.constants")

SMALL = Path(__file__).parent / "checkpoints" / "format_2.ckpt"
COMMIT = "a" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "exported"
    assert main(["export", f"checkpoint={SMALL}", f"hub={path}"]) == 0
    return path


def test_folder_loads_as_the_exported_file_does(folder: Path, tmp_path: Path) -> None:
    assert main(["export", f"checkpoint={SMALL}", f"output={tmp_path / 'small.ckpt'}"]) == 0
    from_folder, from_file = (
        load_checkpoint(str(folder)),
        load_checkpoint(str(tmp_path / "small.ckpt")),
    )
    assert (
        from_folder.checkpoint_record == from_file.checkpoint_record
        and from_folder.specs == from_file.specs
    )
    for name, value in from_file.model.state_dict().items():
        assert torch.equal(from_folder.model.state_dict()[name], value), name
    again = tmp_path / "again"  # from a folder to a folder
    assert main(["export", f"checkpoint={folder}", f"hub={again}"]) == 0
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert load_checkpoint(str(again)).digest == from_folder.digest


def test_record_comes_back_as_it_was(tmp_path: Path) -> None:
    """JSON alone knows neither tuples, numbers as names, infinities nor tensors."""
    record = {
        "format": 2, "tuple": (1, (2.5, None)), "numbers": {137: "a", 96: (True,)},
        "limits": [float("inf"), -float("inf")], "tensor": torch.arange(3), "__tuple__": "a name",
    }  # fmt: skip
    weights = {"ema.module.weight": torch.ones(2, 3, dtype=torch.float16).T}
    write_hub_folder(tmp_path / "one", {"state_dict": weights, "atmossl": record})
    contents, _ = read_hub_folder(tmp_path / "one")
    tensor = contents["atmossl"].pop("tensor")
    assert torch.equal(tensor, record.pop("tensor")) and contents["atmossl"] == record
    assert torch.equal(contents["state_dict"]["ema.module.weight"], weights["ema.module.weight"])
    plain = json.loads((tmp_path / "one" / CONFIG).read_text(), parse_constant=pytest.fail)
    assert plain["library"] == "atmossl"


def test_card_tells_data_masks_licence_and_hashes(folder: Path) -> None:
    card = (folder / CARD).read_text()
    record = exported([str(SMALL)])["atmossl"]
    config = json.loads((folder / CONFIG).read_text())
    for text in (
        record["statistics"]["primary"]["period"], "CC BY-SA 4.0", "Kochkov et al.",
        "temperature, at 500",
        "5 steps, 8 rows, 16 columns", json.dumps(record["config"]["masking"], default=str),
        config["weights"]["sha256"],
    ):  # fmt: skip
        assert text in card, text


def test_card_has_the_scores_of_the_checkpoint_s_own_report(tmp_path: Path, capsys) -> None:
    report = tmp_path / "report"
    report.mkdir()
    digest = load_checkpoint(str(SMALL)).digest
    scores = {"forecast_vs_persistence": 0.8, "forecast_vs_persistence_interval": [0.7, 0.9]}
    (report / "figures.json").write_text(json.dumps(scores))
    (tmp_path / "one").mkdir()  # an empty folder is no output
    how = f"## How to reproduce\n\natmossl evaluate every=4\n\n- checkpoint: x, digest {digest}\n"
    (report / "summary.md").write_text(how)
    arguments = ["export", f"checkpoint={SMALL}", f"hub={tmp_path / 'one'}", f"report={report}"]
    assert main(arguments) == 0
    card = (tmp_path / "one" / CARD).read_text()
    assert "| forecast_vs_persistence | 0.8 | [0.7, 0.9] |" in card
    assert "atmossl evaluate every=4" in card
    (report / "summary.md").write_text(how.replace(digest, "0" * 16))
    arguments[2] = f"hub={tmp_path / 'two'}"
    assert main(arguments) == 2 and "of another checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("name", PACKAGED)
def test_checkpoint_of_the_package_is_a_folder_for_a_hub(name: str, tmp_path: Path) -> None:
    folder, trained = checkpoint_path(name), load_checkpoint(name)
    assert sorted(path.name for path in folder.iterdir()) == [CARD, CONFIG, WEIGHTS]
    card = (folder / CARD).read_text()
    for file in (CONFIG, WEIGHTS):
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() in card, file
    entry, config = catalog_entry(trained.data), trained.checkpoint_record["config"]
    for text in (
        "license: apache-2.0", entry.licence.strip(), entry.citation.strip(), *trained.variables,
        f"at {listed(trained.levels)} hPa",
        trained.checkpoint_record["statistics"]["primary"]["period"],
        "5.625 x 5.625 degrees", json.dumps(config["masking"]), "## Citation",
    ):  # fmt: skip
        assert text in card, text
    assert main(["export", f"checkpoint={name}", f"hub={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_checkpoint_that_the_wheel_lacks_says_where_it_is(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="repository.*atmossl/assets/reference_joint$"):
        checkpoint_path("default_joint")


def test_members_of_the_joint_checkpoint_differ_from_cell_to_cell() -> None:
    """Members of a tail are put in an order in which whole regions depart together."""
    dataset, found = atmossl.open_data("sample", split="test"), {}
    for name in ("default_joint", "default"):
        time = "1959-02-12T00"
        predicted = atmossl.load(name).predict("temporal_interpolation", dataset, time, tilings=1)
        field = predicted["temperature"].sel(level=500).isel(time=0)
        departure = field - field.mean("member")
        step = departure.roll(longitude=1) - departure
        found[name] = float((step**2).mean() / (2 * (departure**2).mean()))
    assert found["default_joint"] > 2 * found["default"]


def damage(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


def change_config(folder: Path, **changes) -> None:
    values = json.loads((folder / CONFIG).read_text())
    values.pop("sha256_of_values")
    write_sealed(folder / CONFIG, {**values, **changes})


class Harmful:
    """Writes a file as soon as it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def with_pickle(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Harmful(folder.parent / "harm")))
    seal_weights(folder)


def seal_weights(folder: Path) -> None:
    """Make the configuration fit what now are the weights, as an attacker would."""
    contents = (folder / WEIGHTS).read_bytes()
    sha256 = hashlib.sha256(contents).hexdigest()
    change_config(folder, weights={"bytes": len(contents), "sha256": sha256})


def with_endless_header(folder: Path) -> None:
    contents = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + contents[8:])
    seal_weights(folder)


def with_record(folder: Path, **changes) -> None:
    record = json.loads((folder / CONFIG).read_text())["record"]
    change_config(folder, record={**record, **changes})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: damage(f / WEIGHTS), "model.safetensors does not match its checksum"),
        (lambda f: damage(f / CONFIG), "config.json does not match its checksum"),
        (lambda f: (f / WEIGHTS).unlink(), "model.safetensors is missing"),
        (lambda f: (f / CONFIG).unlink(), "config.json is missing"),
        (with_pickle, "model.safetensors is no such file"),
        (with_endless_header, "model.safetensors is no such file"),
        (lambda f: change_config(f, format=99), "form 99"),
        (lambda f: change_config(f, library="other"), "another library"),
        (lambda f: change_config(f, weights="/etc/passwd"), "checksum"),
        (lambda f: (f / CONFIG).write_text("[" * 100_000), "config.json"),
        (lambda f: with_record(f, a={"__tensor__": "/etc/passwd"}), "another form"),
        (lambda f: with_record(f, model={"os.system": "touch harm"}), "makes no network"),
        (lambda f: with_record(f, network="os.system"), "code of the package os"),
        (lambda f: with_record(f, format=99), "format 99"),
    ],
)  # fmt: skip
def test_damaged_and_malicious_folders_are_refused_and_nothing_runs(
    folder: Path, change, words: str, capsys
) -> None:
    change(folder)
    with pytest.raises(ValueError, match="checkpoint=.*|the network") as refusal:
        load_checkpoint(str(folder))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["exported"]
    assert main(["info", f"checkpoint={folder}"]) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and nobody to ask."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    ask(monkeypatch, "http://127.0.0.1:9")
    return tmp_path / "cache"


def ask(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(hub_constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with one model, `owner/name`, and a file in it that no checkpoint has.
    The value lists what it was asked for."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()} | {"evil.pkl": b"evil"}
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            name = self.path.rpartition("/")[2]
            if "owner/name" not in self.path or "none" in self.path:
                self.send_error(404)
                return
            if "/tree/" in self.path:
                entries = [{"type": "file", "path": n, "size": len(b), "oid": "b" * 40}
                           for n, b in files.items()]  # fmt: skip
                body = json.dumps(entries).encode()
            elif "/api/" in self.path:
                names = [{"rfilename": key} for key in files]
                body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": names}).encode()
            else:
                body = files[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ask(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.filterwarnings("default")  # the hub's client warns of its own doings
def test_model_of_a_hub_is_fetched_once_and_kept(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, monkeypatch) as asked:
        model = atmossl.load("hf://owner/name", device="cpu")
        assert model.trained.digest == load_checkpoint(str(folder)).digest
        assert model.trained.checkpoint_record["hub"] == f"hf://owner/name@{COMMIT}"
        pinned = downloaded(f"hf://owner/name@{COMMIT}")
        assert sorted(path.name for path in pinned.iterdir()) == [CARD, CONFIG, WEIGHTS]
        assert not [path for path in asked if "evil" in path]
        with pytest.raises(ValueError, match="hf://owner/name@none could not be fetched"):
            downloaded("hf://owner/name@none")
    assert downloaded("hf://owner/name") == pinned  # nobody answers any more
    (cache / "models--owner--name" / "blobs" / WEIGHTS).write_bytes(b"changed")
    with pytest.raises(ValueError, match="checkpoint=.* is damaged"):
        load_checkpoint("hf://owner/name")


@pytest.mark.usefixtures("cache")
def test_no_network_and_no_copy_is_told_in_one_line(capsys) -> None:
    assert main(["info", "checkpoint=hf://owner/name"]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("atmossl info: checkpoint=hf://owner/name could not be fetched")
    assert "\n" not in line
    for name in ("hf://name", "hf://", "hf://a/b/c", "hf://../..@main@x"):
        with pytest.raises(ValueError, match="valid: hf://OWNER/NAME"):
            downloaded(name)


def test_offline_mode_asks_nobody(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, monkeypatch) as asked:
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="hf://owner/name could not be fetched"):
            downloaded("hf://owner/name")
        snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
        snapshot.parent.mkdir(parents=True)
        folder.rename(snapshot)
        (cache / "models--owner--name" / "refs").mkdir()
        (cache / "models--owner--name" / "refs" / "main").write_text(COMMIT)
        assert load_checkpoint("hf://owner/name").checkpoint_record["hub"].endswith(COMMIT)
        assert asked == []
