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
//   dots (1 part)           no tensor cores: a lane sums its rows by dp4a, and its four lanes' sums are added at a panel's end. An mma
//                           takes the scheduler's slots of 6 instructions for four hashes, dp4a one each (docs/log/products.md).
//   wide (up to 8 parts)    two columns at a time, two rows of each: B column p carries part p. 16 mma, 64 accumulators.
//                           With TILES = 2, 16 parts and 128 accumulators.
//
// A part is a token's int8 activations, or one of the two int8 halves of its 16-bit ones (exact mode).
//
// Work is a line of steps of 16 columns, panel after panel, cut into equal runs for the blocks of the grid; what a block has of a panel is
// cut into runs for its WARPS warps. A warp fetches its steps STAGES - 1 ahead into shared memory, where it alone reads them. At the
// end of its run it leaves its sums in shared memory and goes on; further warps add them up and finish the rows.
//
// GROUPED = 1 (int8): x has a scale for each GROUP columns, a whole multiple of the token's (quantize.cuh). A warp leaves its
// sums, times the multiple, at the end of each group.
//
// Sums are exact integers, so atomics in any order give the same bits. A row that several blocks share is one 64-bit word in
// `sums`: the sum in its lower 48 bits, above it how many blocks have added theirs. Whoever makes it complete scales and
// writes. `sums` may hold anything before: the block that begins a shared panel clears its words and says so by CLEARED, a number
// that no memory holds by chance; the others wait for it before they add, and the panel's last takes it away again.
//
// OWN_INPUT = 1: x is as it is, and each block transforms and quantises it all (quantize.cuh) while its first weights arrive,
// which is faster than a kernel before this one as long as it is little. Else x is what `rotate` makes of it.
//
// Weights that read the same x (q, k, v; gate, up) are one line of panels: MEMBERS of them, each with its own y.
//
// x: [tokens, in], or int8 [steps][parts][16] with x_scale: float [tokens] and x_sum: int32 [parts][8], behind it, if GROUPED, the
// multiples, int32 [groups][parts]. words: int32 [segments, steps * 16 * R]. sums: int64 [slots], then [tokens][slots * 256], a slot
// for each panel, or for each block (a block begins at most one shared panel), whichever are fewer. y: [tokens, out].
//
// Compile-time beside decode.cuh's, and with OWN_INPUT quantize.cuh's and hadamard.cuh's: OWN_INPUT, WARPS (that decode), FINISHERS
// (threads), STAGES, UNROLL (steps of a turn of the loop), TILES (0 is narrow), DOTS, GROUPED, GROUP (columns), MEMBERS, NEIGHBOURS (1:
// the strip's next segment is not always in the same panel, so its first words are fetched too).

constexpr int STEP = 16, GROUP_STEPS = GROUP / STEP;
constexpr int APART = GROUPED ? 1 : WARPS;  // steps of a warp
constexpr int THREADS = WARPS * 32 + FINISHERS, FINISHED = 256 / FINISHERS;  // rows of a finisher
constexpr bool NARROW = TILES == 0;
constexpr int FRAGMENTS = NARROW ? 8 : 16;
constexpr int COLUMN_TILES = NARROW ? 1 : TILES;
// In shared memory a lane reads R chunks of 16 bytes, a segment's four lanes lie QUARTER apart and segments PITCH: so that no two lanes
// of the eight that read at once meet in a bank, and all that differs between the chunks of a lane is known at compile time.
constexpr int QUARTER = 16 * (R + (R % 4 == 0));
constexpr int PITCH = 4 * QUARTER + 16 * (R % 4 == 2);
constexpr int STAGE = 8 * PITCH + (NEIGHBOURS ? 512 : 0);  // bytes
constexpr int RING = WARPS * STAGES * STAGE;
constexpr int ROW_PAD = 36, WIDE_PITCH = 65;  // against bank conflicts
constexpr int TOGETHER = NARROW ? 1 : 4;      // tokens that are finished at once
constexpr int MOST_PARTS = NARROW ? 4 : 8 * TILES;
constexpr int SUMS = OWN_INPUT ? 1 : 8;       // numbers whose sum is that of a part's int8
constexpr u64 CLEARED = 0x9E3779B97F4A7C15ull;

DEVICE uint4 read16(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}
DEVICE u32 read4(u32 from) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
  return v;
}

// Keep a value in its register: the compiler would rather compute it again at every use.
DEVICE u32 pinned(u32 value) {
  asm volatile("" : "+r"(value));
  return value;
}

DEVICE u32 read_x(const u32* from) { return OWN_INPUT ? read4(smem_address(from)) : __ldg(from); }

DEVICE int dot4(u32 a, u32 b, int c) {
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

DEVICE void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct Member {
  const u32* words;
  const u16* row_scales;
  const float* scale;
  const void* bias;
  void* y;
  int out, segments, first, panels;  // first: its first panel in the line
};
struct Members {
  Member each[MEMBERS];
};

struct Problem {
  const Members& members;
  const u32* x_parts;
  const float* x_scale;
  const int *x_sum, *multiples;
  u64* sums;
  int steps, strip, tokens, parts_each, half_base, type;
  u32 run, longer, inverse;  // inverse: 2^32 / steps, rounded down

  DEVICE u32 panel_of(u32 position) const {
    const u32 panel = __umulhi(position, inverse);
    return panel + ((panel + 1) * steps <= position);
  }
  DEVICE int sum_of(int part) const {
    int sum = 0;
    for (int i = 0; i < SUMS; i++) sum += x_sum[part * SUMS + i];
    return sum;
  }
  DEVICE int panels() const { return members.each[MEMBERS - 1].first + members.each[MEMBERS - 1].panels; }
  DEVICE int slots() const { return min(panels(), (int)gridDim.x); }
  DEVICE const Member& member_of(int panel) const {
    int m = 0;
#pragma unroll
    for (int i = 1; i < MEMBERS; i++) m += panel >= members.each[i].first;
    return members.each[m];
  }
};

// Runs of steps: the first `longer` blocks have one step more than `run`, both worked out by the host.
struct Share {
  u32 run, longer, begin, end;
  DEVICE Share(u32 run, u32 longer) : run(run), longer(longer) {
    begin = blockIdx.x * run + min(blockIdx.x, longer);
    end = begin + run + (blockIdx.x < longer);
  }
  DEVICE u32 block_of(u32 step) const {
    const u32 in_longer = longer * (run + 1);
    return step < in_longer ? step / (run + 1) : longer + (step - in_longer) / run;
  }
};

// A warp's steps in a panel, of those that its block has: neighbours if GROUPED, else every WARPS-th. Who has one more than others goes round.
struct Run {
  int begin, count;
  DEVICE Run(const Share& share, int panel, int steps, int warp) {
    const int from = max((int)share.begin, panel * steps), size = min((int)share.end, (panel + 1) * steps) - from;
    const u32 rank = (warp + WARPS - (from - share.begin) % WARPS) % WARPS, each = size / WARPS, more = size % WARPS;
    begin = from + (GROUPED ? rank * each + min(rank, more) : rank), count = each + (rank < more);
  }
};

// The warp's next step to fetch. Lane (g, t) copies chunks t, t + 4, ... of segment g, so that four lanes read whole sectors.
struct Fetcher {
  const char* at;
  const u64 policy = read_once();
  int panel, step, here;  // here: steps of the warp that are left in this panel

  // At the warp's first step in this panel, or in the next one that has any.
  DEVICE void place(const Problem& p, const Share& share, int warp, int lane) {
    for (here = 0; panel * p.steps < (int)share.end; panel++) {
      const Run run(share, panel, p.steps, warp);
      if (!run.count) continue;
      const Member& weight = p.member_of(panel);
      const int segment = min((panel - weight.first) * 8 + lane / 4, weight.segments - 1);
      here = run.count, step = run.begin - panel * p.steps;
      at = (const char*)weight.words + ((u64)segment * p.steps + step) * (STEP * R * 4) + lane % 4 * 16;
      return;
    }
  }

  // All stages but one are filled, from the warp's first step on.
  DEVICE void fill(const Problem& p, const Share& share, u32 ring, int warp, int lane) {
    panel = p.panel_of(share.begin);
    place(p, share, warp, lane);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
      if (here) fetch(p, ring + s * STAGE + lane / 4 * PITCH + lane % 4 * 16, lane);
      copies_commit();
      if (here) pass(p, share, 1, warp, lane);
    }
  }

  // To where the lane's first chunk lies.
  DEVICE void fetch(const Problem& p, u32 to, int lane) {
#pragma unroll
    for (int i = 0; i < R; i++) {
      if (R % 4 == 0) copy16(to + 4 * i / R * QUARTER + 4 * i % R * 16, at + i * 64, policy);
      else copy16(to + i * 64, at + i * 64, policy);
    }
    if (NEIGHBOURS) fetch_neighbours(p, to + 8 * PITCH - lane / 4 * PITCH + lane / 4 * 64, lane);
    at += APART * STEP * R * 4;
    if (NEIGHBOURS) step += APART;
  }

  // So many steps of this panel have been fetched. Where it has no more, the next panel's first is found.
  DEVICE void pass(const Problem& p, const Share& share, int steps, int warp, int lane) {
    here -= steps;
    if (here) return;
    panel++;
    place(p, share, warp, lane);
  }

  DEVICE void fetch_neighbours(const Problem& p, u32 to, int lane) {
    const Member& weight = p.member_of(panel);
    const int row = next_segment(min((panel - weight.first) * 8 + lane / 4, weight.segments - 1), weight.segments, p.strip);
    const u32* from = weight.words + ((u64)row * p.steps + step) * (STEP * R) + lane % 4 * 4 * R;
#pragma unroll
    for (int j = 0; j < 4; j++) copy4(to + j * 4, from + j * R);
  }
};

DEVICE void multiply(const u32 (&w)[4][R + 1], const u32 (&x)[COLUMN_TILES], int (&acc)[COLUMN_TILES][FRAGMENTS][4], int lane) {
  if (DOTS) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 b = __byte_perm(x[0], 0, 0x1111 * j);
#pragma unroll
      for (int row = 0; row < 32; row++) acc[0][row / 4][row % 4] = dot4(hash(w[j], row), b, acc[0][row / 4][row % 4]);
    }
  } else if (NARROW) {
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
  return ((part >> 3) * 32 + row % 32) * WIDE_PITCH + (part & 1) * 32 + (row / 32) * 4 + (part >> 1 & 3);
}

// The warp's number. In wide kernels it comes from one lane, so that the compiler knows that all lanes have the same and stay together;
// narrow ones gain nothing by it (docs/log/products.md, version 11).
DEVICE int warp_number() { return NARROW ? threadIdx.x >> 5 : __shfl_sync(~0u, threadIdx.x >> 5, 0); }

// All of the block, each thread where it stands.
DEVICE void meet() { asm volatile("barrier.sync 1, %0;" ::"n"(THREADS) : "memory"); }
DEVICE void finishers_meet() { asm volatile("barrier.sync 2, %0;" ::"n"(FINISHERS) : "memory"); }

// What a lane's sums count: the multiples of their parts in a group.
struct Multiples {
  int each[COLUMN_TILES][NARROW ? 1 : 2];

  DEVICE Multiples(const Problem& p, int group, int parts, int lane) {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int i = 0; i < (NARROW ? 1 : 2); i++) {
        const int part = DOTS ? 0 : NARROW ? lane & 3 : n * 8 + 2 * (lane & 3) + i;
        each[n][i] = GROUPED && part < parts ? p.multiples[group * parts + part] : 1;
      }
  }
};

DEVICE void leave(int4* to, int a, int b, int c, int d, int multiple, bool first) {
  int4 before = {0, 0, 0, 0};
  if (GROUPED && !first) before = *to;
  *to = make_int4(before.x + a * multiple, before.y + b * multiple, before.z + c * multiple, before.w + d * multiple);
}
// Put the warp's sums, as often as the multiples say, where the block adds them up: side by side (narrow), or by atomics (wide).
DEVICE void deposit(const int (&acc)[COLUMN_TILES][FRAGMENTS][4], int* totals, const Multiples& multiples, bool first, int parts,
                    int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  if (DOTS) {
    int half[16], quarter[8];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int lower = acc[0][i / 4][i % 4], upper = acc[0][4 + i / 4][i % 4];
      half[i] = (t & 2 ? upper : lower) + __shfl_xor_sync(~0u, t & 2 ? lower : upper, 2);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) quarter[i] = (t & 1 ? half[8 + i] : half[i]) + __shfl_xor_sync(~0u, t & 1 ? half[i] : half[8 + i], 1);
    int4* to = (int4*)(totals + (warp * 8 + g) * ROW_PAD + t * 8);
    leave(to, quarter[0], quarter[1], quarter[2], quarter[3], multiples.each[0][0], first);
    leave(to + 1, quarter[4], quarter[5], quarter[6], quarter[7], multiples.each[0][0], first);
  } else if (NARROW) {
    if (t < parts)
#pragma unroll
      for (int i = 0; i < FRAGMENTS; i++)
        leave((int4*)(totals + ((warp * parts + t) * 8 + g) * ROW_PAD + 4 * i), acc[0][i][0], acc[0][i][2], acc[0][i][1], acc[0][i][3],
              multiples.each[0][0], first);
  } else {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int i = 0; i < FRAGMENTS; i++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          atomicAdd(totals + wide_slot(g * 32 + 2 * i + (k >> 1), n * 8 + 2 * t + (k & 1)),
                    acc[n][i][k] * multiples.each[n][NARROW ? 0 : k & 1]);
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

// atomicAdd, or 0; without a branch, at the end of which the compiler would wait for the result.
DEVICE u64 add_if(bool wanted, u64* word, u64 value) {
  u64 before = 0;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p atom.global.add.u64 %0, [%1], %2;\n}"
               : "+l"(before) : "l"(word), "l"(value), "r"((u32)wanted) : "memory");
  return before;
}

// What a finisher knows of some tokens: their scales, and the sums of their activations, 510 of which are in every row's.
struct Tokens {
  int first;
  float scales[TOGETHER];
  long long middles[TOGETHER];

  DEVICE Tokens(const Problem& p, int first) : first(first) {
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const int token = min(first + i, p.tokens - 1), part = token * p.parts_each;
      scales[i] = p.x_scale[token];
      middles[i] = p.sum_of(part);
      if (p.parts_each == 2) middles[i] = middles[i] * p.half_base + p.sum_of(part + 1);
    }
  }
};

// What it knows of a panel before its sums are there. Its rows lie FINISHERS apart.
struct Rows {
  const Member* weight;
  int first, shares, slot, slots;  // first: the thread's first row
  bool begun;                      // by this block
  float factors[FINISHED], biases[FINISHED];

  DEVICE Rows(const Problem& p, const Share& share, int panel, int thread) : weight(&p.member_of(panel)) {
    const int beginner = share.block_of(panel * p.steps);
    shares = share.block_of(panel * p.steps + p.steps - 1) - beginner + 1, begun = beginner == blockIdx.x;
    slots = p.slots(), slot = p.panels() <= (int)gridDim.x ? panel : beginner;
    first = (panel - weight->first) * 256 + thread;
    const float scale = *weight->scale;
#pragma unroll
    for (int k = 0; k < FINISHED; k++) {
      const int row = first + k * FINISHERS;
      factors[k] = row < weight->out ? from_half(weight->row_scales[row]) * scale : 0.0f;
      biases[k] = row < weight->out && weight->bias ? load_number(weight->bias, row, p.type) : 0.0f;
    }
  }

  // Another block has cleared the panel's words.
  DEVICE void await_cleared(const Problem& p, int thread) const {
    if (shares == 1 || begun) return;
    u64 found = CLEARED;
    do
      if (thread == 0) asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(p.sums + slot) : "memory");
    while (found != CLEARED);
    finishers_meet();
  }

  // Sums of rows and tokens go to memory together, since each takes as long as hundreds of instructions.
  DEVICE void finish(const Problem& p, const Tokens& tokens, int* totals, int thread) const {
    const int parts = p.tokens * p.parts_each;
    u64* words = p.sums + slots + slot * 256 + thread;
    u64 sums[TOGETHER][FINISHED], others[TOGETHER][FINISHED];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const int token = min(tokens.first + i, p.tokens - 1), part = token * p.parts_each;
#pragma unroll
      for (int k = 0; k < FINISHED; k++) {
        long long sum = total(totals, parts, k * FINISHERS + thread, part);
        if (p.parts_each == 2) sum = sum * p.half_base + total(totals, parts, k * FINISHERS + thread, part + 1);
        sums[i][k] = (u64)sum + (shares > 1 ? 1ull << 48 : 0);
      }
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; i++)
#pragma unroll
      for (int k = 0; k < FINISHED; k++) {
        u64* word = words + (u64)(tokens.first + i) * slots * 256 + k * FINISHERS;
        others[i][k] = add_if(shares > 1 && tokens.first + i < p.tokens, word, sums[i][k]);
      }
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const int token = tokens.first + i;
      if (token >= p.tokens) break;
#pragma unroll
      for (int k = 0; k < FINISHED; k++) {
        const int row = first + k * FINISHERS;
        u64 sum = sums[i][k] + others[i][k];
        if (shares > 1) {
          const u64 arrived = (sum + (1ull << 47)) >> 48;
          if (arrived != shares) continue;
          if (token == 0 && k == 0 && thread == 0) p.sums[slot] = 0;
          sum -= arrived << 48;
        }
        if (row >= weight->out) continue;
        const float value = (float)((long long)sum - 510 * tokens.middles[i]) * factors[k] * tokens.scales[i];
        store_number(weight->y, (u64)token * weight->out + row, p.type, weight->bias ? value + biases[k] : value);
      }
    }
  }
};

// Clear the words of the panel that this block begins and others end, if there is one: its last.
DEVICE void clear(const Problem& p, const Share& share, int thread) {
  const u32 panel = p.panel_of(share.end - 1);
  if (panel * p.steps < share.begin || (panel + 1) * p.steps <= share.end) return;
  const int slots = p.slots(), slot = p.panels() <= (int)gridDim.x ? panel : blockIdx.x;
  for (int token = 0; token < p.tokens; token++)
#pragma unroll
    for (int k = 0; k < FINISHED; k++) p.sums[slots + (u64)(token * slots + slot) * 256 + k * FINISHERS + thread] = 0;
  finishers_meet();
  if (thread == 0) asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p.sums + slot), "l"(CLEARED) : "memory");
}

// The last warps: they wait for a panel's sums, of which there are two places, and finish its rows. The barrier `full` counts the
// warps that have left a panel's sums, `drained` the finishers that have read them.
DEVICE void finish(const Problem& p, int* totals, int totals_size, u32 full, u32 drained) {
  const Share share(p.run, p.longer);
  const int thread = threadIdx.x - WARPS * 32;
  const Tokens first(p, 0);
  clear(p, share, thread);
  u32 panel = p.panel_of(share.begin);
  Rows rows(p, share, panel, thread);
  for (int turn = 0;; turn++, panel++) {
    const int place = turn & 1;
    const bool more = (panel + 1) * p.steps < share.end;
    const Rows next = more ? Rows(p, share, panel + 1, thread) : rows;  // asked for while the blocks of this panel are at work
    rows.await_cleared(p, thread);
    barrier_wait(full + 8 * place, turn >> 1 & 1);
    rows.finish(p, first, totals + place * totals_size, thread);
    for (int token = TOGETHER; token < p.tokens; token += TOGETHER)
      rows.finish(p, Tokens(p, token), totals + place * totals_size, thread);
    barrier_arrive(drained + 8 * place);
    if (!more) break;
    rows = next;
  }
}

DEVICE void decode_and_multiply(const Problem& p, Fetcher& ahead, u32 ring, int* totals, int totals_size, u32 full, u32 drained) {
  const int warp = warp_number(), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int parts = p.tokens * p.parts_each, steps = p.steps;
  const Share share(p.run, p.longer);
  // Stages of the ring are counted from `base`: narrow 0, wide an address that each lane makes of threadIdx.x. Of `warp_number` none may be
  // made: where a part of an address is the same for the warp, NVRTC 13.0 writes a copy with an L2 policy as an instruction that an H200
  // calls illegal (tests/codes/test_trellis_kernels_gpu.py looks for it).
  const u32 first = pinned(ring + g * PITCH + t * QUARTER), base = NARROW ? 0 : first, reads = first - base;
  const u32 writes = TILES == 1 ? pinned(t * 16 - t * QUARTER) : pinned(ring + g * PITCH + t * 16) - base;
  constexpr bool SUM = TILES == 2;          // `free` has `writes` in it: 3 % faster there, 2 % slower with one tile
  constexpr bool READS_FIRST = TILES == 2;  // 2 to 5 % faster there at 4 and 2 bits, slower elsewhere (docs/log/products.md, version 12)
  int turn = 0;
  u32 stage = base, free = base + (STAGES - 1) * STAGE + (SUM ? writes : 0u);  // to be computed with, and to be filled
  for (int panel = p.panel_of(share.begin); panel * steps < (int)share.end; panel++, turn++) {
    const Member& weight = p.member_of(panel);
    const int begin = (panel - weight.first) * 8, segment = min(begin + g, weight.segments - 1);
    const int next = next_segment(segment, weight.segments, p.strip) - begin;
    const u32 ends_at = NARROW ? ring + next * PITCH + t * QUARTER : (next - g) * PITCH;
    const u32 ends = pinned(NEIGHBOURS ? ring + 8 * PITCH + lane * 16 - base : ends_at);
    const Run run(share, panel, steps, warp);
    const u32* x_at[COLUMN_TILES];
    u32 x_next[COLUMN_TILES];
    bool used[COLUMN_TILES];
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) {
      const int part = DOTS ? 0 : NARROW ? g >> 1 : n * 8 + g;
      used[n] = part < parts;
      x_at[n] = p.x_parts + ((u64)(run.begin - panel * steps) * parts + part) * 4 + t;
      x_next[n] = used[n] && run.count ? read_x(x_at[n]) : 0u;
    }
    const int place = turn & 1;
    int round = run.count, at = run.begin - panel * steps;  // steps that are left of the run; the next one's place in the panel
    do {  // one group, or all
      const int left = GROUPED ? max(0, round - (GROUP_STEPS - at % GROUP_STEPS)) : 0;
      const Multiples multiples(p, min(at, steps - 1) / GROUP_STEPS, parts, lane);
      const bool first_group = round == run.count;
      at += round - left;
      int acc[COLUMN_TILES][FRAGMENTS][4] = {};
      while (round > left) {
        const bool fetching = ahead.here > 0;
        const int turns = fetching ? min(round - left, ahead.here) : round - left;
#pragma unroll UNROLL
        for (int last = round - turns; round > last; round--) {
          u32 x[COLUMN_TILES];
#pragma unroll
          for (int n = 0; n < COLUMN_TILES; n++) {
            x[n] = x_next[n];
            x_at[n] += APART * parts * 4;
            if (used[n] && round > 1) x_next[n] = read_x(x_at[n]);
          }
          copies_wait<STAGES - 2>();
          __syncwarp();
          const auto fetch = [&] {
            if (fetching) ahead.fetch(p, SUM ? free : writes + free, lane);
            copies_commit();
          };
          if (!READS_FIRST) fetch();
          u32 w[4][R + 1];
          const u32 end_of_stage = NEIGHBOURS ? 4 : R * 4;
#pragma unroll
          for (int i = 0; i < R; i++) {
            const uint4 v = read16(reads + stage + i * 16);
            w[4 * i / R][4 * i % R] = v.x, w[(4 * i + 1) / R][(4 * i + 1) % R] = v.y;
            w[(4 * i + 2) / R][(4 * i + 2) % R] = v.z, w[(4 * i + 3) / R][(4 * i + 3) % R] = v.w;
          }
#pragma unroll
          for (int j = 0; j < 4; j++) w[j][R] = read4(ends + stage + j * end_of_stage);
          if (READS_FIRST) fetch();
          multiply(w, x, acc, lane);
          free = SUM ? writes + stage : stage;
          stage = stage == base + (STAGES - 1) * STAGE ? base : stage + STAGE;
        }
        if (fetching) ahead.pass(p, share, turns, warp, lane);
      }
      if (turn >= 2 && first_group) barrier_wait(drained + 8 * place, (turn >> 1 & 1) ^ 1);
      deposit(acc, totals + place * totals_size, multiples, first_group, parts, warp, lane);
    } while (round > 0);
    __syncwarp();
    if (lane == 0) barrier_arrive(full + 8 * place);
  }
}

#if OWN_INPUT
struct Input {
  u32 largest[MOST_PARTS * GROUPS];  // of a token's groups, or of a token
  float scales[MOST_PARTS];
  int sums[MOST_PARTS];
  int multiples[GROUPS * MOST_PARTS];

  DEVICE Quantizer quantizer(int token) const {
    u32 top = 0;
    int shares = 0;
    for (int g = 0; g < GROUPS; g++) top = max(top, largest[token * GROUPS + g]);
    if (GROUPED)
      for (int g = 0; g < GROUPS; g++) shares += share_of(largest[token * GROUPS + g], top);
    return Quantizer(top, shares);
  }
};

// x as the products want it, into x_parts in shared memory: int8 [steps][parts][16]. All warps, which have met.
DEVICE void take_input(const Problem& p, const void* x, signed char* x_parts, Input& input) {
  constexpr int PIECE = 32 * E, ALL = THREADS / 32, pieces = (IN + PIECE - 1) / PIECE;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, parts = p.tokens * PARTS_EACH;
  float v[E];
  int unit = warp;
  for (; unit < p.tokens * pieces; unit += ALL) {
    const int token = unit / pieces, first = unit % pieces * PIECE + lane * E;
    const u32 top = largest_of_group(transformed(v, x, token, first, lane), lane);
    if (first % GROUP == 0 && first < IN) atomicMax(&input.largest[token * GROUPS + (GROUPED ? first / GROUP : 0)], top);
  }
  meet();
  bool held = true;  // v is of the last piece
  for (unit -= ALL; unit >= 0; unit -= ALL, held = false) {
    const int token = unit / pieces, first = unit % pieces * PIECE + lane * E;
    if (!held) transformed(v, x, token, first, lane);
    const Quantizer quantizer = input.quantizer(token);
    int high_sum = 0, low_sum = 0, multiple = 1;
    if (first < p.steps * STEP) {
      if (GROUPED) multiple = quantizer.multiple(input.largest[token * GROUPS + first / GROUP]);
      if (GROUPED && first % GROUP == 0) input.multiples[first / GROUP * parts + token] = multiple;
      quantizer.store(x_parts + (first / STEP * parts + token * PARTS_EACH) * STEP + first % STEP, v, multiple, high_sum, low_sum);
    }
    high_sum = __reduce_add_sync(~0u, high_sum);
    low_sum = __reduce_add_sync(~0u, low_sum);
    if (lane < PARTS_EACH) atomicAdd(&input.sums[token * PARTS_EACH + lane], lane ? low_sum : high_sum);
    if (lane == 0) input.scales[token] = quantizer.scale;
  }
  meet();
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
product(const __grid_constant__ Members members, const void* x, const float* x_scale, const int* x_sum, u64* sums,
        int steps, int strip, int tokens, int half_base, int type, u32 run, u32 longer, u32 inverse) {
  Problem p = {members, (const u32*)x, x_scale, x_sum, x_sum + tokens * SUMS, sums, steps, strip, tokens, half_base ? 2 : 1, half_base, type,
               run, longer, inverse};
  extern __shared__ __align__(128) int4 memory[];  // so that `read_slot` may exchange bits
  __shared__ u64 barriers[4];
  int* totals = (int*)((char*)memory + RING);
  const int totals_size = NARROW ? WARPS * p.tokens * p.parts_each * 8 * ROW_PAD : COLUMN_TILES * 32 * WIDE_PITCH;
  const u32 full = smem_address(barriers), drained = full + 16;
  const int warp = warp_number(), lane = threadIdx.x & 31;
  const u32 ring = smem_address(memory) + (threadIdx.x >> 5) * STAGES * STAGE;
  const Share share(run, longer);
  let_next_kernel_start();
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; i++) barrier_init(full + 8 * i, WARPS), barrier_init(drained + 8 * i, FINISHERS);
  if (!NARROW)
    for (int i = threadIdx.x; i < 2 * totals_size; i += THREADS) totals[i] = 0;
#if OWN_INPUT
  __shared__ Input input;
  if (threadIdx.x < MOST_PARTS) input.sums[threadIdx.x] = 0;
  if (threadIdx.x < MOST_PARTS * GROUPS) input.largest[threadIdx.x] = 0;
#endif
  Fetcher ahead;
  if (warp < WARPS) ahead.fill(p, share, ring, warp, lane);
  meet();
  wait_for_previous_kernel();
#if OWN_INPUT
  signed char* x_parts = (signed char*)(totals + 2 * totals_size);
  take_input(p, x, x_parts, input);
  p.x_parts = (const u32*)x_parts, p.x_scale = input.scales, p.x_sum = input.sums, p.multiples = input.multiples;
#endif
  if (warp < WARPS) decode_and_multiply(p, ahead, ring, totals, totals_size, full, drained);
  else finish(p, totals, totals_size, full, drained);
}
