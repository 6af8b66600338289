"""What a UNet's call costs: kernels and bytes as Inductor lowers it for a GPU that is not there."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from fastddpm.cli import inspect as command
from fastddpm.diagnostics import lowering, network_cost
from fastddpm.diagnostics.lowering import Call
from fastddpm.diagnostics.network_cost import NORMS, RESIZING, Cost
from fastddpm.errors import BackendUnavailable
from fastddpm.unet.inference import cuda_form
from tests.tiny import tiny_unet

needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="fake CUDA tensors need a CUDA build")


ONE_LEVEL = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}


@needs_cuda_build
def test_a_fused_network_launches_what_its_layers_say() -> None:
    """Counted by hand: tensors of the normalisations as PyTorch hands them over, layers as the module lists them."""
    unet = tiny_unet(**ONE_LEVEL).to(torch.bfloat16)
    norms = [module for module in unet.modules() if isinstance(module, nn.GroupNorm)]
    convolutions = [module.kernel_size for module in unet.modules() if isinstance(module, nn.Conv2d)]
    costs = network_cost.network_cost(unet.config, 2, "sm_90", fuse=True)
    assert costs["products"].launches == convolutions.count((1, 1)) > 0
    assert costs["convolutions"].launches == len(convolutions) - costs["products"].launches
    assert costs["attention"] == costs[RESIZING] == Cost(0, 0)

    moved = 0

    class Norms(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal moved
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.fastddpm.group_norm.default:
                moved += sum(value.nbytes for value in (*args, *result) if isinstance(value, Tensor))
            return result

    form = cuda_form(unet, True)
    with Norms(), torch.no_grad():
        form(torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16), torch.zeros(2, sum(form.widths), dtype=torch.bfloat16))
    # One kernel of Inductor's own, for the last convolution's bias: it reads and writes an image, and reads the bias.
    assert costs[NORMS] == Cost(len(norms) + 1, moved + 2 * (2 * 64 * 2) + 2)


def test_a_group_that_no_program_holds_takes_two_launches() -> None:
    def call(size: int) -> Call:
        image, weight = torch.empty(1, 16, size, size, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
        arguments = (image, weight, weight, 2, 1e-5, None, None, None, None, False, True, False, "auto")
        return Call(frozenset(["group_norm"]), False, 2 * image.nbytes, arguments)

    assert network_cost._cost(call(16)) == Cost(1, 2 * 16 * 256 * 2)
    assert network_cost._cost(call(96)) == Cost(2, 3 * 16 * 96 * 96 * 2)


def test_what_inductor_fuses_is_told_apart_by_what_it_was_traced_for() -> None:
    for operators, kind in ((["add", "upsample_nearest2d"], RESIZING), (["add", "native_group_norm"], NORMS)):
        assert network_cost._kind(Call(frozenset(operators), True, 1)) == kind


def test_what_cannot_be_lowered_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="no data sheet on file for sm_99"):
        lowering.lower(lambda x: (x,), [], "sm_99")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendUnavailable, match="needs a CUDA build"):
        lowering.lower(lambda x: (x,), [], "sm_90")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(lowering, "generate", lambda *_: torch.what_has_gone)
    with pytest.raises(BackendUnavailable, match=r"not as known here \(AttributeError.*tried with torch 2\.14"):
        lowering.lower(lambda x: (x,), [], "sm_90")


def test_inspect_prints_a_network_before_and_after(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cost(config: Any, batch: int, arch: str, *, fuse: bool) -> dict[str, Cost]:
        return {kind: Cost(2 + fuse, batch * (1 + fuse) * 10**6) for kind in network_cost.KINDS}

    monkeypatch.setattr(network_cost, "network_cost", cost)
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    assert command.run(parser.parse_args(["--model", "cifar10", "--batch", "4"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cifar10, batch 4, bfloat16, sm_90:")
    assert lines[-1].split() == ["all", "10", "5.00", "15", "10.00"]
    assert command.run(parser.parse_args(["--model", "cifar10", "--json"])) == 0
    assert '"attention": [3, 32000000]' in capsys.readouterr().out
    with pytest.raises(ValueError, match="no kernel and no --gpu"):
        command.run(parser.parse_args(["p_sample", "--model", "cifar10"]))


def test_a_network_without_a_size_is_refused() -> None:
    config = dataclasses.replace(tiny_unet().config, sample_size=None)
    with pytest.raises(ValueError, match="names no sample_size"):
        network_cost.network_cost(config, 1, "sm_90", fuse=True)
