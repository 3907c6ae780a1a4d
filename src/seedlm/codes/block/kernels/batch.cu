// y = W x for up to 8 * GROUPS tokens: weights are formed in half precision, as the A operand of mma.m16n8k16.
//
// A lane owns whole blocks, so the order of columns within mma's k is its own; activations follow it and stay in registers
// while the warp walks down the rows. A token's chunk of bfloat16 or float activations is scaled by a power of two into half's range.
//
// include: common.cuh, weights.cuh

constexpr int batch_tiles = 2, sum_line = 20, tokens_per_tile = 8 * GROUPS;

__device__ __forceinline__ void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <int I>
__device__ __forceinline__ void add_block(const u32 (*code)[code_words + 1], const char* table, int lane, const Opaque& o,
                                          const u32 (*x)[pairs], float (*sum)[4]) {
    u32 w[2][pairs];
    form_block<I>(code, table, lane, o, w);
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int i = 0; i < pairs; i += 2)
            multiply(sum[group], w[0][i], w[1][i], w[0][i + 1], w[1][i + 1], x[group][i], x[group][i + 1]);
}

// Activations of token `token` (of each group of 8) and the lane's own columns; units: what one stands for in the sums of tokens
// 2t and 2t + 1.
template <int KIND>
__device__ __forceinline__ void load_fragments(const void* x, int token, int t, int first_column, int tokens, int columns,
                                               u32 (*fragment)[GROUPS][pairs], float (*units)[2]) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const int row = token + group * 8;
        const long long start = (long long)row * columns + first_column;
        const int count = row < tokens ? columns - first_column : 0;
        float unit = 1;
        if constexpr (KIND == 0) {
            // Halves stay as they are.
#pragma unroll
            for (int i = 0; i < lane_blocks * pairs; i++) {
                const u16* at = (const u16*)x + start + 2 * i;
                u32 two = 2 * i < count ? at[0] : 0;
                if (2 * i + 1 < count) two |= (u32)at[1] << 16;
                fragment[i / pairs][group][i % pairs] = two;
            }
        } else {
            float largest = 0;
#pragma unroll 16
            for (int i = 0; i < lane_blocks * C; i++)
                if (i < count) largest = fmaxf(largest, fabsf(load_value(x, start + i, KIND)));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            // The largest gets an exponent of about 13.
            unit = power_of_two(min(max((int)((u32)__float_as_int(largest) >> 23) - 127 - 13, -126), 113));
            const float inverse = 1 / unit;
#pragma unroll
            for (int i = 0; i < lane_blocks * pairs; i++) {
                const float a = 2 * i < count ? load_value(x, start + 2 * i, KIND) * inverse : 0;
                const float b = 2 * i + 1 < count ? load_value(x, start + 2 * i + 1, KIND) * inverse : 0;
                asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(fragment[i / pairs][group][i % pairs]) : "f"(b), "f"(a));
            }
        }
        units[group][0] = __shfl_sync(~0u, unit, 8 * t), units[group][1] = __shfl_sync(~0u, unit, 8 * t + 4);
    }
}

// words int32 [rows, row_words]; exponent_bias int32 [1]; x [tokens, columns] and y [tokens, rows] of `kind`; bias [rows] or null;
// part float [splits, tokens, rows]; counters int32 [row_splits], zero.
extern "C" __global__ void __launch_bounds__(WARPS * 32, WARPS > 8 ? 1 : 2)
product(const u32* __restrict__ words, const int* __restrict__ exponent_bias, const void* x, const void* bias,
        void* y, float* part, u32* counters, int rows, int columns, int row_words, int splits, int row_splits, int kind, int tokens) {
    extern __shared__ __align__(16) char shared[];
    float* sums = (float*)(shared + planes * table_bytes);  // [2][group_tiles][WARPS][tokens_per_tile][sum_line]
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
#pragma unroll
    for (int plane = 0; plane < planes; plane++) build_table<4>(shared + plane * table_bytes, plane * 4, 0x87ff87ffu);

    wait_for_previous();
    u32 fragment[lane_blocks][GROUPS][pairs];
    const int first_column = (chunk * chunk_blocks + t * lane_blocks) * C;
    float units[GROUPS][2];
    if (kind == 0) load_fragments<0>(x, g, t, first_column, tokens, columns, fragment, units);
    else if (kind == 1) load_fragments<1>(x, g, t, first_column, tokens, columns, fragment, units);
    else load_fragments<2>(x, g, t, first_column, tokens, columns, fragment, units);
    __syncthreads();

    const Opaque o = opaque_constants(rows >> 31);
    int half = 0;
    for (int base = first_tile; base < last_tile; base += batch_tiles, half ^= 1) {
        float* target = sums + half * batch_tiles * WARPS * tokens_per_tile * sum_line;
#pragma unroll 1
        for (int j = 0; j < batch_tiles && base + j < last_tile; j++) {
            u32 code[2][code_words + 1];
            align_codes(ahead[0], lane_bit, code[0]);
            align_codes(ahead[1], lane_bit, code[1]);
            load_tile(words, left, base + j + 1, g, rows, row_words, ahead);
            float sum[GROUPS][4];
#pragma unroll
            for (int group = 0; group < GROUPS; group++) sum[group][0] = sum[group][1] = sum[group][2] = sum[group][3] = 0;
            add_block<0>(code, shared, lane, o, fragment[0], sum);
            add_block<1>(code, shared, lane, o, fragment[1], sum);
            add_block<2>(code, shared, lane, o, fragment[2], sum);
            add_block<3>(code, shared, lane, o, fragment[3], sum);
            float* mine = target + (j * WARPS + warp) * tokens_per_tile * sum_line;
#pragma unroll
            for (int group = 0; group < GROUPS; group++)
#pragma unroll
                for (int i = 0; i < 4; i++) mine[(group * 8 + 2 * t + i % 2) * sum_line + g + i / 2 * 8] = sum[group][i] * units[group][i % 2];
        }
        __syncthreads();
        for (int at = threadIdx.x; at < batch_tiles * tokens_per_tile * tile_rows; at += WARPS * 32) {
            const int row = at % tile_rows, token = at / tile_rows % tokens_per_tile, j = at / tile_rows / tokens_per_tile;
            float v = 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++) v += target[((j * WARPS + i) * tokens_per_tile + token) * sum_line + row];
            const int y_row = (base + j) * tile_rows + row;
            if (base + j < last_tile && y_row < rows && token < tokens) __stcg(part + ((long long)split * tokens + token) * rows + y_row, v);
        }
    }
    finish_rows(part, counters + row_split, splits, tokens, rows, first_tile * tile_rows, min(last_tile * tile_rows, rows), e,
                weight_unit, bias, y, kind);
}
