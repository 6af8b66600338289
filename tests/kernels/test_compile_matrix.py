"""Every kernel compiles for every architecture: no spill, nothing shared. Pairs of settings are in test_ptx_kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics.compile_offline import ARCHITECTURES
from fastddpm.diagnostics.step_cases import step_case
from fastddpm.diagnostics.variants import (
    ddpm_loss_variant,
    group_norm_variant,
    noise_variant,
    p_sample_variant,
    q_sample_variant,
)
from tests.kernels.registers import check_registers

BF16, FP16 = torch.bfloat16, torch.float16
IMAGES = (64, 3, 32, 32)
EVERYTHING = ("clip", "learned", "guided", "use_m", "history_3", "x0_out", "low_nhwc", "m_nhwc")
VARIANTS = {
    "p_sample": lambda: p_sample_variant("plain", step_case("clip", shape=IMAGES)),
    "p_sample, all": lambda: p_sample_variant("all", step_case(*EVERYTHING, shape=IMAGES, x=BF16, m=FP16)),
    "q_sample": lambda: q_sample_variant("bfloat16", x=BF16, eps_out=BF16),
    "loss": lambda: ddpm_loss_variant("v", m=BF16, x=FP16, learned=True),
    "gradient": lambda: ddpm_loss_variant("channels-last", layout="channels_last", gradient=True),
    "noise": lambda: noise_variant("float32"),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_kernels_compile_everywhere(name: str, arch: str) -> None:
    check_registers(VARIANTS[name](), arch, most=168 if "all" in name else 128)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_group_norm_compiles_everywhere(arch: str) -> None:
    """Warps add up over shared memory, and that is all that lies there."""
    variant = group_norm_variant("joined", 256, 32, skip=128, adds=True)
    used = offline.resources(offline.compile_launch(variant.launch, arch))
    assert (used.spills, used.stack) == (0, 0)
    assert used.shared <= 4096
    # 65,536 registers, 16 warps.
    assert used.registers <= 128


@pytest.mark.parametrize("layout", ["contiguous", "shifted"])
def test_bfloat16_compiles_for_sm_75_which_has_no_such_conversion(layout: str) -> None:
    """Turing converts by integer arithmetic."""
    check_registers(p_sample_variant(layout, step_case("clip", x=BF16, m=BF16, layout=layout)), "sm_75")


@pytest.mark.parametrize("fusion", ["0", "1"])
def test_environment_does_not_switch_contraction_on(fusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", fusion)
    compiled = offline.compile_launch(noise_variant("float32", (2, 64)).launch, "sm_90")
    assert "fma." not in compiled.assembly
    assert "mul.rn.f32" in compiled.assembly
