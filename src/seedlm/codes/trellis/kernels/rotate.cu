// Activations for the products: x [tokens, in] -> signs, Hadamard blocks, int8 with one scale a token, or 16 bits in two int8.
//
// A token is the work of CLUSTER blocks. The largest magnitude goes round (warp, block, cluster); then each lane quantises what
// it still holds (quantize.cuh).
//
// x_parts: int8 [steps][tokens * PARTS_EACH][16], zero past `in`. x_scale: float [tokens]. x_sum: int32 [parts], the sum of
// the part's int8, cleared here.
//
// HALVES = 1, for `gemm`: no int8, but halves, x_parts being half [column blocks][padded][64] in that kernel's swizzle; a
// token's scale is a power of two that takes its largest number to 2^13 .. 2^14. `zero`: int32 [zeros], a multiple of 4, that
// kernel's counters, cleared by the blocks behind the tokens'.
//
// Compile-time beside quantize.cuh's and hadamard.cuh's: WARPS, CLUSTER, ROUNDS (pieces of a warp), HALVES.

#if CLUSTER > 1
// A barrier of all threads of the cluster in two halves: what came before the one is visible after the other.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The largest of one value a block, over the cluster.
DEVICE u32 cluster_max(u32 value, u32 (&slots)[CLUSTER], int rank) {
  cluster_wait();  // for all blocks to have started
  if (threadIdx.x < CLUSTER) {
    u32 remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem_address(&slots[rank])), "r"(threadIdx.x));
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(value) : "memory");
  }
  cluster_arrive();
  cluster_wait();
  for (int i = 0; i < CLUSTER; i++) value = max(value, slots[i]);
  return value;
}
#else
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() {}
DEVICE u32 cluster_max(u32 value, u32 (&)[CLUSTER], int) { return value; }
#endif

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(WARPS * 32)
rotate(const void* x, signed char* x_parts, float* x_scale, int* x_sum, int4* zero,
       int zeros, int tokens, int padded_tokens) {
  __shared__ u32 largest[WARPS];
  __shared__ u32 slots[CLUSTER];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, rank = blockIdx.x % CLUSTER;
  const int token = blockIdx.x / CLUSTER;
  constexpr int UNIT = HALVES ? 64 : 16, PADDED = (IN + UNIT - 1) / UNIT * UNIT;
  cluster_arrive();
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (token >= tokens) {
    const int clearing = blockIdx.x - tokens * CLUSTER, apart = (gridDim.x - tokens * CLUSTER) * blockDim.x;
    for (int i = clearing * blockDim.x + threadIdx.x; i < zeros / 4; i += apart) zero[i] = make_int4(0, 0, 0, 0);
    cluster_wait();  // a block that leaves hears what it has said
    return;
  }

  float v[ROUNDS][E];
  u32 top = 0;
#pragma unroll
  for (int k = 0; k < ROUNDS; k++) {
    const int first = (((k * WARPS + warp) * CLUSTER + rank) * 32 + lane) * E;
    if (first - lane * E >= IN) continue;
    top = max(top, transformed(v[k], x, token, first, lane));
  }
  top = __reduce_max_sync(~0u, top);
  if (lane == 0) largest[warp] = top;
  if (!HALVES && rank == 0 && threadIdx.x < PARTS_EACH) x_sum[token * PARTS_EACH + threadIdx.x] = 0;
  __syncthreads();
  for (int i = 0; i < WARPS; i++) top = max(top, largest[i]);
  top = cluster_max(top, slots, rank);

#if HALVES
  const int exponent = min(max((int)(top >> 23), 14), 254);
  const float inverse = __uint_as_float((127 + 127 + 13 - exponent) << 23);
  if (rank == 0 && threadIdx.x == 0)
    x_scale[token] = top < 0x7f800000u ? __uint_as_float(exponent - 13 << 23) : __uint_as_float(top);
#pragma unroll
  for (int k = 0; k < ROUNDS; k++) {
    const int first = (((k * WARPS + warp) * CLUSTER + rank) * 32 + lane) * E;
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
  const Quantizer quantizer(top);
  if (rank == 0 && threadIdx.x == 0) x_scale[token] = quantizer.scale;
  int high_sum = 0, low_sum = 0;
#pragma unroll
  for (int k = 0; k < ROUNDS; k++) {
    const int first = (((k * WARPS + warp) * CLUSTER + rank) * 32 + lane) * E;
    if (first >= PADDED) continue;
    quantizer.store(x_parts + ((u64)(first / 16) * (tokens * PARTS_EACH) + token * PARTS_EACH) * 16 + first % 16, v[k], high_sum, low_sum);
  }
  high_sum = __reduce_add_sync(~0u, high_sum);
  low_sum = __reduce_add_sync(~0u, low_sum);
  if (lane < PARTS_EACH) atomicAdd(x_sum + token * PARTS_EACH + lane, lane ? low_sum : high_sum);
#endif
}
