"""Model folders: both layouts both ways with diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastddpm.unet.load
from fastddpm.integrations.convert import read
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.unet.load import load
from fastddpm.unet.save import save_pretrained
from fastddpm.unet.unet import UNet
from tests.unet.model_folders import (
    CONFIG,
    DIFFUSION,
    T_AND_LABELS,
    assert_same_weights,
    rewrite_weights,
)


@pytest.mark.parametrize("layout", ["flat", "pipeline"])
def test_save_pretrained_then_load_gives_the_same_model(model: UNet, tmp_path: Path, layout: str) -> None:
    model.train().save_pretrained(tmp_path / "new" / "model", layout)
    again = load(tmp_path / "new" / "model")
    assert_same_weights(again, model)
    assert again.config == CONFIG
    assert again.diffusion == DIFFUSION
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_gives_float32_whatever_is_stored(model: UNet, tmp_path: Path, dtype: torch.dtype) -> None:
    save_pretrained(model, tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values()} == {dtype}
    for name, tensor in load(tmp_path).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float()), name


def test_save_pretrained_takes_channels_last_and_compiled_models(model: UNet, tmp_path: Path) -> None:
    save_pretrained(torch.compile(model.to(memory_format=torch.channels_last), backend="eager"), tmp_path)
    assert_same_weights(load(tmp_path), model)


def test_save_pretrained_writes_ho_et_al_diffusion_by_default(model: UNet, tmp_path: Path) -> None:
    model.diffusion = None
    save_pretrained(model, tmp_path)
    assert load(tmp_path).diffusion == DiffusionConfig()


def test_save_pretrained_replaces_a_model_and_leaves_other_files(model: UNet, folder: Path) -> None:
    (folder / "README.md").write_text("notes")
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    save_pretrained(model, folder)
    assert_same_weights(load(folder), model)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "scheduler_config.json",
    ]


def test_save_pretrained_refuses_to_mix_layouts(model: UNet, folder: Path) -> None:
    with pytest.raises(ValueError, match="other layout"):
        save_pretrained(model, folder, layout="pipeline")


def test_save_pretrained_refuses_other_modules_layouts_and_dtypes(model: UNet, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="'nested'"):
        save_pretrained(model, tmp_path, layout="nested")
    with pytest.raises(TypeError, match="int8"):
        save_pretrained(model, tmp_path, dtype=torch.int8)
    with torch.no_grad():
        model.conv_in.bias.fill_(1e5)
    with pytest.raises(ValueError, match=r"conv_in\.bias.*float16"):
        save_pretrained(model, tmp_path, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_pipeline_layout_loads_in_diffusers(model: UNet, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    save_pretrained(model, tmp_path, layout="pipeline")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert_same_weights(pipeline.unet, model)
    assert "not expected" not in capfd.readouterr().err
    betas = pipeline.scheduler.betas.double()
    torch.testing.assert_close(betas, DIFFUSION.schedule().betas, rtol=1e-4, atol=1e-7)  # theirs are made in float32
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        theirs = pipeline.unet(x, *T_AND_LABELS).sample
        torch.testing.assert_close(model(x, *T_AND_LABELS), theirs, rtol=1e-5, atol=1e-5)


def test_flat_layout_loads_in_diffusers(model: UNet, folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    assert_same_weights(diffusers.UNet2DModel.from_pretrained(folder), model)


def test_shipped_digits_load_in_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel.from_pretrained(fastddpm.unet.load.SHIPPED / "digits", torch_dtype=torch.float32)
    assert_same_weights(theirs, load("digits"))


def test_the_old_name_of_weights_is_read_and_replaced(model: UNet, folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "model.safetensors")
    assert_same_weights(load(folder), model)
    save_pretrained(model, folder)
    assert not (folder / "model.safetensors").exists()
    assert_same_weights(load(folder), model)


def test_load_reads_what_diffusers_saves(model: UNet, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    values = {key: value for key, value in CONFIG.to_dict().items() if key != "null_class"}
    theirs = diffusers.UNet2DModel(**values)
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_large")
    diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path / "pipeline")
    theirs.save_pretrained(tmp_path / "unet2d")
    ours = load(tmp_path / "pipeline")
    assert_same_weights(ours, theirs)
    assert ours.diffusion == DiffusionConfig(beta_schedule="cosine", variance_type="fixed_large")
    with pytest.warns(UserWarning, match=r"scheduler_config\.json"):
        alone = load(tmp_path / "unet2d")
    assert_same_weights(alone, theirs)
    assert alone.diffusion is None


def test_load_reads_old_attention_names(model: UNet, folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".attentions." in name]:
            tensor = tensors.pop(name)
            for new_part, old_part in old.items():
                name = name.replace(f".{new_part}.", f".{old_part}.")
            tensors[name] = tensor

    rewrite_weights(folder, rename)
    assert any(".proj_attn." in name for name in load_file(folder / "diffusion_pytorch_model.safetensors"))
    assert_same_weights(load(folder), model)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_folders_of_diffusers_are_read_in_shards_and_variants(
    model: UNet, tmp_path: Path, safe: bool, variant: str | None, shards: int
) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel(**{key: value for key, value in CONFIG.to_dict().items() if key != "null_class"})
    size = 10**9 if shards == 1 else f"{sum(4 * p.numel() for p in theirs.parameters()) // 2 // 1000}KB"
    folder = tmp_path / "pipeline"
    theirs.save_pretrained(folder / "unet", safe_serialization=safe, variant=variant, max_shard_size=size)
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    assert len([path for path in (folder / "unet").iterdir() if path.suffix != ".json"]) == shards
    if safe:
        assert_same_weights(load(folder), theirs)
    ours = read(folder).model
    assert ours is not None
    assert_same_weights(ours, theirs)
    next(path for path in sorted((folder / "unet").iterdir()) if path.suffix != ".json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"the others are missing|no diffusion_pytorch_model"):
        read(folder)


def test_weights_in_full_precision_are_preferred_and_two_variants_alone_are_refused(model: UNet, folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    for variant in ("fp16", "bf16"):
        (folder / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(weights.read_bytes()[:-1])
    assert_same_weights(load(folder), model)
    weights.unlink()
    with pytest.raises(ValueError, match="variants 'bf16', 'fp16'; keep one"):
        load(folder)


def test_the_average_of_a_training_folder_is_taken_and_named(model: UNet, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import EMAModel

    theirs = diffusers.UNet2DModel(**{key: value for key, value in CONFIG.to_dict().items() if key != "null_class"})
    ema = EMAModel(theirs.parameters(), model_cls=diffusers.UNet2DModel, model_config=theirs.config)
    average = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    with torch.no_grad():
        theirs.conv_in.weight.add_(1.0)
    theirs.save_pretrained(tmp_path / "unet")
    ema.save_pretrained(tmp_path / "unet_ema")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.warns(UserWarning, match=r"took the moving average in unet_ema/; weights='last'"):
        taken = load(tmp_path)
    assert all(torch.equal(tensor, average[name]) for name, tensor in taken.state_dict().items())
    assert_same_weights(load(tmp_path, weights="last"), theirs)
