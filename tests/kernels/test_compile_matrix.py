"""Every kernel compiles for every architecture, each flag alone, and in pairs for sm_90: no spill, nothing shared."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics.compile_offline import ARCHITECTURES, Resources
from fastddpm.diagnostics.variants import (
    Variant,
    ddpm_loss_variant,
    noise_variant,
    p_sample_variant,
    q_sample_variant,
)
from fastddpm.ops.twins import Flags

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SINGLE: dict[str, dict[str, Any]] = {
    "clip": {"flags": {"clip": True}},
    "learned": {"flags": {"learned": True}},
    "guided": {"flags": {"guided": True}},
    "use_m": {"flags": {"use_m": True}},
    "use_prev": {"flags": {"use_prev": True}},
    "x0_out": {"x0_out": FP32},
    "low_out": {"low_out": BF16},
    "low_nhwc": {"low_nhwc": True, "low_out": FP16},
    "m_nhwc": {"m_nhwc": True},
    "noise_given": {"noise": "given"},
    "noise_none": {"noise": "none"},
}
EXCLUSIVE = ({"noise_given", "noise_none"}, {"low_out", "low_nhwc"})
PAIRS = [pair for pair in itertools.combinations(SINGLE, 2) if set(pair) not in EXCLUSIVE]
OTHERS = [arch for arch in ARCHITECTURES if arch != "sm_90"]


def p_sample(names: tuple[str, ...], **how: Any) -> Variant:
    """The variant for 3 x 32 x 32 with these flags and no other."""
    flags: dict[str, bool] = {}
    for name in names:
        flags |= SINGLE[name].get("flags", {})
        how |= {key: value for key, value in SINGLE[name].items() if key != "flags"}
    return p_sample_variant("+".join(names), flags=Flags(**flags), **how)


def resources(variant: Variant, arch: str) -> Resources:
    return offline.resources(offline.compile_launch(variant.launch, arch))


def check(variant: Variant, arch: str) -> None:
    used = resources(variant, arch)
    assert (used.spills, used.stack, used.shared) == (0, 0, 0)
    assert used.registers <= 128


@pytest.mark.parametrize("names", [(), *((name,) for name in SINGLE), *PAIRS], ids="+".join)
def test_p_sample_compiles_for_sm_90(names: tuple[str, ...]) -> None:
    check(p_sample(names), "sm_90")


@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize("name", SINGLE)
def test_p_sample_compiles_elsewhere(name: str, arch: str) -> None:
    check(p_sample((name,)), arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_p_sample_compiles_with_everything_at_once(arch: str) -> None:
    names = ("clip", "learned", "guided", "use_m", "use_prev", "x0_out", "low_nhwc", "m_nhwc")
    used = resources(p_sample(names, x=BF16, m=FP16), arch)
    assert (used.spills, used.shared) == (0, 0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("gradient", [False, True], ids=["sums", "gradient"])
def test_ddpm_loss_compiles(gradient: bool, arch: str) -> None:
    check(ddpm_loss_variant("v", m=BF16, x=FP16, learned=True, gradient=gradient), arch)
    check(ddpm_loss_variant("nhwc", m_nhwc=True, gradient=gradient), arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["q_sample", "noise"])
def test_noise_and_q_sample_compile(kernel: str, arch: str) -> None:
    if kernel == "q_sample":
        check(q_sample_variant("bfloat16", x=BF16, eps_out=BF16), arch)
    else:
        check(noise_variant("float32"), arch)


@pytest.mark.parametrize("aligned", [True, False])
def test_bfloat16_compiles_for_sm_75_which_has_no_such_conversion(aligned: bool) -> None:
    """Turing converts by integer arithmetic."""
    check(p_sample(("clip",), x=BF16, m=BF16, offset=0 if aligned else 1), "sm_75")


@pytest.mark.parametrize("fusion", ["0", "1"])
def test_environment_does_not_switch_contraction_on(fusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", fusion)
    compiled = offline.compile_launch(noise_variant("float32", (2, 64)).launch, "sm_90")
    assert "fma." not in compiled.assembly
    assert "mul.rn.f32" in compiled.assembly
