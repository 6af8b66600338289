"""``fastddpm profile``: ranges, breakdown, and the commands it prints."""

from __future__ import annotations

import contextlib
import copy
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastddpm.benchmarks.peers import networks
from torch.profiler import ProfilerActivity, profile

from fastddpm.cli import build_parser, main
from fastddpm.cli.profile import _commands, command
from fastddpm.diagnostics import profile as profiling
from fastddpm.machine import torch_compile
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.step import StaticStep
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.ddpm import ddpm_table

pytestmark = pytest.mark.usefixtures("still_generators")

STEPS = 3
ARGUMENTS = ["profile", "--model", "tiny", "--batch", "2", "--steps", str(STEPS), "--device", "cpu"]


def make_sampler(kind: type[Sampler] = profiling.RangedSampler) -> Any:
    table = ddpm_table(Schedule.linear(1000), steps=STEPS)
    return kind(networks.build("tiny"), table, networks.shape("tiny"), compile=False)


@pytest.fixture(scope="module")
def profiled() -> profile:
    found = profiling.run_profile(make_sampler(), {"seeds": [0, 1]})
    assert found is not None
    return found


def test_profile_names_every_step(profiled: profile) -> None:
    counts = {event.key: event.count for event in profiled.key_averages()}
    for name in (profiling.STEP, profiling.UNET, profiling.P_SAMPLE):
        assert counts[name] == STEPS
    assert counts[profiling.SAMPLE] == 1


def test_breakdown_adds_up_to_the_whole_loop(profiled: profile) -> None:
    found = profiling.breakdown(profiled)
    parts = (found.unet, found.p_sample, found.rest, found.gaps)
    assert all(part.host_ms >= 0 for part in parts)
    assert sum(part.host_ms for part in parts) == pytest.approx(found.total.host_ms, rel=1e-6)
    assert found.steps == STEPS
    assert found.unet.host_ms > 0


def test_breakdown_without_a_loop_raises() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as empty:
        torch.ones(1).add(1)
    with pytest.raises(ValueError, match="no sampling steps"):
        profiling.breakdown(empty)


def test_profile_names_the_kernels_of_a_compiled_network(monkeypatch: pytest.MonkeyPatch) -> None:
    # The fused step stays eager: its kernels may have been compiled before, without names.
    monkeypatch.setattr(torch_compile, "has_cpp_compiler", lambda: False)
    table = ddpm_table(Schedule.linear(1000), steps=STEPS)
    found = profiling.run_profile(
        profiling.RangedSampler(lambda x, t: x.cos(), table, (8,), compile=True), {"seeds": [0]}
    )
    assert found is not None
    assert any("cpp_fused" in event.key for event in found.key_averages())


def test_noise_is_drawn_within_the_fused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    within: list[list[str]] = []
    opened: list[str] = []

    @contextlib.contextmanager
    def named(name: str) -> Iterator[None]:
        opened.append(name)
        yield
        opened.pop()

    draw = StaticStep._noise
    monkeypatch.setattr(StaticStep, "_noise", lambda self, m: within.append([*opened]) or draw(self, m))
    monkeypatch.setattr(profiling, "record_function", named)
    make_sampler().sample(seeds=[0])
    assert within == [[profiling.STEP, profiling.P_SAMPLE]] * STEPS


def test_breakdown_takes_host_times_from_the_host(profiled: profile) -> None:
    """On CUDA, a range is an event of the host and one of the device, of the same name."""
    host = profiled.key_averages()
    device = [copy.copy(event) for event in host if event.key == profiling.UNET]
    for event in device:
        event.device_type, event.cpu_time_total = torch.autograd.DeviceType.CUDA, 0
    both = SimpleNamespace(key_averages=lambda: [*host, *device])
    assert profiling.breakdown(both) == profiling.breakdown(profiled)  # type: ignore[arg-type]


def test_profiled_loop_draws_the_same_samples() -> None:
    assert torch.equal(make_sampler().sample(seeds=[3]), make_sampler(Sampler).sample(seeds=[3]))


def test_profile_writes_a_chrome_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "new" / "trace.json"
    assert main([*ARGUMENTS, "--trace", str(trace)]) == 0
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {profiling.STEP, profiling.UNET, profiling.P_SAMPLE} <= names
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 and str(tmp_path) not in line] == []
    assert any(line.startswith("UNet") for line in lines)


def test_profile_json_has_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--json", "--trace", str(tmp_path / "trace.json")]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["steps"] == STEPS
    assert all(kernel in found["commands"]["ncu"] for kernel in profiling.KERNELS)


def test_commands_repeat_the_run() -> None:
    options = ["--sampler", "ddim", "--dtype", "bfloat16", "--device", "cuda:1", "--compile", "off", "--cuda-graph"]
    given = build_parser().parse_args([*ARGUMENTS, *options])
    words = shlex.split(command(given))
    repeated = build_parser().parse_args(words[words.index("profile") :])
    assert repeated == given


def test_profile_of_a_graph_without_cuda_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--cuda-graph"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_ranges_only_writes_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace.json"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*ARGUMENTS, "--ranges-only", "--trace", str(trace)]) == 0
    assert not trace.exists()
    assert capsys.readouterr().err == "fastddpm: profiling 3 steps of tiny ...\n"


def test_commands_can_be_pasted() -> None:
    command = "python -m fastddpm profile --model digits --batch 16 --steps 10 --dtype float32 --sampler ddpm"
    for tool, text in profiling.nsight_commands(command).items():
        lines = _commands({tool: text})
        assert max(map(len, lines)) <= 80
        assert shlex.split(" ".join(line.rstrip("\\") for line in lines)) == shlex.split(text)
        assert shlex.split(text)[0] == tool
