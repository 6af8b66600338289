"""What Inductor makes of a function for a GPU that is not there: kernels, and the bytes that they move.

The only module that uses the inside of Inductor's compiler, which moves between releases; tried with torch 2.14, a CUDA
build, and Triton 3.8. A function is traced without data and lowered for a device whose properties come from its data
sheet. Whatever breaks raises `BackendUnavailable` with what happened.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddpm.diagnostics.compile_offline import load_triton
from fastddpm.diagnostics.gpus import Gpu, default_gpu
from fastddpm.errors import BackendUnavailable

# What a program may hold on sm_80 and later: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
_LIMITS = {
    "warp_size": 32,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
}
# The largest heads that flash attention takes.
_FLASH_HEAD = 256


class Call(NamedTuple):
    """A kernel that the compiled function launches.

    Attributes:
        operators: what runs it, such as "convolution"; of a kernel of Inductor's own, the operations fused in it.
        generated: whether it is Inductor's own.
        bytes: of the tensors that it reads and writes, each once.
        arguments: of an operator that Inductor does not know, tensors without data among them.
    """

    operators: frozenset[str]
    generated: bool
    bytes: int
    arguments: tuple[Any, ...] = ()


def lower(function: Callable[..., Any], inputs: Sequence[Tensor], arch: str) -> list[Call]:
    """Return what a function of tensors, which returns a tuple of them, launches as Inductor compiles it.

    Args:
        inputs: on the meta device, in the layouts that the function gets.
        arch: with a data sheet on file, "sm_90".

    Raises:
        BackendUnavailable: this torch or Triton cannot be asked; the message has the reason.
    """
    with inductor_for(arch), torch.no_grad():
        return generate(function, inputs)[0]


@contextlib.contextmanager
def inductor_for(arch: str) -> Iterator[None]:
    """Let Inductor compile for a GPU that is not there.

    Raises:
        BackendUnavailable: this torch or Triton cannot be asked, or something broke inside; the message has the reason.
    """
    gpu = default_gpu(arch)
    if gpu is None or not arch.startswith("sm_"):
        raise BackendUnavailable(f"no data sheet on file for {arch}, which Inductor would ask for")
    if torch.version.cuda is None:
        raise BackendUnavailable("this build of PyTorch has no CUDA tensors, not even fake ones; needs a CUDA build")
    load_triton()
    try:
        with _stub_device(gpu):
            yield
    except BackendUnavailable:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BackendUnavailable(
            f"Inductor of torch {torch.__version__} is not as known here ({reason}); tried with torch 2.14"
        ) from error


def generate(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Call], str]:
    """Return what a function launches, and the Python module that Inductor writes for it; within `inductor_for`."""
    from torch._inductor import config
    from torch._inductor.compile_fx import view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.fx_passes.replace_random import replace_random_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.fx.traceback import preserve_node_meta

    with preserve_node_meta():
        traced = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
    with FakeTensorMode() as fake:
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in inputs]
    for node in traced.graph.nodes:
        # Layouts are those on the GPU, where a convolution keeps channels last.
        node.meta.pop("eager_input_vals", None)
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
    view_to_reshape(traced)
    # Else it starts processes that would compile what it writes.
    with config.patch(compile_threads=1), V.set_fake_mode(fake), fake, DebugContext():
        FakeTensorProp(traced, mode=fake).propagate_dont_convert_inputs(*fakes)
        replace_random_passes(traced)
        post_grad_passes(traced, is_inference=True)
        graph = GraphLowering(traced, example_inputs=fakes, shape_env=None, is_inference=True)
        with V.set_graph_handler(graph):
            graph.run(*fakes)
            code: Any = graph.codegen()[0]
            return list(_calls(graph)), getattr(code, "value", code)


def _calls(graph: Any) -> Iterator[Call]:
    scheduler = importlib.import_module("torch._inductor.scheduler")
    for node in graph.scheduler.nodes:
        origins = [origin for part in node.get_nodes() for origin in part.node.get_origins()]
        moved = node.get_read_write_buffers_sizes()
        if not node.is_extern():
            if not isinstance(node, scheduler.NopKernelSchedulerNode):
                yield Call(frozenset(map(_operator, origins)), True, moved)
        elif type(node.node).__name__ != "MultiOutput":
            namespace, operator = node.node.python_kernel_name.removesuffix(".default").split(".")[-2:]
            unknown = namespace not in ("aten", "extern_kernels")
            given = torch.fx.node.map_arg(origins[0].args, lambda argument: argument.meta["val"]) if unknown else ()
            yield Call(frozenset([operator]), False, moved, given)


def _operator(origin: torch.fx.Node) -> str:
    """The name of the operation that a node was traced for, before it was taken apart."""
    original = origin.meta.get("original_aten", origin.target)
    return str(getattr(original, "_overloadpacket", original)).split(".")[-1]


@contextlib.contextmanager
def _stub_device(gpu: Gpu) -> Iterator[None]:
    """Answer questions about the device from a data sheet, and for cuDNN and PyTorch's choice of attention."""
    create = importlib.import_module("torch._inductor.runtime.hints").DeviceProperties
    major, minor = divmod(int(gpu.arch[3:]), 10)
    device = create("cuda", 0, gpu.processors, 10 * major + minor, major=major, **_LIMITS)
    answers: dict[str, Any] = {
        "torch.cuda.get_device_capability": lambda *_: (major, minor),
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch._inductor.runtime.hints.DeviceProperties.create": lambda *_: device,
        # torch remembers its first answer for the whole process: "no", where anything was compiled for the CPU before.
        "torch._inductor.scheduler.has_triton": lambda: True,
        "torch.utils._triton.triton_hash_with_backend": lambda *_: "stub",
        "torch._C._select_conv_backend": lambda *_, **__: vars(torch._C)["_ConvBackend"].Cudnn,
        "torch._C._conv_determine_backend_memory_format": lambda *_: torch.channels_last,
        "torch.nn.functional.scaled_dot_product_attention": _attention,
    }
    with replaced(answers):
        yield


@contextlib.contextmanager
def replaced(values: Mapping[str, Any]) -> Iterator[None]:
    """Let dotted names have other values for a while, in the whole process."""
    with contextlib.ExitStack() as stack:
        for target, value in values.items():
            owner, name = target.rsplit(".", 1)
            place = pkgutil.resolve_name(owner)
            stack.callback(setattr, place, name, vars(place)[name])
            setattr(place, name, value)
        yield


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dtype != torch.float32 and q.shape[-1] <= _FLASH_HEAD:
        return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention.default(q, k, v, None, False)[0]
