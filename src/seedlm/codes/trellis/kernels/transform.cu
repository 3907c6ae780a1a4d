// x in the transformed basis, in its own dtype, for products by a weight that `dequantize` has formed in that basis.
//
// A warp transforms 32 * E neighbours of a token in registers. x, y: [tokens, in] of `type`; a line of eight warps' pieces after
// another. In half precision what leaves +-65504 becomes infinite, as in any product of halves.
extern "C" __global__ void __launch_bounds__(256)
transform(const void* x, void* y, int in, int tokens, int type) {
  const int lane = threadIdx.x & 31, pieces = (in + 32 * E - 1) / (32 * E);
  const u64 number = blockIdx.x * 8ull + (threadIdx.x >> 5);
  if (number >= (u64)tokens * pieces) return;
  const u64 row = number / pieces * in;
  const int first = ((int)(number % pieces) * 32 + lane) * E;
  const Place place(first, in);
  float v[E];
  load_numbers(v, x, row, first, in, type);
#pragma unroll
  for (int e = 0; e < E; e++) v[e] = signed_by(v[e], place.signs, e);
  butterflies(v, place, lane);
  const float factor = block_factor(max(place.size, 1));
#pragma unroll
  for (int e = 0; e < E; e++) v[e] *= place.size ? factor : block_factor(place.size_of(e));
  store_numbers(y, row + first, v, in - first, type);
}
