"""Model folders: both layouts both ways with diffusers, and what damaged or hostile files get."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastddpm.unet.load
from fastddpm.files.atomic import write_files
from fastddpm.files.safejson import parse_object, read_object
from fastddpm.integrations.convert import read
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.unet.load import load
from fastddpm.unet.save import save_pretrained
from fastddpm.unet.unet import UNet, UNetConfig
from tests import tiny

CONFIG = UNetConfig(**{**tiny.ATTENTION, "attention_head_dim": 8, "num_class_embeds": 3, "null_class": 2})
DIFFUSION = DiffusionConfig(beta_schedule="cosine", num_timesteps=500, prediction_type="v", clip_range=None)
ATTENTION = "mid_block.attentions.0.to_q.weight"
T_AND_LABELS = (torch.tensor([3, 400]), torch.tensor([0, 1]))


@pytest.fixture
def model() -> UNet:
    torch.manual_seed(0)
    model = UNet(CONFIG, zero_init=False).eval()
    model.diffusion = DIFFUSION
    return model


@pytest.fixture
def folder(model: UNet, tmp_path: Path) -> Path:
    """A sound flat model folder, for tests to damage."""
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


def assert_same_weights(got: torch.nn.Module, want: torch.nn.Module) -> None:
    assert got.state_dict().keys() == want.state_dict().keys()
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def forget_digest(folder: Path) -> None:
    edit_config(folder, _weights_sha256=None)


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors and drop their digest, so that the next check has to find what is wrong."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    forget_digest(folder)


def write_header(folder: Path, header: bytes | dict[str, Any], *, announced: int | None = None, data: int = 0) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(content) if announced is None else announced)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(length + content + bytes(data))
    forget_digest(folder)


# What is saved is what is loaded.


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


# Interchange with diffusers.


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


# Names and folders.


def test_load_lists_shipped_models_for_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numbers", "letters"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setattr(fastddpm.unet.load, "SHIPPED", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'faces'.*shipped models: letters, numbers"):
        load("faces")


def test_load_finds_a_shipped_model_by_name(model: UNet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastddpm.unet.load, "SHIPPED", folder.parent)
    assert_same_weights(load(folder.name), model)


def test_load_names_what_a_folder_lacks(folder: Path, tmp_path: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors"):
        load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="not a folder"):
        load(folder / "config.json")


# faults.md row 35: pickles.


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl", ".PT"])
def test_load_refuses_pickles_and_names_convert(folder: Path, suffix: str) -> None:
    pickle = folder / f"model{suffix}"
    torch.save({"weight": torch.zeros(1)}, pickle)
    with pytest.raises(ValueError, match=f"model{suffix}: refused.*fastddpm convert"):
        load(pickle)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"model{suffix}: refused.*fastddpm convert"):
        load(folder)


# faults.md row 33: damaged weights, weights of another architecture.


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_load_refuses_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    forget_digest(folder)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        load(folder)


def test_load_names_the_key_whose_bytes_are_cut_off(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    forget_digest(folder)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: tensor '[a-z_0-9.]+'.*truncated"):
        load(folder)


@pytest.mark.parametrize("spelling", ["_weights_sha256", "weights_sha256"])
def test_load_verifies_sha256(folder: Path, spelling: str) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    digest = config.pop("_weights_sha256")
    assert digest == hashlib.sha256(content).hexdigest()
    (folder / "config.json").write_text(json.dumps({**config, spelling: digest}))
    load(folder)
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors.*SHA-256"):
        load(folder)


@pytest.mark.parametrize("digest", ["abc", 5, "g" * 64])
def test_load_refuses_malformed_sha256(folder: Path, digest: object) -> None:
    edit_config(folder, _weights_sha256=digest)
    with pytest.raises(ValueError, match=r"config\.json: weights_sha256"):
        load(folder)


def test_load_refuses_every_flipped_header_bit_or_loads_unharmed(model: UNet, folder: Path) -> None:
    """Without a digest, a flip in the header is found or hits what carries no meaning; nothing else comes out."""
    forget_digest(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    sound = path.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    for position in range(0, header, 211):
        content = bytearray(sound)
        content[position] ^= 1 << (position % 8)
        path.write_bytes(content)
        try:
            flipped = load(folder)
        except ValueError as error:
            assert "diffusion_pytorch_model.safetensors" in str(error)  # noqa: PT017
        else:
            assert_same_weights(flipped, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_names_the_key_that_is_not_finite(folder: Path, value: float) -> None:
    rewrite_weights(folder, lambda tensors: tensors[ATTENTION].view(-1)[3:4].fill_(value))
    with pytest.raises(ValueError, match=rf"diffusion_pytorch_model\.safetensors: {ATTENTION}.*damaged"):
        load(folder)


def test_load_names_missing_unexpected_and_mismatched_keys(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["conv_out.weigth"] = tensors.pop("conv_out.weight")
        tensors[ATTENTION] = torch.zeros(16, 15)

    rewrite_weights(folder, spoil)
    expected = (
        r"diffusion_pytorch_model\.safetensors.*1 missing: 'conv_out\.weight'; 1 unexpected: 'conv_out\.weigth'; "
        rf"1 of another shape: '{ATTENTION}' is \[16, 15\] where the configuration needs \[16, 16\]"
    )
    with pytest.raises(ValueError, match=expected):
        load(folder)


def test_load_refuses_weights_of_another_architecture(folder: Path) -> None:
    edit_config(folder, block_out_channels=[8, 24])
    with pytest.raises(ValueError, match=r"another architecture.*of another shape"):
        load(folder)


def test_load_refuses_one_parameter_under_two_names(folder: Path) -> None:
    old_name = ATTENTION.replace("to_q", "query")
    rewrite_weights(folder, lambda tensors: tensors.update({old_name: tensors[ATTENTION].clone()}))
    with pytest.raises(ValueError, match="an old and a new name"):
        load(folder)


# faults.md row 34: hostile headers.

HUGE = 2**62
HEADERS = [
    pytest.param({"header": b"{}", "announced": 2**63}, "truncated", id="length-2^63"),
    pytest.param({"header": b" " * (4 << 20)}, "header of 4194304 bytes", id="header-4-MiB"),
    pytest.param({"header": b"[" * 100_000}, "nested", id="nested"),
    pytest.param({"header": b"\xff{}"}, "JSON", id="no-utf8"),
    pytest.param({"header": b"[]"}, "object", id="list"),
    pytest.param({"header": b'{"a":{},"a":{}}'}, "'a' is given twice", id="duplicate-key"),
    pytest.param({"header": {"a": 5}}, "tensor 'a'", id="entry-is-number"),
    pytest.param({"header": {"a": {"dtype": "F32", "shape": [1]}}}, "data_offsets", id="no-offsets"),
    *(
        pytest.param({"header": {"a": {"dtype": d, "shape": s, "data_offsets": o}}, "data": 4}, message, id=name)
        for name, d, s, o, message in [
            ("complex", "C64", [1], [0, 8], "dtype 'C64'"),
            ("dtype-list", ["F32"], [1], [0, 4], "dtype"),
            ("wrapping-shape", "F32", [HUGE, 4], [0, 0], "shape"),
            ("huge-shape", "F32", [HUGE], [0, 4 * HUGE], "outside the file"),
            ("negative-shape", "F32", [-1, -1], [0, 4], "no list of sizes"),
            ("float-shape", "F32", [1.0], [0, 4], "no list of sizes"),
            ("bool-shape", "F32", [True], [0, 4], "no list of sizes"),
            ("many-dimensions", "F32", [1] * 1000, [0, 4], "no list of sizes"),
            ("reversed-offsets", "F32", [0], [4, 0], "shape"),
            ("outside", "F32", [1], [4, 8], "outside the file"),
        ]
    ),
]


@pytest.mark.parametrize(("file", "message"), HEADERS)
def test_load_refuses_hostile_headers(folder: Path, file: dict[str, Any], message: str) -> None:
    write_header(folder, **file)
    with pytest.raises(ValueError, match=rf"diffusion_pytorch_model\.safetensors.*{message}"):
        load(folder)


@pytest.mark.parametrize("count", [16_000, 200_000])
def test_load_refuses_too_many_tensors(folder: Path, count: int) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_header(folder, {f"t{i}": entry for i in range(count)})
    with pytest.raises(ValueError, match=r"at most \d+ are read"):
        load(folder)


def test_load_refuses_overlapping_tensors(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = "mid_block.resnets.0.conv1.weight", "mid_block.resnets.0.conv2.weight"
    header[second]["data_offsets"] = header[first]["data_offsets"]
    write_header(folder, header, data=len(content) - 8 - length)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        load(folder)


# faults.md row 36: hostile configurations.

CONFIG_TEXTS = [
    pytest.param('{"norm_eps": NaN}', "NaN", id="nan"),
    pytest.param('{"norm_eps": -Infinity}', "Infinity", id="infinity"),
    pytest.param('{"norm_eps": 1e999}', "too large", id="overflow"),
    pytest.param('{"layers_per_block": ' + "9" * 100_000 + "}", "JSON", id="100000-digits"),
    pytest.param('{"norm_eps": ' + "9" * 400 + "}", "int too large|finite", id="int-beyond-float"),
    pytest.param('{"norm_eps": 1e-5, "norm_eps": 1e-6}', "'norm_eps' is given twice", id="duplicate-key"),
    pytest.param('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested", id="depth-1e5"),
    pytest.param('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested", id="object-depth-1e5"),
    pytest.param('{"a": "' + '\\"' * 400_000, "JSON", id="unterminated-string"),
    pytest.param("[1, 2]", "object", id="list"),
    pytest.param("", "JSON", id="empty"),
    pytest.param("\ufeff{}", "JSON", id="byte-order-mark"),
    pytest.param('{"layers_per_block": 1000000000}', "layers_per_block", id="1e9-layers"),
    pytest.param('{"block_out_channels": [8, "16"]}', "block_out_channels", id="string-for-int"),
    pytest.param('{"block_out_channels": {"8": 16}}', "block_out_channels", id="object-for-list"),
    pytest.param('{"sample_size": [[8], [8]]}', "sample_size", id="nested-size"),
    pytest.param('{"act_fn": ["silu"]}', "act_fn", id="list-for-string"),
    pytest.param('{"weights": "../secret.safetensors"}', "unknown key 'weights'", id="unknown-key"),
    pytest.param('{"x": "' + "y" * 500_000 + '"}', "unknown key 'x'", id="long-value"),
    pytest.param('{"_class_name": "os.system"}', r"os\.system.*not supported", id="class-name"),
    pytest.param('{"_class_name": ["UNet2DModel"]}', "not supported", id="class-list"),
    pytest.param("{}", "another architecture", id="all-keys-missing"),
]


@pytest.mark.parametrize(("text", "message"), CONFIG_TEXTS)
def test_load_refuses_hostile_configurations(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


SCHEDULER_TEXTS = [
    pytest.param('{"num_train_timesteps": 1000000000}', "num_timesteps", id="1e9-steps"),
    pytest.param('{"num_train_timesteps": "many"}', "num_timesteps", id="string-for-int"),
    pytest.param('{"trained_betas": 5}', "", id="number-for-list"),
    pytest.param('{"beta_start": NaN}', "NaN", id="nan"),
    pytest.param('{"shift": 3.0}', "shift", id="unknown-key"),
]


@pytest.mark.parametrize(("text", "message"), SCHEDULER_TEXTS)
def test_load_refuses_hostile_scheduler_configurations(folder: Path, text: str, message: str) -> None:
    (folder / "scheduler_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"scheduler_config\.json.*{message}"):
        load(folder)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize(
    "solver",
    [
        *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
        *("LMSDiscreteScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "SASolverScheduler"),
        *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    ],
)
def test_a_folder_of_another_solver_gives_its_training_process(folder: Path, solver: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    process = {"beta_start": 0.002, "beta_end": 0.03, "num_train_timesteps": 300, "prediction_type": "v_prediction"}
    theirs = getattr(diffusers, solver)(**process)
    theirs.save_pretrained(folder)
    ours = load(folder).diffusion
    assert ours is not None
    torch.testing.assert_close(ours.schedule().alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-4, atol=0)
    assert ours.prediction_type == "v"
    ddpm = diffusers.DDPMScheduler.from_config(theirs.config)
    assert ours.variance_type == ddpm.config.variance_type


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_load_refuses_oversized_json_unread(folder: Path, name: str) -> None:
    with (folder / name).open("wb") as stream:
        stream.truncate(100_000_000)
    with pytest.raises(ValueError, match=f"{name}: 100000000 bytes"):
        load(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_load_refuses_weights_that_are_no_regular_file_instead_of_waiting(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        load(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="not a regular file"):
        load(folder)


def test_load_reads_the_header_of_a_huge_file_before_its_digest(folder: Path) -> None:
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as stream:
        stream.truncate(60 << 30)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: header"):
        load(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_read_object_refuses_a_pipe_instead_of_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_object(tmp_path / "config.json")


def test_parse_object_ignores_brackets_in_strings() -> None:
    text = {"a": "[" * 100 + '"\\', "b": [1, 2.5, True, None]}
    assert parse_object(json.dumps(text).encode(), source="text") == text


# faults.md row 37: links and paths that lead out of the folder.


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"])
def test_load_refuses_links_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name}: links to .*elsewhere"):
        load(folder)


def test_load_refuses_a_linked_unet_folder(model: UNet, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "pipeline", layout="pipeline")
    (tmp_path / "pipeline" / "unet").rename(tmp_path / "elsewhere")
    (tmp_path / "pipeline" / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="links to"):
        load(tmp_path / "pipeline")


def test_load_follows_links_inside_the_folder_and_in_the_hub_cache(model: UNet, folder: Path, tmp_path: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "v1.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").symlink_to("v1.safetensors")
    assert_same_weights(load(folder), model)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "scheduler_config.json"):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (folder / "v1.safetensors").rename(blobs / "cafe")
    (snapshot / "diffusion_pytorch_model.safetensors").symlink_to("../../blobs/cafe")
    assert_same_weights(load(snapshot), model)


def test_load_reads_no_path_from_model_index(model: UNet, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "pipeline", layout="pipeline")
    index = {"_class_name": "os.system", "unet": ["../../evil", "Net"], "scheduler": ["/etc", "passwd"]}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    assert_same_weights(load(tmp_path / "pipeline"), model)


# Whole or absent (faults.md rows 30 and 31).


def test_write_files_leaves_old_files_when_the_disk_is_full(
    model: UNet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    synced = []

    def fail_on_the_second(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_on_the_second)
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_load_never_takes_a_half_replaced_model_for_a_whole_one(
    model: UNet, folder: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """Killed after `moved` of three files: the old model, or an error about the pair, never a mixture."""
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    replace, count = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if len(count) == moved:
            raise KeyboardInterrupt
        count.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(model, folder)
    if moved == 0:
        assert all(torch.equal(tensor, old[name]) for name, tensor in load(folder).state_dict().items())
    else:
        with pytest.raises(ValueError, match="SHA-256"):
            load(folder)


def test_write_files_ignores_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    leftover = tmp_path / f".a.{os.getpid()}.tmp"
    leftover.write_bytes(b"half")
    write_files({tmp_path / "a": b"whole"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"whole"}


def test_load_of_a_sound_folder_warns_of_nothing(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)
