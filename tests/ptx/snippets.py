"""Wrap a few PTX instructions into a kernel with one thread per element, to test the interpreter itself."""

from __future__ import annotations

import numpy as np

from tests.ptx.machine import Grid, Machine
from tests.ptx.memory import Memory, Segment
from tests.ptx.parser import parse

_HEADER = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry snippet({parameters})
.reqntid {threads}
{{
"""
_REGISTERS = """
	.reg .pred %p<9>;
	.reg .b16 %h<9>;
	.reg .b32 %r<9>;
	.reg .b64 %d<9>;
	.reg .b32 %t<9>;
	.reg .b64 %a<9>;
	mov.u32 %t0, %tid.x;
	mov.u32 %t1, %ctaid.x;
	mad.lo.s32 %t2, %t1, {threads}, %t0;
"""


def segment_of(name: str, array: np.ndarray, *, writable: bool = False) -> Segment:
    """A segment over an array's own memory."""
    unit = min(array.itemsize, 4)
    return Segment(name, array.ctypes.data, array.nbytes, unit=unit, writable=writable)


def build_kernel(body: str, parameters: int, threads: int) -> str:
    """A module whose entry takes pointers ``p0 ... pN`` and holds the body; ``%t2`` is the element's index."""
    names = ", ".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(parameters))
    return (_HEADER + _REGISTERS).format(parameters=names, threads=threads) + body + "\nret;\n}\n"


def run_kernel(body: str, arrays: list[np.ndarray], *, writable: int, threads: int = 32, blocks: int = 1) -> Memory:
    """Run a body on arrays; the last ``writable`` of them are outputs, unreadable before they are written."""
    memory, program = Memory(), parse(build_kernel(body, len(arrays), threads))
    for i, array in enumerate(arrays):
        is_output = i >= len(arrays) - writable
        segment = memory.add(segment_of(f"p{i}", array, writable=is_output))
        segment.unreadable[:] = is_output
    Machine(program, memory).run([a.ctypes.data for a in arrays], Grid((blocks, 1, 1)))
    return memory


def address(index: int, itemsize: int) -> str:
    """Instructions that leave the address of this thread's element of ``p<index>`` in ``%a<index>``."""
    return f"ld.param.b64 %a{index}, [p{index}];\nmad.wide.u32 %a{index}, %t2, {itemsize}, %a{index};\n"


def evaluate(instruction: str, inputs: list[np.ndarray], result: str) -> np.ndarray:
    """Apply one instruction, written with ``$0`` for its result and ``$1 ...`` for its inputs, to whole arrays."""
    output = np.zeros(inputs[0].shape, result)
    registers, body = {1: "p", 2: "h", 4: "r", 8: "d"}, ""
    names = [f"%{registers[max(a.itemsize, 2)]}{i + 1}" for i, a in enumerate(inputs)]
    for i, (array, name) in enumerate(zip(inputs, names, strict=True)):
        body += address(i, array.itemsize) + f"ld.global.b{array.itemsize * 8} {name}, [%a{i}];\n"
        if array.dtype == np.bool_:
            body += f"setp.ne.b16 %p{i + 1}, {name}, 0;\n"
            names[i] = f"%p{i + 1}"
    target = "%p0" if output.dtype == np.bool_ else f"%{registers[output.itemsize]}0"
    text = instruction.replace("$0", target)
    for i, name in enumerate(names):
        text = text.replace(f"${i + 1}", name)
    last = len(inputs)
    body += text + ";\n" + address(last, output.itemsize)
    if output.dtype == np.bool_:
        body += "selp.b16 %h0, 1, 0, %p0;\n"
        target = "%h0"
    body += f"st.global.b{output.itemsize * 8} [%a{last}], {target};\n"
    count = len(output)
    run_kernel(body, [*inputs, output], writable=1, threads=1, blocks=count)
    return output


def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values against a shuffled copy, and against themselves."""
    shuffled = np.random.default_rng(0).permutation(values)
    return np.concatenate([values, values]), np.concatenate([shuffled, values])
