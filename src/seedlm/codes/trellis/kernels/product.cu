// y = W x for a few tokens, the weights living only in registers, as bytes on int8 tensor cores.
//
// A hash is four bytes whose sum is the weight (plus 510), and the four bytes of one register are four neighbours along k
// of an int8 A operand: with the activation repeated four times in B, multiplying IS summing the bytes. mma.m16n8k32 wants
// of lane (g, t), g = lane / 4, t = lane % 4: A rows g and g + 8 at k-groups t and t + 4, and B column g at those k-groups.
// So lane (g, t) decodes segment g of eight (256 rows, a "panel") in columns of its own, and all of its rows stay its own:
//
//   narrow (up to 4 parts)  one column at a time: registers 0, 1 (k-group t) and 2, 3 (k-group t + 4) are four rows of it. B
//                           column 2p carries part p for k-groups 0..3 and zero above, B column 2p + 1 the reverse. 8 mma
//                           give 32 rows, 32 accumulators.
//   wide (up to 8 parts)    two columns at a time, two rows of each: B column p carries part p. 16 mma, 64 accumulators.
//                           With TILES = 2, 16 parts and 128 accumulators.
//
// A part is a token's int8 activations, or one of the two int8 halves of its 16-bit ones (exact mode).
//
// Work is a line of steps of 16 columns, panel after panel, cut into equal runs for the blocks of the grid; inside a block
// the warps take turns. A warp fetches its steps STAGES - 1 ahead into shared memory, where it alone reads them. Sums are
// int32 and exact, so atomics in any order give the same bits: panels that several blocks share are added up in `sums`,
// and the block that comes last scales and writes. It leaves zeros behind.
//
// x_parts: int8 [steps][parts][16]. words: int32 [segments, steps * 16 * R]. sums: int32 [parts][panels * 256], zero.
// arrived: int32 [panels], zero. x_scale: float [tokens]; x_sum: int32 [parts]; y: [tokens, out].
//
// Compile-time beside RATE, STATE_BITS, MULTIPLIER: WARPS, STAGES, BLOCKS (a multiprocessor), TILES (0 is narrow),
// NEIGHBOURS (1: the strip's next segment is not always in the same panel, so its first words are fetched too).

constexpr int STEP = 16;
constexpr int THREADS = WARPS * 32;
constexpr bool NARROW = TILES == 0;
constexpr int FRAGMENTS = NARROW ? 8 : 16;
constexpr int COLUMN_TILES = NARROW ? 1 : TILES;
constexpr int CHUNKS = 4 * R;                          // 16-byte chunks of one segment in one step
constexpr int PITCH = CHUNKS + (R == 2 || R == 6);     // in shared memory: chosen so that no two lanes meet in a bank
constexpr int STAGE = (8 * PITCH + (NEIGHBOURS ? 32 : 0)) * 16;  // bytes
constexpr int RING = WARPS * STAGES * STAGE;
constexpr int ROW_PAD = 36;

// With R = 4 and 8 a padding cannot do it: the chunks of a segment are exchanged among each other instead.
DEVICE int swizzle(int segment, int chunk) {
  if (R == 4) return (chunk ^ (chunk >> 3)) ^ ((segment & 1) << 1);
  if (R == 8) return (chunk ^ (chunk >> 3)) ^ ((segment & 1) << 2);
  return chunk;
}

// Byte offset in a stage of the lane's chunk i, as it is fetched (base: that of chunk 0) and as it is read.
DEVICE u32 write_slot(u32 base, int i, int lane) {
  if (R == 6) return ((i * 32 + lane) / CHUNKS * PITCH + (i * 32 + lane) % CHUNKS) * 16;
  if (R == 8) return (base ^ (i & 1) * 64) + i * 512;
  return base + i * 32 / CHUNKS * (PITCH - CHUNKS) * 16 + i * 512;
}
DEVICE u32 read_slot(u32 base, int i) { return R == 4 || R == 8 ? base ^ i * 16 : base + i * 16; }

// Keep a value in its register: the compiler would rather compute it again at every use.
DEVICE u32 pinned(u32 value) {
  asm volatile("" : "+r"(value));
  return value;
}

DEVICE void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct Problem {
  const u32* words;
  const u32* x_parts;
  const float* x_scale;
  const int* x_sum;
  const u16* row_scales;
  const float* scale;
  const void* bias;
  void* y;
  int* sums;
  int* arrived;
  int out, steps, segments, strip, tokens, parts_each, half_base, type;
};

// The warp's next step to fetch. The lane copies R chunks of 16 bytes: `at` is the first, the others lie `apart` from it.
struct Fetcher {
  const char* at;
  int apart[R];
  int panel, step, left;

  DEVICE void place(const Problem& p, int lane) {
    const u64 pitch = (u64)p.steps * (STEP * R * 4);
    const int last = p.segments - 1 - panel * 8, first = min(lane / CHUNKS, last);
    at = (const char*)p.words + (panel * 8 + first) * pitch + step * (STEP * R * 4) + lane % CHUNKS * 16;
#pragma unroll
    for (int i = 1; i < R; i++) {
      const int id = i * 32 + lane;
      apart[i] = (min(id / CHUNKS, last) - first) * (int)pitch + (id % CHUNKS - lane % CHUNKS) * 16;
    }
  }

  DEVICE void start(const Problem& p, int position, int end, int lane) {
    panel = position / p.steps, step = position % p.steps;
    left = position < end ? (end - position - 1) / WARPS + 1 : 0;
    if (left) place(p, lane);
  }

  // Into the stage at `to`, the lane's first chunk at `slot` in it; then on to the warp's next step.
  DEVICE void fetch(const Problem& p, u32 to, u32 slot, int lane) {
    if (left > 0) {
#pragma unroll
      for (int i = 0; i < R; i++) copy16(to + write_slot(slot, i, lane), i ? at + apart[i] : at);
      if (NEIGHBOURS) fetch_neighbours(p, to, lane);
      left--;
      step += WARPS, at += WARPS * STEP * R * 4;
      if (step >= p.steps && left > 0) {
        while (step >= p.steps) step -= p.steps, panel++;
        place(p, lane);
      }
    }
    copies_commit();
  }

  DEVICE void fetch_neighbours(const Problem& p, u32 to, int lane) {
    const int row = next_segment(min(panel * 8 + lane / 4, p.segments - 1), p.segments, p.strip);
    const u32* from = p.words + ((u64)row * p.steps + step) * (STEP * R) + lane % 4 * 4 * R;
#pragma unroll
    for (int j = 0; j < 4; j++) copy4(to + (8 * PITCH + lane) * 16 + j * 4, from + j * R);
  }
};

DEVICE void multiply(const u32 (&w)[4][R + 1], const u32 (&x)[COLUMN_TILES], int (&acc)[COLUMN_TILES][FRAGMENTS][4], int lane) {
  if (NARROW) {
    const bool upper = (lane >> 2) & 1;
    const u32 x0 = upper ? 0u : x[0], x1 = upper ? x[0] : 0u;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 b0 = __byte_perm(x0, 0, 0x1111 * j), b1 = __byte_perm(x1, 0, 0x1111 * j);
#pragma unroll
      for (int i = 0; i < FRAGMENTS; i++)
        mma(acc[0][i], hash(w[j], 4 * i), hash(w[j], 4 * i + 1), hash(w[j], 4 * i + 2), hash(w[j], 4 * i + 3), b0, b1);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      u32 b[COLUMN_TILES][2];
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) {
        b[n][0] = __byte_perm(x[n], 0, 0x1111 * j);
        b[n][1] = __byte_perm(x[n], 0, 0x1111 * (j + 1));
      }
#pragma unroll
      for (int i = 0; i < FRAGMENTS; i++) {
        const u32 a0 = hash(w[j], 2 * i), a1 = hash(w[j], 2 * i + 1), a2 = hash(w[j + 1], 2 * i), a3 = hash(w[j + 1], 2 * i + 1);
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) mma(acc[n][i], a0, a1, a2, a3, b[n][0], b[n][1]);
      }
    }
  }
}

// Where the block's sum of one row (0..255) and part lies in shared memory.
DEVICE int wide_slot(int row, int part) {
  return ((part >> 3) * 32 + row % 32) * 64 + (part & 1) * 32 + (row / 32) * 4 + (part >> 1 & 3);
}

// Put the warp's accumulators where the block adds them up: side by side (narrow), or by atomics (wide).
DEVICE void deposit(const int (&acc)[COLUMN_TILES][FRAGMENTS][4], int* totals, int parts, int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  if (NARROW) {
    if (t < parts)
#pragma unroll
      for (int i = 0; i < FRAGMENTS; i++)
        *(int4*)(totals + ((warp * parts + t) * 8 + g) * ROW_PAD + 4 * i) =
            make_int4(acc[0][i][0], acc[0][i][2], acc[0][i][1], acc[0][i][3]);
  } else {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int i = 0; i < FRAGMENTS; i++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          atomicAdd(totals + wide_slot(g * 32 + 2 * i + (k >> 1), n * 8 + 2 * t + (k & 1)), acc[n][i][k]);
  }
}

DEVICE int total(int* totals, int parts, int row, int part) {
  if (NARROW) {
    int sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += totals[((warp * parts + part) * 8 + row / 32) * ROW_PAD + row % 32];
    return sum;
  }
  int* slot = totals + wide_slot(row, part);
  const int sum = *slot;
  *slot = 0;
  return sum;
}

// Integer sums to one output. In exact mode a token's parts are its high and low halves; the base between them is 255.
DEVICE void write_output(const Problem& p, int row, int token, int high, int low) {
  const int part = token * p.parts_each;
  float value = (float)(high - 510 * p.x_sum[part]);
  if (p.parts_each == 2) {
    const long long whole = (long long)(high - 510 * p.x_sum[part]) * p.half_base + (low - 510 * p.x_sum[part + 1]);
    value = (float)whole;
  }
  value *= from_half(p.row_scales[row]) * *p.scale;
  value *= p.x_scale[token];
  if (p.bias) value += load_number(p.bias, row, p.type);
  store_number(p.y, (u64)token * p.out + row, p.type, value);
}

DEVICE void finish(const Problem& p, int panel, bool whole, int shares, int* totals, int* flag) {
  const int parts = p.tokens * p.parts_each, stride = (p.segments + 7) / 8 * 256;
  for (int i = threadIdx.x; i < 256 * p.tokens; i += THREADS) {
    const int row = i & 255, token = i >> 8, part = token * p.parts_each;
    const int high = total(totals, parts, row, part), low = p.parts_each == 2 ? total(totals, parts, row, part + 1) : 0;
    if (whole) {
      if (panel * 256 + row < p.out) write_output(p, panel * 256 + row, token, high, low);
    } else {
      atomicAdd(p.sums + (u64)part * stride + panel * 256 + row, high);
      if (p.parts_each == 2) atomicAdd(p.sums + (u64)(part + 1) * stride + panel * 256 + row, low);
    }
  }
  if (whole) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(p.arrived + panel, 1) == shares - 1;
  __syncthreads();
  if (!*flag) return;
  __threadfence();
  for (int i = threadIdx.x; i < 256 * p.tokens; i += THREADS) {
    const int row = i & 255, token = i >> 8;
    int* high = p.sums + (u64)token * p.parts_each * stride + panel * 256 + row;
    int* low = high + stride;
    if (panel * 256 + row < p.out)
      write_output(p, panel * 256 + row, token, __ldcg(high), p.parts_each == 2 ? __ldcg(low) : 0);
    *high = 0;
    if (p.parts_each == 2) *low = 0;
  }
  if (threadIdx.x == 0) p.arrived[panel] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
product(const u32* words, const u32* x_parts, const float* x_scale, const int* x_sum, const u16* row_scales,
        const float* scale, const void* bias, void* y, int* sums, int* arrived,
        int out, int steps, int segments, int strip, int tokens, int half_base, int type) {
  const Problem p = {words, x_parts, x_scale, x_sum, row_scales, scale, bias, y, sums, arrived,
                     out, steps, segments, strip, tokens, half_base ? 2 : 1, half_base, type};
  extern __shared__ int4 memory[];
  __shared__ int flag;
  int* totals = (int*)((char*)memory + RING);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int parts = p.tokens * p.parts_each;
  let_next_kernel_start();

  const u64 all = (u64)((segments + 7) / 8) * steps;
  const int begin = (int)(blockIdx.x * all / gridDim.x), end = (int)((blockIdx.x + 1) * all / gridDim.x);
  const char* own = (const char*)memory + warp * STAGES * STAGE;
  const u32 ring = smem_address(own);
  const u32 slot = pinned((lane / CHUNKS * PITCH + swizzle(lane / CHUNKS, lane % CHUNKS)) * 16);
  const u32 reads = pinned((g * PITCH + swizzle(g, t * R)) * 16);
  Fetcher ahead;
  ahead.start(p, begin + warp, end, lane);
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) ahead.fetch(p, ring + s * STAGE, slot, lane);
  if (!NARROW)
    for (int i = threadIdx.x; i < COLUMN_TILES * 2048; i += THREADS) totals[i] = 0;
  wait_for_previous_kernel();

  int position = begin + warp;
  u32 stage = 0, free = (STAGES - 1) * STAGE;  // of the ring: to be computed with, and to be filled
  for (int panel = begin / steps; panel * (long long)steps < end; panel++) {
    const int from = max(begin, panel * steps), to = min(end, (panel + 1) * steps);
    const int next_lane = NEIGHBOURS ? 0 : (next_segment(min(panel * 8 + g, segments - 1), segments, strip) - panel * 8) * 4 + t;
    const int rounds = position < to ? (to - position - 1) / WARPS + 1 : 0;
    const u32* x_at[COLUMN_TILES];
    u32 x_next[COLUMN_TILES];
    bool used[COLUMN_TILES];
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) {
      const int part = NARROW ? g >> 1 : n * 8 + g;
      used[n] = part < parts;
      x_at[n] = x_parts + ((u64)(position - panel * steps) * parts + part) * 4 + t;
      x_next[n] = used[n] && rounds ? __ldg(x_at[n]) : 0u;
    }
    int acc[COLUMN_TILES][FRAGMENTS][4] = {};
#pragma unroll 1
    for (int round = 1; round <= rounds; round++) {
      u32 x[COLUMN_TILES];
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) {
        x[n] = x_next[n];
        x_at[n] += WARPS * parts * 4;
        if (used[n] && round < rounds) x_next[n] = __ldg(x_at[n]);
      }
      copies_wait<STAGES - 2>();
      __syncwarp();
      u32 raw[4 * R];
#pragma unroll
      for (int i = 0; i < R; i++) {
        const uint4 v = *(const uint4*)(own + read_slot(reads + stage, i));
        raw[4 * i] = v.x, raw[4 * i + 1] = v.y, raw[4 * i + 2] = v.z, raw[4 * i + 3] = v.w;
      }
      u32 w[4][R + 1];
#pragma unroll
      for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int i = 0; i < R; i++) w[j][i] = raw[j * R + i];
        if (NEIGHBOURS) w[j][R] = *(const u32*)(own + stage + (8 * PITCH + lane) * 16 + j * 4);
        else w[j][R] = __shfl_sync(~0u, w[j][0], next_lane);
      }
      ahead.fetch(p, ring + free, slot, lane);
      multiply(w, x, acc, lane);
      free = stage;
      stage = stage == (STAGES - 1) * STAGE ? 0 : stage + STAGE;
    }
    position += rounds * WARPS;
    __syncthreads();
    deposit(acc, totals, parts, warp, lane);
    __syncthreads();
    const long long first = (long long)panel * steps, last = first + steps - 1;
    const int shares = (int)(((last + 1) * gridDim.x - 1) / (long long)all - ((first + 1) * gridDim.x - 1) / (long long)all) + 1;
    finish(p, panel, to - from == steps, shares, totals, &flag);
  }
}
