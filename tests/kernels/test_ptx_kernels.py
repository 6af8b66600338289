"""The compiled sm_90 code of the fused operations, executed on the CPU: same bits as the twins, memory as promised.

The PTX interpreter fails a test by itself on an access out of bounds or unaligned, on a read of memory that was never
written, on a race, and on an undefined value that reaches memory.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from fastddpm.ops.twins import Flags
from tests.ptx.pairs import pairwise
from tests.ptx.steps import StepCase, assert_twins_bits, run_step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MAIN = StepCase()

# What each flag of the kernel is called here, and the case that has it and nothing else.
SINGLE = {
    "clip": {"flags": Flags(clip=True)},
    "learned": {"flags": Flags(learned=True)},
    "guided": {"flags": Flags(guided=True)},
    "use_m": {"flags": Flags(use_m=True)},
    "use_prev": {"flags": Flags(use_prev=True)},
    "x0_out": {"x0_out": FP32},
    "low_out": {"low_out": BF16},
    "low_nhwc": {"low_out": FP16, "low_layout": "channels_last"},
    "m_nhwc": {"m_layout": "channels_last"},
    "noise_given": {"noise": "given"},
    "noise_none": {"noise": "none"},
}
EXCLUSIVE = ({"noise_given", "noise_none"}, {"low_out", "low_nhwc"})


def with_flags(names: tuple[str, ...], base: StepCase = MAIN) -> StepCase:
    case = base
    for name in names:
        changes = dict(SINGLE[name])
        if "flags" in changes:
            merged = {k: v or getattr(case.flags, k) for k, v in changes["flags"]._asdict().items()}
            changes["flags"] = Flags(**merged)
        case = case.but(**changes)
    return case


PAIRS = [pair for pair in itertools.combinations(SINGLE, 2) if set(pair) not in EXCLUSIVE]


@pytest.mark.parametrize("name", ["no flag", *SINGLE])
def test_each_flag_alone_has_the_twins_bits(name: str) -> None:
    assert_twins_bits(run_step(with_flags(() if name == "no flag" else (name,))))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_each_pair_of_flags_has_the_twins_bits(pair: tuple[str, str]) -> None:
    assert_twins_bits(run_step(with_flags(pair)))


@pytest.mark.parametrize("arch", [75, 80, 100, 120])
def test_code_for_other_architectures_has_the_same_bits(arch: int) -> None:
    flags = Flags(clip=True, learned=True, guided=True, use_m=True)
    assert_twins_bits(run_step(MAIN.but(flags=flags, x=BF16, m=FP16, low_out=FP32, m_layout="channels_last"), arch))


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
    "use_prev": [False, True],
    "noise": ["counter", "given", "none"],
    "x0_out": [None, FP32, BF16],
    "low_out": [None, BF16, FP32],
    "layout": ["contiguous", "channels_last", "shifted"],
    "m_layout": ["contiguous", "channels_last", "shifted"],
    "low_layout": ["contiguous", "channels_last", "shifted"],
    "shared": [False, True],
}


def mixed_cases() -> list[StepCase]:
    cases = []
    for settings in pairwise(FACTORS):
        flags = Flags(**{name: settings.pop(name) for name in Flags._fields})
        cases.append(StepCase(flags=flags, z=settings["m"], **settings))
    return cases


def test_an_expanded_state_has_the_twins_bits() -> None:
    assert_twins_bits(run_step(MAIN.but(layout="expanded", shape=(3, 3, 8, 8))))


@pytest.mark.parametrize("case", mixed_cases(), ids=str)
def test_shapes_types_layouts_and_flags_mix_pairwise(case: StepCase) -> None:
    assert_twins_bits(run_step(case))
