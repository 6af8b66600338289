"""The PTX interpreter's memory: bytes counted, and every access that is a fault or a race."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.machine import Grid, Machine
from tests.ptx.memory import AccessError, Memory, Segment, sparse_zeros
from tests.ptx.parser import parse
from tests.ptx.registers import UndefinedValueError
from tests.ptx.snippets import address, build_kernel, run_kernel

RNG = np.random.default_rng(2)


@pytest.mark.parametrize(("width", "vector"), [(8, 1), (16, 1), (16, 4), (32, 1), (32, 2), (32, 4), (64, 1), (64, 2)])
def test_traffic_counts_bytes_and_widths(width: int, vector: int) -> None:
    source = RNG.integers(0, 255, 32 * width * vector // 8, dtype=np.uint8).view(f"u{width // 8}")
    target = np.zeros_like(source)
    register = {8: "h", 16: "h", 32: "r", 64: "d"}[width]
    names = ", ".join(f"%{register}{i}" for i in range(vector))
    shape, braced = (f".v{vector}", "{" + names + "}") if vector > 1 else ("", names)
    size = width * vector // 8
    body = address(0, size) + address(1, size)
    body += f"ld.global{shape}.b{width} {braced}, [%a0];\nst.global{shape}.b{width} [%a1], {braced};"
    memory = run_kernel(body, [source, target], writable=1)
    assert np.array_equal(source, target)
    by_name = {segment.name: segment for segment in memory.segments}
    assert by_name["p0"].traffic.loaded == by_name["p1"].traffic.stored == source.nbytes
    assert by_name["p0"].traffic.load_widths == by_name["p1"].traffic.store_widths == {size: 32}
    assert (by_name["p1"].writes == 1).all()


LOAD = "ld.global.b32 %r0, [%a0{offset}];\nst.global.b32 [%a1], %r0;"


@pytest.mark.parametrize("offset", [4, -4, 128, -128, 1 << 40])
def test_read_outside_a_tensor_is_a_fault(offset: int) -> None:
    body = address(0, 4) + address(1, 4) + LOAD.format(offset=f"+{offset}")
    with pytest.raises(AccessError, match="out of bounds"):
        run_kernel(body, [np.zeros(32, np.uint32), np.zeros(32, np.uint32)], writable=1)


def test_write_outside_a_tensor_is_a_fault() -> None:
    body = address(0, 4) + "st.global.b32 [%a0+4], %t2;"
    with pytest.raises(AccessError, match="out of bounds"):
        run_kernel(body, [np.zeros(32, np.uint32)], writable=1)


def test_masked_access_outside_a_tensor_is_none() -> None:
    body = address(0, 4) + "setp.lt.u32 %p0, %t2, 31;\n@%p0 st.global.b32 [%a0+4], %t2;"
    output = np.full(32, 9, np.uint32)
    run_kernel(body, [output], writable=1)
    assert output.tolist() == [9, *range(31)]


@pytest.mark.parametrize(("access", "offset"), [("v4.b32 {%r0,%r1,%r2,%r3}", 4), ("b64 %d0", 4), ("b32 %r0", 2)])
def test_unaligned_access_is_a_fault(access: str, offset: int) -> None:
    array = np.zeros(64, np.uint32)
    body = f"ld.param.b64 %a0, [p0];\nld.global.{access}, [%a0+{offset}];"
    with pytest.raises(AccessError, match="unaligned"):
        run_kernel(body, [array], writable=0, threads=1)


def test_read_of_unwritten_memory_is_a_fault_until_it_is_written() -> None:
    read = "ld.global.b32 %r0, [%a0];\n"
    with pytest.raises(AccessError, match="never written"):
        run_kernel(address(0, 4) + read, [np.zeros(32, np.uint32)], writable=1)
    run_kernel(address(0, 4) + "st.global.b32 [%a0], 1;\n" + read, [np.zeros(32, np.uint32)], writable=1)


def test_write_to_an_input_is_a_fault() -> None:
    with pytest.raises(AccessError, match="write to an input"):
        run_kernel(address(0, 4) + "st.global.b32 [%a0], 1;", [np.zeros(32, np.uint32)], writable=0)


def test_part_of_an_element_is_a_fault() -> None:
    with pytest.raises(AccessError, match="2 bytes to elements of 4"):
        run_kernel(address(0, 4) + "ld.global.b16 %h0, [%a0];", [np.zeros(32, np.uint32)], writable=0)


def test_two_threads_writing_one_element_is_a_race() -> None:
    body = "ld.param.b64 %a0, [p0];\nst.global.b32 [%a0], %t2;"
    with pytest.raises(AccessError, match="two threads write"):
        run_kernel(body, [np.zeros(1, np.uint32)], writable=1)


@pytest.mark.parametrize("first", ["read", "write"])
def test_reading_what_another_thread_writes_is_a_race(first: str) -> None:
    """Thread i reads element i ^ 1 and writes element i: right or wrong by the order of execution alone."""
    memory, array = Memory(), np.zeros(32, np.uint32)
    memory.add(Segment("p0", array.ctypes.data, array.nbytes, writable=True))
    steps = ["xor.b32 %r1, %t2, 1;\nmad.wide.u32 %a1, %r1, 4, %a1;\nld.global.b32 %r0, [%a1];\n"]
    steps.insert(0 if first == "write" else 1, "st.global.b32 [%a0], %t2;\n")
    body = "ld.param.b64 %a1, [p0];\n" + address(0, 4) + "".join(steps)
    with pytest.raises(AccessError, match="race"):
        Machine(parse(build_kernel(body, 1, 32)), memory).run([array.ctypes.data], Grid((1, 1, 1)))


def in_place(body: str, array: np.ndarray) -> Memory:
    memory = Memory()
    memory.add(Segment("p0", array.ctypes.data, array.nbytes, writable=True, in_place=True))
    Machine(parse(build_kernel(body, 1, 32)), memory).run([array.ctypes.data], Grid((2, 1, 1)))
    return memory


NEIGHBOUR = address(0, 4) + "min.u32 %r3, %t2, 40;\nmad.wide.u32 %a1, %r3, 4, %a1;\nld.global.b32 %r0, [%a1];\n"


def test_in_place_reads_of_others_elements_may_be_dropped() -> None:
    """Threads past the end read the last element, which thread 40 updates, and drop it: in any order, the same."""
    array = np.arange(41, dtype=np.uint32)
    body = "ld.param.b64 %a1, [p0];\n" + NEIGHBOUR + "add.u32 %r0, %r0, 5;\nsetp.le.u32 %p0, %t2, 40;\n"
    memory = in_place(body + "@%p0 st.global.b32 [%a0], %r0;", array)
    assert array.tolist() == list(range(5, 46))
    (segment,) = memory.segments
    assert (segment.traffic.loaded, segment.distinct_loaded, segment.traffic.stored) == (256, 164, 164)
    assert (segment.writes == 1).all()


def test_in_place_reads_of_others_elements_must_not_be_used() -> None:
    body = "ld.param.b64 %a1, [p0];\n" + NEIGHBOUR.replace("min.u32 %r3, %t2, 40", "xor.b32 %r3, %t2, 1")
    with pytest.raises(UndefinedValueError, match="memory"):
        in_place(body + "st.global.b32 [%a0], %r0;", np.arange(64, dtype=np.uint32))


def test_in_place_update_of_ones_own_element_is_no_race() -> None:
    memory, array = Memory(), np.arange(64, dtype=np.uint32)
    memory.add(Segment("p0", array.ctypes.data, array.nbytes, writable=True))
    body = address(0, 4) + "ld.global.b32 %r0, [%a0];\nadd.u32 %r0, %r0, 5;\nst.global.b32 [%a0], %r0;"
    Machine(parse(build_kernel(body, 1, 32)), memory).run([array.ctypes.data], Grid((2, 1, 1)))
    assert array.tolist() == list(range(5, 69))


def test_elements_beyond_two_to_the_31_cost_only_their_pages() -> None:
    array = sparse_zeros((1 << 31) + 64, np.float32)
    memory = Memory()
    memory.add(Segment("p0", array.ctypes.data, array.nbytes, writable=True))
    body = address(0, 4) + "add.s64 %a0, %a0, 8589934592;\nst.global.b32 [%a0], 0f3F800000;"
    Machine(parse(build_kernel(body, 1, 32)), memory).run([array.ctypes.data], Grid((1, 1, 1)))
    assert array[-96:].tolist() == [0.0] * 32 + [1.0] * 32 + [0.0] * 32


def test_a_tensor_at_an_odd_offset_keeps_its_exact_bounds() -> None:
    storage = np.arange(40, dtype=np.uint16)
    body = "ld.param.b64 %a0, [p0];\nmad.wide.u32 %a0, %t2, 2, %a0;\n" + address(1, 2)
    body += "ld.global.b16 %h0, [%a0];\nst.global.b16 [%a1], %h0;"
    output = np.zeros(32, np.uint16)
    run_kernel(body, [storage[3:35], output], writable=1)
    assert output.tolist() == list(range(3, 35))
    with pytest.raises(AccessError, match="out of bounds"):
        run_kernel(body, [storage[3:34], output], writable=1)


def test_overlapping_inputs_are_joined_and_overlapping_outputs_refused() -> None:
    array = np.arange(64, dtype=np.uint32)
    memory = run_kernel(address(0, 4) + "ld.global.b32 %r0, [%a0+128];", [array[:40], array[30:]], writable=0)
    (joined,) = memory.segments
    assert joined.traffic.loaded == 128
    with pytest.raises(AccessError, match="overlaps"):
        run_kernel("", [array[:40], array[30:]], writable=1)
