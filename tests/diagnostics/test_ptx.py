"""Widths of global accesses by argument: against hand-written PTX, and against what the interpreter counts."""

from __future__ import annotations

import pytest

from fastddpm.diagnostics.ptx import accesses

HEADER = ".visible .entry k(\n .param .u64 .ptr k_param_0, .param .u64 k_param_1, .param .u64 .ptr k_param_2\n)\n{\n"
SIGNATURE = {"x_ptr": "*fp32", "n": "i64", "out_ptr": "*fp32"}
BODY = """
	.loc 1 4 0 // k.py:4:0
	ld.param.b64 %rd1, [k_param_0];
	ld.param.b64 %rd2, [k_param_1];
	ld.param.b64 %rd3, [k_param_2];
	mad.lo.s64 %rd4, %rd2, 4, %rd1;
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 0 ];
	ld.global.nc.b16 %rs1, [%rd4+16];
	mul.wide.u32 %rd5, %r1, 4;
	add.s64 %rd6, %rd3, %rd5;
	st.global.v2.b64 [ %rd6 + 0 ], { %rd4, %rd5 };
	ret;
}
"""


def test_accesses_are_traced_through_arithmetic_but_not_through_memory() -> None:
    found = accesses(HEADER + BODY, SIGNATURE)
    assert found == {"x_ptr": {"load": (128, 16)}, "out_ptr": {"store": (128,)}}


def test_pointers_that_a_loop_advances_are_traced() -> None:
    loop = BODY.replace("mad.lo.s64 %rd4, %rd2, 4, %rd1;", "mov.b64 %rd4, %rd7;\nadd.s64 %rd7, %rd1, 4;")
    assert accesses(HEADER + loop, SIGNATURE)["x_ptr"] == {"load": (128, 16)}


@pytest.mark.parametrize("source", ["%rd2", "%rd8"])
def test_an_access_from_no_pointer_is_refused(source: str) -> None:
    body = BODY.replace("add.s64 %rd6, %rd3, %rd5;", f"add.s64 %rd6, {source}, %rd5;")
    with pytest.raises(ValueError, match="starts from 0 arguments"):
        accesses(HEADER + body, SIGNATURE)


def test_an_access_from_two_pointers_is_refused() -> None:
    body = BODY.replace("add.s64 %rd6, %rd3, %rd5;", "selp.b64 %rd6, %rd3, %rd1, %p1;")
    with pytest.raises(ValueError, match="starts from 2 arguments"):
        accesses(HEADER + body, SIGNATURE)
