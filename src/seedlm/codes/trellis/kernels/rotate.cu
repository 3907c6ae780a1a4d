// Activations for the products: x [tokens, in] -> signs, Hadamard blocks, int8 with one scale a token, or 16 bits in two int8.
//
// A token is the work of CLUSTER blocks. A warp transforms 32 * E neighbours in registers; the largest magnitude goes round
// (warp, block, cluster); then each lane quantises what it still holds. The largest is found on the bits, as integers, so a
// NaN or Inf is the largest of all and becomes the token's scale: its outputs are not finite, as they should be.
//
// x_parts: int8 [steps][tokens * parts_each][16], zero past `in`. x_scale: float [tokens]. x_sum: int32 [parts], the sum of
// the part's int8. `zero`: int32 [zeros], a multiple of 4, cleared for the products that follow, by the blocks behind the tokens'.
//
// HALVES = 1, for `gemm`: no int8, but halves, x_parts being half [column blocks][padded][64] in that kernel's swizzle; a
// token's scale is a power of two that takes its largest number to 2^13 .. 2^14.
//
// With half_base = 0 a token is one part of -levels..levels; else the integer is high * half_base + low, both in
// -levels..levels. Compile-time: HADAMARD, LANE_NUMBERS, SIGN_WORDS, WARPS, CLUSTER, ROUNDS (pieces of a warp), HALVES.

DEVICE u32 cluster_rank() {
#if __CUDA_ARCH__ >= 900 && CLUSTER > 1
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// No block may write into another's shared memory before that one has started: said at the start, heard before writing.
DEVICE void cluster_started() {
#if __CUDA_ARCH__ >= 900 && CLUSTER > 1
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// A block that leaves hears what it has said.
DEVICE void cluster_left() {
#if __CUDA_ARCH__ >= 900 && CLUSTER > 1
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The largest of one value a block, over the cluster. What was written to global memory before is visible after.
DEVICE u32 cluster_max(u32 value, u32 (&slots)[CLUSTER]) {
#if __CUDA_ARCH__ >= 900 && CLUSTER > 1
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x < CLUSTER) {
    u32 remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem_address(&slots[cluster_rank()])), "r"(threadIdx.x));
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(value) : "memory");
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  for (int i = 0; i < CLUSTER; i++) value = max(value, slots[i]);
  return value;
#else
  __syncthreads();
  return value;
#endif
}

DEVICE void store_part(signed char* to, const int (&q)[E]) {
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

extern "C" __global__ void
#if __CUDA_ARCH__ >= 900 && CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(WARPS * 32)
rotate(const void* x, signed char* x_parts, float* x_scale, int* x_sum, int4* zero,
       int in, int padded_in, int half_base, int levels, int type, int zeros, int tokens, int padded_tokens) {
  __shared__ u32 largest[WARPS];
  __shared__ u32 slots[CLUSTER];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, rank = cluster_rank();
  const int token = blockIdx.x / CLUSTER;
  const int parts_each = half_base ? 2 : 1, parts = tokens * parts_each;
  cluster_started();
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (token >= tokens) {
    const int clearing = blockIdx.x - tokens * CLUSTER, apart = (gridDim.x - tokens * CLUSTER) * blockDim.x;
    for (int i = clearing * blockDim.x + threadIdx.x; i < zeros / 4; i += apart) zero[i] = make_int4(0, 0, 0, 0);
    cluster_left();
    return;
  }

  float v[ROUNDS][E];
  u32 top = 0;
#pragma unroll
  for (int k = 0; k < ROUNDS; k++) {
    const int first = (((k * WARPS + warp) * CLUSTER + rank) * 32 + lane) * E;
    if (first - lane * E >= in) continue;
    const Place place(first, in);
    load_numbers(v[k], x, (u64)token * in, first, in, type);
#pragma unroll
    for (int e = 0; e < E; e++) v[k][e] = signed_by(v[k][e], place.signs, e);
    butterflies(v[k], place, lane);
    const float factor = block_factor(max(place.size, 1));
#pragma unroll
    for (int e = 0; e < E; e++) {
      v[k][e] *= place.size ? factor : block_factor(place.size_of(e));
      top = max(top, __float_as_uint(v[k][e]) & 0x7fffffffu);
    }
  }
  top = __reduce_max_sync(~0u, top);
  if (lane == 0) largest[warp] = top;
  if (!HALVES && rank == 0 && threadIdx.x < parts_each) x_sum[token * parts_each + threadIdx.x] = 0;
  __syncthreads();
  for (int i = 0; i < WARPS; i++) top = max(top, largest[i]);
  top = cluster_max(top, slots);

#if HALVES
  const int exponent = min(max((int)(top >> 23), 14), 254);
  const float inverse = __uint_as_float((127 + 127 + 13 - exponent) << 23);
  if (rank == 0 && threadIdx.x == 0)
    x_scale[token] = top < 0x7f800000u ? __uint_as_float(exponent - 13 << 23) : __uint_as_float(top);
#pragma unroll
  for (int k = 0; k < ROUNDS; k++) {
    const int first = (((k * WARPS + warp) * CLUSTER + rank) * 32 + lane) * E;
    if (first >= padded_in) continue;
    u16* to = (u16*)x_parts + ((u64)(first / 64) * padded_tokens + token) * 64;
#pragma unroll
    for (int e = 0; e < E; e += 8) {
      u32 pairs[4] = {};
      if (first < in)
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = to_half(v[k][e + 2 * i] * inverse) | (u32)to_half(v[k][e + 2 * i + 1] * inverse) << 16;
      *(uint4*)(to + (((first + e) / 8 & 7) ^ (token & 7)) * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
#else
  const float most = __uint_as_float(top), limit = half_base ? (float)(levels * half_base + levels) : (float)levels;
  const float boost = most < 0x1p-100f ? 0x1p100f : 1.0f;  // So that limit / most is finite.
  const float inverse = top ? limit / (most * boost) : 0.0f;
  if (rank == 0 && threadIdx.x == 0) x_scale[token] = most / limit;
  const float high_factor = 1.0f / (float)half_base;  // half_base is odd, so no quotient is near a half
  int high_sum = 0, low_sum = 0;
#pragma unroll
  for (int k = 0; k < ROUNDS; k++) {
    const int first = (((k * WARPS + warp) * CLUSTER + rank) * 32 + lane) * E;
    if (first >= padded_in) continue;
    int high[E], low[E];
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int whole = first < in ? __float2int_rn(v[k][e] * boost * inverse) : 0;
      high[e] = half_base ? __float2int_rn((float)whole * high_factor) : whole;
      low[e] = whole - high[e] * half_base;
      high_sum += high[e], low_sum += low[e];
    }
    signed char* to = x_parts + ((u64)(first / 16) * parts + token * parts_each) * 16 + first % 16;
    store_part(to, high);
    if (half_base) store_part(to + 16, low);
  }
  high_sum = __reduce_add_sync(~0u, high_sum);
  low_sum = __reduce_add_sync(~0u, low_sum);
  if (lane < parts_each) atomicAdd(x_sum + token * parts_each + lane, lane ? low_sum : high_sum);
#endif
}
