// Activations for the products: x -> signs, Hadamard blocks, int8 with a scale for each GROUP columns, or 16 bits in two int8.
//
// A token is the work of CLUSTER blocks. Each warp tells all of them the largest magnitudes of its pieces; then each lane quantises
// what it still holds (quantize.cuh).
//
// What is transformed, by SOURCE:
//   0   x
//   1   the RMS norm of x + also, with weight [in] and epsilon; the sum, rounded to its type, replaces x unless there is no `also`.
//       A token's root mean square is one factor, so it goes into x_scale: nobody waits for it before the transform.
//   2   silu(x) * also
//
// x_parts: int8 [steps][tokens * PARTS_EACH][16], zero past `in`. x_scale: float [tokens]. x_sum: int32 [parts][8], of which each
// block of a token's cluster writes one: the sum of its int8, as often as the multiples say; behind it, for int8, the multiples of
// x_scale, int32 [groups][tokens].
//
// HALVES = 1, for `gemm`: no int8, but halves, x_parts being half [column blocks][padded][64] in that kernel's swizzle; a
// token's scale is a power of two that takes its largest number to 2^13 .. 2^14. `zero`: int32 [zeros], a multiple of 4, that
// kernel's counters, cleared by the blocks behind the tokens'.
//
// Compile-time beside quantize.cuh's and hadamard.cuh's: WARPS, CLUSTER, ROUNDS (pieces of a warp), HALVES (with
// SOURCE 0 alone), SOURCE.

constexpr int PIECES = (IN + 32 * E - 1) / (32 * E);

// What is known of a piece: the largest magnitudes, as bits, of its groups, and the sum of squares (SOURCE 1).
struct __align__(E) Piece {
  u32 tops[E / 8];
  float squares;
#if LANE_NUMBERS == 16
  u32 nothing;
#endif
};

// And of a token: the largest, the shares of its groups, and the sum of squares. Every lane of the warp takes part; all find the same.
struct Known {
  u32 top = 0;
  int shares = 0;
  float squares = 0.0f;

  DEVICE Known(const Piece (&pieces)[PIECES], int lane) {
    Piece mine[(PIECES + 31) / 32] = {};
#pragma unroll
    for (int i = 0; i < (PIECES + 31) / 32; i++) {
      if (i * 32 + lane < PIECES) mine[i] = pieces[i * 32 + lane];
#pragma unroll
      for (int k = 0; k < E / 8; k++) top = max(top, mine[i].tops[k]);
      squares += mine[i].squares;
    }
    top = __reduce_max_sync(~0u, top);
    if (SOURCE == 1)
      for (int lanes = 16; lanes; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
    if (HALF_BASE || HALVES) return;
#pragma unroll
    for (int i = 0; i < (PIECES + 31) / 32; i++)
#pragma unroll
      for (int k = 0; k < E / 8; k++) shares += share_of(mine[i].tops[k], top);
    shares = __reduce_add_sync(~0u, shares);
  }
};

DEVICE float as_stored(float value) {
  return TYPE == FLOAT32 ? value : TYPE == FLOAT16 ? from_half(to_half(value)) : from_bfloat(to_bfloat(value));
}

// A lane's numbers of a piece before the transform; the sum of what is squared for a norm, of whose weight the lane has its part.
DEVICE float read_source(float (&v)[E], void* x, const void* also, const float (&weight)[E], int token, int first) {
  if (IN % (32 * E) == 0) __builtin_assume(first < IN);
  const u64 row = (u64)token * IN;
  float squares = 0.0f, other[E];
  if (SOURCE && also) load_both(v, other, x, also, row, first, IN, TYPE);
  else load_numbers(v, x, row, first, IN, TYPE);
  if (SOURCE == 1) {
    if (also) {
#pragma unroll
      for (int e = 0; e < E; e++) v[e] = as_stored(v[e] + other[e]);
      store_numbers(x, row + first, v, IN - first, TYPE);
    }
#pragma unroll
    for (int e = 0; e < E; e++) squares += v[e] * v[e], v[e] *= weight[e];
  }
  if (SOURCE == 2)
#pragma unroll
    for (int e = 0; e < E; e++) v[e] = __fdividef(v[e], 1.0f + __expf(-v[e])) * other[e];
  return squares;
}

// The first column of a lane's piece in a round.
DEVICE int column(int round, int warp, int rank, int lane) { return (((round * WARPS + warp) * CLUSTER + rank) * 32 + lane) * E; }

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(WARPS * 32)
rotate(void* x, const void* also, const void* weight, signed char* x_parts, float* x_scale, int* x_sum, int4* zero,
       int zeros, int tokens, int padded_tokens, float epsilon) {
  __shared__ Piece pieces[PIECES];
  __shared__ u64 inbox;
  __shared__ int sums[PARTS_EACH];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, rank = blockIdx.x % CLUSTER;
  const int token = blockIdx.x / CLUSTER;
  constexpr int UNIT = HALVES ? 64 : 16, PADDED = (IN + UNIT - 1) / UNIT * UNIT;
  open_inbox(&inbox, sizeof(pieces));
  if (threadIdx.x < PARTS_EACH) sums[threadIdx.x] = 0;
  __syncthreads();  // which the inbox does not make up for
  let_next_kernel_start();
  float v[ROUNDS][E], weights[ROUNDS][E];
  if (SOURCE == 1 && token < tokens)  // while the kernel before this one is at work, which does not write it
#pragma unroll
    for (int k = 0; k < ROUNDS; k++) load_numbers(weights[k], weight, 0, column(k, warp, rank, lane), IN, TYPE);
  wait_for_previous_kernel();
  if (token >= tokens) {
    const int clearing = blockIdx.x - tokens * CLUSTER, apart = (gridDim.x - tokens * CLUSTER) * blockDim.x;
    for (int i = clearing * blockDim.x + threadIdx.x; i < zeros / 4; i += apart) zero[i] = make_int4(0, 0, 0, 0);
    inboxes_open();
    return;
  }

  u32 tops[ROUNDS];
  float squares[ROUNDS];
#pragma unroll
  for (int k = 0; k < ROUNDS; k++) {
    const int first = column(k, warp, rank, lane);
    if (first - lane * E >= IN) continue;
    squares[k] = read_source(v[k], x, also, weights[k], token, first);
    tops[k] = largest_of_group(transform(v[k], first, lane), lane);
    if (SOURCE == 1)
      for (int lanes = 16; lanes; lanes /= 2) squares[k] += __shfl_xor_sync(~0u, squares[k], lanes);
  }
  inboxes_open();
#pragma unroll
  for (int k = 0; k < ROUNDS; k++) {
    const int first = column(k, warp, rank, lane);
    if (first - lane * E >= IN) continue;
    Piece* mine = &pieces[first / (32 * E)];
    const u32 upper = GROUPS_OF_PIECE == 1 ? 0 : __shfl_sync(~0u, tops[k], 31);
    if (lane >= CLUSTER) continue;
    if (GROUPS_OF_PIECE == 1) tell(mine, &inbox, lane, tops[k], __float_as_uint(squares[k]));
    else tell(mine, &inbox, lane, tops[k], upper, __float_as_uint(squares[k]), 0);
  }
  await_inbox(&inbox);
  const Known known(pieces, lane);
  const u32 top = known.top;

#if HALVES
  const int exponent = min(max((int)(top >> 23), 14), 254);
  const float inverse = __uint_as_float((127 + 127 + 13 - exponent) << 23);
  if (rank == 0 && threadIdx.x == 0)
    x_scale[token] = top < 0x7f800000u ? __uint_as_float(exponent - 13 << 23) : __uint_as_float(top);
#pragma unroll
  for (int k = 0; k < ROUNDS; k++) {
    const int first = column(k, warp, rank, lane);
    if (first >= PADDED) continue;
    u16* to = (u16*)x_parts + ((u64)(first / 64) * padded_tokens + token) * 64;
#pragma unroll
    for (int e = 0; e < E; e += 8) {
      u32 pairs[4] = {};
      if (first < IN)
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = to_half(v[k][e + 2 * i] * inverse) | (u32)to_half(v[k][e + 2 * i + 1] * inverse) << 16;
      *(uint4*)(to + (((first + e) / 8 & 7) ^ (token & 7)) * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
#else
  const Quantizer quantizer(top, known.shares);
  int high_sum = 0, low_sum = 0;
#pragma unroll
  for (int k = 0; k < ROUNDS; k++) {
    const int first = column(k, warp, rank, lane);
    if (first >= PADDED) continue;
    int multiple = 1;
    if (!HALF_BASE) {
      multiple = quantizer.multiple(tops[k]);
      if (first % GROUP == 0) x_sum[tokens * 8 + first / GROUP * tokens + token] = multiple;
    }
    quantizer.store(x_parts + ((u64)(first / 16) * (tokens * PARTS_EACH) + token * PARTS_EACH) * 16 + first % 16, v[k], multiple, high_sum, low_sum);
  }
  high_sum = __reduce_add_sync(~0u, high_sum);
  low_sum = __reduce_add_sync(~0u, low_sum);
  if (lane < PARTS_EACH) atomicAdd(&sums[lane], lane ? low_sum : high_sum);
  if (rank == 0 && threadIdx.x == 0)
    x_scale[token] = SOURCE == 1 ? quantizer.scale / sqrtf(known.squares / IN + epsilon) : quantizer.scale;
  __syncthreads();
  for (int i = threadIdx.x; i < PARTS_EACH * 8 / CLUSTER; i += WARPS * 32) {
    const int part = i % PARTS_EACH, slot = i / PARTS_EACH * CLUSTER + rank;
    x_sum[(token * PARTS_EACH + part) * 8 + slot] = slot == rank ? sums[part] : 0;
  }
#endif
}
