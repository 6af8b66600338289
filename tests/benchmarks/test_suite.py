"""``fastddpm bench``: a smoke run of everything, its report, and what it says when something is amiss."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastddpm.benchmarks.counts import cuda, inductor_kernel, offline
from fastddpm.benchmarks.harness import suite, worker
from fastddpm.benchmarks.harness.case import NAMES, NOT_ASKED, Benchmark, Case, Check, Prepared, Provider, find
from fastddpm.benchmarks.harness.process import ProcessRunner, WorkerError
from fastddpm.benchmarks.harness.runner import LocalRunner
from fastddpm.benchmarks.report import markdown as report
from torch.autograd import DeviceType

from fastddpm.cli import main
from fastddpm.cli.bench import QUICK
from fastddpm.errors import BackendUnavailable
from fastddpm.machine import building

CASE = Case("p_sample", 2, (3, 4, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole suite, once; what its providers compile has tests of its own."""
    outdir = tmp_path_factory.mktemp("bench")
    command = ["bench", "--smoke", "--quiet", "--device", "cpu", "--no-offline", "--outdir", str(outdir)]
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(building, "build", lambda *_: pytest.fail("compiled"))
        assert main(command) == 0
    return outdir


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text())


def test_smoke_run_times_only_what_passed_its_gate(results: dict[str, Any]) -> None:
    assert {row["op"] for row in results["rows"]} == set(NAMES)
    for row in results["rows"]:
        assert row["checked"] != bool(row["note"]), row
        assert row["checked"] == ("p50_ms" in row), row


def test_smoke_run_covers_every_own_provider(results: dict[str, Any]) -> None:
    for name in NAMES:
        cases = find(name).cases("cpu", True)
        able = [p.name for p in find(name).providers if not all(p.skips(case) for case in cases)]
        own = {name for name in able if name.startswith("fastddpm")}
        timed = {row["provider"] for row in results["rows"] if row["op"] == name and row["checked"]}
        assert own <= timed


def test_report_reads_at_80_columns(folder: Path) -> None:
    lines = (folder / "bench.md").read_text().splitlines()
    assert [line for line in lines if len(line) > report.WIDTH] == []


def test_report_labels_the_cpu_and_the_smoke_run(folder: Path) -> None:
    text = (folder / "bench.md").read_text()
    assert "CPU, not comparable with GPU" in text
    assert "SMOKE RUN: no measurement" in text


def test_report_says_why_cuda_was_skipped(folder: Path) -> None:
    assert "Skipped: " in (folder / "bench.md").read_text()


def test_smoke_run_draws_its_plots(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("throughput.png", "roofline.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_bench_names_the_cases_where_none_was_chosen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "sampling", "--case", "nosuch", "--outdir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "no case has the parts of nosuch" in error
    assert "sampling-cifar10-B16-S20-ddpm" in error
    assert not (tmp_path / "out").exists()


def test_bench_of_an_unknown_name_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "warp"]) == 1
    assert "unknown benchmark 'warp'; choose one of sampling" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_bench_on_cuda_without_a_gpu_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 1
    assert "torch.cuda.is_available() is False" in capsys.readouterr().err


def benchmark_of(*providers: Provider, check: Any = None) -> Benchmark:
    return Benchmark(
        name="p_sample",
        title="",
        providers=providers,
        cases=lambda device, smoke: [CASE],
        check=check or (lambda case, provider, found: Check(float(found["x"]), 0.0, "x")),
    )


def provider(name: str, value: float = 0.0, **options: Any) -> Provider:
    return Provider(name, lambda case: Prepared(lambda: None, lambda: {"x": torch.tensor(value)}), **options)


@pytest.mark.parametrize("value", [1.0, float("nan")], ids=["wrong", "nan"])
def test_run_case_does_not_time_a_wrong_provider(value: float) -> None:
    good, bad = suite.run_case(benchmark_of(provider("good"), provider("bad", value)), CASE, 1, smoke=True)
    assert good["checked"]
    assert not bad["checked"]
    assert "wrong result: x" in bad["note"]
    assert "p50_ms" not in bad
    assert "ratio" not in bad


def test_run_case_says_who_is_missing() -> None:
    absent = provider("peer", needs={"no_such_module": "no-such-package"})
    _, row = suite.run_case(benchmark_of(provider("base"), absent), CASE, 1, smoke=True)
    assert row["note"] == "not installed: pip install no-such-package"
    assert not row["checked"]


def test_run_case_says_who_was_left_out() -> None:
    names = ("base", "fast", "slow, one", "slow, two")
    benchmark, chosen = benchmark_of(*map(provider, names)), ["fast"]
    rows = suite.run_case(benchmark, CASE, 1, smoke=True, providers=chosen)
    assert [row["checked"] for row in rows] == [True, True, False, False]
    assert "- slow, one; slow, two: left out of this run" in report.case_section(rows)


def test_run_case_outlives_a_provider_that_raises() -> None:
    def build(case: Case) -> Prepared:
        raise RuntimeError("no kernel for this shape")

    rows = suite.run_case(benchmark_of(provider("base"), Provider("broken", build)), CASE, 2, smoke=True)
    assert rows[1]["note"] == "failed: RuntimeError: no kernel for this shape"
    assert rows[0]["n"] == 2


def test_run_case_times_nobody_where_a_round_was_not_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    def died(self: LocalRunner) -> float:
        raise WorkerError(f"{self.name}: its process died during 'time': out of memory")

    monkeypatch.setattr(LocalRunner, "time", died)
    rows = suite.run_case(benchmark_of(provider("base"), provider("other")), CASE, 2, smoke=True)
    for row in rows:
        assert row["note"] == "failed: a round was not finished: base: its process died during 'time': out of memory"
        assert not row["checked"]
        assert "p50_ms" not in row


def test_interrupted_bench_leaves_what_it_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_case, cases = suite.run_case, []

    def interrupted(benchmark: Benchmark, case: Case, *rest: Any, **named: Any) -> list[dict[str, Any]]:
        if cases:
            raise KeyboardInterrupt
        cases.append(case.id)
        return run_case(benchmark, case, *rest, **named)

    monkeypatch.setattr(suite, "run_case", interrupted)
    assert (
        main(["bench", "randn", "q_sample", "--smoke", "--quiet", "--device", "cpu", "--outdir", str(tmp_path)]) == 130
    )
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {row["id"] for row in found["rows"]} == set(cases)
    assert report.render(found)


def test_bench_refuses_an_architecture_before_it_measures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "run", lambda *names, **options: pytest.fail("measured"))
    assert main(["bench", "--arch", "sm90"]) == 1
    assert "unknown architecture 'sm90' (did you mean 'sm_90'?)" in capsys.readouterr().err


def test_process_runner_gates_times_and_counts_memory() -> None:
    benchmark = find("sampling")
    (case, *_) = benchmark.cases("cpu", True)
    runner = ProcessRunner("sampling", benchmark.provider("PyTorch"), case)
    try:
        assert suite.judge(benchmark, runner).ok
        assert runner.warm() == "wall time"
        assert runner.time() > 0
        assert (runner.peak_memory_mb() or 0) > 0
        runner._process.kill()
        with pytest.raises(WorkerError, match=r"^PyTorch: its process died during 'time', exit code -9"):
            runner.time()
    finally:
        runner.close()


def test_peak_memory_sees_what_came_and_went() -> None:
    if not worker.reset_peak():
        pytest.skip("this system cannot reset the peak")
    before = worker.memory_mb("VmHWM") or 0
    torch.ones(64 << 20, dtype=torch.uint8).sum()
    assert (worker.memory_mb("VmHWM") or 0) - before > 50


def test_report_prints_losses_and_ties_like_wins(results: dict[str, Any]) -> None:
    value = {"to": "base", "low": 0.7, "high": 0.9, "median": 0.8, "verdict": "slower"}
    assert report.ratio(value) == "0.80 (0.70-0.90) slower"
    assert report.ratio(value | {"verdict": "tie"}).endswith("tie")
    changed = copy.deepcopy(results)
    for row in changed["rows"]:
        if row["checked"]:
            row["ratio"] = value
    assert report.render(changed).count("slower") >= sum(row["checked"] for row in changed["rows"])


def test_report_warns_of_a_noisy_and_of_a_busy_machine(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    for row in changed["rows"]:
        row["noisy"] = False
    changed["machine"]["load_average"] = [0.1, 0.1, 0.1]
    assert report.warnings(changed) == []
    changed["machine"]["load_average"] = [99.0, 1.0, 1.0]
    timed = next(row for row in changed["rows"] if row["checked"])
    timed["noisy"], timed["spread"] = True, 0.5
    noisy, busy = report.warnings(changed)
    assert "Noisy machine" in noisy
    assert "load average 99.0" in busy


def test_offline_part_fails_softly(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arch: str, smoke: bool) -> list[dict[str, Any]]:
        raise BackendUnavailable("Inductor is not as known here")

    monkeypatch.setattr(offline, "_inductor", broken)
    monkeypatch.setattr(offline, "_ours", broken)
    found = offline.measure()
    assert found["rows"] == []
    assert found["remarks"] == [f"{who}: Inductor is not as known here" for who in ("fastddpm", "Inductor")]
    assert "Inductor is not as known here" in report.offline_section(found)


def test_offline_part_counts_our_kernel() -> None:
    pytest.importorskip("triton")
    found = offline.measure(smoke=True)
    (row,) = found["rows"]
    assert (row["who"], row["kernel"], row["variant"]) == ("fastddpm", "p_sample", "float32")
    assert 60 < row["executed"] < 80
    assert row["bytes_per_element"] == 12
    assert "fastddpm p_sample: float32" in report.offline_section(found)


def test_inductor_kernel_says_what_it_needs() -> None:
    with pytest.raises(BackendUnavailable, match="no data sheet on file for sm_99"):
        inductor_kernel.measure("sm_99")
    if torch.version.cuda is None:
        with pytest.raises(BackendUnavailable, match="needs a CUDA build"):
            inductor_kernel.measure()


def test_inductor_kernel_after_torch_has_found_no_gpu() -> None:
    if torch.version.cuda is None:
        pytest.skip("needs a CUDA build of PyTorch, whose fake tensors can be traced; this is a CPU build")
    from torch.utils import _triton

    before = _triton.has_triton()
    assert 60 < inductor_kernel.measure().executed < 90
    assert _triton.has_triton() == before


def test_find_kernel_wants_exactly_one() -> None:
    one = "k = async_compile.triton('k', '''\nbody\n''', device_str='cuda')\n"
    assert inductor_kernel.find_kernel(one) == ("k", "\nbody\n")
    for module in ("", one * 2):
        with pytest.raises(BackendUnavailable, match="instead of one"):
            inductor_kernel.find_kernel(module)


def test_tally_tells_launches_from_kernels_and_waits() -> None:
    events = [
        SimpleNamespace(name=name, device_type=device, is_user_annotation=name.startswith("CompiledFxGraph"))
        for device, name in (
            (DeviceType.CPU, "cudaGraphLaunch"),
            (DeviceType.CUDA, "_p_sample_kernel"),
            (DeviceType.CUDA, "CompiledFxGraph f3x"),
            (DeviceType.CUDA, "Memset (Device)"),
            (DeviceType.CUDA, "Memcpy DtoH (Device -> Pageable)"),
            (DeviceType.CPU, "cudaStreamSynchronize"),
            (DeviceType.CPU, "aten::add"),
        )
    ]
    assert cuda.tally(events) == cuda.CudaCalls(launches=1, kernels=1, syncs=1)


def test_memory_on_cuda_counts_private_pools_and_compiles_nothing_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a capture the graph's buffers are reserved, not allocated; what eager code left in the cache is neither."""
    held = {"graph": 300e6, "cache": 500e6}
    monkeypatch.setattr(worker, "load_compiler", lambda: pytest.fail("compiled for the CPU"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.pop("cache", None))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: int(sum(held.values())))
    case = Case("sampling", 1, (1, 8, 8), "tiny", 2, device="cuda")
    runner = worker.MeasuredRunner(provider("ours", compiled=True), case)
    runner.warm()
    assert runner.peak_memory_mb() == 300


def test_reduce_overhead_row_passes_the_gate_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    sampling = find("sampling")
    case, found = sampling.cases("cpu", True)[0], sampling.provider("diffusers, reduce-overhead, bf16")
    assert found.why_not(case) == NOT_ASKED
    with torch.compiler.set_stance("force_eager"):
        assert suite.judge(sampling, LocalRunner(found, case)).ok


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "run", lambda *names, **options: pytest.fail("measured"))


@pytest.mark.parametrize("outdir", ["file", "file/below", "/dev/null"])
def test_bench_refuses_an_outdir_before_it_measures(
    outdir: str, unmeasured: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["bench", "randn", "--smoke", "--outdir", str(tmp_path / outdir)]) == 1
    assert outdir in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_bench_names_the_nearest_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "randn", "--smoke", "--outdir", str(tmp_path / "out"), "--provider"]
    assert main([*command, "fastdpm"]) == 1
    error = capsys.readouterr().err
    assert "unknown provider 'fastdpm' (did you mean 'fastddpm'?); choose one of torch.randn" in error
    assert ", fastddpm, 'fastddpm, eager twin'\n" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quick_chooses_cases_and_providers_that_exist(device: str) -> None:
    names, cases, providers = QUICK[device]
    found = [find(name) for name in names]
    for text in cases:
        assert any(suite.choose(benchmark.cases(device, False), [text]) for benchmark in found)
    for part in providers:
        assert any(part in provider.name for benchmark in found for provider in benchmark.providers)


def test_benchmarks_ignore_what_other_libraries_warn_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*names: Any, **options: Any) -> dict[str, Any]:
        warnings.warn("theirs is deprecated", stacklevel=1)
        raise ValueError("far enough")

    monkeypatch.setattr(suite, "run", run)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert main(["bench", "randn", "--smoke", "--outdir", str(tmp_path)]) == 1
    assert not shown


def test_progress_has_no_lines_of_other_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "sampling", "--case", "ddim", "--provider", "diffusers", "--smoke", "--device", "cpu"]
    assert main([*command, "--outdir", str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith(("measuring this machine", "sampling-tiny-", "wrote "))] == []
