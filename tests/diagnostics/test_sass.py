"""The SASS reader and walker: hand-written listings with known counts, and kernels compiled without a GPU."""

from __future__ import annotations

import re

import pytest

from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics import sass
from fastddpm.diagnostics.sass_walk import Walk, walk


def listing(body: str, kernel: str = "k") -> str:
    """Write out a body (one instruction or label per line) the way nvdisasm prints it."""
    lines = [f"\t.section\t.text.{kernel}", f"{kernel}:", f".text.{kernel}:"]
    address = 0
    for line in body.strip().splitlines():
        text = line.strip()
        if text.endswith(":"):
            lines.append(text)
        else:
            lines.append(f"        /*{address:04x}*/                   {text} ;")
            address += 16
    return "\n".join(lines)


def count(body: str, *trips: int) -> Walk:
    return walk(listing(body), "k", trips)


LOOP = """
    MOV R0, RZ
    .L_x_0:
    IADD3 R0, R0, 0x1, RZ
    FADD R1, R1, R2
    ISETP.NE.AND P0, PT, R0, R3, PT
    @P0 BRA `(.L_x_0)
    STG.E desc[UR4][R4.64], R1
    EXIT
"""


def test_straight_line_counts_every_instruction_and_no_padding() -> None:
    body = "MOV R0, RZ\n@!P0 LDG.E.128 R4, desc[UR4][R2.64]\nEXIT\n.L_x_9:\nBRA `(.L_x_9)\nNOP\nNOP"
    result = count(body)
    assert (result.executed, result.avoided, len(sass.parse(listing(body), "k")[0])) == (3, (), 3)
    assert result.widths("LDG") == {16: 1}


def test_an_early_exit_is_not_the_path_of_a_full_thread() -> None:
    assert count("ISETP P0, R0\n@P0 EXIT\nFADD R0, R1, R2\nFMUL R0, R1, R2\nEXIT").executed == 5


@pytest.mark.parametrize(("first", "second"), [(1, 4), (4, 1)])
def test_a_branch_takes_its_costlier_arm(first: int, second: int) -> None:
    arms = ["FADD R0, R1, R2\n" * n for n in (first, second)]
    body = f"@P0 BRA `(.L_x_1)\n{arms[0]}BRA `(.L_x_2)\n.L_x_1:\n{arms[1]}.L_x_2:\nEXIT"
    assert count(body).executed == 1 + max(first + 1, second) + 1


@pytest.mark.parametrize("trips", [1, 3, 10])
def test_a_loop_counts_as_often_as_it_runs(trips: int) -> None:
    result = count(LOOP, trips)
    assert result.executed == 1 + 4 * trips + 2
    assert result.classes["float"] == trips


def test_nested_loops_multiply() -> None:
    body = """
        .L_x_0:
        MOV R0, RZ
        .L_x_1:
        FADD R1, R1, R2
        @P0 BRA `(.L_x_1)
        @P1 BRA `(.L_x_0)
        EXIT
    """
    assert count(body, 3, 5).executed == 3 * (1 + 5 * 2 + 1) + 1


def test_an_unknown_loop_is_avoided_and_reported() -> None:
    body = "@P1 BRA `(.L_x_3)\n.L_x_0:\nFADD R1, R1, R2\n@P0 BRA `(.L_x_0)\n.L_x_3:\nEXIT"
    result = count(body)
    assert (result.executed, result.avoided) == (2, ("loop at 0x10",))
    assert count(body, 7).executed == 2 + 14


def test_an_unavoidable_unknown_loop_is_refused() -> None:
    with pytest.raises(sass.SassError, match="trip counts"):
        count(LOOP)


def test_leaving_early_is_no_way_around_a_loop_that_stores() -> None:
    body = LOOP.replace("MOV R0, RZ", "@P1 EXIT\nMOV R0, RZ")
    with pytest.raises(sass.SassError, match=r"loop at 0x20.*trip counts"):
        count(body)
    assert count(body, 2).executed == 2 + 2 * 4 + 2


def test_a_subroutine_is_avoided_and_reported() -> None:
    body = "@P0 BRA `(.L_x_1)\nMOV R0, R1\nCALL.REL.NOINC `($slowpath)\n.L_x_1:\nFADD R0, R1, R2\nEXIT"
    result = count(body)
    assert (result.executed, result.avoided) == (3, ("call of $slowpath",))


def test_a_path_ends_where_the_thread_leaves() -> None:
    into_a_subroutine = "MOV R0, R1\nFADD R0, R0, R0\n.L_x_0:\nCALL.REL.NOINC `($slowpath)\n@P1 BRA `(.L_x_0)"
    assert count(f"@P0 BRA `(.L_x_1)\n{into_a_subroutine}\n.L_x_1:\nEXIT").executed == 2
    assert count("FADD R0, R1, R2\n@P0 EXIT").executed == 2


def test_an_unavoidable_subroutine_is_refused() -> None:
    with pytest.raises(sass.SassError, match="slowpath"):
        count("CALL.REL.NOINC `($slowpath)\nEXIT")


def test_a_uniform_branch_may_fall_through() -> None:
    assert count("BRA.U UP0, `(.L_x_1)\nFADD R0, R1, R2\n.L_x_1:\nEXIT").executed == 3


def test_indirect_branches_and_irreducible_loops_are_refused() -> None:
    with pytest.raises(sass.SassError, match="indirect"):
        count("BRX R2 -0x10\nEXIT")
    two_entries = "@P0 BRA `(.L_x_1)\n.L_x_0:\nFADD R0, R1, R2\n.L_x_1:\nFMUL R0, R1, R2\n@P1 BRA `(.L_x_0)\nEXIT"
    with pytest.raises(sass.SassError, match="irreducible"):
        count(two_entries, 1)


def test_a_missing_kernel_and_surplus_loop_counts_are_refused() -> None:
    with pytest.raises(sass.SassError, match="no kernel 'other'"):
        walk(listing("EXIT"), "other")
    with pytest.raises(sass.SassError, match="2 loop counts"):
        count(LOOP, 1, 2)


def test_an_unrolled_loop_needs_no_count() -> None:
    assert count("FADD R0, R1, R2\nFADD R0, R1, R2\nEXIT", 2).executed == 3


@pytest.mark.parametrize(
    ("opcode", "width"),
    [("LDG.E", 4), ("LDG.E.U16", 2), ("LDG.E.64.CONSTANT", 8), ("STG.E.128", 16), ("STG.E.U8", 1)],
)
def test_access_width_is_read_from_the_opcode(opcode: str, width: int) -> None:
    assert sass.access_width(sass.SassInstruction(0, None, opcode, "", None)) == width


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("IMAD.WIDE.U32", "integer multiply"),
        ("IMAD.HI.U32", "integer multiply"),
        ("IMAD.MOV.U32", "integer"),
        ("LOP3.LUT", "integer"),
        ("FFMA", "float"),
        ("I2FP.F32.U32", "conversion"),
        ("MUFU.RSQ", "special function"),
        ("LDG.E.128", "memory"),
        ("LDC.64", "uniform"),
        ("ULDC.64", "uniform"),
        ("BSSY", "branch"),
    ],
)
def test_instruction_class_names_the_unit(opcode: str, name: str) -> None:
    assert sass.instruction_class(sass.SassInstruction(0, None, opcode, "", None)) == name


def compiled(
    name: str, arch: str, signature: dict[str, str], options: dict[str, int] | None = None, **constants: int
) -> offline.Compiled:
    pytest.importorskip("triton")
    from tests.ptx import toys

    pointers = [argument for argument, kind in signature.items() if kind.startswith("*")]
    kernel = getattr(toys, name)
    return offline.compile_kernel(kernel, signature, constants, arch, aligned=pointers, options=options)


ADD = {"x_ptr": "*fp32", "y_ptr": "*fp32", "out_ptr": "*fp32", "n_elements": "i64"}


@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_100"])
def test_compiled_straight_line_kernel_executes_its_whole_listing(arch: str) -> None:
    binary = compiled("masked_add", arch, ADD, BLOCK=1024)
    text = offline.disassemble(binary)
    result = walk(text, binary.name)
    body = text.split(".text.masked_add:")[1]
    last = max(m.end() for m in re.finditer(r"\bEXIT\b", body))
    assert result.executed == len(re.findall(r"/\*[0-9a-f]{4}\*/ +\S", body[:last]))
    assert offline.resources(binary).spills == body.count("BAR.") == 0


@pytest.mark.parametrize("sine", [False, True])
def test_slow_paths_of_the_library_are_listed_but_not_executed(sine: bool) -> None:
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n_elements": "i32"}
    binary = compiled("library_functions", "sm_90", signature, SINE=sine, BLOCK=512)
    text = offline.disassemble(binary)
    result = walk(text, binary.name)
    assert result.avoided
    assert result.executed < (0.5 if sine else 0.8) * len(sass.parse(text, binary.name)[0])


def test_resources_count_registers_and_spills() -> None:
    ours = offline.resources(compiled("masked_add", "sm_90", ADD, BLOCK=1024))
    assert 8 <= ours.registers <= 64
    assert (ours.spills, ours.shared) == (0, 0)
    starved = offline.resources(compiled("masked_add", "sm_90", ADD, {"maxnreg": 32, "num_warps": 1}, BLOCK=2048))
    assert starved.spills > 0
    assert starved.registers <= 32


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'volta'.*sm_90"):
        compiled("masked_add", "volta", ADD, BLOCK=1024)
