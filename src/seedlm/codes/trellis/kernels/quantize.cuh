// Activations as the kernels want them: in the transformed basis (`transformed`), as integers with one scale a token (`Quantizer`).
//
// A warp transforms 32 * E neighbours in registers, a piece. The largest magnitude of a token is found on the bits, as integers,
// so a NaN or Inf is the largest of all and becomes the token's scale: its outputs are not finite, as they should be.
//
// With HALF_BASE = 0 a token is one part of -LEVELS..LEVELS; else the integer is high * HALF_BASE + low, both in
// -LEVELS..LEVELS.
//
// Compile-time, since this runs once a kernel and so takes as long as its instructions take to arrive: IN (columns of x), TYPE (of its
// numbers), HALF_BASE, LEVELS.

constexpr int PARTS_EACH = HALF_BASE ? 2 : 1;

// Transform a piece, of which a lane has the numbers from column `first` on; returns the largest magnitude of what they become.
// Every lane of the warp takes part.
DEVICE u32 transform(float (&v)[E], int first, int lane) {
  const Place place(first, IN);
#pragma unroll
  for (int e = 0; e < E; e++) v[e] = signed_by(v[e], place.signs, e);
  butterflies(v, place, lane);
  const float factor = block_factor(max(place.size, 1));
  u32 top = 0;
#pragma unroll
  for (int e = 0; e < E; e++) {
    v[e] *= place.size ? factor : block_factor(place.size_of(e));
    top = max(top, __float_as_uint(v[e]) & 0x7fffffffu);
  }
  return top;
}

// The same, read from x.
DEVICE u32 transformed(float (&v)[E], const void* x, int token, int first, int lane) {
  if (IN % (32 * E) == 0) __builtin_assume(first < IN);
  load_numbers(v, x, (u64)token * IN, first, IN, TYPE);
  return transform(v, first, lane);
}

// How a token whose largest magnitude is `top` becomes integers.
struct Quantizer {
  float scale, boost, inverse;

  DEVICE Quantizer(u32 top) {
    const float most = __uint_as_float(top), limit = HALF_BASE ? (float)(LEVELS * HALF_BASE + LEVELS) : (float)LEVELS;
    boost = most < 0x1p-100f ? 0x1p100f : 1.0f;  // So that limit / most is finite.
    inverse = top ? limit / (most * boost) : 0.0f;
    scale = most / limit;
  }

  // Write a lane's numbers to `to`, and the lower halves 16 bytes further; add them to the sums.
  DEVICE void store(signed char* to, const float (&v)[E], int& high_sum, int& low_sum) const {
    int high[E], low[E];
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int whole = __float2int_rn(v[e] * boost * inverse);
      high[e] = HALF_BASE ? __float2int_rn((float)whole * (1.0f / (float)HALF_BASE)) : whole;  // HALF_BASE is odd: no half
      low[e] = whole - high[e] * HALF_BASE;
      high_sum += high[e], low_sum += low[e];
    }
    store_part(to, high);
    if (HALF_BASE) store_part(to + 16, low);
  }

  static DEVICE void store_part(signed char* to, const int (&q)[E]) {
#pragma unroll
    for (int e = 0; e < E; e += 8) {
      uint2 packed = {0, 0};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        packed.x |= (q[e + i] & 255u) << (8 * i);
        packed.y |= (q[e + i + 4] & 255u) << (8 * i);
      }
      *(uint2*)(to + e) = packed;
    }
  }
};
