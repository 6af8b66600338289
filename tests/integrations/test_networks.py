"""Networks in checkpoints: found wherever a trainer keeps them, the average before the last weights, or a question."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastddpm
from fastddpm.cli import main
from fastddpm.files.checkpoints import Checkpoint
from fastddpm.integrations.convert import read
from fastddpm.integrations.lucidrains.buffers import read_diffusion
from fastddpm.integrations.lucidrains.tables import SCHEDULES, make_buffers
from fastddpm.integrations.openai.unet_weights import OpenAIFlags
from tests.integrations.ho_unet import HoUNet
from tests.integrations.openai_unet import UNetModel
from tests.tiny import RGB, tiny_unet

State = dict[str, Tensor]


@pytest.fixture
def last() -> State:
    return dict(tiny_unet(RGB).state_dict())


@pytest.fixture
def average(last: State) -> State:
    return {name: tensor + 1.0 for name, tensor in last.items()}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny_unet(RGB).save_pretrained(tmp_path / "architecture")
    return tmp_path / "architecture" / "config.json"


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def ema_model(state: State) -> dict[str, Any]:
    """diffusers' EMAModel.state_dict()."""
    return {"decay": 0.9, "optimization_step": 7, "use_ema_warmup": False, "shadow_params": list(state.values())}


def lightning(last: State, average: State) -> dict[str, Any]:
    states = {**prefixed(last, "model."), **prefixed(average, "ema_model.")}
    return {"state_dict": states, "epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}]}


ALONE: dict[str, Callable[[State], Any]] = {
    "bare": lambda last: last,
    "list": lambda last: [last, 3],
    "model_state_dict": lambda last: {"model_state_dict": last, "optimizer_state_dict": {"state": {}}},
    "module": lambda last: prefixed(last, "module."),
    "orig_mod": lambda last: {"unet": prefixed(last, "_orig_mod.module.")},
    "deep": lambda last: {"state": {"nets": [{"eps": prefixed(last, "net.unet.")}]}},
    "beside-an-autoencoder": lambda last: {
        "state_dict": {
            **prefixed(last, "model.unet."),
            "first_stage_model.encoder.conv_in.weight": torch.zeros(4, 3, 3, 3),
            "first_stage_model.encoder.down.0.block.0.conv1.weight": torch.zeros(4, 4, 3, 3),
        }
    },
}
BOTH: dict[str, Callable[[State, State], Any]] = {
    "model-ema": lambda last, average: {"model": last, "ema": average},
    "unet-unet_ema": lambda last, average: {"unet": last, "unet_ema": average},
    "ema_state_dict": lambda last, average: {"model_state_dict": last, "ema_state_dict": prefixed(average, "module.")},
    "lightning": lightning,
    "EMAModel": lambda last, average: {"model": last, "ema": ema_model(average)},
    "integer-keys": lambda last, average: {"model": last, "ema": dict(enumerate(average.values()))},
    "AveragedModel": lambda last, average: {
        "model": last,
        "other": {**prefixed(average, "module."), "n_averaged": torch.tensor(5)},
    },
    "LitEma": lambda last, average: {
        "state_dict": {
            **prefixed(last, "model.diffusion_model."),
            **{f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in average.items()},
        }
    },
    "ema_pytorch": lambda last, average: {
        "model": last,
        "ema": {**prefixed(average, "ema_model."), **prefixed(last, "online_model."), "step": torch.tensor(3)},
    },
}


@pytest.mark.parametrize("layout", ALONE)
def test_a_network_is_found_under_any_prefix_and_nesting(
    tmp_path: Path, last: State, config: Path, layout: str
) -> None:
    torch.save(ALONE[layout](last), tmp_path / "a.pt")
    model = read(tmp_path / "a.pt", config=config).model
    assert model is not None
    assert all(torch.equal(tensor, last[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_with_objects_is_taken_as_the_message_says(
    tmp_path: Path, last: State, average: State, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lightning writes them: callbacks and hyperparameters are objects of its own and its user's classes."""
    content = BOTH["LitEma"](last, average) | {"callbacks": {"checkpoint": types.SimpleNamespace(best=0.1)}}
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"it needs 'types\.SimpleNamespace'") as refusal:
        read(tmp_path / "last.ckpt", config=config)
    monkeypatch.chdir(tmp_path)
    exec(str(refusal.value)[str(refusal.value).index("torch.save(") :], {"torch": torch, "checkpoint": content})
    model = read("weights.pt", config=config).model
    assert model is not None
    assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", BOTH)
def test_the_average_is_taken_unless_the_last_weights_are_asked_for(
    tmp_path: Path, last: State, average: State, config: Path, layout: str
) -> None:
    torch.save(BOTH[layout](last, average), tmp_path / "a.pt")
    for weights, expected in (("average", average), ("last", last)):
        converted = read(tmp_path / "a.pt", config=config, weights=weights)  # type: ignore[arg-type]
        assert converted.model is not None
        assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.model.state_dict().items())
        assert converted.taken is not None
        assert converted.taken.average == (weights == "average")
        assert any(other.average != converted.taken.average for other in converted.others)


def test_what_cannot_be_decided_is_asked_and_answered_by_a_prefix(
    tmp_path: Path, last: State, average: State, config: Path, capsys: Any
) -> None:
    torch.save({"a": last, "b": {"net": average}}, tmp_path / "a.pt")
    arguments = ["convert", str(tmp_path / "a.pt"), str(tmp_path / "out"), "--config", str(config)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "2 networks to take" in error
    assert "'a.': UNet2DModel (diffusers)" in error
    assert "'b.net.': UNet2DModel (diffusers)" in error
    assert main([*arguments, "--prefix", "b.net"]) == 0
    assert "taken: 'b.net.'" in capsys.readouterr().out
    assert torch.equal(fastddpm.load(tmp_path / "out").conv_in.weight, average["conv_in.weight"])
    with pytest.raises(ValueError, match=r"0 networks with prefix 'c'.*'b\.net\.'"):
        read(tmp_path / "a.pt", config=config, prefix="c")


def test_more_networks_than_are_kept_in_a_file_are_refused(tmp_path: Path) -> None:
    names = ("time_embedding.linear_1.weight", "conv_in.weight")
    state = {f"{i}.{name}": torch.zeros(1) for i in range(65) for name in names}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="65 networks; at most 64"):
        read(tmp_path / "a.pt")


def test_safetensors_outside_a_folder_are_read(tmp_path: Path, last: State, config: Path) -> None:
    save_file({**prefixed(last, "unet."), "step": torch.tensor([3])}, tmp_path / "checkpoint.safetensors")
    model = read(tmp_path / "checkpoint.safetensors", config=config).model
    assert model is not None
    assert torch.equal(model.conv_in.weight, last["conv_in.weight"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model.diffusion_model."])
def test_openai_networks_are_found_under_a_prefix(tmp_path: Path, prefix: str) -> None:
    theirs = UNetModel().w
    torch.save({"state_dict": prefixed(theirs, prefix)}, tmp_path / "a.pt")
    converted = read(tmp_path / "a.pt", flags=OpenAIFlags(num_heads=2))
    assert converted.model is not None
    assert torch.equal(converted.model.conv_in.weight, theirs["input_blocks.0.0.weight"])
    assert converted.model.diffusion == fastddpm.DiffusionConfig(variance_type="fixed_large")


def test_a_latent_diffusion_file_gives_its_own_betas(tmp_path: Path) -> None:
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    buffers = {
        name: tensor for name, tensor in make_buffers(betas, "pred_noise", None).items() if name != "loss_weight"
    }
    state = {**buffers, **prefixed(UNetModel().w, "model.diffusion_model.")}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    diffusion = read(tmp_path / "a.ckpt", flags=OpenAIFlags(num_heads=2)).model.diffusion
    assert diffusion is not None
    assert diffusion.trained_betas == tuple(betas.float().double().tolist())
    assert diffusion.prediction_type == "epsilon"


@pytest.mark.parametrize("layout", ["bare", "list-of-five"])
def test_ho_et_al_networks_compute_the_same(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    raw, theirs = HoUNet(), HoUNet().eval()
    states = [prefixed(dict(raw.state_dict()), "module."), {"state": {}}, 3, 400, theirs.state_dict()]
    torch.save(theirs.state_dict() if layout == "bare" else states, tmp_path / "ckpt.pth")
    converted = read(tmp_path / "ckpt.pth")
    assert converted.model.diffusion == fastddpm.DiffusionConfig(variance_type="fixed_large")
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 777])
    with torch.no_grad():
        expected, actual = theirs.double()(x, t), converted.model.double()(x, t)
    assert float(expected.abs().max()) > 0.1
    assert float((actual - expected).abs().max()) < 1e-6
    assert converted.model.config.block_out_channels == (32, 64, 64)


@pytest.mark.parametrize("loss", ["p2_loss_weight", "none"])
def test_lucidrains_files_that_do_not_say_what_is_predicted_ask(tmp_path: Path, loss: str) -> None:
    state = make_buffers(SCHEDULES["cosine"](100), "pred_noise", None)
    del state["loss_weight"]
    if loss != "none":
        state[loss] = torch.ones(100)
    torch.save({"step": 1, "model": state, "ema": prefixed(state, "ema_model.")}, tmp_path / "model-1.pt")
    checkpoint = Checkpoint(tmp_path / "model-1.pt")
    with pytest.raises(ValueError, match=r"without a loss_weight it does not say.*epsilon"):
        read_diffusion(checkpoint, "model.", None, None)
    diffusion = read_diffusion(checkpoint, "model.", "epsilon", None)
    betas = tuple(state["betas"].double().tolist())
    assert diffusion == fastddpm.DiffusionConfig(trained_betas=betas, num_timesteps=100)


def test_lucidrains_loss_weights_of_another_length_or_prediction_are_refused(tmp_path: Path) -> None:
    state = make_buffers(SCHEDULES["cosine"](100), "pred_v", None)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="predicts v by its loss_weight, not epsilon"):
        read_diffusion(Checkpoint(tmp_path / "a.pt"), "", "epsilon", None)
    torch.save({**state, "loss_weight": torch.ones(50)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="'loss_weight' differ in length"):
        read_diffusion(Checkpoint(tmp_path / "a.pt"), "", None, None)
    torch.save({**state, "loss_weight": torch.rand(100)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="loss_weight fits 0 objectives"):
        read_diffusion(Checkpoint(tmp_path / "a.pt"), "", None, None)
