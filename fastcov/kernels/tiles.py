"""Device code shared by the kernels: loading tiles of rows, splitting float32, exact products."""

import inspect
import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True if the kernels run in Triton's interpreter, on the CPU: decided where triton is imported."""

MODES = {"direct": 0, "split": 1, "tf32": 2, "ieee": 3}
"""Numbers of the modes below, for launchers."""

DIRECT = tl.constexpr(0)
"""Products of bfloat16 or float16 as they are: exact in float32."""
SPLIT = tl.constexpr(1)
"""float32 as three bfloat16, which hold all its 24 bits; six products of nine. Two parts and three
products would miss up to 4.6e-5 of a moment where all rows hold values that they cannot hold."""
TF32 = tl.constexpr(2)
"""float32 rounded to 10 bits of mantissa by the tensor cores."""
IEEE = tl.constexpr(3)
"""float32 products without tensor cores."""


def kernel(*aligned: str):
    """Decorator of a kernel that is compiled anew only for other dtypes, constants and alignments.

    No number picks a compilation by its value, so every number is annotated with its type. Of the
    pointers only those named here promise an address that is a multiple of 16, where it is one.
    """

    def decorate(function):
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        return triton.jit(
            do_not_specialize=[p.name for p in parameters if isinstance(p.annotation, tl.dtype)],
            do_not_specialize_on_alignment=[
                p.name for p in parameters if p.annotation is p.empty and p.name not in aligned
            ],
        )(function)

    return decorate


@triton.jit
def locate(rows, step, geometry, STEP: tl.constexpr, IS_DEEP: tl.constexpr):
    """Address of a step of STEP rows, its image and its first position.

    IS_DEEP: more than one dimension counts images.
    """
    image = step // geometry.steps_per_image
    position = (step % geometry.steps_per_image) * STEP
    if IS_DEEP:
        outer = (image // (geometry.size_1 * geometry.size_2)).to(tl.int64)
        middle = ((image // geometry.size_2) % geometry.size_1).to(tl.int64)
        inner = (image % geometry.size_2).to(tl.int64)
        offset = outer * geometry.stride_0 + middle * geometry.stride_1 + inner * geometry.stride_2
    else:
        offset = image.to(tl.int64) * geometry.stride_2
    return rows + (offset + position.to(tl.int64) * geometry.stride_position), image, position


@triton.jit
def load_tile(
    origin,  # where the step starts
    position,  # of the step's first row in its image
    channel,  # of the tile's first column
    geometry,
    is_read,  # [ROWS] or None: rows that a mask keeps
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
):
    """Rows of one image, zero outside. [ROWS, COLUMNS], transposed [COLUMNS, ROWS]."""
    row = tl.arange(0, ROWS)
    column = channel + tl.arange(0, COLUMNS)
    is_row = position + row < geometry.positions
    if is_read is not None:
        is_row = is_row & is_read
    is_column = column < geometry.channels
    if IS_TRANSPOSED:
        offset = column[:, None] * geometry.stride_channel + row[None, :] * geometry.stride_position
        tile = tl.load(origin + offset, mask=is_column[:, None] & is_row[None, :], other=0.0)
    else:
        offset = row[:, None] * geometry.stride_position + column[None, :] * geometry.stride_channel
        tile = tl.load(origin + offset, mask=is_row[:, None] & is_column[None, :], other=0.0)
    return tile


@triton.jit
def multiply(left, right, sums, MODE: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    """``sums`` plus left @ right. The interpreter multiplies bfloat16 wrongly: there in float32."""
    if IS_INTERPRETED:
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), sums)
    elif MODE == IEEE:
        product = tl.dot(left, right, sums, input_precision="ieee")
    else:
        product = tl.dot(left, right, sums, input_precision="tf32")
    return product


@triton.jit
def to_bfloat16(values, IS_INTERPRETED: tl.constexpr):
    """Nearest bfloat16. The interpreter's cast truncates: there rounded by hand, kept float32."""
    if IS_INTERPRETED:
        bits = values.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        result = tl.where(values == values, rounded, values)
    else:
        result = values.to(tl.bfloat16)
    return result


@triton.jit
def split(values, IS_INTERPRETED: tl.constexpr):
    """float32 as the sum of three bfloat16: exact, but for parts below the smallest number."""
    high = to_bfloat16(values, IS_INTERPRETED)
    # An infinity leaves inf - inf = NaN: still not finite, which is all that is asked of it.
    rest = values - high.to(tl.float32)
    middle = to_bfloat16(rest, IS_INTERPRETED)
    low = to_bfloat16(rest - middle.to(tl.float32), IS_INTERPRETED)
    return high, middle, low


@triton.jit
def multiply_parts(
    left_high,
    left_middle,
    left_low,
    right_high,
    right_middle,
    right_low,
    sums,
    MODE: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """``sums`` plus left @ right, both in three parts; the products left out are below 2**-23.

    The small products are summed apart, and added with rounding: in the chain of the large ones
    each would be another truncation, or fall below the last bit.
    """
    small = tl.zeros(sums.shape, tl.float32)
    small = multiply(left_low, right_high, small, MODE, IS_INTERPRETED)
    small = multiply(left_high, right_low, small, MODE, IS_INTERPRETED)
    small = multiply(left_middle, right_middle, small, MODE, IS_INTERPRETED)
    small = multiply(left_middle, right_high, small, MODE, IS_INTERPRETED)
    small = multiply(left_high, right_middle, small, MODE, IS_INTERPRETED)
    return multiply(left_high, right_high, sums, MODE, IS_INTERPRETED) + small


@triton.jit
def multiply_tiles(left, right, sums, MODE: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    """``sums`` plus left @ right, float32 operands split if MODE says so. [M, K] @ [K, N]."""
    if MODE == SPLIT:
        left_high, left_middle, left_low = split(left, IS_INTERPRETED)
        right_high, right_middle, right_low = split(right, IS_INTERPRETED)
        sums = multiply_parts(
            left_high,
            left_middle,
            left_low,
            right_high,
            right_middle,
            right_low,
            sums,
            MODE,
            IS_INTERPRETED,
        )
    else:
        sums = multiply(left, right, sums, MODE, IS_INTERPRETED)
    return sums


@triton.jit
def is_finite(values):
    """False for NaN too: no comparison with it holds."""
    return tl.abs(values.to(tl.float32)) < float("inf")


@triton.jit
def keep(address, values, mask, ADDS: tl.constexpr):
    """Values stored in, or added to, entries that no other program touches.

    The addition is L2's, rounded to nearest, and in the order of the calls. A value that several
    threads hold alike is added once.
    """
    if ADDS:
        tl.atomic_add(address, values, mask=mask, sem="relaxed")
    else:
        tl.store(address, values, mask=mask)


@triton.jit
def workspace(partial, partial_entries, notes_entries):
    """Notes and the mask of rows, which lie behind the partial results.

    One allocation for all three: allocating takes nearly half of the host's time for an update.
    """
    notes = (partial + partial_entries).to(tl.pointer_type(tl.int32))
    is_row_finite = (notes + notes_entries).to(tl.pointer_type(tl.uint8))
    return notes, is_row_finite


@triton.jit
def begin_update(ends, count):
    """Facts behind an update's notes: if the state had seen no row, and the update's token."""
    tl.store(ends, (tl.load(count) == 0).to(tl.int32))
    tl.store(ends + 1, update_token(count))


@triton.jit
def update_token(count):
    """Number of an update of a state: the rows before it, and 1 so that it is not 0."""
    return (tl.load(count) + tl.load(count + 1) + 1).to(tl.int32)


@triton.jit
def note_broken(ends, count):
    """Note that the update has met a row that is not finite."""
    tl.store(ends + 2, update_token(count))


@triton.jit
def has_broken(ends):
    """True if the update may have met a row that is not finite: the notes then say how many.

    True by chance where memory that nobody has written holds the token; false only where all rows
    are finite.
    """
    return tl.load(ends + 1) == tl.load(ends + 2)


@triton.jit
def start_next(OVERLAPS: tl.constexpr):
    """Permission for the update's next launch to come early: it waits before it reads."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAPS: tl.constexpr):
    """Wait until all values written by the launch before can be read."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def slot_size(channels, EDGE: tl.constexpr):
    """Entries of one chunk's partial result: packed triangle of blocks, then column sums."""
    edges = tl.cdiv(channels, EDGE)
    return edges * (edges + 1) // 2 * (EDGE * EDGE) + edges * EDGE


@triton.jit
def triangle_size(channels, EDGE: tl.constexpr):
    """Entries of the packed triangle alone."""
    edges = tl.cdiv(channels, EDGE)
    return edges * (edges + 1) // 2 * (EDGE * EDGE)


@triton.jit
def triangle_row(index):
    """Largest r with r (r + 1) / 2 <= index. Counted: a root would have to be corrected."""
    row = 0
    while (row + 1) * (row + 2) // 2 <= index:
        row += 1
    return row
