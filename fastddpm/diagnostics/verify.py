"""The correctness suite that a user runs on their own machine: what is promised to the bit, checked to the bit.

Each check is a function of the device that raises AssertionError with what differed, or Skip with what it would need.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddpm import ops, reference
from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics.step_cases import StepCase, inputs, same_bits, setting_cases, step_case
from fastddpm.diagnostics.variants import p_sample_variant
from fastddpm.machine.devices import synchronisation_raises
from fastddpm.machine.torch_compile import why_not_triton
from fastddpm.noise import v1 as noise
from fastddpm.noise.known_answers import NOISE_V1
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.ops.group_norm import group_norm
from fastddpm.ops.operators import DTYPES
from fastddpm.sampling.sampler import Sampler
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.ddpm import ddpm_table
from fastddpm.tables.table import loss_rows, q_rows
from fastddpm.unet.load import load

SHAPES = ((1,), (3,), (2, 5, 5), (3, 32, 32))
STEPS = 20
BATCH = 16
# Dtype, what normalises, and relative L2 distance of images; cuDNN multiplies float32 as TF32, with float16's mantissa.
NETWORKS = ((torch.float32, "torch", 2e-2), (torch.bfloat16, "torch", 1e-1), (torch.bfloat16, "fused", 1e-1))


class Skip(Exception):  # noqa: N818  (not an error)
    """The check cannot run here; the message says what it needs."""


class Result(NamedTuple):
    """One check's outcome: status "passed", "failed" or "left out", and what was seen."""

    name: str
    status: str
    detail: str
    seconds: float


def check_noise(device: torch.device) -> str:
    """noise-v1 gives the committed digests, in every backend that runs here."""
    backends = ["torch"] if why_not_triton(device) else ["torch", "triton"]
    for backend, (case, digest) in itertools.product(backends, NOISE_V1.items()):
        seed, sample_id, step, stream, n = case
        counter = noise.counter(resolve_seeds(seed=seed, sample_ids=[sample_id]), step, stream, device)
        z = ops.randn(counter, (n,), backend=backend).cpu().numpy().astype("<f4")
        seen = hashlib.sha256(z.tobytes()).hexdigest()
        assert seen == digest, f"{backend}: {case} gives {seen[:16]}, expected {digest[:16]}"
    return f"{len(NOISE_V1)} digests, {' and '.join(backends)}"


def check_step(device: torch.device) -> str:
    """A row executed in float32 is the paper's step: the reference in float64, to float32's rounding."""
    schedule = Schedule.linear()
    table = ddpm_table(schedule)
    x_t, eps, z = (_normal(seed, (4, 3, 16, 16), device) for seed in range(3))
    worst = 0.0
    for t in (999, 500, 1, 0):
        row = torch.tensor([999 - t], device=device)
        fused = ops.p_sample(x_t, eps, table.rows.to(device), row, z, clip=True)
        paper = reference.p_sample(x_t.double(), eps.double(), t, schedule, z.double())
        worst = max(worst, float((fused - paper).abs().max()))
    assert worst < 5e-6, f"the fused step differs from Ho et al.'s by {worst:.1e}"
    return f"largest difference {worst:.1e}"


def check_kernels(device: torch.device) -> str:
    """Each kernel gives its twin's bits: every setting alone and in pairs, every dtype and noise source."""
    _require_triton(device)
    # Triton's interpreter, the only way to run the kernels on a CPU, truncates to bfloat16 instead of rounding.
    dtypes = [d for d in DTYPES if d != torch.bfloat16 or device.type != "cpu"]
    cases = list(_step_cases(dtypes))
    if device.type == "cuda":
        with torch.cuda.device(device):
            offline.compile_together(p_sample_variant(str(case), case).launch for case in cases)
    for case in cases:
        twin, kernel = (inputs(case, device=device) for _ in range(2))
        for backend, arguments in (("torch", twin), ("triton", kernel)):
            ops.p_sample(**arguments, backend=backend)
        for name in ("out", "x0_out", "low_out", "history"):
            expected = twin[name]
            assert expected is None or same_bits(expected, kernel[name]), f"p_sample {case}: {name} differs"
    draws = list(itertools.product(SHAPES, dtypes))
    for shape, dtype in draws:
        x_0, rows = _normal(5, (3, *shape), device).to(dtype), q_rows(Schedule.linear()).to(device)
        t, counter = torch.tensor([0, 500, 999], device=device), _counter(3, device)
        results = [ops.q_sample(x_0, rows, t, counter, return_eps=True, backend=b) for b in ("torch", "triton")]
        assert all(map(same_bits, *results)), f"q_sample {shape} {dtype} differs"
    return f"{len(cases) + len(draws)} cases"


def check_loss(device: torch.device) -> str:
    """The loss kernel gives its twin's gradient to the bit, and its sum to rounding (the order of adding differs)."""
    _require_triton(device)
    t, counter = torch.tensor([0, 500, 999], device=device), _counter(3, device)
    cases = list(itertools.product(("epsilon", "x_0", "v"), SHAPES))
    for target, shape in cases:
        rows, x_0 = loss_rows(Schedule.linear(), target).to(device), _normal(6, (3, *shape), device)
        results = []
        for backend in ("torch", "triton"):
            m = _normal(7, (3, *shape), device).requires_grad_()
            operands = (None if target == "x_0" else counter, None if target == "epsilon" else x_0)
            loss = ops.ddpm_loss(m, rows, t, *operands, backend=backend)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), m)))
        (twin, twin_gradient), (fused, gradient) = results
        assert same_bits(twin_gradient, gradient), f"ddpm_loss {target} {shape}: the gradient differs"
        assert torch.allclose(twin, fused, rtol=1e-6, atol=0), f"ddpm_loss {target} {shape}: {fused} for {twin}"
    return f"{len(cases)} cases"


def check_group_norm(device: torch.device) -> str:
    """The group normalisation gives its twin's values to rounding, in one pass and in two, and its sum to the bit."""
    _require_triton(device)
    worst = 0.0
    for shape, dtype in itertools.product(((2, 32, 16, 16), (1, 16, 96, 96)), (torch.float32, torch.float16)):
        x, residual = (_normal(i, shape, device).to(dtype, memory_format=torch.channels_last) for i in (8, 9))
        weight, beta, bias = (_normal(i, (1, shape[1]), device)[0].to(dtype) for i in (10, 11, 12))
        (y, u), (expected, kept) = (
            group_norm(x, weight, beta, 4, 1e-5, residual=residual, bias=bias, silu=True, keep=True, backend=backend)
            for backend in ("triton", "torch")
        )
        assert same_bits(u, kept), f"{shape} {dtype}: the sum differs"
        error = float((y - expected).abs().max()) / torch.finfo(dtype).eps
        assert error < 32, f"{shape} {dtype}: y differs by {error:.0f} eps"
        worst = max(worst, error)
    return f"largest difference {worst:.1f} eps"


def check_batches(device: torch.device) -> str:
    """A sample is the same alone, in a batch, and in another order."""
    seeds = [7, 0, 2**64 - 1, 123456789]
    together = _sampler(device).sample(seeds=seeds)
    alone = torch.cat([_sampler(device).sample(seeds=[seed]) for seed in seeds])
    reverse = _sampler(device).sample(seeds=seeds[::-1]).flip(0)
    assert torch.equal(together, alone), "a sample alone differs from the same one in a batch"
    assert torch.equal(together, reverse), "samples depend on the order of the seeds"
    return f"{len(seeds)} seeds, {STEPS} steps"


def check_graph(device: torch.device) -> str:
    """The loop replayed as a CUDA graph gives the eager loop's bits, for new seeds too."""
    _require_cuda(device)
    eager, graph = (_sampler(device, cuda_graph=choice) for choice in (False, True))
    for seeds in ([0, 1, 2], [3, 4, 5]):
        assert torch.equal(eager.sample(seeds=seeds), graph.sample(seeds=seeds)), f"seeds {seeds}: the loops differ"
    return "2 runs of one captured graph"


def check_network(device: torch.device) -> str:
    """The shipped UNet, compiled and captured, gives its own eager loop's bits, and the uncompiled one's images."""
    _require_cuda(device)
    unet, table, seeds = load("digits"), ddpm_table(Schedule.linear(), steps=4), list(range(BATCH))
    seen = []
    for dtype, norm, tolerance in NETWORKS:
        compiled, eager, plain = (
            Sampler(unet, table, (1, 32, 32), device=device, dtype=dtype, compile=choice, cuda_graph=captured, norm=by)
            for choice, captured, by in ((True, True, norm), (True, False, norm), (False, False, "torch"))
        )
        graph, loop, expected = (sampler.sample(seeds=seeds) for sampler in (compiled, eager, plain))
        case = f"{dtype}, norm={norm!r}"
        assert same_bits(graph, loop), f"{case}: the captured network differs from its own eager loop"
        off = float((graph - expected).norm() / expected.norm())
        assert off < tolerance, f"{case}: compiled and uncompiled differ by {off:.1e}"
        start = time.perf_counter()
        compiled.sample(seeds=seeds).cpu()
        seen.append(f"{case}: {(time.perf_counter() - start) / len(table) * 1e3:.2f} ms a step, off by {off:.1e}")
    return f"batch {BATCH}; " + "; ".join(seen)


def check_synchronisation(device: torch.device) -> str:
    """No step of the loop waits for the device."""
    _require_cuda(device)
    steps = _sampler(device).steps(seeds=[0, 1])
    next(steps)
    with synchronisation_raises():
        count = sum(1 for _ in steps)
    return f"{count} steps under sync_debug_mode('error')"


def check_recompilation(device: torch.device) -> str:
    """New seeds, steps, labels and batch sizes compile nothing."""
    _require_triton(device)
    _sampler(device).sample(seeds=[0, 1])
    with _compilations() as compiled:
        for seeds in ([2], [2**31, 2**63], list(range(5))):
            _sampler(device).sample(seeds=seeds)
    assert not compiled, f"compiled again: {', '.join(compiled)}"
    return "3 batch sizes, seeds up to 2**63"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "noise-v1 digests": check_noise,
    "step = paper": check_step,
    "kernels = twins": check_kernels,
    "loss kernel = twin": check_loss,
    "group norm = twin": check_group_norm,
    "batch invariance": check_batches,
    "graph = eager loop": check_graph,
    "compiled network": check_network,
    "no host sync": check_synchronisation,
    "no recompilation": check_recompilation,
}


def verify(device: torch.device) -> Iterator[Result]:
    """Run every check on ``device`` and yield its result as it comes."""
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            status, detail = "passed", check(device)
        except Skip as reason:
            status, detail = "left out", str(reason)
        except Exception as error:
            status, detail = "failed", f"{type(error).__name__}: {error}"
        yield Result(name, status, detail, time.perf_counter() - start)


def _step_cases(dtypes: Sequence[torch.dtype]) -> Iterator[StepCase]:
    for images in ((2, 3, 4, 4), (3, 2, 5, 5)):
        yield from setting_cases(shape=images)
    for shape, dtype in itertools.product(SHAPES, dtypes):
        yield step_case("clip", "x0_out", "history_2", shape=(3, *shape), x=dtype, m=dtype, low_out=dtypes[1])


def _sampler(device: torch.device, cuda_graph: bool = False) -> Sampler:
    table = ddpm_table(Schedule.linear(), steps=STEPS)
    return Sampler(_elementwise, table, (3, 8, 8), device=device, compile=False, cuda_graph=cuda_graph)


def _elementwise(x: Tensor, t: Tensor) -> Tensor:
    """A network without rounding that depends on the batch: products and sums of single elements."""
    return 0.75 * x + 0.001 * t.to(x.dtype)[:, None, None, None]


def _counter(batch: int, device: torch.device) -> ops.Counter:
    seed = torch.arange(batch, device=device) * 977 - 1
    return ops.Counter(seed, torch.arange(batch, device=device), torch.tensor([5], device=device), 1)


def _normal(seed: int, shape: tuple[int, ...] | torch.Size, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _require_triton(device: torch.device) -> None:
    reason = why_not_triton(device)
    if reason is not None:
        raise Skip(reason)


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("needs a CUDA device")


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """Collect the names of the kernels that Triton compiles meanwhile."""
    import triton

    names: list[str] = []

    def note(*args: Any, **details: Any) -> None:
        names.append(str(details.get("repr", "a kernel")))

    runtime: Any = getattr(getattr(triton, "knobs", None), "runtime", None)
    if not hasattr(runtime, "jit_post_compile_hook"):
        raise Skip(f"Triton {triton.__version__} has no knobs.runtime.jit_post_compile_hook")
    if type(triton.jit(_elementwise)).__name__ == "InterpretedFunction":
        raise Skip("Triton's interpreter compiles nothing")
    with runtime.scope():
        runtime.jit_post_compile_hook = note
        yield names
