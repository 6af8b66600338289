"""The PTX interpreter's threads, branches and undefined values: every fault that it must not hide."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.machine import Grid, Machine
from tests.ptx.memory import Memory, Segment
from tests.ptx.parser import PtxError, parse
from tests.ptx.registers import UndefinedValueError
from tests.ptx.snippets import address, build_kernel, run_kernel

RNG = np.random.default_rng(2)
COLLATZ = """
	ld.global.b32 %r0, [%a0];
	mov.b32 %r1, 0;
$L_head:
	setp.le.u32 %p0, %r0, 1;
	@%p0 bra $L_done;
	add.u32 %r1, %r1, 1;
	and.b32 %r2, %r0, 1;
	setp.eq.u32 %p1, %r2, 0;
	@%p1 bra $L_even;
	mad.lo.u32 %r0, %r0, 3, 1;
	bra.uni $L_head;
$L_even:
	shr.u32 %r0, %r0, 1;
	bra.uni $L_head;
$L_done:
	st.global.b32 [%a1], %r1;
"""


def collatz_steps(value: int) -> int:
    steps = 0
    while value > 1:
        value = value // 2 if value % 2 == 0 else 3 * value + 1
        steps += 1
    return steps


@pytest.mark.parametrize("blocks", [1, 7])
def test_divergent_loops_run_each_thread_its_own_number_of_times(blocks: int) -> None:
    values = RNG.integers(1, 5000, 32 * blocks, dtype=np.uint32)
    steps = np.zeros_like(values)
    run_kernel(address(0, 4) + address(1, 4) + COLLATZ, [values, steps], writable=1, blocks=blocks)
    assert steps.tolist() == [collatz_steps(int(v)) for v in values]


def test_guarded_return_stops_only_its_threads() -> None:
    output = np.zeros(64, np.uint32)
    body = address(0, 4) + "setp.ge.u32 %p0, %t2, 40;\n@%p0 ret;\nst.global.b32 [%a0], %t2;"
    memory = run_kernel(body, [output], writable=1, blocks=2)
    assert output.tolist() == [i if i < 40 else 0 for i in range(64)]
    assert memory.segments[0].traffic.stored == 160


def test_guards_may_be_negated() -> None:
    output = np.zeros(32, np.uint32)
    body = address(0, 4) + "setp.lt.u32 %p0, %t2, 5;\nmov.u32 %r0, 1;\n@!%p0 mov.u32 %r0, 2;\nst.global.b32 [%a0], %r0;"
    run_kernel(body, [output], writable=1)
    assert output.tolist() == [1] * 5 + [2] * 27


def test_block_coordinates_cover_the_grid() -> None:
    shape = (3, 2, 2)
    output = np.zeros(12 * 4, np.uint32)
    body = """
	mov.u32 %r0, %ctaid.x;
	mov.u32 %r1, %ctaid.y;
	mov.u32 %r2, %ctaid.z;
	mov.u32 %r3, %nctaid.x;
	mov.u32 %r4, %nctaid.y;
	mad.lo.u32 %r5, %r2, %r4, %r1;
	mad.lo.u32 %r5, %r5, %r3, %r0;
	ld.param.b64 %a0, [p0];
	mul.wide.u32 %d0, %r5, 16;
	add.s64 %a0, %a0, %d0;
	st.global.v4.b32 [%a0 + 0], {%r0, %r1, %r2, %r5};
"""
    memory = Memory()
    memory.add(Segment("p0", output.ctypes.data, output.nbytes, writable=True))
    Machine(parse(build_kernel(body, 1, 1)), memory).run([output.ctypes.data], Grid(shape))
    expected = [[x, y, z, (z * 2 + y) * 3 + x] for z in range(2) for y in range(2) for x in range(3)]
    assert output.reshape(-1, 4).tolist() == expected


def test_only_selected_blocks_run() -> None:
    output = np.zeros(32 * 5, np.uint32)
    memory = Memory()
    memory.add(Segment("p0", output.ctypes.data, output.nbytes, writable=True))
    program = parse(build_kernel(address(0, 4) + "st.global.b32 [%a0], 1;", 1, 32))
    Machine(program, memory).run([output.ctypes.data], Grid((5, 1, 1), np.array([1, 4])))
    assert output.reshape(5, 32).any(axis=1).tolist() == [False, True, False, False, True]


MASKED_LOAD = "setp.lt.u32 %p0, %t2, 20;\n@%p0 ld.global.b32 %r0, [%a0];\nadd.u32 %r1, %r0, 1;\n"


@pytest.mark.parametrize(
    ("use", "where"),
    [
        ("st.global.b32 [%a1], %r1;", "memory"),
        ("setp.lt.u32 %p1, %r1, 3;\n@%p1 mov.u32 %r2, 0;", "decision"),
        ("setp.lt.u32 %p1, %r1, 3;\n@%p1 bra $L_end;\n$L_end:", "decision"),
        ("mad.wide.u32 %a1, %r1, 0, %a1;\nst.global.b32 [%a1], %t2;", "address"),
        ("selp.b32 %r2, %r1, 0, %p0;\nselp.b32 %r2, 0, %r1, %p0;\nst.global.b32 [%a1], %r2;", "memory"),
        ("st.global.b32 [%a1], %r7;", "memory"),
    ],
)
def test_undefined_values_are_caught_where_they_are_used(use: str, where: str) -> None:
    body = address(0, 4) + address(1, 4) + MASKED_LOAD + use
    with pytest.raises(UndefinedValueError, match=where):
        run_kernel(body, [np.zeros(32, np.uint32), np.zeros(32, np.uint32)], writable=1)


@pytest.mark.parametrize("limit", [20, 0, 32])
def test_undefined_values_may_be_computed_with_and_dropped(limit: int) -> None:
    source, output = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    load = MASKED_LOAD.replace("20", str(limit))
    body = address(0, 4) + address(1, 4) + load + "selp.b32 %r2, %r1, 7, %p0;\nst.global.b32 [%a1], %r2;"
    run_kernel(body, [source, output], writable=1)
    assert output.tolist() == [i + 1 if i < limit else 7 for i in range(32)]


@pytest.mark.parametrize("text", ["fizz.b32 %r0, %r1;", "bar.sync 1;", "ld.local.b32 %r0, [%r1];", "add.u32 %r0, %r1;"])
def test_unknown_instructions_are_refused_before_anything_runs(text: str) -> None:
    with pytest.raises(PtxError, match=r"not defined|sources expected|defined here"):
        run_kernel(text, [np.zeros(32, np.uint32)], writable=0)


def test_branch_to_an_unknown_label_is_refused() -> None:
    with pytest.raises(PtxError, match="unknown label"):
        parse(build_kernel("bra $L_nowhere;", 1, 32))


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 16])
def test_butterfly_shuffles_read_the_lane_across(distance: int) -> None:
    values, output = RNG.integers(0, 2**32, 64, dtype=np.uint32), np.zeros(64, np.uint32)
    body = f"ld.global.b32 %r0, [%a0];\nshfl.sync.bfly.b32 %r1, %r0, {distance}, 31, -1;\nst.global.b32 [%a1], %r1;"
    run_kernel(address(0, 4) + address(1, 4) + body, [values, output], writable=1, threads=64)
    assert output.tolist() == [int(values[i ^ distance]) for i in range(64)]


def test_a_shuffle_with_a_thread_that_returned_is_refused() -> None:
    body = "setp.ge.u32 %p0, %t2, 16;\n@%p0 ret;\nshfl.sync.bfly.b32 %r1, %t2, 16, 31, -1;\nst.global.b32 [%a0], %r1;"
    with pytest.raises(PtxError, match="elsewhere"):
        run_kernel(address(0, 4) + body, [np.zeros(32, np.uint32)], writable=1)


def test_a_pair_with_one_half_undefined_gives_the_other() -> None:
    """Packed and unpacked again, the half that was defined may be stored and the other may not."""
    pack = "cvt.u16.u32 %h0, %t2;\nmov.b32 %r0, {%h0, %h1};\nmov.b32 {%h2, %h3}, %r0;\n"
    output = np.zeros(32, np.uint16)
    run_kernel(address(0, 2) + pack + "st.global.b16 [%a0], %h2;", [output], writable=1)
    assert output.tolist() == list(range(32))
    with pytest.raises(UndefinedValueError):
        run_kernel(address(0, 2) + pack + "st.global.b16 [%a0], %h3;", [output], writable=1)
