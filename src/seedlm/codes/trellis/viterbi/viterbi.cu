// The Viterbi search on a GPU. `cuda.py` has the idea and launches these kernels; `cost.py` defines the costs.
//
// Compile-time constants: RATE, STATE_BITS, MULTIPLIER, COST_SHIFT of the trellis; CHECKPOINT and PERIOD in rows;
// THREADS for a pair of sequences, PAIRS of a block (1, or THREADS is 32), BLOCKS of a multiprocessor at least; SHARED_COSTS
// whether path costs are in shared memory. No header is needed, since NVRTC comes without any.

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
constexpr int BITS = R * CHECKPOINT;  // stored bits of the rows between two checkpoints, 5 to 8
constexpr u32 LIMIT = 0x7FFF7FFFu;    // highest path cost, twice
constexpr u32 ZERO_COST = 0x64006400u;  // 1024 in half precision, twice: the bits that stand for a branch cost of 0
constexpr float UNIT = COST_SHIFT < 0 ? 1 << (COST_SHIFT < 0 ? -COST_SHIFT : 0) : 1.f / (1 << (COST_SHIFT < 0 ? 0 : COST_SHIFT));
constexpr int WARPS = THREADS / 32;
constexpr int SCRATCH = 2 * WARPS + 2;  // words; the last two are the ends of the pair's paths

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

__device__ __forceinline__ u32 half_bits(float x) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
__device__ __forceinline__ float from_half(u32 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)bits));
  return x;
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
__device__ __forceinline__ float scaled_value(u32 state) { return state_value(state) * UNIT; }

__device__ __forceinline__ float scaled_target(float target, float root) {
  return from_half(half_bits(rintf(fminf(fmaxf(target, -510.f), 510.f) * (root * (64 * UNIT))) * 0.015625f));
}
__device__ __forceinline__ u32 pair_of(float a, float b) { return half_bits(a) | half_bits(b) << 16; }

__device__ __forceinline__ void meet() {
  if (THREADS == 32) __syncwarp();
  else __syncthreads();
}

// What a thread needs to know of its pair of sequences; the arrays are the pair's.
struct Pair {
  u32* costs;       // [2, G] path costs
  u32* scratch;     // [SCRATCH]
  u32* target;      // [rows] targets, in half precision
  u32* minus_root;  // [rows] roots of the rows' weights, negated
  u32* keep;        // [slots, G] path costs before every CHECKPOINT-th row of a run, in global memory
  int rows, t;
};

__device__ __forceinline__ void fill_values(u32 (&values)[STATES / 2], int t) {
#pragma unroll
  for (int s = 0; s < STATES; s += 2) {
    int j = s % P, i = s / P % NI, n = s / P / NI;
    u32 state = (t % AT + AT * n + A * (t / AT * NI + i)) * P + j;
    values[s / 2] = pair_of(scaled_value(state), scaled_value(state + 1));
    asm volatile("" : "+r"(values[s / 2]));
  }
}

// One row: path costs of all groups from those before it.
__device__ __forceinline__ void row(const u32* before, u32* after, const u32 (&values)[STATES / 2], u32 target, u32 minus_root, int t) {
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
          u32 d = state % 2 ? fma_high(v, minus_root, target) : fma_low(v, minus_root, target);
          best[i] = __viaddmin_u16x2(path[j], fma2(d, d, ZERO_COST), best[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < NI; i++) after[place(a + A * (part + i))] = best[i] - ZERO_COST;
  }
}

// Smallest of a pair's words over its threads, each half alone.
__device__ __forceinline__ u32 least_of(u32 mine, const Pair& pair) {
#pragma unroll
  for (int o = 16; o; o >>= 1) mine = __vminu2(mine, __shfl_xor_sync(~0u, mine, o));
  if (THREADS == 32) return mine;
  if (pair.t % 32 == 0) pair.scratch[pair.t / 32] = mine;
  meet();
  mine = pair.scratch[0];
#pragma unroll
  for (int w = 1; w < WARPS; w++) mine = __vminu2(mine, pair.scratch[w]);
  return mine;
}

// Path costs over `steps` rows from row `begin` on, around the end; `starts` are the groups that all paths come from, or null.
// If `ends` is not null, the two sequences' best groups after the last row are written there.
__device__ __forceinline__ void run(const u32 (&values)[STATES / 2], const Pair& pair, int begin, int steps, const u32* starts, u32* ends) {
  u32 *before = pair.costs, *after = pair.costs + G;
  int t = pair.t;
  for (int g = t; g < G; g += THREADS) before[g] = starts ? LIMIT : 0;
  meet();
  if (starts && t < 2) ((u16*)(before + place(starts[t])))[t] = 0;
  meet();
  for (int k = 0, r = begin; k < steps; k++) {
    if (k % CHECKPOINT == 0)
      for (int g = t; g < G / 4; g += THREADS) __stcs((uint4*)pair.keep + k / CHECKPOINT * (G / 4) + g, ((const uint4*)before)[g]);
    row(before, after, values, pair.target[r], pair.minus_root[r], t);
    meet();
    u32* swap = before;
    before = after, after = swap;
    if ((k + 1) % PERIOD == 0) {
      u32 least = ~0u;
      for (int g = t; g < G; g += THREADS) least = __vminu2(least, before[g]);
      least = least_of(least, pair);
      for (int g = t; g < G; g += THREADS) before[g] -= least;
      meet();
    }
    if (++r == pair.rows) r = 0;
  }
  if (!ends) return;
  u32 low = ~0u, high = ~0u;  // cost in the upper, group in the lower half
  for (int g = t; g < G; g += THREADS) {
    u32 cost = before[place(g)];
    low = min(low, cost << 16 | g), high = min(high, (cost & 0xFFFF0000u) | g);
  }
  low = __reduce_min_sync(~0u, low), high = __reduce_min_sync(~0u, high);
  if (t % 32 == 0) pair.scratch[t / 32] = low, pair.scratch[WARPS + t / 32] = high;
  meet();
  if (t == 0) {
    for (int w = 1; w < WARPS; w++) low = min(low, pair.scratch[w]), high = min(high, pair.scratch[WARPS + w]);
    ends[0] = low & 0xFFFF, ends[1] = high & 0xFFFF;
  }
  meet();
}

// Traceback, by one warp for one sequence: the half `half` of a pair.

__device__ __forceinline__ u32 cost_of(u32 state, float target, float minus_root) {
  float d = from_half(half_bits(fmaf(scaled_value(state), minus_root, target)));
  return half_bits(fmaf(d, d, 1024.f)) - 0x6400;
}

// The stored bits of the CHECKPOINT rows of the best path to `group`, those of the first row lowest. Every lane has some of the
// states that the path can come from, by these bits; the key is the path's cost and, below, its bits.
__device__ __forceinline__ u32 trace_rows(u32 group, const u32* slot, int half, const u32* target, const u32* minus_root,
                                          const int (&at)[CHECKPOINT], int lane) {
  constexpr int KEYS = 1 << (BITS - 5);
  u32 key[KEYS];
#pragma unroll
  for (int i = 0; i < KEYS; i++) key[i] = __ldcs(slot + place((group << BITS | i * 32 | lane) & (G - 1)));
#pragma unroll
  for (int i = 0; i < KEYS; i++) key[i] = (key[i] >> (16 * half) & 0xFFFF) << 8 | i * 32 | lane;
#pragma unroll
  for (int k = 0; k < CHECKPOINT; k++) {
    float x = from_half(target[at[k]] >> (16 * half)), s = from_half(minus_root[at[k]] >> (16 * half));
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      if (i & ((1 << (k * R < 5 ? 0 : k * R - 5)) - 1)) continue;
      u32 state = (group << BITS | i * 32 | lane) >> (k * R) & ((1 << L) - 1);
      key[i] = (min(key[i] >> 8, LIMIT & 0xFFFF) + cost_of(state, x, s)) << 8 | (key[i] & 255);
    }
#pragma unroll
    for (int b = k * R; b < k * R + R; b++) {
#pragma unroll
      for (int i = 0; i < KEYS; i++) {
        if (i & ((1 << (b < 5 ? (k * R < 5 ? 0 : k * R - 5) : b - 4)) - 1)) continue;
        u32 other = b < 5 ? __shfl_xor_sync(~0u, key[i], 1 << (b < 5 ? b : 0)) : key[(i + (1 << (b < 5 ? 0 : b - 5))) % KEYS];
        key[i] = min(key[i], other);
      }
    }
  }
  return key[0] & 255;
}

// The same where saturated costs could lead elsewhere than to `start`, `begin` rows before: row by row, only what leads there.
__device__ __noinline__ u32 trace_rows_to(u32 start, int begin, u32 group, const u32* slot, int half, const u32* target,
                                          const u32* minus_root, const int (&at)[CHECKPOINT], u32* reached, int lane) {
  u32* level = reached;
  for (int k = 0; k < CHECKPOINT; k++) {
    int bits = R * (CHECKPOINT - k);
    float x = from_half(target[at[k]] >> (16 * half)), s = from_half(minus_root[at[k]] >> (16 * half));
    u32* to = k ? level + (P << bits) : level;
    for (int index = lane; index < 1 << bits; index += 32) {
      u32 state = (group << bits | index) & ((1 << L) - 1);
      u32 cost = LIMIT & 0xFFFF;
      if (k == 0) cost = slot[place(state % G)] >> (16 * half) & 0xFFFF;
      else
        for (int j = 0; j < P; j++) cost = min(cost, level[index * P + j]);
      to[index] = cost + cost_of(state, x, s);
    }
    level = to;
    __syncwarp();
  }
  u32 index = 0;
  for (int k = CHECKPOINT - 1; k >= 0; k--) {
    int shared_bits = max(0, L - R - R * (begin + k));
    u32 key = ~0u;
    for (int j = lane; j < P; j += 32) {
      u32 from = group << R | j;
      bool right = shared_bits == 0 || ((from ^ start >> (R * (begin + k))) & ((1u << shared_bits) - 1)) == 0;
      if (right) key = min(key, level[index * P + j] << 8 | j);
    }
    u32 choice = __reduce_min_sync(~0u, key) & 255;
    index = index * P + choice;
    group = (group << R | choice) & (G - 1);
    level -= 1 << (R * (CHECKPOINT - k + 1));
  }
  __syncwarp();
  return index;
}

// The path that ends in `group` after `steps` rows from row `begin` on, back to before its row `stop`; the group there.
// `start` is the group that the run came from, or -1; `reached` is room for trace_rows_to.
__device__ __forceinline__ u32 trace(u32 group, const Pair& pair, int half, int begin, int steps, int stop, int start, u32* reached,
                                     unsigned char* symbols, int lane) {
  for (int first = steps - CHECKPOINT; first >= stop; first -= CHECKPOINT) {
    const u32* slot = pair.keep + (size_t)(first / CHECKPOINT) * G;
    int at[CHECKPOINT];
#pragma unroll
    for (int k = 0; k < CHECKPOINT; k++) at[k] = (begin + first + k) % pair.rows;
    u32 bits = trace_rows(group, slot, half, pair.target, pair.minus_root, at, lane);
    int shared_bits = start < 0 ? 0 : L - R - R * first;
    if (shared_bits > 0 && (((group << BITS | bits) ^ (u32)start >> (R * first)) & ((1u << shared_bits) - 1)))
      bits = trace_rows_to(start, first, group, slot, half, pair.target, pair.minus_root, at, reached, lane);
    group = (group << BITS | bits) & (G - 1);
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < CHECKPOINT; k++) symbols[at[k]] = bits >> (k * R) & (P - 1);
    }
  }
  __syncwarp();
  return group;
}

// Word `w` of the stream of these rows' bits.
__device__ __forceinline__ u32 packed(const unsigned char* symbols, int w) {
  u32 word = 0;
  for (int s = 32 * w / R; R * s < 32 * w + 32; s++) {
    int at = R * s - 32 * w;
    word |= at >= 0 ? (u32)symbols[s] << at : (u32)symbols[s] >> -at;
  }
  return word;
}

__device__ __forceinline__ int value_at(const unsigned char* symbols, int row, int rows) {
  u32 state = 0;
#pragma unroll
  for (int k = 0; R * k < L; k++) state |= (u32)symbols[(row + k) % rows] << (R * k);
  return state_value(state & ((1 << L) - 1));
}

// One run of `count` sequences, a pair for THREADS threads.
//   targets  float32 [count, rows]; roots float32, likewise but for its stride
//   starts   int32 [count]: the groups that all paths come from; null if they may come from any
//   kept     u32 [pairs, slots, G]
//   ends     int32 [count], or null: each sequence's best group after the last row
//   costs    u32 [pairs, 2, G], only without SHARED_COSTS
extern "C" __global__ void __launch_bounds__(THREADS * PAIRS, BLOCKS)
forward(const float* __restrict__ targets, const float* __restrict__ roots, const int* __restrict__ starts, u32* __restrict__ kept,
        int* __restrict__ ends, u32* costs, int count, int root_stride, int rows, int begin, int steps, int slots) {
  extern __shared__ __align__(16) u32 shared[];
  int which = threadIdx.x / THREADS, t = threadIdx.x % THREADS;
  int number = blockIdx.x * PAIRS + which;
  if (2 * number >= count) return;
  int first = 2 * number, second = min(first + 1, count - 1);
  constexpr int OWN = (SHARED_COSTS ? 2 * G : 0) + (SCRATCH + 3) / 4 * 4;
  u32* mine = shared + which * (OWN + 2 * rows);
  Pair pair;
  pair.costs = SHARED_COSTS ? mine : costs + (size_t)number * 2 * G;
  pair.scratch = mine + (SHARED_COSTS ? 2 * G : 0);
  pair.target = mine + OWN;
  pair.minus_root = pair.target + rows;
  pair.keep = kept + (size_t)number * slots * G;
  pair.rows = rows, pair.t = t;
  for (int r = t; r < rows; r += THREADS) {
    float a = roots[(size_t)first * root_stride + r], b = roots[(size_t)second * root_stride + r];
    pair.target[r] = pair_of(scaled_target(targets[(size_t)first * rows + r], a), scaled_target(targets[(size_t)second * rows + r], b));
    pair.minus_root[r] = pair_of(-a, -b);
  }
  u32* path_ends = pair.scratch + 2 * WARPS;
  if (starts && t < 2) path_ends[t] = starts[t ? second : first];
  u32 values[STATES / 2];
  fill_values(values, t);
  meet();
  run(values, pair, begin, steps, starts ? path_ends : nullptr, ends ? path_ends : nullptr);
  if (ends && t < 2 && first + t < count) ends[first + t] = path_ends[t];
}

// The paths of such a run that end in `ends` [count], traced back to before its row `stop`, a warp for each sequence.
//   found    int32 [count], or null: the groups that they come from. Else `ends` are the groups that they come from too, and
//   words    int32 [count, rows * R / 32] and values int16 [count, rows] of the streams are written
extern "C" __global__ void __launch_bounds__(128)
backward(const float* __restrict__ targets, const float* __restrict__ roots, u32* __restrict__ kept, const int* __restrict__ ends,
         int* __restrict__ found, u32* __restrict__ words, short* __restrict__ values, int count, int root_stride, int rows,
         int begin, int steps, int stop, int slots) {
  extern __shared__ __align__(16) u32 shared[];
  int lane = threadIdx.x % 32, sequence = blockIdx.x * 4 + threadIdx.x / 32;
  if (sequence >= count) return;
  u32* reached = shared + threadIdx.x / 32 * ((2 << BITS) + 2 * rows + rows / 4);
  Pair pair;
  pair.target = reached + (2 << BITS);
  pair.minus_root = pair.target + rows;
  pair.keep = kept + (size_t)(sequence / 2) * slots * G;
  pair.rows = rows;
  unsigned char* symbols = (unsigned char*)(pair.minus_root + rows);
  for (int r = lane; r < rows; r += 32) {
    float root = roots[(size_t)sequence * root_stride + r], x = scaled_target(targets[(size_t)sequence * rows + r], root);
    pair.target[r] = pair_of(x, x), pair.minus_root[r] = pair_of(-root, -root);
  }
  __syncwarp();
  int end = ends[sequence];
  u32 start = trace(end, pair, sequence & 1, begin, steps, stop, found ? -1 : end, reached, symbols, lane);
  if (found) {
    if (lane == 0) found[sequence] = start;
    return;
  }
  for (int w = lane; w < rows * R / 32; w += 32) words[(size_t)sequence * (rows * R / 32) + w] = packed(symbols, w);
  for (int r = lane; r < rows; r += 32) values[(size_t)sequence * rows + r] = value_at(symbols, r, rows);
}

// All columns of a panel, one after another, with error feedback between them: `feedback` in seedlm/codes/feedback.py, column by
// column, for the rows of a strip. A pair of strips for THREADS threads.
//   weight        float32 [count, columns, rows]
//   fed           float64 [count, columns, rows], or null: what earlier panels feed, integers in units of `take`
//   take          float64 [count, rows], power of two; per_unit float64 [count, rows]: errors are counted in 1 / per_unit
//   scale         float32 [count, rows] of rows; roots float32 [count, rows] of row weights, 0 for rows that do not count
//   coefficients  float64 [matrices, columns, columns] integers, [k, j] is what column j takes of k's error; matrix int32 [count]
//   words         int32 [count, columns, rows * R / 32], values int16 and errors float32 (integers) [count, columns, rows]
//   kept          u32 [blocks * PAIRS, slots, G]; costs u32 [blocks * PAIRS, 2, G], only without SHARED_COSTS
extern "C" __global__ void __launch_bounds__(THREADS * PAIRS, BLOCKS)
panel(const float* __restrict__ weight, const double* __restrict__ fed, const double* __restrict__ take,
      const double* __restrict__ per_unit, const float* __restrict__ scale, const float* __restrict__ roots,
      const double* __restrict__ coefficients, const int* __restrict__ matrix, u32* __restrict__ words, short* __restrict__ values_out,
      float* errors, u32* __restrict__ kept, u32* costs, int count, int columns, int rows, int overlap, int slots) {
  extern __shared__ __align__(16) u32 shared[];
  int which = threadIdx.x / THREADS, t = threadIdx.x % THREADS, lane = t % 32;
  int place_of = blockIdx.x * PAIRS + which;
  constexpr int OWN = (SHARED_COSTS ? 2 * G : 0) + (SCRATCH + 3) / 4 * 4;
  u32* mine = shared + which * (OWN + 2 * rows + rows / 2);
  Pair pair;
  pair.costs = SHARED_COSTS ? mine : costs + (size_t)place_of * 2 * G;
  pair.scratch = mine + (SHARED_COSTS ? 2 * G : 0);
  pair.target = mine + OWN;
  pair.minus_root = pair.target + rows;
  pair.keep = kept + (size_t)place_of * slots * G;
  pair.rows = rows, pair.t = t;
  unsigned char* symbols = (unsigned char*)(pair.minus_root + rows);
  u32* ends = pair.scratch + 2 * WARPS;
  u32 values[STATES / 2];
  fill_values(values, t);
  for (int number = place_of; 2 * number < count; number += gridDim.x * PAIRS) {
    for (int column = 0; column < columns; column++) {
      for (int item = t; item < 2 * rows; item += THREADS) {
        int half = item >= rows, r = item - half * rows, strip = min(2 * number + half, count - 1);
        size_t at = ((size_t)strip * columns + column) * rows + r;
        double taken = fed ? fed[at] : 0;
        if (coefficients) {
          const double* c = coefficients + (size_t)matrix[strip] * columns * columns + column;
          const float* e = errors + (size_t)strip * columns * rows + r;
#pragma unroll 8
          for (int k = 0; k < column; k++) taken = fma((double)e[(size_t)k * rows], c[(size_t)k * columns], taken);  // exact
        }
        float by = scale[(size_t)strip * rows + r], root = roots[(size_t)strip * rows + r];
        float target = __double2float_rn(__dadd_rn(weight[at], taken * take[(size_t)strip * rows + r]));
        ((u16*)(pair.target + r))[half] = half_bits(scaled_target(by > 0 ? __fdiv_rn(target, by) : 0, root));
        ((u16*)(pair.minus_root + r))[half] = half_bits(-root);
      }
      meet();
#pragma unroll 1
      for (int second_run = 0; second_run < 2; second_run++) {
        int begin = second_run ? 0 : rows - overlap, steps = second_run ? rows : 2 * overlap;
        run(values, pair, begin, steps, second_run ? ends : nullptr, second_run ? nullptr : ends);
        for (int half = t / 32; half < 2; half += WARPS) {
          u32* reached = pair.costs + (WARPS == 1 ? 0 : half * G);
          u32 seam = trace(ends[half], pair, half, begin, steps, second_run ? 0 : overlap, second_run ? (int)ends[half] : -1, reached,
                           symbols + half * rows, lane);
          if (lane == 0) ends[half] = seam;
        }
        meet();
      }
      for (int item = t; item < 2 * rows; item += THREADS) {
        int half = item >= rows, r = item - half * rows, strip = min(2 * number + half, count - 1);
        size_t at = ((size_t)strip * columns + column) * rows + r;
        int value = value_at(symbols + half * rows, r, rows);
        float coded = __fmul_rn(value, scale[(size_t)strip * rows + r]);
        double missed = rint(__dadd_rn(weight[at], -(double)coded) * per_unit[(size_t)strip * rows + r]);
        values_out[at] = value;
        errors[at] = fmin(fmax(missed, -16777216.), 16777216.);
        if (r < rows * R / 32) words[((size_t)strip * columns + column) * (rows * R / 32) + r] = packed(symbols + half * rows, r);
      }
      meet();
    }
  }
}
