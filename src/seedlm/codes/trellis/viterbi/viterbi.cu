// The Viterbi search on a GPU. `cuda.py` has the idea and launches these two kernels; `cost.py` defines the costs.
//
// Compile-time constants: RATE, STATE_BITS, MULTIPLIER, COST_SHIFT of the trellis; CHECKPOINT and PERIOD in rows;
// THREADS for a pair of sequences, PAIRS of a block, BLOCKS of a multiprocessor at least; SHARED_COSTS whether path costs
// are in shared memory.
#include <cuda_fp16.h>

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int R = RATE, L = STATE_BITS;
constexpr int P = 1 << R;             // predecessors of a state
constexpr int G = 1 << (L - R);       // groups: states with the same successors
constexpr int A = 1 << (L - 2 * R);   // blocks of groups with the same predecessors: a, a + A, a + 2 A, ...
constexpr int AT = A < THREADS ? A : THREADS;
constexpr int NA = A / AT;            // a thread's blocks: a = t % AT + AT * n
constexpr int NI = P * AT / THREADS;  // its groups of each block: a + A * (t / AT * NI + i)
constexpr int STATES = NA * NI * P;   // its states
constexpr int CHUNK = P < 16 ? P : 16;
constexpr u32 LIMIT = 0x7FFF7FFFu;    // highest path cost, twice
constexpr u32 ZERO_COST = 0x64006400u;  // 1024 in half precision, twice: the bits that stand for a branch cost of 0

// Halves of the 32-bit words are two sequences.
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// With one half of `a` for both. In one piece, since splatting apart from the product would be done once and take registers;
// as it is, it becomes an operand's modifier and costs nothing.
__device__ __forceinline__ u32 fma_low(u32 a, u32 b, u32 c) {
  u32 d;
  asm("{.reg .b16 l, h; .reg .b32 t; mov.b32 {l, h}, %1; mov.b32 t, {l, l}; fma.rn.f16x2 %0, t, %2, %3;}" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 fma_high(u32 a, u32 b, u32 c) {
  u32 d;
  asm("{.reg .b16 l, h; .reg .b32 t; mov.b32 {l, h}, %1; mov.b32 t, {h, h}; fma.rn.f16x2 %0, t, %2, %3;}" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Where a group's path cost lies: 16-byte units are swapped such that threads that read whole blocks of P, and threads that
// write neighbouring groups, meet different banks.
__device__ __forceinline__ int place(int group) {
  int block = group >> R;
  int turn = R < 3 ? 0 : R < 5 ? (block >> (5 - R)) & (P / 4 - 1) : block & 7;
  return group ^ (turn << 2);
}

__device__ __forceinline__ int state_value(u32 state) {
  u32 mixed = state * MULTIPLIER;
  return (int)__dp4a(mixed, 0x01010101u, 0u) - 510;
}

constexpr float EIGHTHS = 1 << (3 - COST_SHIFT);  // eighths of the scaled unit in a value's unit

// Targets and values in the scaled unit, in half precision.
__device__ __forceinline__ __half scaled_target(float target) {
  float eighths = rintf(fminf(fmaxf(target, -510.f), 510.f) * EIGHTHS);
  return __hmul(__float2half_rn(eighths), __float2half_rn(0.125f));
}
__device__ __forceinline__ __half scaled_value(u32 state) { return __float2half_rn(state_value(state) * (EIGHTHS / 8)); }

__device__ __forceinline__ u32 pair_of(__half a, __half b) { return __half_as_ushort(a) | (u32)__half_as_ushort(b) << 16; }

__device__ __forceinline__ void meet(int which) {
  if (THREADS == 32) __syncwarp();
  else if (PAIRS == 1) __syncthreads();
  else asm volatile("bar.sync %0, %1;" ::"r"(which + 1), "r"(THREADS) : "memory");
}

// One row: path costs of all groups from those before it.
// d = target - value * care, where care is 1 or, for rows that cost nothing, 0.
__device__ __forceinline__ void row(const u32* before, u32* after, const u32 (&values)[STATES / 2], u32 target, u32 minus_care, int t) {
  int part = t / AT * NI;
#pragma unroll
  for (int n = 0; n < NA; n++) {
    int a = t % AT + AT * n;
    u32 best[NI];
#pragma unroll
    for (int i = 0; i < NI; i++) best[i] = LIMIT + ZERO_COST;
    const u32* mine = before + a * P;
    int turn = place(a * P) ^ (a * P);
#pragma unroll
    for (int c = 0; c < P; c += CHUNK) {
      u32 path[CHUNK];
      if (P == 2) {
        uint2 two = *(const uint2*)mine;
        path[0] = two.x, path[1 % CHUNK] = two.y;
      } else {
#pragma unroll
        for (int j = 0; j < CHUNK; j += 4) {
          uint4 four = *(const uint4*)(mine + ((c + j) ^ turn));
          path[j] = four.x, path[(j + 1) % CHUNK] = four.y, path[(j + 2) % CHUNK] = four.z, path[(j + 3) % CHUNK] = four.w;
        }
      }
#pragma unroll
      for (int i = 0; i < NI; i++) {
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
          int state = (n * NI + i) * P + c + j;
          u32 v = values[state / 2];
          u32 d = state % 2 ? fma_high(v, minus_care, target) : fma_low(v, minus_care, target);
          best[i] = __viaddmin_u16x2(path[j], fma2(d, d, ZERO_COST), best[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < NI; i++) after[place(a + A * (part + i))] = best[i] - ZERO_COST;
  }
}

// Smallest of a pair's words over its threads, each half alone.
__device__ __forceinline__ u32 least_of(u32 mine, u32* scratch, int which, int t) {
#pragma unroll
  for (int o = 16; o; o >>= 1) mine = __vminu2(mine, __shfl_xor_sync(~0u, mine, o));
  if (THREADS == 32) return mine;
  if (t % 32 == 0) scratch[t / 32] = mine;
  meet(which);
  mine = scratch[0];
#pragma unroll
  for (int w = 1; w < THREADS / 32; w++) mine = __vminu2(mine, scratch[w]);
  return mine;
}

// Path costs of pairs of sequences over `steps` rows from row `begin` on, around the end.
//   targets  float32 [count, rows]
//   start    int32 [count]: the group that all paths come from; null if they may come from any
//   kept     u32 [pairs, slots, G]: path costs before every CHECKPOINT-th row
//   best     int32 [count], or null: each sequence's best group after the last row
//   costs    u32 [pairs, 2, G], only without SHARED_COSTS
extern "C" __global__ void __launch_bounds__(THREADS * PAIRS, BLOCKS)
forward(const float* __restrict__ targets, const int* __restrict__ start, u32* __restrict__ kept, int* __restrict__ best,
        u32* costs, int count, int rows, int valid, int begin, int steps, int slots) {
  extern __shared__ __align__(16) u32 shared[];
  constexpr int WARPS = THREADS / 32, SCRATCH = WARPS < 2 ? 4 : 2 * WARPS;
  int which = threadIdx.x / THREADS, t = threadIdx.x % THREADS;
  int pair = blockIdx.x * PAIRS + which;
  if (2 * pair >= count) return;
  int first = 2 * pair, second = min(2 * pair + 1, count - 1);
  int room = rows + SCRATCH + (SHARED_COSTS ? 2 * G : 0);
  u32* mine = shared + which * room;
  u32* before = SHARED_COSTS ? mine : costs + (size_t)pair * 2 * G;
  u32* after = before + G;
  u32* scratch = mine + (SHARED_COSTS ? 2 * G : 0);
  u32* both = scratch + SCRATCH;
  for (int r = t; r < rows; r += THREADS)
    both[r] = r < valid ? pair_of(scaled_target(targets[(size_t)first * rows + r]), scaled_target(targets[(size_t)second * rows + r])) : 0;
  for (int g = t; g < G; g += THREADS) before[g] = start ? LIMIT : 0;

  u32 values[STATES / 2];
#pragma unroll
  for (int s = 0; s < STATES; s += 2) {
    int j = s % P, i = s / P % NI, n = s / P / NI;
    u32 state = (t % AT + AT * n + A * (t / AT * NI + i)) * P + j;
    values[s / 2] = pair_of(scaled_value(state), scaled_value(state + 1));
    asm volatile("" : "+r"(values[s / 2]));
  }
  meet(which);
  if (start && t < 2) ((u16*)(before + place(start[t ? second : first])))[t] = 0;
  meet(which);

  u32* keep = kept + (size_t)pair * slots * G;
  for (int k = 0, r = begin; k < steps; k++) {
    if (k % CHECKPOINT == 0)
      for (int g = t; g < G / 4; g += THREADS) __stcs((uint4*)keep + k / CHECKPOINT * (G / 4) + g, ((const uint4*)before)[g]);
    row(before, after, values, both[r], r < valid ? 0xBC00BC00u : 0u, t);
    meet(which);
    u32* swap = before;
    before = after, after = swap;
    if ((k + 1) % PERIOD == 0) {
      u32 least = ~0u;
      for (int g = t; g < G; g += THREADS) least = __vminu2(least, before[g]);
      least = least_of(least, scratch, which, t);
      for (int g = t; g < G; g += THREADS) before[g] -= least;
      meet(which);
    }
    if (++r == rows) r = 0;
  }
  if (!best) return;
  u32 low = ~0u, high = ~0u;  // cost in the upper, group in the lower half
  for (int g = t; g < G; g += THREADS) {
    u32 cost = before[place(g)];
    low = min(low, cost << 16 | g), high = min(high, (cost & 0xFFFF0000u) | g);
  }
  low = __reduce_min_sync(~0u, low), high = __reduce_min_sync(~0u, high);
  if (t % 32 == 0) scratch[t / 32] = low, scratch[WARPS + t / 32] = high;
  meet(which);
  if (t == 0) {
    for (int w = 1; w < WARPS; w++) low = min(low, scratch[w]), high = min(high, scratch[WARPS + w]);
    best[first] = low & 0xFFFF;
    if (second != first) best[second] = high & 0xFFFF;
  }
}

// Traceback, a warp for each sequence.

constexpr int REACHED = 2 << (R * CHECKPOINT);

__device__ __forceinline__ u32 cost_of(u32 state, float target) {
  float d = target - state_value(state) * (EIGHTHS / 8);
  return __half_as_ushort(__float2half_rn(1024.f + d * d)) - 0x6400;
}

// The path that ends in `group`, from the row before row `last` of the run back to before its row `stop`; the group there.
// `closing` is the group that it must come from, or -1.
__device__ u32 trace(u32 group, int last, int stop, int closing, const u32* keep, int half, const float* targets, int rows,
                     int valid, int from, u32* reached, unsigned char* symbols, int lane) {
  while (last > stop) {
    int begin = (last - 1) / CHECKPOINT * CHECKPOINT, count = last - begin;
    const u32* slot = keep + (size_t)(begin / CHECKPOINT) * G;
    u32* level = reached;
    for (int k = 0; k < count; k++) {
      int bits = R * (count - k);
      int row = (from + begin + k) % rows;
      float target = targets[row];
      u32* to = k ? level + (P << bits) : level;
      for (int index = lane; index < 1 << bits; index += 32) {
        u32 state = (group << bits | index) & ((1 << L) - 1);
        u32 cost = LIMIT & 0xFFFF;
        if (k == 0) cost = __ldcs(slot + place(state % G)) >> (16 * half) & 0xFFFF;
        else
          for (int j = 0; j < P; j++) cost = min(cost, level[index * P + j]);
        to[index] = cost + (row < valid ? cost_of(state, target) : 0);
      }
      level = to;
      __syncwarp();
    }
    u32 index = 0;
    for (int k = count - 1; k >= 0; k--) {
      int now = begin + k;
      int fixed = closing < 0 ? 0 : max(0, L - R - R * now);
      u32 key = ~0u;
      for (int j = lane; j < P; j += 32) {
        bool right = fixed == 0 || (((group << R | j) ^ (closing >> (R * now))) & ((1u << fixed) - 1)) == 0;
        if (right) key = min(key, level[index * P + j] << 8 | j);
      }
      u32 choice = __reduce_min_sync(~0u, key) & 255;
      if (lane == 0) symbols[(from + now) % rows] = choice;
      index = index * P + choice;
      group = (group << R | choice) & (G - 1);
      level -= 1 << (R * (count - k + 1));
    }
    __syncwarp();
    last = begin;
  }
  return group;
}

// The paths that end in `ends` [count] after `steps` rows from row `from` on, traced back to before step `stop`.
//   closing  int32 [count]: if `words` is null, the groups that they come from are written there; else they are `ends`
//   words    int32 [count, rows * R / 32], or null
//   values   int16 [count, rows]
extern "C" __global__ void __launch_bounds__(128)
backward(const float* __restrict__ targets, const u32* __restrict__ kept, const int* __restrict__ ends, int* __restrict__ closing,
         u32* __restrict__ words, short* __restrict__ values, int count, int rows, int valid, int from, int steps, int stop,
         int slots) {
  extern __shared__ __align__(16) u32 shared[];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int sequence = blockIdx.x * 4 + warp;
  if (sequence >= count) return;
  u32* reached = shared + warp * (REACHED + rows + rows / 4);
  float* scaled = (float*)(reached + REACHED);
  unsigned char* symbols = (unsigned char*)(scaled + rows);
  const float* mine = targets + (size_t)sequence * rows;
  for (int r = lane; r < rows; r += 32) scaled[r] = __half2float(scaled_target(mine[r]));
  __syncwarp();
  const u32* keep = kept + (size_t)(sequence / 2) * slots * G;
  u32 end = ends[sequence];
  u32 start = trace(end, steps, stop, words ? (int)end : -1, keep, sequence & 1, scaled, rows, valid, from, reached, symbols, lane);
  if (!words) {
    if (lane == 0) closing[sequence] = start;
    return;
  }
  __syncwarp();
  for (int w = lane; w < rows * R / 32; w += 32) {
    u32 word = 0;
    for (int s = 32 * w / R; R * s < 32 * w + 32; s++) {
      int at = R * s - 32 * w;
      word |= at >= 0 ? (u32)symbols[s] << at : (u32)symbols[s] >> -at;
    }
    words[(size_t)sequence * (rows * R / 32) + w] = word;
  }
  for (int r = lane; r < rows; r += 32) {
    u32 state = 0;
    for (int k = 0; R * k < L; k++) state |= (u32)symbols[(r + k) % rows] << (R * k);
    values[(size_t)sequence * rows + r] = state_value(state & ((1 << L) - 1));
  }
}
