"""The compiled sm_90 code of the fused operations, executed on the CPU: same bits as the twins, memory as promised.

The PTX interpreter fails a test by itself on an access out of bounds or unaligned, on a read of memory that was never
written, on a race, and on an undefined value that reaches memory.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastddpm.diagnostics.step_cases import StepCase, setting_cases, step_case
from fastddpm.diagnostics.variants import p_sample_variant
from tests.kernels.registers import check_registers
from tests.ops.pairs import all_pairs
from tests.ptx.steps import assert_twins_bits, run_step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MAIN = StepCase(shape=(2, 3, 32, 32))


@pytest.mark.parametrize("case", setting_cases(shape=MAIN.shape), ids=str)
def test_each_pair_of_settings_has_the_twins_bits_and_stays_in_registers(case: StepCase) -> None:
    assert_twins_bits(run_step(case))
    check_registers(p_sample_variant(str(case), case), "sm_90")


@pytest.mark.parametrize("arch", [75, 80, 100, 120])
def test_code_for_other_architectures_has_the_same_bits(arch: int) -> None:
    case = step_case("clip", "learned", "guided", "use_m", "history_3", "m_nhwc", shape=MAIN.shape)
    assert_twins_bits(run_step(case.but(x=BF16, m=FP16, low_out=FP32), arch))


# Elements per sample 1, 2, 3, 4, 5, 1023 and 1025; planes that are whole groups and planes that are not; one sample in
# a tile, several, and several tiles in a sample.
SHAPES = [
    (2, 1, 1, 1),
    (3, 2, 1, 1),
    (2, 1, 3, 1),
    (5, 2, 2, 1),
    (1, 5, 1, 1),
    (2, 3, 11, 31),
    (1, 5, 5, 41),
    (3, 3, 8, 8),
    (2, 3, 7, 4),
    (9, 2, 2, 2),
    (2, 3, 32, 32),
]
FACTORS = {
    "shape": SHAPES,
    "x": [FP32, BF16, FP16],
    "m": [FP32, BF16, FP16],
    "clip": [False, True],
    "learned": [False, True],
    "guided": [False, True],
    "use_m": [False, True],
    "history": [0, 1, 2, 3],
    "noise": ["counter", "given", "none"],
    "x0_out": [None, FP32, BF16],
    "low_out": [None, BF16, FP32],
    "layout": ["contiguous", "channels_last", "shifted"],
    "m_layout": ["contiguous", "channels_last", "shifted"],
    "low_layout": ["contiguous", "channels_last", "shifted"],
    "shared": [False, True],
}


def test_an_expanded_state_has_the_twins_bits() -> None:
    assert_twins_bits(run_step(MAIN.but(layout="expanded", shape=(3, 3, 8, 8))))


MIXED = [StepCase().but(**settings, z=settings["m"]) for settings in all_pairs(FACTORS)]


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_shapes_types_layouts_and_flags_mix_pairwise(case: StepCase) -> None:
    assert_twins_bits(run_step(case))
