"""The kernel of fused.py, in Triton: a tile of groups in, the same groups rounded out.

To equal `quantize_dequantize` to the last bit it needs RN(x / s), the quotient rounded to nearest,
for which a GPU takes some thirty instructions; the memory leaves time for about as many in all. So
one reciprocal per group is divided, r = RN(1 / s), and each quotient is x r, corrected twice by
q + r (x - q s) in fused multiply-adds: the first correction leaves it within a unit in the last
place, and then the second rounds it correctly (Markstein, IBM J. Res. Dev. 34(1), 1990). Values of
16 bits need the first alone: with 11 bits in x and s a quotient is a tie k + 1/2, or 2^-13 away
from it. x and s are lifted by a power of two near 1 / max|x| first, so that nothing on the way
over- or underflows.

The rest is one instruction each: adding and taking away 1.5 * 2^23 rounds half to even, and the
sign is put back afterwards for the sake of -0. Magnitudes are compared as integers, among which NaN
and infinity are the largest, as which they reach the scale.
"""

import triton
import triton.language as tl

_ROUND: tl.constexpr = tl.constexpr(1.5 * 2**23)
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
_SIGN: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=["num_groups"])  # type: ignore[untyped-decorator]  # triton has no types
def round_groups(  # type: ignore[no-untyped-def]  # neither have its arguments
    x,
    out,
    num_groups,
    width,
    half,  # 2^(bits - 1), float
    step,  # its inverse
    GROUP: tl.constexpr,  # elements that share a scale
    EVEN: tl.constexpr,  # whether every group of a row is whole
    LANES: tl.constexpr,  # GROUP or the next power of two
    TILE: tl.constexpr,  # groups of a program
):
    """Round the groups of `x`, rows of `width` elements, into `out`, in the dtype of that."""
    first = tl.program_id(0).to(tl.int64) * TILE
    group = tl.arange(0, TILE)
    lane = tl.arange(0, LANES)[None, :]
    here = (group < num_groups - first)[:, None]
    if EVEN:
        place = first * GROUP + (group * GROUP)[:, None] + lane
        if LANES != GROUP:
            here = here & (lane < GROUP)
    else:
        per_row = tl.cdiv(width, GROUP)
        group += (first % per_row).to(tl.int32)
        column = group % per_row * GROUP
        start = group // per_row * width + column
        place = first // per_row * width + start[:, None] + lane
        here = here & (lane < tl.minimum(width - column, GROUP)[:, None])
    value = tl.load(x + place, here, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    largest = tl.max(bits & ~_SIGN, 1)
    scale = largest.to(tl.float32, bitcast=True) * step
    scale = tl.where(scale == 0, 1.0, scale)
    scale = tl.where(largest >= _INFINITY, float("nan"), scale)
    exponent = tl.maximum(tl.minimum(254 - (largest >> 23), 253), 1)
    lift = (exponent << 23).to(tl.float32, bitcast=True)
    lifted = scale * lift
    inverse = tl.div_rn(1.0, lifted)
    value *= lift[:, None]
    inverse = tl.broadcast_to(inverse[:, None], [TILE, LANES])
    minus = tl.broadcast_to(-lifted[:, None], [TILE, LANES])
    quotient = value * inverse
    quotient = tl.fma(tl.fma(quotient, minus, value), inverse, quotient)
    if x.dtype.element_ty == tl.float32:
        quotient = tl.fma(tl.fma(quotient, minus, value), inverse, quotient)
    rounded = (quotient + _ROUND) - _ROUND
    rounded = tl.minimum(tl.maximum(rounded, -half), half - 1) * scale[:, None]
    signed = rounded.to(tl.int32, bitcast=True) | (bits & _SIGN)
    result = signed.to(tl.float32, bitcast=True)
    tl.store(out + place, result.to(out.dtype.element_ty), here)
