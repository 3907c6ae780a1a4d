// One token's attention over a cache: rotary embedding of q and k, the cache's writing, softmax, sum of values.
//
// A key head, with GROUP of the query heads that share it, is the work of a cluster of CLUSTER blocks. Eight lanes hold a position, each
// WIDTH / 8 of its numbers, so a warp reads four positions at once, and a sum over a position takes three shuffles. Every
// eight lanes go over positions of their own with a running maximum and sums relative to it (online softmax); these are joined in
// the warp, the block, and through shared memory in the cluster. All sums have a fixed order: the same inputs give the same bits.
//
// The token's own key and value go from k and v into the sums, and into the cache, of which only earlier positions are read: so the
// first reads wait for nothing. They, and that of the position, come before the kernel before this one has ended, so what wrote
// them must have: any kernel between that does not start early, as torch's own, sees to it. A position outside of the cache
// gives NaN and writes nothing. A kernel that runs once takes as long as its instructions take to arrive, so what all lanes need
// is made once and goes through shared memory.
//
// q: [kv heads * HEADS * WIDTH]. k, v: [kv heads * WIDTH]. cosine, sine: [WIDTH]. keys, values: [kv heads, length, WIDTH].
// out: as q. All of TYPE (0 float16, 1 bfloat16, 2 float32), computed in float32.
//
// Compile-time: TYPE, WIDTH (a multiple of 64), HEADS (query heads of a key head), GROUP, CLUSTER, WARPS.

constexpr int BYTES = TYPE == 2 ? 4 : 2, PER = WIDTH / 8, PER_16 = 16 / BYTES, GROUPS = (HEADS + GROUP - 1) / GROUP;
constexpr int AHEAD = 2, TAKEN = 4 * AHEAD;  // positions of eight lanes, and of a warp, that are under way together
constexpr int PART = GROUP * WIDTH / CLUSTER;    // numbers that a block finishes
constexpr float LEAST = -1e30f;

DEVICE float from_bits(u32 bits) {
  float f;
  if (TYPE == 0) asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
  else f = __uint_as_float(bits << 16);
  return f;
}
DEVICE u16 to_bits(float f) {
  u16 h;
  if (TYPE == 0) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
DEVICE float load(const void* p, u64 i) {
  return TYPE == 2 ? ((const float*)p)[i] : from_bits(((const u16*)p)[i]);
}
DEVICE void store(void* p, u64 i, float value) {
  if (TYPE == 2) ((float*)p)[i] = value;
  else ((u16*)p)[i] = to_bits(value);
}

DEVICE float as_stored(float value) { return TYPE == 2 ? value : from_bits(to_bits(value)); }
DEVICE float exp_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A lane's numbers of a position.
DEVICE void load_line(uint4 (&raw)[PER / PER_16], const void* p, u64 i) {
#pragma unroll
  for (int c = 0; c < PER / PER_16; c++) raw[c] = ((const uint4*)((const char*)p + i * BYTES))[c];
}
DEVICE void convert(float (&numbers)[PER], const uint4 (&raw)[PER / PER_16]) {
#pragma unroll
  for (int i = 0; i < PER; i++) {
    const uint4& q = raw[i / PER_16];
    const int word = i % PER_16 * BYTES / 4;
    const u32 bits = word == 0 ? q.x : word == 1 ? q.y : word == 2 ? q.z : q.w;
    numbers[i] = TYPE == 2 ? __uint_as_float(bits) : from_bits(i & 1 ? bits >> 16 : bits & 0xffffu);
  }
}

// A number of a head after rotary embedding. d: 0 .. WIDTH - 1.
DEVICE float turned(const void* x, u64 head, int d, const void* cosine, const void* sine) {
  const int half = WIDTH / 2;
  const float other = load(x, head * WIDTH + (d < half ? d + half : d - half));
  return load(x, head * WIDTH + d) * load(cosine, d) + (d < half ? -other : other) * load(sine, d);
}

// The sum of a value over eight lanes, in all of them.
DEVICE float over_position(float value) {
#pragma unroll
  for (int lanes = 4; lanes; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// What a block knows of one number: its sum, relative to the maximum `top` of its scores, and their weight.
struct Share {
  float sum, top, weight, unused;

  DEVICE void tell_block(int block, Share* slot, u64* inbox) const {
    tell(slot, inbox, block, __float_as_uint(sum), __float_as_uint(top), __float_as_uint(weight), 0);
  }
};

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(WARPS * 32)
attend(const void* q, const void* k, const void* v, const void* cosine, const void* sine, void* keys, void* values,
       const long long* position, void* out, int length, float scaling) {
  __shared__ __align__(16) float sums[WARPS][GROUP][WIDTH], queries[GROUP][WIDTH], own_key[WIDTH], own_value[WIDTH];
  __shared__ float tops[WARPS][GROUP], weights[WARPS][GROUP];
  __shared__ __align__(16) Share shares[CLUSTER][PART];
  __shared__ u64 inbox;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, place = lane >> 3, first = (lane & 7) * PER;
  const int rank = blockIdx.x % CLUSTER, group = blockIdx.x / CLUSTER % GROUPS, kv = blockIdx.x / CLUSTER / GROUPS;
  const int head = kv * HEADS + group * GROUP, heads = min(GROUP, HEADS - group * GROUP);
  open_inbox(&inbox, sizeof(shares));
  let_next_kernel_start();
  const long long now = *position;
  const bool inside = now >= 0 && now < length;
  const int before = inside ? (int)now : 0;
  const u64 cache = (u64)kv * length * WIDTH;
  const bool owns = rank == CLUSTER - 1;

  int start = (rank * WARPS + warp) * TAKEN;
  uint4 raw_keys[AHEAD][PER / PER_16], raw_values[AHEAD][PER / PER_16];
  const auto fetch = [&](uint4 (&raw)[AHEAD][PER / PER_16], const void* of, int from) {
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      load_line(raw[a], of, cache + (u64)max(min(from + a * 4 + place, before - 1), 0) * WIDTH + first);
  };
  fetch(raw_keys, keys, start), fetch(raw_values, values, start);
  wait_for_previous_kernel();
  for (int i = threadIdx.x; i < GROUP * WIDTH; i += WARPS * 32)
    queries[0][i] = turned(q, head + min(i / WIDTH, heads - 1), i % WIDTH, cosine, sine) * (scaling * 1.44269504f);
  if (owns)
    for (int d = threadIdx.x; d < WIDTH; d += WARPS * 32) {
      own_key[d] = as_stored(turned(k, kv, d, cosine, sine)), own_value[d] = load(v, (u64)kv * WIDTH + d);
      if (inside && group == 0) store(keys, cache + now * WIDTH + d, own_key[d]), store(values, cache + now * WIDTH + d, own_value[d]);
    }
  __syncthreads();

  float query[GROUP][PER], sum[GROUP][PER], top[GROUP], weight[GROUP];
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    top[g] = LEAST, weight[g] = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i += 4) {
      const float4 four = *(const float4*)&queries[g][first + i];
      query[g][i] = four.x, query[g][i + 1] = four.y, query[g][i + 2] = four.z, query[g][i + 3] = four.w;
    }
    float score = 0.0f;
    if (owns && warp == WARPS - 1) {
#pragma unroll
      for (int i = 0; i < PER; i++) score += query[g][i] * own_key[first + i];
      score = over_position(score);
    }
    const bool mine = owns && warp == WARPS - 1 && place == 0;
    if (mine) top[g] = score, weight[g] = 1.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) sum[g][i] = mine ? own_value[first + i] : 0.0f;
  }
#pragma unroll 1
  for (; start < before; start += CLUSTER * WARPS * TAKEN) {
    float score[AHEAD][GROUP], numbers[PER];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      convert(numbers, raw_keys[a]);
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        score[a][g] = 0.0f;
#pragma unroll
        for (int i = 0; i < PER; i++) score[a][g] += query[g][i] * numbers[i];
        score[a][g] = over_position(score[a][g]);
        if (start + a * 4 + place >= before) score[a][g] = -__int_as_float(0x7f800000);
      }
    }
    fetch(raw_keys, keys, start + CLUSTER * WARPS * TAKEN);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float highest = top[g];
#pragma unroll
      for (int a = 0; a < AHEAD; a++) highest = fmaxf(highest, score[a][g]);
      const float kept = exp_2(top[g] - highest);
      top[g] = highest, weight[g] *= kept;
#pragma unroll
      for (int a = 0; a < AHEAD; a++) score[a][g] = exp_2(score[a][g] - highest), weight[g] += score[a][g];
#pragma unroll
      for (int i = 0; i < PER; i++) sum[g][i] *= kept;
    }
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      convert(numbers, raw_values[a]);
#pragma unroll
      for (int g = 0; g < GROUP; g++)
#pragma unroll
        for (int i = 0; i < PER; i++) sum[g][i] += score[a][g] * numbers[i];
    }
    fetch(raw_values, values, start + CLUSTER * WARPS * TAKEN);
  }

  // The four positions of a warp become one, of which each lane keeps a quarter of its numbers: those from place * PER / 4 on.
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    float highest = fmaxf(top[g], __shfl_xor_sync(~0u, top[g], 8));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 16));
    const float kept = exp_2(top[g] - highest);
    weight[g] *= kept;
    weight[g] += __shfl_xor_sync(~0u, weight[g], 8);
    weight[g] += __shfl_xor_sync(~0u, weight[g], 16);
#pragma unroll
    for (int i = 0; i < PER; i++) sum[g][i] *= kept;
    const bool upper = place & 2, odd = place & 1;
#pragma unroll
    for (int i = 0; i < PER / 2; i++) {
      const float other = __shfl_xor_sync(~0u, upper ? sum[g][i] : sum[g][i + PER / 2], 16);
      sum[g][i] = (upper ? sum[g][i + PER / 2] : sum[g][i]) + other;
    }
#pragma unroll
    for (int i = 0; i < PER / 4; i++) {
      const float other = __shfl_xor_sync(~0u, odd ? sum[g][i] : sum[g][i + PER / 4], 8);
      sums[warp][g][first + place * (PER / 4) + i] = (odd ? sum[g][i + PER / 4] : sum[g][i]) + other;
    }
    if (lane == 0) tops[warp][g] = highest, weights[warp][g] = weight[g];
  }
  inboxes_open();
  __syncthreads();

  // The warps of a block become one, and each block of the cluster hears of the numbers that it is to finish.
#pragma unroll 1
  for (int i = threadIdx.x; i < GROUP * WIDTH; i += WARPS * 32) {
    const int g = i / WIDTH;
    float highest = LEAST, total = 0.0f, all = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, tops[w][g]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float share = exp_2(tops[w][g] - highest);
      total += sums[w][0][i] * share, all += weights[w][g] * share;
    }
    Share{total, highest, all}.tell_block(i / PART, &shares[rank][i % PART], &inbox);
  }
  await_inbox(&inbox);
#pragma unroll 1
  for (int i = threadIdx.x; i < min(PART, heads * WIDTH - rank * PART); i += WARPS * 32) {
    float highest = LEAST, total = 0.0f, all = 0.0f;
#pragma unroll
    for (int b = 0; b < CLUSTER; b++) highest = fmaxf(highest, shares[b][i].top);
#pragma unroll
    for (int b = 0; b < CLUSTER; b++) {
      const float share = exp_2(shares[b][i].top - highest);
      total += shares[b][i].sum * share, all += shares[b][i].weight * share;
    }
    store(out, (u64)head * WIDTH + rank * PART + i, inside ? total / all : __int_as_float(0x7fc00000));
  }
}
