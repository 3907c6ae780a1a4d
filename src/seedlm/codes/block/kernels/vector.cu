// y = W x for one token, without forming W: 16-bit integer activations against bits of the seeds, on int8 tensor cores.
//
// With G[c] the P new bits that weight c adds to the register's bit string, T[p] = sum over c of x[c] * (V[c,p] - center) obeys
//
//     T[P-1]          = sum over c of G[c] * X[c] + seed * X[-1] - ..     X[c] = sum over d >= c of x[d] * 2^(-P (d - c))
//     T[p-1] / 2^..   = T[p] / 2^.. - sum over c of x[c] * (top bit of V[c,p])                                    and constants
//
// up to bits below a state's lowest, which are lost in truth and not here, so that a state is too large by a half on average:
// `center` takes that away. The windows overlap, so the bits of one serve the next with a smaller weight, and the activations'
// prefix sums X carry that. So the tensor cores' u8 operand is C bytes a block, each a G at its top, plus the seed's two bytes, and then single bits of the same bytes; accumulators run on from T[P-1] down to T[0]. All is exact but
// the activations, which are 16-bit integers with a scale for each 4 blocks of columns, in two int8 parts.
//
// mma.m16n8k32: a lane owns its four blocks (rows g and g + 8), and the B operand is block-diagonal: columns 2t and 2t + 1 hold
// the high and low parts of what lane t's block meets, so the block's P results come back to the lane that has its coefficients.
// The weights of x stay in registers while the warp walks down the rows. Counted in machine code: 4.6 instructions a weight
// at 4 bits and 3 bits, half of them on the pipe for shifts and logic.
//
// include: common.cuh

constexpr int registers = C / 4, main_registers = registers + 1, group_tiles = 4, group_rows = group_tiles * tile_rows;
static_assert(C % 4 == 0 && registers <= ENTRY && P <= 4 && K >= 9 && K <= 16 && 16 - K <= P, "no such fast path");

// Byte j of register i belongs to weight 4i + j: its G at the top, zeros below. The last register is the seed.
struct Features { u32 g[main_registers]; };

__device__ __forceinline__ Features features(const char* table, u32 lane_offset, u32 byte, u32 code) {
    Features f;
    u32 entry[ENTRY];
    look_up<ENTRY>(table, lane_offset, byte, code, entry);
#pragma unroll
    for (int i = 0; i < registers; i++) f.g[i] = entry[i];
    f.g[registers] = K == 16 ? code : code & low_bits(K);  // What is above 16 bits meets zeros.
    return f;
}

// c += A B for u8 A and s8 B. Registers a[row][k]: 4 bytes each of rows g and g + 8; the second k is left out of the short form.
__device__ __forceinline__ void multiply(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(int* c, u32 a0, u32 a1, u32 b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
}

constexpr int exponent_base = (127 - 22 - (1 << (EB - 1))) >> EB << EB;  // A multiple of 2^EB, so that exponents are OR-ed in.
// A sum's unit: a T counts 2^(K-8), its exponent is as above.
constexpr float result_unit = (float)((1 << (K - 1)) / ((1 << (K - 1)) - 1.0) / 128) * (1u << (127 - (1 << (EB - 1)) - exponent_base));
static_assert(K + EB <= 23 && EB <= 5, "no such fast path");

// What one block of columns meets: B fragments, and -128 times the sum of its activations, for the states' center (and a half).
struct Inputs { u32 main[main_registers], bit[registers]; int center; };

// The part (0 high, 1 low) of four 16-bit integers, a byte each.
__device__ __forceinline__ u32 part_bytes(const int* v, int part) {
    u32 bytes = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int high = (v[j] + 128) >> 8;
        bytes |= (u32)((part ? v[j] - high * 256 : high) & 255) << 8 * j;
    }
    return bytes;
}

// x: a block's C activations times `scale`. They and their prefix sums become 16-bit integers; each is rounded so that the sum
// of the errors so far stays below a half, since features have a mean.
__device__ __forceinline__ Inputs make_inputs(const float* x, float scale, float lift, int part) {
    Inputs in;
    int main[C + 4], bit[C];
    float main_left = 0, bit_left = 0, prefix = 0, sum = 0;
#pragma unroll
    for (int c = C - 1; c >= 0; c--) {
        const float v = x[c] * lift * scale;
        prefix = v + prefix * (1.0f / (1 << P)), sum += v;
        main[c] = __float2int_rn(fminf(fmaxf(prefix + main_left, -32512), 32512)), main_left += prefix - main[c];
        bit[c] = __float2int_rn(fminf(fmaxf(bit_left - v, -32512), 32512)), bit_left -= v + bit[c];
    }
    const float seed = prefix * (1.0f / (1 << P)) * (1 << (16 - K)) + main_left;
    main[C + 1] = __float2int_rn(seed), main[C] = __float2int_rn(seed * (1.0f / 256)), main[C + 2] = main[C + 3] = 0;
#pragma unroll
    for (int i = 0; i < main_registers; i++) in.main[i] = part_bytes(main + 4 * i, part);
#pragma unroll
    for (int i = 0; i < registers; i++) in.bit[i] = part_bytes(bit + 4 * i, part);
    in.center = __float2int_rn(-(128 + 128.0f / (1 << K)) * sum);
    return in;
}

// Lane 4 (2i + part) + t makes block i's part for the lanes of t, which then fetch it; fragments are zero unless the lane's column
// (g) belongs to its own blocks. Returns what one stands for, for the lane's four blocks: NaN if an activation is not finite.
__device__ __forceinline__ float load_inputs(const void* x, int kind, int first_column, int columns, int g, int t, Inputs* in) {
    float v[C], largest = 0, prefix = 0;
    bool finite = true;
#pragma unroll
    for (int c = C - 1; c >= 0; c--) {
        const int column = first_column + g / 2 * C + c;
        v[c] = column < columns ? load_value(x, column, kind) : 0;
    }
#pragma unroll
    for (int c = C - 1; c >= 0; c--) {
        prefix = v[c] + prefix * (1.0f / (1 << P));
        largest = fmaxf(largest, fmaxf(fabsf(v[c]), fabsf(prefix)));
        finite = finite && fabsf(v[c]) <= 0x1.fffffep127f;
    }
    if (!finite) largest = __int_as_float(0x7f800000);
#pragma unroll
    for (int d = 4; d < 32; d *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
    finite = largest <= 0x1.fffffep127f;
    const float lift = largest < 0x1p-90f ? 0x1p60f : 1;  // Denormal activations count too.
    const float scale = finite && largest > 0 ? 32512 / (largest * lift) : 0;
#pragma unroll
    for (int c = 0; c < C; c++) v[c] = finite ? v[c] : 0;
    const Inputs mine = make_inputs(v, scale, lift, g % 2);
#pragma unroll
    for (int i = 0; i < lane_blocks; i++) {
        const int source = 4 * (2 * i + g % 2) + t;
#pragma unroll
        for (int k = 0; k < main_registers; k++) {
            const u32 bytes = __shfl_sync(~0u, mine.main[k], source);
            in[i].main[k] = g / 2 == t ? bytes : 0;
        }
#pragma unroll
        for (int k = 0; k < registers; k++) {
            const u32 bytes = __shfl_sync(~0u, mine.bit[k], source);
            in[i].bit[k] = g / 2 == t ? bytes : 0;
        }
        in[i].center = __shfl_sync(~0u, mine.center, source);
    }
    return finite ? largest * (result_unit / 32512) : __int_as_float(0x7fffffff);
}

// Coefficients I and up, times T (and the center's share of it).
template <int AT, int I>
__device__ __forceinline__ int combine(const u32* code, const int* t, int center) {
    if constexpr (I == P) return 0;
    else return signed_field<AT + I * QB, QB>(code) * (t[I] * (1 << (P - 1 - I)) + center) + combine<AT, I + 1>(code, t, center);
}

struct Opaque { u32 exponent_flip; int byte; };  // byte: 256.

// Add block I of a lane's codes to the sums of rows g and g + 8.
template <int I>
__device__ __forceinline__ void add_block(const u32 (*code)[code_words + 1], const char* table, u32 lane_offset, const Opaque& o,
                                          const Inputs& in, float* sum) {
    Features f[2];
#pragma unroll
    for (int r = 0; r < 2; r++) f[r] = features(table, lane_offset, o.byte, bits<I * block_bits>(code[r]));
    int c[4] = {0, 0, 0, 0}, t[2][P];
#pragma unroll
    for (int k = 0; k < main_registers; k += 2) {
        if (k + 1 < main_registers) multiply(c, f[0].g[k], f[1].g[k], f[0].g[k + 1], f[1].g[k + 1], in.main[k], in.main[k + 1]);
        else multiply(c, f[0].g[k], f[1].g[k], in.main[k]);
    }
    t[0][P - 1] = c[0] * o.byte + c[1], t[1][P - 1] = c[2] * o.byte + c[3];
#pragma unroll
    for (int p = P - 1; p > 0; p--) {
        const u32 bit = 0x80808080u >> (P - 1 - p);
#pragma unroll
        for (int k = 0; k < registers; k += 2) {
            if (k + 1 < registers)
                multiply(c, f[0].g[k] & bit, f[1].g[k] & bit, f[0].g[k + 1] & bit, f[1].g[k + 1] & bit, in.bit[k], in.bit[k + 1]);
            else multiply(c, f[0].g[k] & bit, f[1].g[k] & bit, in.bit[k]);
        }
        t[0][p - 1] = c[0] * o.byte + c[1], t[1][p - 1] = c[2] * o.byte + c[3];
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int total = combine<I * block_bits + K + EB, 0>(code[r], t[r], in.center);
        const u32 exponent = (bits<I * block_bits>(code[r]) << (23 - K) & low_bits(EB) << 23) ^ o.exponent_flip;
        sum[r] += (float)total * __int_as_float(exponent);
    }
}

// words int32 [rows, row_words]; exponent_bias int32 [1]; x [columns] and y [rows] of `kind`; bias [rows] or null;
// part float [splits, rows]; counters int32 [row_splits], zero.
extern "C" __global__ void __launch_bounds__(WARPS * 32, WARPS > 8 ? 1 : 2)
product(const u32* __restrict__ words, const int* __restrict__ exponent_bias, const void* x, const void* bias,
        void* y, float* part, u32* counters, int rows, int columns, int row_words, int splits, int row_splits, int kind) {
    extern __shared__ __align__(16) char shared[];
    constexpr int line = WARPS * 4 + 4;
    float* sums = (float*)(shared + table_bytes);  // [2][group_rows][line]
    let_next_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row_split = blockIdx.x % row_splits, split = blockIdx.x / row_splits;
    const int chunk = split * WARPS + warp, tiles = (rows + tile_rows - 1) / tile_rows;
    const int first_tile = (int)((long long)tiles * row_split / row_splits);
    const int last_tile = (int)((long long)tiles * (row_split + 1) / row_splits);
    const int lane_bit = (chunk * chunk_blocks + t * lane_blocks) * block_bits % 32;
    const int lane_word = chunk * (chunk_blocks * block_bits / 32) + t * lane_blocks * block_bits / 32;

    const int left = row_words - lane_word;
    words += lane_word;

    Codes ahead[2];
    load_tile(words, left, first_tile, g, rows, row_words, ahead);
    const int e = *exponent_bias;
    build_table<ENTRY>(shared, 0, 0);
    wait_for_previous();
    Inputs in[lane_blocks];
    const float unit = load_inputs(x, kind, (chunk * chunk_blocks + t * lane_blocks) * C, columns, g, t, in);
    __syncthreads();

    const u32 lane_offset = lane * ENTRY * 4 % 128;
    const Opaque o = {opaque((exponent_base << 23) + (1 << (22 + EB)), rows >> 31), (int)opaque(256, rows >> 31)};
    const int own = split * rows;
    int half = 0;
    for (int base = first_tile; base < last_tile; base += group_tiles, half ^= 1) {
        float* target = sums + half * group_rows * line;
#pragma unroll 1
        for (int j = 0; j < group_tiles && base + j < last_tile; j++) {
            u32 code[2][code_words + 1];
            align_codes(ahead[0], lane_bit, code[0]);
            align_codes(ahead[1], lane_bit, code[1]);
            load_tile(words, left, base + j + 1, g, rows, row_words, ahead);
            float sum[2] = {0, 0};
            add_block<0>(code, shared, lane_offset, o, in[0], sum);
            add_block<1>(code, shared, lane_offset, o, in[1], sum);
            add_block<2>(code, shared, lane_offset, o, in[2], sum);
            add_block<3>(code, shared, lane_offset, o, in[3], sum);
            float* mine = target + (j * tile_rows + g) * line + warp * 4 + t;
            mine[0] = sum[0] * unit, mine[8 * line] = sum[1] * unit;
        }
        __syncthreads();
        // WARPS / 2 threads add up a row: 4 * WARPS partial sums.
        constexpr int team = WARPS / 2;
        const int row = threadIdx.x / team, member = threadIdx.x % team;
        const float4 a = *(const float4*)(target + row * line + member * 4), b = *(const float4*)(target + row * line + (member + team) * 4);
        float v = a.x + a.y + a.z + a.w + (b.x + b.y + b.z + b.w);
#pragma unroll
        for (int d = team / 2; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
        const int at = base * tile_rows + row;
        if (member == 0 && at < min(last_tile * tile_rows, rows)) __stcg(part + own + at, v);
    }
    finish_rows(part, counters + row_split, splits, 1, rows, first_tile * tile_rows, min(last_tile * tile_rows, rows), e, 1, bias, y,
                kind);
}
