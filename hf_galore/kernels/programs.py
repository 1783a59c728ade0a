"""The kernels, in Triton. Imported on first use only: `triton` is missing where torch has no CUDA, and on Windows.

All arithmetic is float32 whatever is read and written. Offsets have 64 bits. What changes with each step comes as
float32 numbers, which Triton never compiles for anew.

Moments are requantised to exactly the nearest value of the table, since the table is what a checkpoint's codes mean. A
search by halves would be eight reads of the table, each waiting for the last, which on a card take longer than all the
rest. bitsandbytes' dynamic tables have a closed form that is never off by more than one code; two reads then decide.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _magnitudes(values):
    """The largest magnitude of each row, and what to divide the row by: 1 for one of zeros."""
    largest = tl.max(tl.abs(values), axis=1)
    return largest, tl.where(largest > 0, largest, 1.0)[:, None]


@triton.jit
def _dynamic_steps(size):
    """How many steps of a dynamic table lie below a number from 0 to 1, and a fraction.

    The decade up to 10⁻ⁱ, for i from 0 to 6, has 2⁶⁻ⁱ equal steps, so that steps by size are lines that meet at the
    ends of decades. Each is flatter than the one before: the least of all of them is the one that holds.
    """
    steps = size * (1e6 / 0.9) + 8 / 9
    for i in tl.static_range(1, 7):
        steps = tl.minimum(steps, size * (1e6 / 0.9 / 5**i) + (8 / 9) * 2**i)
    return steps


@triton.jit
def _nearer(values, places, table):
    """The place of the nearest value in a table of 256, from one that is off by one at most."""
    places = tl.minimum(tl.maximum(places, 0), 255)
    there = tl.load(table + places)
    others = tl.where(values > there, places + 1, places - 1)
    others = tl.minimum(tl.maximum(others, 0), 255)
    middle = (there + tl.load(table + others)) * 0.5
    return tl.where(values > middle, tl.maximum(places, others), tl.minimum(places, others))


@triton.jit
def _nearest(values, table, bits: tl.constexpr):
    """The place of the nearest value in an ascending table of 2^bits: how many middles between two lie below."""
    places = tl.zeros_like(values).to(tl.int32)
    for i in tl.static_range(bits):
        upper = places + 2 ** (bits - 1 - i)
        middle = (tl.load(table + upper - 1) + tl.load(table + upper)) * 0.5
        places = tl.where(values > middle, upper, places)
    return places


@triton.jit
def _moved(norm, numel):
    """How many elements are moved: none where the norm is NaN or infinite."""
    return tl.where(tl.abs(tl.load(norm)) < float("inf"), numel, 0)


@triton.jit
def _write(
    target,
    offsets,
    mask,
    moving,
    exp_avg,
    exp_avg_sq,
    eps,
    correction1,
    correction2,
    decay,
    lr,
    is_weight: tl.constexpr,
):
    """N in the target's place, or a weight moved by it; of what is skipped N is 0 and the weight left alone."""
    direction = exp_avg * correction1 / (tl.sqrt(exp_avg_sq) * correction2 + eps)
    if is_weight:
        weight = tl.load(target + offsets, mask=moving, other=0.0).to(tl.float32)
        moved = weight * decay - lr * direction
        tl.store(target + offsets, moved.to(target.dtype.element_ty), mask=moving)
    else:
        direction = tl.where(moving, direction, 0.0)
        tl.store(target + offsets, direction.to(target.dtype.element_ty), mask=mask)


@triton.jit
def adam_8bit(
    target,
    gradient,
    norm,
    exp_avg,
    exp_avg_absmax,
    exp_avg_sq,
    exp_avg_sq_absmax,
    signed,
    unsigned,
    numel,
    beta1,
    new1,
    beta2,
    new2,
    eps,
    correction1,
    correction2,
    decay,
    lr,
    is_weight: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
):
    """Adam with moments in dynamic 8 bits, for `rows` blocks of them."""
    blocks = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    offsets = blocks[:, None] * block + tl.arange(0, block)[None, :]
    moved = _moved(norm, numel)
    moving, moving_blocks = offsets < moved, blocks * block < moved

    new = tl.load(gradient + offsets, mask=moving, other=0.0).to(tl.float32)
    # Elements after the last count for nothing in a block's largest magnitude: 127 and 0 stand for 0.
    codes = tl.load(exp_avg + offsets, mask=moving, other=127).to(tl.int32)
    codes_sq = tl.load(exp_avg_sq + offsets, mask=moving, other=0).to(tl.int32)
    scale = tl.load(exp_avg_absmax + blocks, mask=moving_blocks, other=0.0)[:, None]
    scale_sq = tl.load(exp_avg_sq_absmax + blocks, mask=moving_blocks, other=0.0)[:, None]
    first = tl.load(signed + codes) * scale * beta1 + new * new1
    second = tl.load(unsigned + codes_sq) * scale_sq * beta2 + new * new * new2
    _write(target, offsets, offsets < numel, moving, first, second, eps, correction1, correction2, decay, lr, is_weight)

    largest, scale = _magnitudes(first)
    scaled = first / scale
    steps = _dynamic_steps(tl.abs(scaled)).to(tl.int32)
    places = _nearer(scaled, tl.where(scaled < 0, 127 - steps, 127 + steps), signed)
    tl.store(exp_avg + offsets, places.to(tl.uint8), mask=moving)
    tl.store(exp_avg_absmax + blocks, largest, mask=moving_blocks)

    largest, scale = _magnitudes(second)
    scaled = second / scale
    # With no sign to keep, a decade has twice as many steps.
    places = _nearer(scaled, (2 * _dynamic_steps(scaled)).to(tl.int32) - 1, unsigned)
    tl.store(exp_avg_sq + offsets, places.to(tl.uint8), mask=moving)
    tl.store(exp_avg_sq_absmax + blocks, largest, mask=moving_blocks)


@triton.jit
def adam_32bit(
    target,
    gradient,
    norm,
    exp_avg,
    exp_avg_sq,
    numel,
    beta1,
    new1,
    beta2,
    new2,
    eps,
    correction1,
    correction2,
    decay,
    lr,
    is_weight: tl.constexpr,
    size: tl.constexpr,
):
    """Adam with float32 moments, for `size` elements."""
    offsets = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    moving = offsets < _moved(norm, numel)
    new = tl.load(gradient + offsets, mask=moving, other=0.0).to(tl.float32)
    first = tl.load(exp_avg + offsets, mask=moving, other=0.0) * beta1 + new * new1
    second = tl.load(exp_avg_sq + offsets, mask=moving, other=0.0) * beta2 + new * new * new2
    _write(target, offsets, offsets < numel, moving, first, second, eps, correction1, correction2, decay, lr, is_weight)
    tl.store(exp_avg + offsets, first, mask=moving)
    tl.store(exp_avg_sq + offsets, second, mask=moving)


@triton.jit
def quantize_8bit(codes, absmax, values, table, numel, block: tl.constexpr, rows: tl.constexpr):
    """Places in a table of 256 and scales, of `rows` blocks."""
    blocks = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    offsets = blocks[:, None] * block + tl.arange(0, block)[None, :]
    found = tl.load(values + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
    largest, scale = _magnitudes(found)
    tl.store(codes + offsets, _nearest(found / scale, table, 8).to(tl.uint8), mask=offsets < numel)
    tl.store(absmax + blocks, largest, mask=blocks * block < numel)


@triton.jit
def dequantize_8bit(values, codes, absmax, table, numel, block: tl.constexpr, rows: tl.constexpr):
    """What places in a table stand for, of `rows` blocks."""
    blocks = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    offsets = blocks[:, None] * block + tl.arange(0, block)[None, :]
    places = tl.load(codes + offsets, mask=offsets < numel, other=0).to(tl.int32)
    scale = tl.load(absmax + blocks, mask=blocks * block < numel, other=0.0).to(tl.float32)[:, None]
    found = tl.load(table + places) * scale
    tl.store(values + offsets, found.to(values.dtype.element_ty), mask=offsets < numel)


@triton.jit
def quantize_4bit(codes, absmax, values, table, numel, num_codes, block: tl.constexpr, rows: tl.constexpr):
    """Places in a table of 16, two to a byte, and scales, of `rows` blocks. After the last element comes a 0."""
    half: tl.constexpr = block // 2
    blocks = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    pairs = blocks[:, None] * half + tl.arange(0, half)[None, :]
    upper = tl.load(values + 2 * pairs, mask=2 * pairs < numel, other=0.0).to(tl.float32)
    lower = tl.load(values + 2 * pairs + 1, mask=2 * pairs + 1 < numel, other=0.0).to(tl.float32)
    largest, scale = _magnitudes(tl.maximum(tl.abs(upper), tl.abs(lower)))
    both = (_nearest(upper / scale, table, 4) << 4) | _nearest(lower / scale, table, 4)
    tl.store(codes + pairs, both.to(tl.uint8), mask=pairs < num_codes)
    tl.store(absmax + blocks, largest, mask=blocks * block < numel)


@triton.jit
def dequantize_4bit(values, codes, absmax, table, numel, num_codes, block: tl.constexpr, rows: tl.constexpr):
    """What places in a table of 16 stand for, of `rows` blocks."""
    half: tl.constexpr = block // 2
    blocks = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    pairs = blocks[:, None] * half + tl.arange(0, half)[None, :]
    both = tl.load(codes + pairs, mask=pairs < num_codes, other=0).to(tl.int32)
    places = tl.reshape(tl.join(both >> 4, both & 15), (rows, block))
    scale = tl.load(absmax + blocks, mask=blocks * block < numel, other=0.0).to(tl.float32)[:, None]
    found = tl.load(table + places) * scale
    offsets = blocks[:, None] * block + tl.arange(0, block)[None, :]
    tl.store(values + offsets, found.to(values.dtype.element_ty), mask=offsets < numel)


# ---- weights in 8 bits, MXINT8 (`hf_galore.int8.format`): a power of 2 for each 32 codes of a row


@triton.jit
def _places(num_blocks, blocks_in_row, columns, rows: tl.constexpr):
    """The blocks of 32 that a program has of a matrix: their rows, places in these, columns, and which there are."""
    numbers = tl.program_id(0) * rows + tl.arange(0, rows)
    row, block = numbers // blocks_in_row, numbers % blocks_in_row
    column = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    there = numbers < num_blocks
    return row, block, column, there, there[:, None] & (column < columns)


@triton.jit
def _of_codes(codes, exponents, row, block, column, there, mask, codes_stride, exponents_stride):
    """The values that codes stand for, float32. An exponent is that of a float32, whose other bits are 0."""
    found = tl.load(codes + row.to(tl.int64)[:, None] * codes_stride + column, mask=mask, other=0)
    exponent = tl.load(exponents + row.to(tl.int64) * exponents_stride + block, mask=there, other=1)
    factor = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return found.to(tl.float32) * factor[:, None]


@triton.jit
def _noise(seed, row, block, rows: tl.constexpr):
    """Random numbers from 0 to below 1, of a seed and of an element's own place: whoever else is computed with it.

    Philox gives four numbers at a time, for four elements beside each other.
    """
    quad = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    zero = quad * 0
    first, second, third, fourth = tl.philox(seed, quad, row[:, None] + zero, zero, zero)
    four = tl.join(tl.join(first, third), tl.join(second, fourth))
    # 24 bits are a float32 exactly.
    return (tl.reshape(four, (rows, 32)) >> 8).to(tl.int32).to(tl.float32) * (1.0 / 2**24)


@triton.jit(do_not_specialize=["num_blocks", "blocks_in_row", "exponents_stride"])
def read_int8(
    values,
    codes,
    exponents,
    num_blocks,
    blocks_in_row,
    columns,
    codes_stride,
    exponents_stride,
    rows: tl.constexpr,
):
    """What codes stand for, of `rows` blocks."""
    row, block, column, there, mask = _places(num_blocks, blocks_in_row, columns, rows)
    found = _of_codes(codes, exponents, row, block, column, there, mask, codes_stride, exponents_stride)
    target = values + row.to(tl.int64)[:, None] * columns + column
    tl.store(target, found.to(values.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_blocks", "blocks_in_row", "exponents_stride", "seed", "first_row"])
def add_int8(
    codes,
    exponents,
    update,
    skip,
    num_blocks,
    blocks_in_row,
    columns,
    codes_stride,
    exponents_stride,
    update_stride,
    update_step,
    alpha,
    decay,
    seed: tl.int64,  # said, so that none is compiled for by its size
    first_row: tl.int32,
    is_random: tl.constexpr,
    has_skip: tl.constexpr,
    rows: tl.constexpr,
):
    """Decay and add, of `rows` blocks, and round once: to the nearest, or at random to one of the two beside."""
    if has_skip:
        num_blocks = tl.where(tl.load(skip) == 0, num_blocks, 0)
    row, block, column, there, mask = _places(num_blocks, blocks_in_row, columns, rows)
    before = _of_codes(codes, exponents, row, block, column, there, mask, codes_stride, exponents_stride)
    new = tl.load(update + row.to(tl.int64)[:, None] * update_stride + column * update_step, mask=mask, other=0.0)
    values = before * decay + new.to(tl.float32) * alpha

    # As whole numbers, magnitudes are in the same order, and what is not finite is the largest.
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    # The smallest with which the largest is no more than 127, which is 2^6 times a mantissa of 0x7E0000.
    exponent = (largest >> 23) - 6 + tl.where((largest & 0x7FFFFF) > 0x7E0000, 1, 0)
    exponent = tl.minimum(tl.maximum(exponent, 1), 248)  # 127 of a larger power of 2 are no float32
    scaled = values * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    if is_random:
        down = tl.floor(scaled)
        up = _noise(seed, row + first_row, block, rows) < scaled - down
        rounded = down + tl.where(up, 1.0, 0.0)
    else:
        rounded = (scaled + 12582912.0) - 12582912.0  # 1.5 · 2²³, beside which nothing is left of a fraction
    # Rounded down the largest may be what the next smaller exponent has too.
    halved = (tl.max(tl.abs(rounded), axis=1) <= 63) & (exponent > 1)
    rounded = tl.where(halved[:, None], 2 * rounded, rounded)
    # All of a block that is not finite is NaN: a code of 0 and an exponent of 255.
    finite = largest < 0x7F800000
    exponent = tl.where(finite, exponent - tl.where(halved, 1, 0), 255)
    rounded = tl.where(finite[:, None], tl.minimum(tl.maximum(rounded, -127.0), 127.0), 0.0)
    tl.store(codes + row.to(tl.int64)[:, None] * codes_stride + column, rounded.to(tl.int8), mask=mask)
    tl.store(exponents + row.to(tl.int64) * exponents_stride + block, exponent.to(tl.uint8), mask=there)
