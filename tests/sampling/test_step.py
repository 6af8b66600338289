"""A step as the device sees it: one fused operation, no host read, one graph whatever t, seed and label."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddpm import Sampler, Schedule, UNet, UNetConfig, ddpm_table
from fastddpm.machine import torch_compile
from fastddpm.machine.building import Want
from fastddpm.sampling import options as sampling_options
from fastddpm.sampling.network import Network, sampling_networks
from fastddpm.sampling.options import Options
from fastddpm.sampling.request import StepKey
from fastddpm.sampling.step import StaticStep
from fastddpm.unet.inference import UNetInference

TABLE = ddpm_table(Schedule.linear(50, 1e-3, 0.2), steps=4)
SHAPE = (3, 8, 8)


def pull(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """The gradient of a log p(y | x_t), in closed form: autograd wants a device that is there."""
    return -0.1 * x


KEYS = {
    "counter": StepKey(4),
    "given": StepKey(4, noise="given"),
    "none": StepKey(4, noise="none"),
    "guided": StepKey(4, guided=True, labels=True),
    "rescaled": StepKey(4, guided=True, rescaled=True, labels=True),
    "mean": StepKey(4, cond_fn=pull, cond_form="mean"),
    "epsilon": StepKey(4, guided=True, labels=True, cond_fn=pull, cond_form="epsilon"),
    "x0": StepKey(4, x0_out=True),
    "finite": StepKey(4, check_finite=True),
    "kwargs": StepKey(4, buffers=(("shift", (4, 1, 1, 1), torch.float32),)),
}


class Small(nn.Module):
    """A convolution and an embedding, on any device, with weights that need no initialisation."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3, 3, 3, device=device, dtype=dtype))
        self.embedding = nn.Parameter(torch.zeros(11, 3, device=device, dtype=dtype))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, shift: Any = 0.0) -> Tensor:
        m = torch.conv2d(x, self.weight, padding=1) + (t / 50).to(x.dtype).reshape(-1, 1, 1, 1) + shift
        return m if class_labels is None else m + self.embedding[class_labels][:, :, None, None]


class Record(TorchDispatchMode):
    """Counts operations, and the devices of the tensors that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[func.name()] += 1
        self.devices |= {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


# Made once, outside of the fake tensors that some tests run under.
ON_THE_CPU = Sampler(lambda x, t: x, TABLE, SHAPE, compile=False).options


def options(device: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Options:
    return dataclasses.replace(ON_THE_CPU, device=torch.device(device), dtype=dtype, **changed)


def static_step(key: StepKey, device: str, dtype: torch.dtype) -> StaticStep:
    network = Network(Small(device, dtype), compile_model=False, strict=False)
    return StaticStep(key, network, TABLE, options(device, dtype))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a CUDA build of PyTorch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", KEYS)
def test_step_on_cuda_reads_nothing_back_and_touches_no_host_tensor(key: str, dtype: torch.dtype) -> None:
    TABLE.rows  # noqa: B018  (cached: a real tensor, as in a real run)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        step = static_step(KEYS[key], "cuda:0", dtype)
        with Record() as record:
            Sampler.reverse_step(step)
    assert record.devices == {"cuda"}
    assert "aten::_local_scalar_dense" not in record.operations
    assert record.operations["aten::conv2d"] + record.operations["aten::convolution"] == 1
    assert record.operations["fastddpm::p_sample_out"] == 1


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a CUDA build of PyTorch")
@pytest.mark.parametrize("learned", [False, True])
def test_step_with_our_unet_on_cuda_reads_nothing_back(learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = UNetConfig(
        sample_size=8,
        in_channels=3,
        out_channels=6 if learned else 3,
        block_out_channels=(32,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        layers_per_block=1,
        num_class_embeds=11,
        null_class=10,
    )
    table = ddpm_table(Schedule.linear(50, 1e-3, 0.2), steps=5, variance_type="learned" if learned else "fixed_small")
    table.rows  # noqa: B018
    # Labels are counted when a run is loaded, not in its steps.
    monkeypatch.setattr(UNetInference, "load", lambda self, labels: None)
    device = torch.device("cuda:0")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), device:
        unet = UNet(config).eval()
        networks = sampling_networks(unet, table.timesteps.to(device), want=Want.NEVER, strict=True)
        key = StepKey(2, guided=True, labels=True)
        step = StaticStep(key, networks(key.network_batch), table, options("cuda:0"))
        Sampler.reverse_step(step)  # Makes the network's form for this size.
        with Record() as record:
            Sampler.reverse_step(step)
    assert record.devices == {"cuda"}
    assert "aten::_local_scalar_dense" not in record.operations
    assert record.operations["fastddpm::p_sample_out"] == 1
    # That of its time projections: it does not need t.
    assert record.operations["aten::index_select.out"] == 1


def test_step_around_the_network_is_three_operations() -> None:
    """The timestep, the fused step and the counter; views move no data."""
    step = static_step(StepKey(4), "cpu", torch.float32)
    step.network = lambda x, t, row, kwargs: x  # type: ignore[assignment]
    with torch.no_grad(), Record() as record:
        Sampler.reverse_step(step)
    moving = {name for name in record.operations if name not in ("aten::expand", "aten::slice.Tensor")}
    assert moving == {"aten::index_select.out", "fastddpm::p_sample_out", "aten::add_.Tensor"}


def allocations(run: Callable[[], None]) -> list[int]:
    """Bytes of every block that a run asks for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.skipif(not torch_compile.has_cpp_compiler(), reason="compiles on the CPU: needs a C++ compiler")
@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("counter", torch.float32),
        ("counter", torch.bfloat16),
        ("guided", torch.bfloat16),
        ("x0", torch.float32),
        ("given", torch.float32),
    ],
)
def test_compiled_step_takes_no_memory_beyond_the_network(key: str, dtype: torch.dtype) -> None:
    network = Network(Small(), compile_model=False, strict=False)
    step = StaticStep(KEYS[key], network, TABLE, options("cpu", dtype, want=Want.NOW))
    m = torch.ones_like(step.x_in)
    step.network = lambda x, t, row, kwargs: m  # type: ignore[assignment]
    with torch.inference_mode():
        for _ in range(2):
            Sampler.reverse_step(step)
        # The counter's increment travels as a tensor.
        assert allocations(lambda: Sampler.reverse_step(step)) == [8]
        assert max(allocations(lambda: step.x_t.add_(step.x_t + 1))) == step.x_t.nbytes


@pytest.mark.parametrize("key", KEYS)
def test_step_keeps_every_buffer_where_it_is(key: str) -> None:
    step = static_step(KEYS[key], "cpu", torch.bfloat16)

    def addresses() -> dict[str, int]:
        tensors = {**vars(step), **step.kwargs}
        return {name: value.data_ptr() for name, value in tensors.items() if isinstance(value, Tensor)}

    before = addresses()
    with torch.no_grad():
        for _ in range(3):
            Sampler.reverse_step(step)
    assert addresses() == before
    assert len(before) >= 8
    assert step.row.item() == 3


def test_model_compiles_once_for_all_timesteps_seeds_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, **options, backend=counter))
    # The fused step stays eager: its compilation has tests of its own, and takes longer.
    monkeypatch.setattr(torch_compile, "has_cpp_compiler", lambda: False)
    torch._dynamo.reset()
    compiled = Sampler(Small().eval(), TABLE, SHAPE, compile=True, null_class=10)
    eager = Sampler(Small().eval(), TABLE, SHAPE, compile=False, null_class=10)
    for seeds, labels in (([0, 1], [0, 1]), ([2**31, 2**63], [9, 9]), ([2, 2], [10, 3])):
        call: dict[str, Any] = {"seeds": seeds, "class_labels": labels, "guidance": 2.0}
        assert torch.equal(compiled.sample(**call), eager.sample(**call))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a CUDA build of PyTorch")
def test_models_compile_on_cuda_with_the_batch_size_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor lays out channels last only where no size is symbolic."""
    shapes: list[tuple[Any, ...]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        shapes.append(tuple(next(tensor for tensor in inputs if tensor.dim() == 4 and tensor.shape[1] == 3).shape))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, **options, backend=backend))
    with FakeTensorMode(allow_non_fake_inputs=True):
        timesteps = torch.zeros(4, device="cuda", dtype=torch.int64)
    networks = sampling_networks(lambda x, t: 0.5 * x, timesteps, want=Want.NOW, strict=True)
    for batch in (2, 3, 2):
        networks(batch)(torch.zeros(batch, *SHAPE), torch.zeros(batch), torch.zeros(1), {})
    assert shapes == [(2, *SHAPE), (3, *SHAPE)]
    assert all(type(size) is int for shape in shapes for size in shape)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a CUDA build of PyTorch")
def test_convolutions_compile_on_cuda_with_channels_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor copies weights of another layout in every call."""
    strides: list[set[tuple[int, ...]]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        strides.append({tensor.stride() for tensor in inputs if tensor.shape[2:] == (3, 3)})
        return graph.forward

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.norm = (*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)), nn.GroupNorm(1, 3))
            self.again.weight = self.first.weight

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.again(self.norm(self.first(x))) + t[:, None, None, None]

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, **options, backend=backend))
    with FakeTensorMode(allow_non_fake_inputs=True):
        timesteps = torch.zeros(4, device="cuda", dtype=torch.int64)
    model, x, t = Tied().eval(), torch.randn(2, *SHAPE), torch.ones(2)
    network = sampling_networks(model, timesteps, want=Want.NOW, strict=True)(2)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, torch.zeros(1), {}), model(x, t))
    assert strides == [{(27, 1, 9, 3)}]
    assert not network.shares_weights  # type: ignore[attr-defined]
    assert model.first.weight.is_contiguous()


def test_compiled_model_follows_a_hook_that_is_added_later(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, **options, backend="eager"))
    monkeypatch.setattr(torch_compile, "has_cpp_compiler", lambda: False)
    model = Small().eval()
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    compiled = Sampler(model, TABLE, SHAPE, compile=True)
    before = compiled.sample(seeds=[1])
    handle = model.register_forward_hook(lambda module, args, output: 0.5 * output)
    after = compiled.sample(seeds=[1])
    assert torch.equal(after, Sampler(model, TABLE, SHAPE, compile=False).sample(seeds=[1]))
    assert not torch.equal(after, before)
    handle.remove()
    assert torch.equal(compiled.sample(seeds=[1]), before)


def test_model_that_does_not_compile_runs_uncompiled_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks_the_graph(x: Tensor, t: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return 0.5 * x

    expected = Sampler(breaks_the_graph, TABLE, SHAPE, compile=False).sample(seeds=[1])
    monkeypatch.setattr(sampling_options, "weight_uses", lambda model, shape: 10**12)
    auto = Sampler(breaks_the_graph, TABLE, SHAPE, samples_ahead=1000)
    assert auto.options.compiles
    monkeypatch.setattr(torch_compile, "has_cpp_compiler", lambda: False)
    assert torch.equal(auto.sample(seeds=[1]), expected)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING and "torch.compile failed" in r.message]) == 1
    strict = Sampler(breaks_the_graph, TABLE, SHAPE, compile=True)
    with pytest.raises(RuntimeError, match=r"(?i)graph[ _]break"):
        strict.sample(seeds=[1])
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_equals_the_loop_for_changing_calls(dtype: torch.dtype) -> None:
    model = Small("cuda").eval()
    options: dict[str, Any] = {"dtype": dtype, "compile": False, "null_class": 10}
    graph = Sampler(model, TABLE, SHAPE, cuda_graph=True, **options)
    loop = Sampler(model, TABLE, SHAPE, cuda_graph=False, **options)
    for seeds, labels, w in (([0, 1], [0, 1], 2.0), ([2**63, 5], [9, 2], 0.5), ([7, 8, 9], [1, 1, 1], 3.0)):
        call: dict[str, Any] = {"seeds": seeds, "class_labels": labels, "guidance": w}
        assert torch.equal(graph.sample(**call), loop.sample(**call))
    generators = [[torch.Generator("cuda").manual_seed(s) for s in (1, 2)] for _ in range(2)]
    assert torch.equal(graph.sample(generator=generators[0]), loop.sample(generator=generators[1]))
    graph.clear()
    assert torch.equal(graph.sample(seeds=[3]), loop.sample(seeds=[3]))


@pytest.mark.gpu
def test_loop_on_cuda_never_waits_for_the_device() -> None:
    for cuda_graph in (True, False):
        s = Sampler(Small("cuda").eval(), TABLE, SHAPE, cuda_graph=cuda_graph, compile=False)
        s.warmup(seeds=[1, 2])
        (step,) = s._steps._idle
        step.rewind()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                for _ in range(len(TABLE)):
                    s._steps.replay(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_model_that_reads_the_device_runs_in_the_loop_and_leaves_cuda_usable(caplog: pytest.LogCaptureFixture) -> None:
    def reads(x: Tensor, t: Tensor) -> Tensor:
        return x * (0.5 if t[0].item() > 20 else 0.25)

    s = Sampler(reads, TABLE, SHAPE, device="cuda", compile=False)
    expected = Sampler(reads, TABLE, SHAPE, device="cuda", compile=False, cuda_graph=False).sample(seeds=[1])
    assert torch.equal(s.sample(seeds=[1]), expected)
    assert caplog.text.count("no CUDA graph") == 1
    assert "nor another thread" in caplog.text
    assert torch.randn(3, device="cuda").isfinite().all()
