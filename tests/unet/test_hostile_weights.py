"""What damaged and hostile model folders get."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddpm.files.safejson import parse_object, read_object
from fastddpm.unet.load import load
from fastddpm.unet.unet import UNet
from tests.unet.model_folders import (
    ATTENTION,
    assert_same_weights,
    edit_config,
    forget_digest,
    rewrite_weights,
    write_header,
)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl", ".PT"])
def test_load_refuses_pickles_and_names_convert(folder: Path, suffix: str) -> None:
    pickle = folder / f"model{suffix}"
    torch.save({"weight": torch.zeros(1)}, pickle)
    with pytest.raises(ValueError, match=f"model{suffix}: refused.*fastddpm convert"):
        load(pickle)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"model{suffix}: refused.*fastddpm convert"):
        load(folder)


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
