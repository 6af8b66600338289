"""The checks that every argument goes through."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from fastddpm import checks


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integer_takes_every_kind_of_integer(value: object) -> None:
    n = checks.integer("steps", value, 1, 3)
    assert n == 3
    assert type(n) is int


@pytest.mark.parametrize(
    "value", [True, 3.0, "3", None, [3], np.float32(3), torch.tensor(3.0), 0, 4, 10**5000], ids=checks.shown
)
def test_integer_refuses_with_name_value_and_range(value: object) -> None:
    with pytest.raises(ValueError, match=r"^steps must be an integer >= 1 and <= 3, got .{1,80}$"):
        checks.integer("steps", value, 1, 3)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.int64(0), Fraction(1, 2)])
def test_number_takes_every_kind_of_real_number(value: float) -> None:
    x = checks.number("eta", value, ge=0, lt=1)
    assert x == float(value)
    assert type(x) is float


@pytest.mark.parametrize("value", [False, "0.5", None, 1j, float("nan"), float("inf"), 1.0, -1e-9, 10**400])
def test_number_refuses_with_name_value_and_range(value: object) -> None:
    with pytest.raises(ValueError, match=r"^eta must be a finite number >= 0 and < 1, got .{1,80}$"):
        checks.number("eta", value, ge=0, lt=1)


def test_one_of_names_the_nearest_choice() -> None:
    choices = ("auto", True, False)
    assert [checks.one_of("compile", value, choices) for value in choices] == ["auto", True, False]
    with pytest.raises(ValueError, match=r"^unknown compile 'Aut' \(did you mean 'auto'\?\); choose one of auto, True"):
        checks.one_of("compile", "Aut", choices)
    for value in (1, None, [], "x", np.ones(2)):
        with pytest.raises(TypeError, match=r"^unknown compile .*; choose one of auto, True, False$"):
            checks.one_of("compile", value, choices, TypeError)


def test_shown_holds_no_control_characters_and_is_short() -> None:
    assert checks.shown("a\x1b[2Jb") == r"'a\x1b[2Jb'"
    assert checks.shown("x" * 10**6) == f"'{'x' * 76}..."
