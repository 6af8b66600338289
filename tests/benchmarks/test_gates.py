"""The gates: a right result passes, and each kind of wrong one fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastddpm.benchmarks import bench_sampling as sampling
from fastddpm.benchmarks.counts import step_counts
from fastddpm.benchmarks.harness import gate, loop_gate
from fastddpm.benchmarks.harness.case import Case, find
from fastddpm.benchmarks.harness.inputs import counter
from fastddpm.benchmarks.peers import networks
from torch import Tensor

from fastddpm import ops
from fastddpm.noise.v1 import STREAM_REVERSE

LOOP = Case("sampling", 2, networks.shape("tiny"), "tiny", 4)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """A right chain, from the plain loop."""
    return sampling.BENCHMARK.provider("PyTorch").build(LOOP).evaluate()


def judge(found: dict[str, Tensor]) -> bool:
    return loop_gate.check(LOOP, sampling.BENCHMARK.provider("PyTorch"), found).ok


def test_chain_passes_the_plain_loop(recorded: dict[str, Tensor]) -> None:
    assert judge(recorded)


@pytest.mark.parametrize("i", range(1, 5))
def test_chain_fails_where_one_step_is_wrong(i: int, recorded: dict[str, Tensor]) -> None:
    x = recorded["x"].clone()
    x[i, 1, 0, 3, 3] += 0.05
    assert not judge(recorded | {"x": x})


def test_chain_fails_on_nan(recorded: dict[str, Tensor]) -> None:
    x = recorded["x"].clone()
    x[2, 0, 0, 0, 0] = float("nan")
    assert not judge(recorded | {"x": x})


def test_chain_fails_on_the_wrong_noise(recorded: dict[str, Tensor]) -> None:
    assert not judge(recorded | {"z": recorded["z"].flip(0)})


def test_chain_fails_on_missing_steps(recorded: dict[str, Tensor]) -> None:
    assert not judge({name: values[:-1] for name, values in recorded.items()})


def test_chain_fails_on_bfloat16_under_the_name_of_float32(recorded: dict[str, Tensor]) -> None:
    network = networks.build("tiny").to(torch.bfloat16)
    found = loop_gate.recorded(LOOP, lambda x, t: network(x.bfloat16(), t).float())
    assert not judge(found)
    assert loop_gate.check(LOOP, sampling.BENCHMARK.provider("fastddpm, bf16"), found).ok


def test_chain_knows_what_16_bits_hold_of_a_trained_networks_input() -> None:
    loop = Case("sampling", 2, networks.shape("digits"), "digits", 4)
    labels = networks.labels("digits", 2)
    network = networks.build("digits").to(torch.bfloat16)
    provider = sampling.BENCHMARK.provider("fastddpm, bf16")

    def judge(wrong: float) -> bool:
        def predict(x: Tensor, t: Tensor) -> Tensor:
            return network(x.bfloat16(), t, labels).float() * (1 + wrong)

        return loop_gate.check(loop, provider, loop_gate.recorded(loop, predict)).ok

    assert judge(0.0)
    assert not judge(0.05)


def test_normal_knows_what_is_no_standard_normal() -> None:
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert gate.normal(z, "z").ok
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).sub(0.5) * 12**0.5
    for wrong in (z + 0.05, z * 1.05, uniform, z.clone().index_fill_(0, torch.tensor([5]), float("nan"))):
        assert not gate.normal(wrong, "z").ok


@pytest.mark.parametrize("name", ["randn", "q_sample", "p_sample"])
def test_operation_gates_fail_on_one_wrong_element(name: str) -> None:
    benchmark = find(name)
    (case,) = benchmark.cases("cpu", True)
    provider = benchmark.provider("fastddpm, eager twin")
    found = provider.build(case).evaluate()
    assert benchmark.check(case, provider, found).ok
    for key, values in found.items():
        wrong = values.clone()
        wrong[-1, -1, -1, -1] += 1.0
        assert not benchmark.check(case, provider, found | {key: wrong}).ok, key


def test_unet_gate_looks_at_every_timestep() -> None:
    benchmark = find("unet")
    (case,) = benchmark.cases("cpu", True)
    provider = benchmark.provider("PyTorch")
    found = provider.build(case).evaluate()
    assert benchmark.check(case, provider, found).ok
    for i in range(case.steps):
        eps = found["eps"].clone()
        eps[i, 0] *= 1.001
        assert not benchmark.check(case, provider, {"eps": eps}).ok
        eps[i, 0] = float("nan")
        assert not benchmark.check(case, provider, {"eps": eps}).ok


def test_count_tells_views_from_work_and_reads_by_the_host() -> None:
    x = torch.ones(8, 4)

    def work() -> Any:
        y = x.t()[0].add(1)
        return float(y.sum())

    counts = step_counts.count(work)
    assert counts.by_name == {"add": 1, "sum": 1, "_local_scalar_dense": 1}
    assert counts.calls == 5
    assert counts.host_reads == 1


def test_count_lets_compiled_code_run() -> None:
    double = torch.compile(lambda x: x + x, backend="eager", fullgraph=True)
    assert step_counts.count(lambda: double(torch.ones(2))).by_name["add"] == 1


def test_count_sees_bytes_of_large_tensors_only() -> None:
    x, small = torch.ones(100), torch.ones(1)
    counts = step_counts.count(lambda: x.mul(small), threshold=100)
    assert (counts.bytes_read, counts.bytes_written, counts.large) == (400, 400, 1)
    counts = step_counts.count(lambda: x.copy_(x.neg()), threshold=100)
    assert (counts.bytes_read, counts.bytes_written) == (800, 800)


def test_count_looks_inside_custom_operators() -> None:
    case = Case("randn", 2, (3, 4, 4))
    counts = step_counts.count(lambda: ops.randn(counter(case, STREAM_REVERSE), case.shape))
    assert counts.operations > 100


def test_step_counts_reads_nothing_back() -> None:
    own = next(row for row in step_counts.measure(smoke=True) if row["who"].startswith("fastddpm"))
    assert own["host_reads"] == 0


@pytest.mark.parametrize("allowed", [True, False])
def test_network_gate_knows_that_cuda_convolutions_may_run_in_tf32(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert gate.network("float32", "cuda") == (gate.TF32 if allowed else gate.NETWORK["float32"])
    assert gate.network("float32", "cpu") == gate.NETWORK["float32"]
    assert gate.network("bfloat16", "cuda") == gate.NETWORK["bfloat16"]


def test_step_counts_finds_what_diffusers_asks_for() -> None:
    pytest.importorskip("diffusers")
    rows = {row["who"]: row for row in step_counts.measure(smoke=True)}
    theirs = rows["DDPMScheduler.step"]
    assert (theirs["calls"], theirs["large"], theirs["host_reads"]) == (62, 10, 11)


def test_lucidrains_loop_runs_without_a_progress_bar_and_leaves_tqdm_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    bar = original.tqdm
    sampling.BENCHMARK.provider("lucidrains").build(LOOP).run()
    assert capsys.readouterr().err == ""
    assert original.tqdm is bar
