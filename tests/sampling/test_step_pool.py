"""A captured step runs from static buffers: the tape that shows what a CUDA graph would do, and the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.sampling.step_pool import GraphPool
from tests.sampling.tape import TapePool


def ignore(*values: Any) -> None:
    """Turn an expression into a step."""


class Countdown:
    """A step over buffers that exercises in-place, out=, view, functional and comparison operations."""

    def __init__(self, device: str = "cpu") -> None:
        self.x = torch.ones(2, 3, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.table = torch.tensor([0.5, -2.0, 3.0, 1.25], device=device)
        self.picked = torch.zeros(1, device=device)

    def step(self) -> None:
        torch.index_select(self.table, 0, self.row.expand(1), out=self.picked)
        doubled = self.x * 2
        doubled[0].mul_(self.picked)
        self.x.copy_(torch.where(doubled > 1, doubled, doubled - self.picked))
        self.row.add_(1)

    def rewind(self) -> None:
        self.row.zero_()


def test_replay_runs_the_captured_step() -> None:
    expected, captured = Countdown(), Countdown()
    tape = TapePool().capture(captured.step, captured.rewind)
    for _ in range(4):
        expected.step()
        tape.replay()
    assert torch.equal(captured.x, expected.x)
    assert captured.row.item() == 4


def test_tape_leaves_the_buffers_as_a_capture_does() -> None:
    countdown = Countdown()
    before = [countdown.x.clone(), countdown.row.clone(), countdown.picked.clone()]
    TapePool().capture(countdown.step, countdown.rewind)
    for tensor, value in zip([countdown.x, countdown.row, countdown.picked], before, strict=True):
        assert torch.equal(tensor, value)


def test_tape_reads_buffers_at_replay() -> None:
    countdown = Countdown()
    tape = TapePool().capture(countdown.step, countdown.rewind)
    countdown.x.fill_(7.0)
    countdown.row.fill_(2)
    tape.replay()
    assert torch.equal(countdown.x, torch.tensor([[42.0] * 3, [14.0] * 3]))


def test_tape_keeps_python_values_of_the_capture() -> None:
    x, scale = torch.ones(3), {"value": 2.0}
    tape = TapePool().capture(lambda: ignore(x.mul_(scale["value"])), ignore)
    scale["value"] = 100.0
    tape.replay()
    assert torch.equal(x, torch.full((3,), 2.0))


def test_tape_shows_a_state_that_is_replaced_instead_of_written() -> None:
    state = {"x": torch.ones(3)}

    def step() -> None:
        state["x"] = state["x"] + 1

    first = state["x"]
    tape = TapePool().capture(step, ignore)
    tape.replay()
    tape.replay()
    assert torch.equal(first, torch.ones(3))
    assert torch.equal(state["x"], torch.full((3,), 2.0))


def test_tape_poisons_what_only_the_capture_computed() -> None:
    x, kept = torch.ones(3), {}

    def step() -> None:
        if "previous" in kept:
            x.add_(kept["previous"])
        kept["previous"] = x * 2

    step()
    tape = TapePool().capture(step, ignore)
    x.fill_(1.0)
    kept["previous"].fill_(5.0)
    tape.replay()
    # A graph would add the tensor that existed at capture (2.0), not what Python calls "previous" by now (5.0).
    assert torch.equal(x, torch.full((3,), 3.0))


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: bool(x.sum() > 0), lambda x: float(x[0])])
def test_tape_refuses_a_host_read(read: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted while capturing"):
        TapePool().capture(lambda: ignore(x.mul_(read(x))), ignore)


class FakeCuda:
    """Stands in for torch.cuda: records what a capture calls, in order, which stream is current, and workspaces.

    As in PyTorch, cuBLAS makes a workspace at the first product on a stream: within a capture in the graph's pool,
    else in general memory. A graph keeps its address; `reset` frees the workspace of the stream that it was captured
    on, and memory of a pool is gone with the pool's last graph.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.current = "main"
        self.pools = 0
        self.workspaces: dict[str, SimpleNamespace] = {}
        self.capturing: Any = None
        cuda, names = self, iter(("side", "capture"))

        class Stream:
            def __init__(self, name: str | None = None) -> None:
                self.name = name or next(names)

            def wait_stream(self, other: Any) -> None:
                cuda.calls.append(f"{self.name} waits for {other.name}")

        class Graph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                cuda.calls.append(f"begin on {cuda.current} in pool {pool}")
                self.stream, self.pool, self.workspaces, cuda.capturing = cuda.current, pool, [], self
                cuda.live.append(self)

            def capture_end(self) -> None:
                cuda.calls.append("end")
                cuda.capturing = None
                if cuda.end_fails:
                    raise RuntimeError("capture was invalidated")

            def replay(self) -> None:
                cuda.calls.append("replay")
                assert not any(workspace.freed for workspace in self.workspaces), "illegal memory access"

            def reset(self) -> None:
                cuda.calls.append("reset")
                cuda.live.remove(self)
                assert self.stream not in [graph.stream for graph in cuda.replayed], "a graph of this stream is in use"
                workspace = cuda.workspaces.pop(self.stream, None)
                if workspace is not None and workspace.pool is None:
                    workspace.freed = True

        self.end_fails = False
        self.live: list[Any] = []
        self.replayed: list[Any] = []

        @contextlib.contextmanager
        def stream(s: Stream) -> Iterator[None]:
            before, cuda.current = cuda.current, s.name
            try:
                yield
            finally:
                cuda.current = before

        def handle() -> int:
            self.pools += 1
            return self.pools

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": stream,
            "current_stream": lambda: Stream(cuda.current),
            "device": lambda device: contextlib.nullcontext(),
            "synchronize": lambda device=None: cuda.calls.append("synchronize"),
            "empty_cache": lambda: cuda.calls.append("empty_cache"),
            "graph_pool_handle": handle,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: cuda.calls.append(f"on synchronisation: {mode}"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def product(self) -> None:
        """A step that multiplies matrices."""
        pool = None if self.capturing is None else self.capturing.pool
        workspace = self.workspaces.setdefault(self.current, SimpleNamespace(pool=pool, freed=False))
        if self.capturing is not None:
            self.capturing.workspaces.append(workspace)


def test_cuda_graph_warms_up_on_one_stream_and_captures_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    pool = GraphPool(torch.device("cuda", 0))
    step = lambda: cuda.calls.append(f"step on {cuda.current}")  # noqa: E731
    pool.capture(step, lambda: cuda.calls.append("rewind")).replay()
    assert cuda.calls == [
        "side waits for main",
        *["rewind", "step on side"] * 2,
        "rewind",
        "on synchronisation: error",
        "step on side",
        "on synchronisation: 0",
        "rewind",
        "synchronize",
        "empty_cache",
        "begin on capture in pool 1",
        "step on capture",
        "end",
        "main waits for side",
        "replay",
    ]


@pytest.mark.parametrize("end_fails", [False, True])
def test_cuda_graph_restores_the_stream_when_a_capture_fails(monkeypatch: pytest.MonkeyPatch, end_fails: bool) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.end_fails = end_fails
    pool = GraphPool(torch.device("cuda", 0))
    steps = iter(range(10))

    def step() -> None:
        if next(steps) == 3:
            raise ValueError("the model reads a value")

    with pytest.raises(ValueError, match="reads a value"):
        pool.capture(step, ignore)
    assert cuda.current == "main"
    assert cuda.calls[-4:] == ["end", "synchronize", "reset", "main waits for side"]
    # The pool has no graph now, and the next one gets a new pool.
    cuda.end_fails = False
    pool.capture(ignore, ignore)
    assert "begin on capture in pool 2" in cuda.calls


def test_cuda_graphs_share_a_pool_until_the_last_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    pool = GraphPool(torch.device("cuda", 0))
    first, second = pool.capture(ignore, ignore), pool.capture(ignore, ignore)
    pool.release(first)
    pool.release(second)
    pool.capture(ignore, ignore)
    assert [call for call in cuda.calls if call.startswith("begin")] == [
        "begin on capture in pool 1",
        "begin on capture in pool 1",
        "begin on capture in pool 2",
    ]
    assert cuda.calls.count("reset") == 2


def test_a_graph_outlives_the_resets_and_failures_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    pool = GraphPool(torch.device("cuda", 0))
    first, second = pool.capture(cuda.product, ignore), pool.capture(cuda.product, ignore)
    cuda.replayed = [second]
    pool.release(first)
    steps = iter([None, None, None, ValueError("the model reads a value")])

    def fails() -> None:
        if (error := next(steps)) is not None:
            raise error

    with pytest.raises(ValueError, match="reads a value"):
        pool.capture(fails, ignore)
    second.replay()
    assert "reset" not in cuda.calls
    cuda.replayed = []
    pool.release(second)
    assert cuda.calls.count("reset") == 3
    assert not cuda.live


@pytest.mark.gpu
def test_cuda_graph_matches_the_loop() -> None:
    expected, captured = Countdown("cuda"), Countdown("cuda")
    pool = GraphPool(torch.device("cuda", torch.cuda.current_device()))
    graph = pool.capture(captured.step, captured.rewind)
    captured.x.fill_(1.0)
    for _ in range(4):
        expected.step()
        graph.replay()
    assert torch.equal(captured.x, expected.x)


@pytest.mark.gpu
def test_cuda_graph_refuses_a_host_read_and_the_device_goes_on() -> None:
    x, pool = torch.ones(3, device="cuda"), GraphPool(torch.device("cuda", torch.cuda.current_device()))
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        pool.capture(lambda: ignore(x.mul_(x.sum().item())), ignore)
    assert torch.cuda.current_stream() == stream
    assert torch.randn(3, device="cuda").isfinite().all()
    counter = torch.zeros(1, device="cuda")
    graph = pool.capture(lambda: ignore(counter.add_(1)), ignore)
    counter.zero_()
    graph.replay()
    assert counter.item() == 1.0
