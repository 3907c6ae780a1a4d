// The weights themselves: of the transformed basis (ORIGINAL = 0), or of the model's own (ORIGINAL = 1).
//
// A warp takes one segment and 32 * E neighbouring columns, E to a lane, and goes down the 32 rows: decode, scale, undo the
// transform (Hadamard, then signs) in float32, and store E neighbours at once. Each product is rounded once, in the order
// of the definition: value * (row scale * scale).
//
// words: int32 [segments, steps * 16 * R]; weight: [out, in] of `type`.
// Compile-time beside RATE, STATE_BITS, MULTIPLIER: ORIGINAL, HADAMARD, LANE_NUMBERS, SIGN_WORD.

// The value of a row as a float, exactly: the byte sum lands in the mantissa of 2^23.
DEVICE float value(const u32 (&q)[R + 1], int row) {
  return __uint_as_float(dot4(hash(q, row), 0x01010101u, 0x4b000000u)) - 8389118.0f;
}

extern "C" __global__ void __launch_bounds__(128)
dequantize(const u32* words, const u16* row_scales, const float* scale, void* weight,
           int out, int in, int steps, int segments, int strip, int type) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int chunk = blockIdx.x * 4 + warp, segment = blockIdx.y, first = (chunk * 32 + lane) * E;
  if (chunk * 32 * E >= in) return;
  const u64 pitch = (u64)steps * (16 * R);
  u32 q[E][R + 1] = {};
  if (first < steps * 16) {
    const u32* own = words + segment * pitch + first * R;
    const u32* next = words + next_segment(segment, segments, strip) * pitch + first * R;
    u32 flat[E * R];
#pragma unroll
    for (int i = 0; i < E * R; i += 4) {
      const uint4 four = __ldg((const uint4*)(own + i));
      flat[i] = four.x, flat[i + 1] = four.y, flat[i + 2] = four.z, flat[i + 3] = four.w;
    }
#pragma unroll
    for (int e = 0; e < E; e++) {
#pragma unroll
      for (int i = 0; i < R; i++) q[e][i] = flat[e * R + i];
      q[e][R] = __ldg(next + e * R);
    }
  }
  const Place place(first, in);
  const float factor = block_factor(max(place.size, 1)), whole = *scale;
  const int rows = min(32, out - segment * 32);
  const float mine = lane < rows ? from_half(row_scales[segment * 32 + lane]) * whole : 0.0f;
#pragma unroll
  for (int row = 0; row < 32; row++) {
    if (row >= rows) break;
    const float row_scale = __shfl_sync(~0u, mine, row);
    float v[E];
#pragma unroll
    for (int e = 0; e < E; e++) v[e] = value(q[e], row) * row_scale;
    if (ORIGINAL) {
      butterflies(v, place, lane);
#pragma unroll
      for (int e = 0; e < E; e++)
        v[e] = signed_by(v[e] * (place.size ? factor : block_factor(place.size_of(e))), place.signs, e);
    }
    store_numbers(weight, (u64)(segment * 32 + row) * in + first, v, in - first, type);
  }
}
