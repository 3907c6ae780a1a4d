// Rows of the weight, looked up as an embedding does, in the model's own basis and float32.
//
// A warp takes one of the rows asked for and 32 * E neighbouring columns, E to a lane: of each column it reads the two words
// that hold the row's state, decodes, scales, and undoes the transform, as `dequantize` does, to the bit.
//
// words: int32 [segments, in * R], as they are stored; indices: int64 [rows], one out of range gives NaN; y: float [rows, in].
// Compile-time beside RATE, STATE_BITS, MULTIPLIER: HADAMARD, LANE_NUMBERS, SIGN_WORD.

extern "C" __global__ void __launch_bounds__(128)
rows(const u32* words, const u16* row_scales, const float* scale, const long long* indices, float* y,
     int out, int in, int segments, int strip) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int chunk = blockIdx.y * 4 + warp, first = (chunk * 32 + lane) * E;
  if (chunk * 32 * E >= in) return;
  const long long index = indices[blockIdx.x];
  const bool known = index >= 0 && index < out;
  const int segment = known ? (int)(index / 32) : 0, at = (known ? (int)(index % 32) : 0) * R;
  const u64 pitch = (u64)in * R;
  const u32* own = words + segment * pitch + (at >> 5);
  const u32* after = (at >> 5) + 1 < R ? own + 1 : words + next_segment(segment, segments, strip) * pitch;
  const float row_scale = from_half(row_scales[known ? index : 0]) * *scale;
  const Place place(first, in);
  float v[E];
#pragma unroll
  for (int e = 0; e < E; e++) {
    const u64 column = (u64)min(first + e, in - 1) * R;
    const u32 state = __funnelshift_r(__ldg(own + column), __ldg(after + column), at & 31) & STATE_MASK;
    v[e] = (__uint_as_float(dot4(state * MULTIPLIER, 0x01010101u, 0x4b000000u)) - 8389118.0f) * row_scale;
  }
  butterflies(v, place, lane);
  const float factor = block_factor(max(place.size, 1));
#pragma unroll
  for (int e = 0; e < E; e++) {
    v[e] = signed_by(v[e] * (place.size ? factor : block_factor(place.size_of(e))), place.signs, e);
    if (!known) v[e] = __uint_as_float(0x7fffffffu);
  }
  store_numbers(y, (u64)blockIdx.x * in + first, v, in - first, FLOAT32);
}
