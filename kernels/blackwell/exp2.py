"""2^x on the FMA pipes, for the share of a tile's exponentials that the exponential unit has no time for.

A Blackwell SM (10.0) makes 16 exponentials a clock against 8192 matrix FLOP, so that at head dim 128 the two
units need the same time for a tile; a share done with packed FMAs takes the exponential unit off the critical
path. 10.3 has a unit twice as fast and needs none.

    x = n + f, n = floor(x), 0 <= f < 1;  2^x = 2^n p(f),  p(f) = 1 + c1 f + c2 f^2 + c3 f^3

p minimises max |p(f) / 2^f - 1| over [0, 1] with p(0) = 1, so that the largest element of a row is exactly 1.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

# Remez exchange on [0, 1]; found with float64, then rounded to fp32.
COEFFICIENTS = (1.0, 0.6951167583465576, 0.22764499485492706, 0.07706703990697861)
MAX_RELATIVE_ERROR = 8.6e-5  # 2^-13.5, fp32 arithmetic included; a bfloat16 P rounds by 2^-9
SMALLEST_EXPONENT = -127.0  # below it the sum of exponent and fraction bits would wrap; 2^-127 is 0 in P
# Adding 1.5 * 2^23 with rounding towards -inf leaves floor(x) in the low mantissa bits.
FLOOR_MAGIC = 12582912.0
MANTISSA_BITS = 23


@cute.jit
def exp2_pair(x: Float32, y: Float32):
    """(2^x, 2^y) for x, y in [-inf, 127), relative error at most `MAX_RELATIVE_ERROR`; a NaN is lost."""
    pair = (cute.arch.fmax(x, SMALLEST_EXPONENT), cute.arch.fmax(y, SMALLEST_EXPONENT))
    shifted = cute.arch.add_packed_f32x2(pair, (FLOOR_MAGIC, FLOOR_MAGIC), rnd="rm")
    floor = cute.arch.sub_packed_f32x2(shifted, (FLOOR_MAGIC, FLOOR_MAGIC))
    fraction = cute.arch.sub_packed_f32x2(pair, floor)
    value = (COEFFICIENTS[3], COEFFICIENTS[3])
    for coefficient in COEFFICIENTS[2::-1]:
        value = cute.arch.fma_packed_f32x2(value, fraction, (coefficient, coefficient))
    return _scale_by_power(value[0], shifted[0]), _scale_by_power(value[1], shifted[1])


@dsl_user_op
def _scale_by_power(value: Float32, shifted: Float32, *, loc=None, ip=None) -> Float32:
    """value * 2^n, where the low bits of `shifted` are n: n is added to the exponent field."""
    exponent = Int32(llvm.bitcast(T.i32(), Float32(shifted).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))
    bits = Int32(llvm.bitcast(T.i32(), Float32(value).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))
    bits = bits + (exponent << MANTISSA_BITS)
    return Float32(llvm.bitcast(T.f32(), bits.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))
