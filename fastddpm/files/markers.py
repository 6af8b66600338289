"""Text between two markers of a Markdown file, which a command writes and the rest of which a person does."""

from __future__ import annotations


def replace_between(text: str, begin: str, end: str, content: str, name: object) -> str:
    """Replace what stands between two markers; the markers stay, on lines of their own.

    Args:
        name: what an error calls the text, such as its path.

    Raises:
        ValueError: the text does not hold each marker once, in order.
    """
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if text.count(begin) != 1 or text.count(end) != 1 or end in before:
        raise ValueError(f"{name} must hold {begin} and, after it, {end}, once each: the numbers go between them")
    return f"{before}{begin}\n{content}\n{end}{after}"
