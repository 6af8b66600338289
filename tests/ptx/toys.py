"""Small Triton kernels that show the interpreter and the driver what compiled code looks like."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def masked_add(x_ptr, y_ptr, out_ptr, n_elements, BLOCK: tl.constexpr):
    """out = x + y in float32, rounded once at the store."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=mask).to(tl.float32)
    tl.store(out_ptr + offs, x + y, mask=mask)


@triton.jit
def philox_words(counter_ptr, key_ptr, out_ptr, COUNT: tl.constexpr):
    """The four words of Philox4x32-10 for each of COUNT counters and keys."""
    rows = tl.arange(0, COUNT)
    c0 = tl.load(counter_ptr + 4 * rows)
    c1 = tl.load(counter_ptr + 4 * rows + 1)
    c2 = tl.load(counter_ptr + 4 * rows + 2)
    c3 = tl.load(counter_ptr + 4 * rows + 3)
    key_low = tl.load(key_ptr + 2 * rows)
    key_high = tl.load(key_ptr + 2 * rows + 1)
    c0, c1, c2, c3 = tl.random.philox_impl(c0, c1, c2, c3, key_low, key_high, 10)
    tl.store(out_ptr + 4 * rows, c0)
    tl.store(out_ptr + 4 * rows + 1, c1)
    tl.store(out_ptr + 4 * rows + 2, c2)
    tl.store(out_ptr + 4 * rows + 3, c3)


@triton.jit
def clamp(x_ptr, bounds_ptr, out_ptr, n_elements, BLOCK: tl.constexpr):
    """out = min(max(x, lo), hi), NaN kept."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    low = tl.load(bounds_ptr)
    high = tl.load(bounds_ptr + 1)
    x = tl.load(x_ptr + offs, mask=mask)
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + offs, x, mask=mask)


@triton.jit
def sum_rows(x_ptr, out_ptr, n_rows, n_columns, BLOCK: tl.constexpr):
    """out[j] = sum over i of x[i, j], a loop whose length is an argument."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_columns
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(n_rows):
        total += tl.load(x_ptr + row * n_columns + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, total, mask=mask)


@triton.jit
def past_the_end(x_ptr, out_ptr, n_elements, BLOCK: tl.constexpr):
    """A kernel with the usual bug: its mask is one element too wide."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs <= n_elements
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)


@triton.jit
def library_functions(x_ptr, out_ptr, n_elements, SINE: tl.constexpr, BLOCK: tl.constexpr):
    """out = sin(x) or sqrt(x), both of which keep a slow path in the listing."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    x = tl.load(x_ptr + offs, mask=mask, other=1.0)
    if SINE:
        y = tl.sin(x)
    else:
        y = tl.sqrt_rn(x)
    tl.store(out_ptr + offs, y, mask=mask)
