// Activations as the kernels want them: in the transformed basis (`transformed`), as integers with a scale (`Quantizer`).
//
// A warp transforms 32 * E neighbours in registers, a piece. Largest magnitudes are found on the bits, as integers,
// so a NaN or Inf is the largest of all and becomes the token's scale: its outputs are not finite, as they should be.
//
// HALF_BASE > 0: the integer is high * HALF_BASE + low, both in -LEVELS..LEVELS, and a token has one scale.
// HALF_BASE = 0: a token is one part of -LEVELS..LEVELS, and each GROUP columns have a scale of their own, since after the transform
// groups may differ as columns did before. So that sums stay integers it is a whole multiple, 1 to 16, of the token's. All its
// multiples together are bounded, which keeps sums in int32 (`BUDGET`): where groups are many and alike, the multiples are small.
//
// Compile-time, since this runs once a kernel and so takes as long as its instructions take to arrive: IN (columns of x), TYPE (of its
// numbers), HALF_BASE, LEVELS, GROUP.

constexpr int PARTS_EACH = HALF_BASE ? 2 : 1;
constexpr int GROUPS = HALF_BASE ? 1 : (IN + GROUP - 1) / GROUP;
constexpr int MOST_MULTIPLE = 16, BUDGET = (int)(2e9 / (510.0 * GROUP * LEVELS));  // 2^31 and a margin for sums that are off their middle
constexpr int GROUPS_OF_PIECE = 32 * E / GROUP;

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

// The largest of the group that a lane's numbers belong to, of those of all lanes.
DEVICE u32 largest_of_group(u32 top, int lane) {
  return GROUPS_OF_PIECE == 1 ? __reduce_max_sync(~0u, top) : __reduce_max_sync(lane < 16 ? 0xffffu : 0xffff0000u, top);
}

// A token whose largest magnitude is `top`, as bits: so that its numbers do not become subnormal.
DEVICE float boost_of(u32 top) { return __uint_as_float(top) < 0x1p-100f ? 0x1p100f : 1.0f; }

// How large a group is beside the largest, in 256ths, rounded up.
DEVICE int share_of(u32 group_top, u32 top) {
  const float boost = boost_of(top);
  return __float2int_ru(__uint_as_float(group_top) * boost * __fdividef(256.0f, __uint_as_float(top) * boost));
}

// How a token becomes integers; `shares` are those of all groups.
struct Quantizer {
  float scale, boost, least, many;  // least: what takes the largest number to the limit; many: the multiple of the largest group

  DEVICE Quantizer(u32 top, int shares = 0) : boost(boost_of(top)), many(1.0f) {
    const float most = __uint_as_float(top), limit = HALF_BASE ? (float)(LEVELS * HALF_BASE + LEVELS) : (float)LEVELS;
    least = top ? limit / (most * boost) : 0.0f;
    scale = most / limit;
    if (HALF_BASE) return;
    // Multiples are rounded up, so all together are less than many * shares / 256 + GROUPS.
    many = fminf(fmaxf(floorf(__fdividef((BUDGET - GROUPS) * 256.0f, (float)shares)), 1.0f), (float)MOST_MULTIPLE);
    scale = __fdividef(scale, many);
  }

  // Of the token's scale, for a group whose largest magnitude is `top`. What a margin loses still rounds to LEVELS.
  DEVICE int multiple(u32 top) const {
    const float needed = ceilf(__uint_as_float(top) * boost * least * (0.99999f / (float)LEVELS) * many);
    return (int)fminf(fmaxf(needed, 1.0f), (float)MOST_MULTIPLE);
  }

  // Write a lane's numbers to `to`, and the lower halves 16 bytes further; add them, as often as the multiple says, to the sums.
  DEVICE void store(signed char* to, const float (&v)[E], int multiple, int& high_sum, int& low_sum) const {
    int high[E], low[E], sum = 0;
    const float factor = HALF_BASE ? least : least * __fdividef(many, (float)multiple);
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int whole = __float2int_rn(v[e] * boost * factor);
      high[e] = HALF_BASE ? __float2int_rn((float)whole * (1.0f / (float)HALF_BASE)) : whole;  // HALF_BASE is odd: no half
      low[e] = whole - high[e] * HALF_BASE;
      sum += high[e], low_sum += low[e];
    }
    high_sum += sum * multiple;
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
