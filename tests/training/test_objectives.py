"""What holds for every objective: a run that is resumed ends as the unbroken one, bit for bit."""

import shutil
from pathlib import Path

import pytest
import xarray as xr

from atmossl.checkpoint_files import read_contents
from atmossl.cli import main
from tests.processes import training
from tests.training.test_resume import differing

STEPS, INTERVAL = 4, 2
OBJECTIVES = {
    "contrastive": ("objective=contrastive", "objective.loss=simsiam"),
    "atmodist": ("objective=atmodist",),
    "jepa": ("objective=jepa", "trainer.accumulate=2"),
    "dino": ("objective=dino", "objective.patch_weight=0.5", "objective.koleo_weight=0.1",
             "objective.num_prototypes=16", "trainer.accumulate=2"),
    "autoregression": ("masking=autoregression", "model.causal=true"),
    "lejepa": ("objective=jepa", "objective.anti_collapse=sigreg"),
    "combined": ("objective=combined", "objective.parts.dino.num_local=1",
                 "objective.parts.dino.num_prototypes=16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.e2e
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_the_unbroken_one(
    name: str,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Network, heads, teacher, centre, averages, optimiser and random states. What a run leaves
    that is killed after its first checkpoint is that checkpoint."""
    monkeypatch.setenv("ATMOSSL_CACHE", str(cache))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = (*OBJECTIVES[name], f"trainer.max_steps={STEPS}",
               f"trainer.checkpoint_interval={INTERVAL}",
               f"trainer.validation_interval={INTERVAL}", "model.num_layers=1")  # fmt: skip
    assert main(training(whole, *changes)) == 0
    (broken / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / f"step-{INTERVAL}.ckpt", broken / "checkpoints")
    assert main(training(broken, *changes, "resume=auto")) == 0
    one, two = (read_contents(f / "checkpoints" / "last.ckpt") for f in (whole, broken))
    assert one["global_step"] == STEPS
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert differing(one[key], two[key]) == [], key
    assert differing(one["atmossl"]["rng"], two["atmossl"]["rng"]) == []
    if name == "jepa":
        _only_its_latents_can_be_written(whole / "checkpoints" / "last.ckpt", tmp_path, capsys)
    if name == "autoregression":
        _it_goes_on_from_its_own_steps(whole / "checkpoints" / "last.ckpt", tmp_path)


def _only_its_latents_can_be_written(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    common = [f"checkpoint={checkpoint}", "init_time=1959-02-12T00", "accelerator=cpu"]
    assert main(["embed", *common, f"output={folder / 'latents.zarr'}"]) == 0
    assert main(["predict", *common, f"output={folder / 'forecast.zarr'}"]) == 2
    assert "trained with objective=jepa" in capsys.readouterr().err


def _it_goes_on_from_its_own_steps(checkpoint: Path, folder: Path) -> None:
    output = folder / "forecast.zarr"
    arguments = [f"checkpoint={checkpoint}", "init_time=1959-02-12T00", "accelerator=cpu",
                 "task.lead_time=12h", "task.rollout_time=6h", f"output={output}"]  # fmt: skip
    assert main(["predict", *arguments]) == 0
    forecast = xr.open_zarr(output, decode_timedelta=True)["temperature"]
    assert forecast.sizes["lead_time"] == 2 and bool(forecast.notnull().all())
