// Y = X W^T for many tokens: weights are formed in registers (as batch.cu does) as the A operand of Hopper's wgmma, so they are
// never in memory; X comes through shared memory.
//
// A thread block has 128 rows and TOKENS tokens: eight warps of two warpgroups form weights and multiply, another fetches X (a third warpgroup,
// since registers are handed from one to another by warpgroups). Two
// blocks make a cluster and share the same tokens: each fetches half of a stage of X for both, which halves what L2 has to
// give (the limit otherwise: 32 bytes a clock and multiprocessor). While the tensor cores work on one block of each lane, the
// warps form the next.
//
// `arrange` puts X into half precision (scaled by a power of two for each token), in the order of columns in which lanes own
// blocks, as images of shared memory with its 128-byte swizzle: [token tile][stage][TOKENS][64].
//
// include: common.cuh, weights.cuh; host: the function wgmma, for TOKENS

typedef unsigned long long u64;
constexpr int stage_columns = 64, stage_steps = 4, stage_bytes = TOKENS * stage_columns * 2;
constexpr int block_steps = C / 4, chunk_steps = lane_blocks * block_steps, chunk_stages = chunk_steps / stage_steps;
constexpr int consumers = 8, tile = 128;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
        :: "r"(barrier), "r"(parity) : "memory");
}

// A stage is free again, for both blocks of the cluster: lane i of each warp tells block i.
__device__ __forceinline__ void release(u32 barrier, int lane) {
    if (lane < 2) {
        u32 there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(barrier), "r"(lane));
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(there) : "memory");
    }
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

struct Stages { u32 data, full, empty; };  // Shared-memory addresses: stage 0, and barriers, 8 bytes a stage.

__device__ __forceinline__ void fetch_activations(const char* image, const Stages& s, int count, int rank) {
    for (int i = 0; i < count; i++) {
        const u32 stage = i % STAGES, full = s.full + stage * 8;
        if (i >= STAGES) wait_barrier(s.empty + stage * 8, (i / STAGES - 1) & 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(full), "r"(stage_bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                     :: "r"(s.data + stage * stage_bytes + rank * (stage_bytes / 2)),
                        "l"(image + (u64)i * stage_bytes + rank * (stage_bytes / 2)), "r"(stage_bytes / 2), "r"(full), "h"((u16)3)
                     : "memory");
    }
}

// Block I of the lane: form its weights, then multiply. In flight: the block before. Stages go back when all has read them.
template <int I>
__device__ __forceinline__ void multiply_block(const u32 (*code)[code_words + 1], const char* table, int lane, const Opaque& o,
                                               const Stages& s, int chunk, u32 (*w)[2][pairs], float (&sum)[TOKENS / 2]) {
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    const int first = chunk * chunk_stages;
#pragma unroll
    for (int j = 0; j < chunk_stages; j++) {
        const int last_block = (stage_steps * j + stage_steps - 1) / block_steps;
        if (last_block + 2 == I) release(s.empty + (first + j) % STAGES * 8, lane);
        if (last_block + 2 == I + lane_blocks && chunk > 0) release(s.empty + (first + j - chunk_stages) % STAGES * 8, lane);
    }
    form_block<I>(code, table, lane, o, w[I % 2]);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int m = 0; m < block_steps; m++) {
        const int step = I * block_steps + m, at = first + step / stage_steps;
        if (step % stage_steps == 0) wait_barrier(s.full + at % STAGES * 8, at / STAGES & 1);
        const u32 address = s.data + at % STAGES * stage_bytes + step % stage_steps * 32;
        // K-major with a 128-byte swizzle: rows of 128 bytes, groups of 8 rows 1024 bytes apart.
        const u64 descriptor = (address & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
        wgmma(sum, w[I % 2][0][2 * m], w[I % 2][1][2 * m], w[I % 2][0][2 * m + 1], w[I % 2][1][2 * m + 1], descriptor);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// words int32 [rows, row_words]; exponent_bias int32 [1]; image as above; scales float [token tiles * TOKENS]; bias [rows] or
// null; y [tokens, rows] of `kind`. Grid: row tiles (an even number), token tiles.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WARPS * 32, 1)
product(const u32* __restrict__ words, const int* __restrict__ exponent_bias, const char* __restrict__ image,
        const float* __restrict__ scales, const void* bias, void* y, int rows, int row_words, int chunks, int tokens, int kind) {
    extern __shared__ char unaligned[];
    char* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
    const Stages s = {shared_address(shared) + planes * table_bytes, shared_address(shared) + planes * table_bytes + STAGES * stage_bytes,
                      shared_address(shared) + planes * table_bytes + STAGES * stage_bytes + 8 * STAGES};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(s.full + 8 * i));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(s.empty + 8 * i), "r"(2 * consumers));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#pragma unroll
    for (int plane = 0; plane < planes; plane++) build_table<4>(shared + plane * table_bytes, plane * 4, 0x87ff87ffu);
    __syncthreads();
    cluster_sync();

    if (warp >= consumers) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == consumers && lane == 0)
            fetch_activations(image + (u64)blockIdx.y * chunks * chunk_stages * stage_bytes, s, chunks * chunk_stages, blockIdx.x % 2);
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int row = blockIdx.x * tile + warp * 16 + g;
        const int lane_bit = t * lane_blocks * block_bits % 32, lane_word = t * lane_blocks * block_bits / 32;
        const u32* source[2] = {words + (long long)min(row, rows - 1) * row_words + lane_word,
                                words + (long long)min(row + 8, rows - 1) * row_words + lane_word};
        int left = row_words - lane_word;
        const Opaque o = opaque_constants(rows >> 31);
        float sum[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) sum[i] = 0;
        u32 w[2][2][pairs];
        Codes next[2] = {load_codes(source[0], left), load_codes(source[1], left)};
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; chunk++) {
            u32 code[2][code_words + 1];
            align_codes(next[0], lane_bit, code[0]);
            align_codes(next[1], lane_bit, code[1]);
            constexpr int chunk_words = chunk_blocks * block_bits / 32;
            source[0] += chunk_words, source[1] += chunk_words, left -= chunk_words;
            next[0] = load_codes(source[0], left), next[1] = load_codes(source[1], left);
            multiply_block<0>(code, shared, lane, o, s, chunk, w, sum);
            multiply_block<1>(code, shared, lane, o, s, chunk, w, sum);
            multiply_block<2>(code, shared, lane, o, s, chunk, w, sum);
            multiply_block<3>(code, shared, lane, o, s, chunk, w, sum);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");

        const int e = *exponent_bias, first_token = blockIdx.y * TOKENS;
        float shift[2] = {0, 0};
        if (bias) shift[0] = load_value(bias, min(row, rows - 1), kind), shift[1] = load_value(bias, min(row + 8, rows - 1), kind);
        // Two-byte outputs go through what was X's memory, so that rows of 128 are written 16 bytes at a time.
        constexpr int line = tile + 8;
        u16* staged = (u16*)(shared + planes * table_bytes);
        if (kind < 2) asm volatile("bar.sync 1, %0;" :: "n"(consumers * 32) : "memory");
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) {
            const int n = i / 4 * 8 + 2 * t + i % 2, below = i / 2 % 2;
            const float v = scaled(sum[i] * (weight_unit * __ldg(scales + first_token + n)), e) + shift[below];
            if (kind < 2) staged[n * line + warp * 16 + g + below * 8] = rounded(v, kind == 1);
            else if (first_token + n < tokens && row + below * 8 < rows)
                ((float*)y)[(long long)(first_token + n) * rows + row + below * 8] = v;
        }
        if (kind < 2) {
            asm volatile("bar.sync 1, %0;" :: "n"(consumers * 32) : "memory");
            for (int i = threadIdx.x; i < TOKENS * (tile / 8); i += consumers * 32) {
                const int n = i / (tile / 8), at = i % (tile / 8) * 8, first_row = blockIdx.x * tile + at;
                if (first_token + n >= tokens) break;
                u16* target = (u16*)y + (long long)(first_token + n) * rows + first_row;
                const u16* from = staged + n * line + at;
                if (rows % 8 == 0 && first_row < rows) *(uint4*)target = *(const uint4*)from;
                else
                    for (int k = 0; k < 8 && first_row + k < rows; k++) target[k] = from[k];
            }
        }
    }
    __syncthreads();
    cluster_sync();  // Nothing may arrive in a block that is gone.
}

// x [tokens, columns] of `kind` to an image and scales, for one token (of TOKENS * token tiles) a thread block of 256.
extern "C" __global__ void __launch_bounds__(256)
arrange(const void* __restrict__ x, uint4* __restrict__ image, float* __restrict__ scales, int columns, int chunks, int tokens, int kind) {
    __shared__ float most[8];
    const int token = blockIdx.x, token_tile = token / TOKENS, n = token % TOKENS;
    float inverse = 1;
    if (kind && token < tokens) {
        float largest = 0;
        for (int c = threadIdx.x; c < columns; c += 256) largest = fmaxf(largest, fabsf(load_value(x, (long long)token * columns + c, kind)));
#pragma unroll
        for (int d = 16; d; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
        if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = largest;
        __syncthreads();
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, most[i]);
        const int e = min(max((int)((u32)__float_as_int(largest) >> 23) - 127 - 13, -126), 113);
        if (threadIdx.x == 0) scales[token] = power_of_two(e);
        inverse = 1 / power_of_two(e);
    } else if (threadIdx.x == 0) scales[token] = 1;
    // 16 bytes are half of a step's k for one token: two columns of each lane.
    for (int i = threadIdx.x; i < chunks * chunk_steps * 2; i += 256) {
        const int step = i / 2, chunk = step / chunk_steps, block = step % chunk_steps / block_steps, m = step % block_steps;
        u32 two[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int column = (chunk * chunk_blocks + t * lane_blocks + block) * C + 4 * m + 2 * (i % 2);
            const long long at = (long long)token * columns + column;
            const float a = token < tokens && column < columns ? load_value(x, at, kind) * inverse : 0;
            const float b = token < tokens && column + 1 < columns ? load_value(x, at + 1, kind) * inverse : 0;
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two[t]) : "f"(b), "f"(a));
        }
        const long long stage = (long long)token_tile * chunks * chunk_stages + step / stage_steps;
        const int piece = step % stage_steps * 2 + i % 2;
        image[(stage * TOKENS + n) * 8 + (piece ^ n % 8)] = make_uint4(two[0], two[1], two[2], two[3]);
    }
}
