// y = x W^T for many tokens: weights decoded once for up to 256 tokens, straight into the tensor cores' shared memory.
//
// A block works on tiles of 128 rows (4 segments) by TOKENS tokens. Two groups of four warps produce, stage about: each warp
// decodes one segment, a lane two neighbouring columns at a time, and stores the values as fp16 (integers in -510..510, so
// exactly). Two groups of four consume, 64 rows each, by wgmma with float32 accumulators; they get the registers that
// producers do not need. Scales and bias come at the end, so that fp16 rounds nothing but the activations. A stage is 64 columns: A 128 x 64 and B TOKENS x 64 halves, 128 bytes a row, in the order of
// wgmma's 128-byte swizzle (16-byte chunk c of row r lies at c ^ r % 8). B is one contiguous piece of `x`, fetched by one
// bulk copy: `rotate` has written it in that order.
//
// Row 2i of a group of 16 is put at A's row i, row 2i + 1 at i + 8: so the two rows that a lane holds of the result are
// neighbours in y.
//
// The first `whole` tiles are a unit of work each, as many times as there are multiprocessors. The rest, for which not all of
// them would be busy, is split along its columns. Every split leaves its sums in `partials`, and the last to arrive adds them
// up, in their order: the same bits every time.
//
// x: half [column blocks][tokens up to whole tiles][64], swizzled. x_scale: float [tokens]. y: [tokens, out] of `type`.
// partials: float4 [(tiles - whole) * splits][2][TOKENS / 8][128]; arrived: u32 [tiles - whole][2], zero before and after.
// Compile-time beside RATE, STATE_BITS, MULTIPLIER: TOKENS (64, 128, 256), STAGES; `multiply_tile` is generated for TOKENS.

constexpr int DEPTH = 64;                 // columns of a stage
constexpr int A_BYTES = 128 * DEPTH * 2;
constexpr int B_BYTES = TOKENS * DEPTH * 2;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int PRODUCERS = 256, CONSUMERS = 256, GROUP = 128;

DEVICE void bulk_copy(u32 to, const void* from, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier) : "memory");
}

// A tile of rows of 128 bytes in 128-byte swizzle, eight rows 1024 bytes apart from the next eight.
DEVICE u64 tile_descriptor(u32 address) { return (u64)(address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

struct Ring {
  int stage;
  u32 parity;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// A lane's words of two columns of its segment, and the next segment's first word of each.
struct Words {
  u32 q[2][R + 1];
  DEVICE void load(const u32* own, const u32* next) {
    u32 flat[2 * R];
    if (R % 2 == 0) {
#pragma unroll
      for (int i = 0; i < R / 2; i++) {
        const uint4 v = __ldg((const uint4*)own + i);
        flat[4 * i] = v.x, flat[4 * i + 1] = v.y, flat[(4 * i + 2) % (2 * R)] = v.z, flat[(4 * i + 3) % (2 * R)] = v.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < R; i++) {
        const uint2 v = __ldg((const uint2*)own + i);
        flat[2 * i] = v.x, flat[2 * i + 1] = v.y;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
      for (int i = 0; i < R; i++) q[j][i] = flat[j * R + i];
      q[j][R] = __ldg(next + j * R);
    }
  }
};

// Two values as halves, exactly: a byte sum in the mantissa of 1024.0, less 1534.
DEVICE u32 two_values(u32 a, u32 b) {
  const u32 sums = __byte_perm(dot4(a, 0x01010101u, 0x6400u), dot4(b, 0x01010101u, 0x6400u), 0x5410);
  u32 values;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(values) : "r"(sums), "r"(0x65fe65feu));
  return values;
}

struct Problem {
  const u32* words;
  const u16* x;
  const float* x_scale;
  const u16* row_scales;
  const float* scale;
  const void* bias;
  void* y;
  float4* partials;
  u32* arrived;
  int out, steps, segments, strip, tokens, type, whole, splits, depths, row_tiles, units;
};

// What a block does at a time: some stages of a tile.
struct Unit {
  int tile, begin, end;
  bool shared;  // with other units
  DEVICE Unit(const Problem& p, int unit) : tile(unit), begin(0), end(p.depths), shared(unit >= p.whole && p.splits > 1) {
    if (!shared) return;
    const int split = (unit - p.whole) % p.splits;
    tile = p.whole + (unit - p.whole) / p.splits;
    begin = split * p.depths / p.splits, end = (split + 1) * p.depths / p.splits;
  }
};

DEVICE void produce(const Problem& p, u32 memory, u32 full, u32 empty) {
  const int group = threadIdx.x / GROUP, warp = threadIdx.x / 32 % 4, lane = threadIdx.x & 31;
  const int columns = p.steps * 16, padded_tokens = (p.tokens + TOKENS - 1) / TOKENS * TOKENS;
  const u32 at = warp * 32 * 128 + ((lane >> 2) << 4 | (lane & 3) << 2);
  u32 before = 0;  // stages of the units before: this group's are those of its own parity
  for (int number = blockIdx.x; number < p.units; number += gridDim.x) {
    const Unit unit(p, number);
    const int segment = min(unit.tile % p.row_tiles * 4 + warp, p.segments - 1), tokens = unit.tile / p.row_tiles * TOKENS;
    const u32* own = p.words + (u64)segment * columns * R;
    const u32* next = p.words + (u64)next_segment(segment, p.segments, p.strip) * columns * R;
    Words ahead;
    const int begin = unit.begin + ((before ^ group) & 1), first = min(begin * DEPTH + 2 * lane, columns - 2);
    ahead.load(own + first * R, next + first * R);
    for (int depth = begin; depth < unit.end; depth += 2) {
      const Words words = ahead;
      const int column = min((depth + 2) * DEPTH + 2 * lane, columns - 2);
      ahead.load(own + column * R, next + column * R);
      const int far = min((depth + 8) * DEPTH + 2 * lane, columns - 2);
      asm volatile("prefetch.global.L2 [%0];" ::"l"(own + far * R));
      const u32 turn = (before + depth - unit.begin) / STAGES, place = (before + depth - unit.begin) % STAGES;
      const u32 stage = memory + place * STAGE_BYTES, arrived = full + 8 * place;
      barrier_wait(empty + 8 * place, ~turn & 1);
      if (threadIdx.x % GROUP == 0) {
        barrier_arrive_expecting(arrived, B_BYTES);
        bulk_copy(stage + A_BYTES, p.x + ((u64)depth * padded_tokens + tokens) * DEPTH, B_BYTES, arrived);
      }
#pragma unroll
      for (int row = 0; row < 32; row++) {
        const int line = (row & 16) + (row % 16 >> 1) + 8 * (row & 1);
        const u32 to = (stage + at ^ (line & 7) << 4) + line * 128;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(two_values(hash(words.q[0], row), hash(words.q[1], row))) : "memory");
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      barrier_arrive(arrived);
    }
    before += unit.end - unit.begin;
  }
}

DEVICE void write_tile(const Problem& p, const float (&acc)[TOKENS / 2], int first_row, int first_token, int lane) {
  const int row = first_row + (lane >> 2) * 2;
  float scales[2], biases[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const bool there = row + i < p.out;
    scales[i] = there ? from_half(p.row_scales[row + i]) * *p.scale : 0.0f;
    biases[i] = there && p.bias ? load_number(p.bias, row + i, p.type) : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int token = first_token + 8 * j + (lane & 3) * 2 + k;
      if (token >= p.tokens || row >= p.out) continue;
      const float x_scale = p.x_scale[token];
      const float a = acc[4 * j + k] * scales[0] * x_scale + biases[0], b = acc[4 * j + 2 + k] * scales[1] * x_scale + biases[1];
      const u64 to = (u64)token * p.out + row;
      if (p.type != FLOAT32 && p.out % 2 == 0) {
        ((u32*)p.y)[to / 2] = p.type == FLOAT16 ? to_half(a) | (u32)to_half(b) << 16 : to_bfloat(a) | (u32)to_bfloat(b) << 16;
      } else {
        store_number(p.y, to, p.type, a);
        if (row + 1 < p.out) store_number(p.y, to + 1, p.type, b);
      }
    }
  }
}

// Leave the sums of a unit; true for the last of its tile, who then has them all. A group's threads only.
DEVICE bool join(const Problem& p, float (&acc)[TOKENS / 2], int number, int tile, int group, int thread) {
  __shared__ u32 before[2];
  constexpr int SIZE = TOKENS / 8 * 128;
  tile -= p.whole;
  float4* mine = p.partials + (u64)(2 * (number - p.whole) + group) * SIZE + thread;
#pragma unroll
  for (int i = 0; i < TOKENS / 8; i++)
    __stcg(mine + i * 128, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  __threadfence();
  asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
  u32* arrived = p.arrived + 2 * tile + group;
  if (thread == 0) before[group] = atomicAdd(arrived, 1);
  asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
  if (before[group] != p.splits - 1) return false;
  if (thread == 0) *arrived = 0;
  __threadfence();
  const float4* all = p.partials + (u64)(2 * tile * p.splits + group) * SIZE + thread;
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) acc[i] = 0.0f;
  for (int split = 0; split < p.splits; split++) {  // outside: so that the loads of one are under way together
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
      const float4 more = __ldcg(all + (u64)split * 2 * SIZE + i * 128);
      acc[4 * i] += more.x, acc[4 * i + 1] += more.y, acc[4 * i + 2] += more.z, acc[4 * i + 3] += more.w;
    }
  }
  return true;
}

DEVICE void consume(const Problem& p, u32 memory, u32 full, u32 empty) {
  const int thread = threadIdx.x - PRODUCERS, group = thread / 128, warp = thread / 32 % 4, lane = thread & 31;
  Ring ring = {0, 0};
  for (int number = blockIdx.x; number < p.units; number += gridDim.x) {
    const Unit unit(p, number);
    float acc[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) acc[i] = 0.0f;
    int before = -1;
    for (int depth = unit.begin; depth < unit.end; depth++) {
      barrier_wait(full + 8 * ring.stage, ring.parity);
      const u32 stage = memory + ring.stage * STAGE_BYTES;
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < DEPTH / 16; k++)
        multiply_tile(acc, tile_descriptor(stage + group * (A_BYTES / 2) + k * 32), tile_descriptor(stage + A_BYTES + k * 32));
      asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (before >= 0) barrier_arrive(empty + 8 * before);
      before = ring.stage;
      ring.next();
    }
    wait_for_multiplies(acc);
    barrier_arrive(empty + 8 * before);
    if (unit.shared && !join(p, acc, number, unit.tile, group, thread % 128)) continue;
    write_tile(p, acc, unit.tile % p.row_tiles * 128 + group * 64 + warp * 16, unit.tile / p.row_tiles * TOKENS, lane);
  }
}

extern "C" __global__ void __launch_bounds__(PRODUCERS + CONSUMERS, 1)
gemm(const u32* words, const u16* x, const float* x_scale, const u16* row_scales, const float* scale, const void* bias, void* y,
     float4* partials, u32* arrived, int out, int steps, int segments, int strip, int tokens, int type, int whole, int splits) {
  const int row_tiles = (segments + 3) / 4, tiles = row_tiles * ((tokens + TOKENS - 1) / TOKENS);
  const Problem p = {words, x, x_scale, row_scales, scale, bias, y, partials, arrived,
                     out, steps, segments, strip, tokens, type, whole, splits, (steps + 3) / 4, row_tiles, whole + (tiles - whole) * splits};
  extern __shared__ __align__(1024) char shared[];
  __shared__ u64 barriers[2 * STAGES];
  const u32 memory = (smem_address(shared) + 1023) & ~1023u;
  const u32 full = smem_address(barriers), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, GROUP + 1);
      barrier_init(empty + 8 * i, CONSUMERS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (threadIdx.x < PRODUCERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
    produce(p, memory, full, empty);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 168;");
    consume(p, memory, full, empty);
  }
}
