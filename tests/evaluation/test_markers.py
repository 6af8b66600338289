"""Text between the markers of a Markdown file."""

from __future__ import annotations

import pytest

from tests.evaluation.model_card import replace_between


def test_replace_between_leaves_the_rest_as_it_is() -> None:
    assert replace_between("before <a>old\nlines<b> after\n", "<a>", "<b>", "new", "it") == (
        "before <a>\nnew\n<b> after\n"
    )


@pytest.mark.parametrize("text", ["", "<a>", "<b>", "<b><a>", "<a><a><b>", "<a><b><b>", "<b><a><b>"])
def test_replace_between_wants_each_marker_once_in_order(text: str) -> None:
    with pytest.raises(ValueError, match=r"^page.md must hold <a> and, after it, <b>, once each"):
        replace_between(text, "<a>", "<b>", "new", "page.md")
