"""What the compiled kernels cost: the bars that a change must not cross, and the command that prints them."""

from __future__ import annotations

import argparse
import json
import re
from functools import lru_cache

import pytest

pytest.importorskip("triton")

from fastddpm.cli import inspect as command
from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics import inspect, sass
from fastddpm.diagnostics import variants as kernel_variants
from fastddpm.diagnostics.gpus import find_gpu, roofline
from fastddpm.diagnostics.inspect import Report
from fastddpm.diagnostics.step_cases import step_case


@lru_cache(maxsize=1)
def catalogue() -> dict[tuple[str, str], kernel_variants.Variant]:
    return {(variant.kernel, variant.name): variant for variant in kernel_variants.variants()}


@lru_cache(maxsize=64)
def report(kernel: str, name: str, arch: str = "sm_90") -> Report:
    return inspect.inspect_variant(catalogue()[kernel, name], arch)


CONTIGUOUS = [
    ("p_sample", "float32"),
    ("p_sample", "float32, full row (c_m)"),
    ("p_sample", "bfloat16 m, bfloat16 copy out"),
    ("p_sample", "bfloat16 throughout"),
    ("q_sample", "float32, eps returned"),
    ("ddpm_loss", "epsilon"),
    ("ddpm_loss", "v, gradient"),
    ("noise", "float32"),
]


@pytest.mark.parametrize(("kernel", "name"), [*CONTIGUOUS, ("p_sample", "channels-last m"), ("p_sample", "3x8x8")])
def test_no_kernel_spills_shares_or_waits(kernel: str, name: str) -> None:
    cost = report(kernel, name)
    assert (cost.spills, cost.shared, cost.barriers, cost.avoided, cost.notes) == (0, 0, 0, (), ())


@pytest.mark.parametrize(("kernel", "name"), CONTIGUOUS)
def test_a_group_of_four_moves_in_one_access(kernel: str, name: str) -> None:
    """128 bits for float32 and 64 for the 16-bit types, x_t, x_prev, eps and a contiguous network output alike."""
    variant, cost = catalogue()[kernel, name], report(kernel, name)
    assert cost.widths
    for argument, tensor in variant.tensors.items():
        expected = {"*fp32": 128, "*bf16": 64}.get(variant.launch.signature.get(argument, ""))
        widths = {bits for direction in cost.widths.get(tensor, {}).values() for bits in direction}
        assert widths == ({expected} if expected else set()), tensor


def test_ptxas_keeps_the_widths_of_the_ptx() -> None:
    """Two groups a thread, each loaded from x_t and m and stored once; the rest are the row's columns and the key."""
    cost = report("p_sample", "float32")
    assert (cost.loads[128], cost.stores) == (4, {128: 2})
    assert report("p_sample", "bfloat16 throughout").stores == {64: 2}


def test_p_sample_keeps_its_widths_where_n_is_a_multiple_of_4_but_not_of_16() -> None:
    variant = kernel_variants.p_sample_variant("n = 4 (mod 16)", step_case("clip", shape=(64, 3 * 32 * 34 + 4)))
    cost = inspect.inspect_variant(variant, "sm_90")
    assert inspect.summarise_widths(cost.widths) == "x_t 128, m 128, x_prev 128"


@pytest.mark.parametrize("name", ["float32", "float32, full row (c_m)"])
def test_p_sample_executes_at_most_76_instructions_per_element(name: str) -> None:
    """torch.compile's kernel for the same step: 76 and three barriers."""
    cost = report("p_sample", name)
    assert cost.executed is not None
    assert cost.executed <= 76
    assert cost.registers <= 48


def test_p_sample_with_a_channels_last_output_is_one_kernel_within_the_bar() -> None:
    cost = report("p_sample", "channels-last m")
    assert cost.executed is not None
    assert cost.executed <= 77
    assert cost.widths["x_t"]["load"] == cost.widths["x_prev"]["store"] == (128, 128)


def test_noise_executes_at_most_58_instructions_per_normal() -> None:
    cost = report("noise", "float32")
    assert cost.executed is not None
    assert cost.executed <= 58


@pytest.mark.parametrize(
    ("kernel", "name", "expected"),
    [
        ("p_sample", "float32", 12),
        ("p_sample", "bfloat16 m", 10),
        ("p_sample", "bfloat16 copy out", 14),
        ("p_sample", "guided", 16),
        ("p_sample", "one older x0 (2M)", 20),
        ("p_sample", "two older x0 (3M, UniPC-2)", 24),
        ("p_sample", "three older x0 (UniPC-3)", 28),
        ("p_sample", "noise given", 16),
        ("p_sample", "bfloat16 throughout", 6),
        ("q_sample", "float32", 8),
        ("q_sample", "float32, eps returned", 12),
        ("ddpm_loss", "epsilon", 4),
        ("ddpm_loss", "epsilon, gradient", 8),
        ("ddpm_loss", "v", 8),
        ("ddpm_loss", "x_0", 8),
        ("ddpm_loss", "v, gradient", 12),
        ("noise", "float32", 4),
    ],
)
def test_bytes_per_element_follow_from_the_types(kernel: str, name: str, expected: int) -> None:
    assert catalogue()[kernel, name].bytes_per_element == expected


@pytest.mark.parametrize("name", ["H100 SXM", "H200 SXM"])
def test_bandwidth_binds_p_sample(name: str) -> None:
    cost = report("p_sample", "float32")
    assert cost.executed is not None
    roof = roofline(find_gpu(name), cost.bytes_per_element, cost.executed, cost.classes)
    assert roof.binds == "DRAM"
    assert roof.l2_elements == 50 * 2**20 // 12


def test_noise_alone_is_bound_by_issue_not_by_bandwidth() -> None:
    assert report("noise", "float32").roof == "issue"


@pytest.mark.parametrize("key", [("p_sample", "float32, full row (c_m)"), ("noise", "float32")], ids=" ".join)
def test_no_product_is_contracted_into_a_sum(key: tuple[str, str]) -> None:
    """A fused multiply-add would change bits; ptxas may fuse what PTX leaves open, so nothing is left open."""
    compiled = offline.compile_launch(catalogue()[key].launch, "sm_90")
    arithmetic = re.findall(r"^\s+((?:add|sub|mul|mad|fma)\S*\.f32)\s", compiled.assembly, re.MULTILINE)
    assert len(arithmetic) > 100
    assert {name for name in arithmetic if ".rn." not in name or name.startswith(("mad", "fma"))} == set()
    instructions, _ = sass.parse(offline.disassemble(compiled), compiled.name)
    assert [i for i in instructions if i.stem == "FFMA"] == []


def test_amd_code_is_reported_without_a_walk() -> None:
    cost = report("p_sample", "float32", "gfx942")
    assert (cost.executed, cost.roof, cost.spills) == (None, None, 0)
    assert set(cost.widths["all"]["load"]) >= {128}
    assert cost.notes


def parse_arguments(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return parser.parse_args([*arguments])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    """Two reports, measured once, that the command is made to print."""
    reports = [report("p_sample", "float32"), report("p_sample", "channels-last m")]
    monkeypatch.setattr(inspect, "inspect_all", lambda variants, arch, gpu: reports)
    return reports


def test_command_prints_a_table_of_80_columns(capsys: pytest.CaptureFixture[str], measured: list[Report]) -> None:
    assert command.run(parse_arguments()) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= command.WIDTH
    assert "H100" in printed
    assert "x_t 128, m 128, x_prev 128" in printed
    assert f"{measured[0].executed:.1f}" in printed


def test_command_prints_json_with_every_field(capsys: pytest.CaptureFixture[str], measured: list[Report]) -> None:
    assert command.run(parse_arguments("--json")) == 0
    entry = json.loads(capsys.readouterr().out)[0]
    assert set(entry) == set(measured[0].to_dict())
    assert (entry["gpu"], entry["executed"]) == ("H100 SXM", measured[0].executed)
    assert entry["widths"]["m"] == {"load": [128, 128]}


def test_command_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"'conv'.*p_sample"):
        command.run(parse_arguments("conv"))
    with pytest.raises(ValueError, match="unknown architecture 'sm_1'"):
        command.run(parse_arguments("--arch", "sm_1"))
    with pytest.raises(ValueError, match="no data sheet"):
        command.run(parse_arguments("--gpu", "GTX 1"))
    with pytest.raises(ValueError, match="is sm_90, not sm_80"):
        command.run(parse_arguments("--gpu", "H100 SXM", "--arch", "sm_80"))


@pytest.mark.parametrize("name", [name for kernel, name in catalogue() if kernel == "group_norm"])
def test_group_norm_is_bound_by_memory_at_all_shapes_of_a_unet(name: str) -> None:
    cost, joined = report("group_norm", name), "+" in name
    assert (cost.spills, cost.notes, cost.roof) == (0, (), "DRAM")
    assert cost.registers <= 128
    if not joined:
        assert cost.bytes_per_element == (8 if "residual" in name else 4)
    assert set(cost.widths["y"]["store"]) <= {64, 128}
