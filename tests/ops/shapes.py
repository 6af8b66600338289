"""Shapes that tests of the operations run over: each is odd in its own way."""

SHAPES = {
    "numel1": (1, 1),
    "two": (2, 2),
    "three": (2, 3),
    "four": (3, 4),
    "five": (2, 5),
    "odd-1023": (2, 1023),
    "odd-1025": (1, 1025),
    "points": (300, 2),
    "8x8": (3, 1, 8, 8),
    "multiple-of-4-not-16": (2, 3, 2, 6),
    "odd-plane": (2, 3, 5, 5),
    "32x32": (1, 3, 32, 32),
}
