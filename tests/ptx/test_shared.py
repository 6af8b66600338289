"""The interpreter's shared memory and shuffles: values, and every misuse that it must find."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.machine import Grid, Machine
from tests.ptx.memory import AccessError, Memory
from tests.ptx.parser import PtxError, parse
from tests.ptx.snippets import address, build_kernel, segment_of

WRITE = "shl.b32 %r0, %t0, 2;\nst.shared.b32 [%r0], %t2;\n"
BARRIER = "bar.sync 0;\n"
# The value of the thread in the mirror: the last one for the first.
READ = "sub.s32 %r1, 252, %r0;\nld.shared.b32 %r2, [%r1];\n"
STORE = address(0, 4) + "st.global.b32 [%a0], %r2;"


def run(body: str, threads: int = 64, blocks: int = 2, shared: int = 256) -> list[int]:
    """Run a body whose threads each store a number, and return these."""
    output, memory = np.zeros(threads * blocks, np.uint32), Memory()
    memory.add(segment_of("output", output, writable=True))
    machine = Machine(parse(build_kernel(body, 1, threads)), memory, shared)
    machine.run([output.ctypes.data], Grid((blocks, 1, 1)))
    return output.tolist()


def test_threads_of_a_block_exchange_values_over_a_barrier() -> None:
    assert run(WRITE + BARRIER + READ + STORE) == [*range(63, -1, -1), *range(127, 63, -1)]


def test_a_missing_barrier_is_a_race() -> None:
    with pytest.raises(AccessError, match="race"):
        run(WRITE + READ + STORE)


def test_two_values_for_one_place_are_a_race_and_one_value_is_none() -> None:
    one_place = "mov.b32 %r0, 0;\nmov.b32 %r1, {};\nst.shared.b32 [%r0], %r1;\n"
    with pytest.raises(AccessError, match="different values"):
        run(one_place.format("%t0") + BARRIER + "ld.shared.b32 %r2, [%r0];\n" + STORE)
    assert run(one_place.format("7") + BARRIER + "ld.shared.b32 %r2, [%r0];\n" + STORE) == [7] * 128


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("mov.b32 %r0, 0;\nld.shared.b32 %r2, [%r0];\n", "never written"),
        ("mov.b32 %r0, 256;\nld.shared.b32 %r2, [%r0];\n", "out of bounds"),
    ],
)
def test_what_holds_nothing_or_is_another_blocks_is_not_read(body: str, said: str) -> None:
    with pytest.raises(AccessError, match=said):
        run(body + STORE)


def test_a_barrier_that_some_threads_miss_is_refused() -> None:
    with pytest.raises(PtxError, match="does not reach"):
        run("setp.ge.u32 %p0, %t0, 32;\n@%p0 ret;\n" + BARRIER + "mov.b32 %r2, 0;\n" + STORE)


def test_a_shuffle_reads_the_lane_that_it_is_given() -> None:
    body = "xor.b32 %r0, %t0, 5;\nshfl.sync.idx.b32 %r2, %t2, %r0, 31, -1;\n"
    assert run(body + STORE) == [n ^ 5 for n in range(128)]


def test_matrices_of_halves_are_written_and_read_row_by_row() -> None:
    """Each lane holds two columns of a row; row r lies where lane r says, here in reverse order."""
    rows = "and.b32 %r0, %t0, 7;\nsub.s32 %r0, 7, %r0;\nshl.b32 %r0, %r0, 4;\n"
    store = "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r0], {%t2};\n"
    load = "shl.b32 %r1, %t0, 2;\nld.shared.b32 %r2, [%r1];\n"
    expected = [4 * (7 - n // 4) + n % 4 for n in range(32)]
    assert run(rows + store + BARRIER + load + STORE, threads=32, blocks=1) == expected
    again = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r0];\n"
    assert run(rows + store + BARRIER + again + STORE, threads=32, blocks=1) == list(range(32))
