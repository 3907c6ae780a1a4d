// What the fused products share: how a warp reads codes, grows them into features, and how rows are summed up.
//
// Constants from the host: K, C, P, QB, EB (the format), WARPS (of a thread block), VECTOR (1 if a lane's four codes are one
// aligned 16-byte load), ENTRY (words of a table entry), BASIS (K rows of ENTRY words: what each seed bit adds to an entry).
//
// A warp owns 16 consecutive blocks of columns and walks down the rows, 16 at a time. Lane 4g + t holds blocks 4t .. 4t + 3
// of rows g and g + 8: its place in the A operand of mma.m16n8k*, so nothing is exchanged between lanes.

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int block_bits = K + EB + P * QB;
constexpr int chunk_blocks = 16, lane_blocks = 4, tile_rows = 16;
// Words that cover a lane's four blocks; they start at bit (4t * block_bits) % 32 of the first. block_bits is even.
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int lane_bits = lane_blocks * block_bits;
constexpr int lane_start = most(lane_bits % 32, most(2 * lane_bits % 32, 3 * lane_bits % 32));
constexpr int raw_words = (lane_start + lane_bits + 31) / 32, code_words = (lane_bits + 31) / 32;

__host__ __device__ constexpr u32 low_bits(int n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

struct Codes { u32 w[raw_words]; };

// first: a lane's first word; left: how many words the row has from there. Words past the row's end read as zero.
__device__ __forceinline__ Codes load_codes(const u32* first, int left) {
    Codes c;
#if VECTOR
    uint4 v = make_uint4(0, 0, 0, 0);
    if (left > 0) v = __ldcs((const uint4*)first);
    c.w[0] = v.x, c.w[1] = v.y, c.w[2] = v.z, c.w[3] = v.w;
#else
#pragma unroll
    for (int i = 0; i < raw_words; i++) c.w[i] = i < left ? __ldcs(first + i) : 0;
#endif
    return c;
}

// Rows g and g + 8 of a tile. first: the lane's first word in row 0.
__device__ __forceinline__ void load_tile(const u32* first, int left, int tile, int g, int rows, int row_words, Codes* codes) {
    const int row = tile * tile_rows + g;
    codes[0] = load_codes(first + (long long)min(row, rows - 1) * row_words, left);
    codes[1] = load_codes(first + (long long)min(row + 8, rows - 1) * row_words, left);
}

// Move a lane's codes down to bit 0.
__device__ __forceinline__ void align_codes(const Codes& c, u32 shift, u32* code) {
#pragma unroll
    for (int i = 0; i < code_words; i++) {
        if constexpr (lane_start == 0) code[i] = c.w[i];
        else code[i] = __funnelshift_r(c.w[i], i + 1 < raw_words ? c.w[i + 1] : 0, shift);
    }
    code[code_words] = 0;
}

template <int AT>
__device__ __forceinline__ u32 bits(const u32* s) {
    if constexpr (AT % 32 == 0) return s[AT / 32];
    else return __funnelshift_r(s[AT / 32], s[AT / 32 + 1], AT % 32);
}

template <int AT, int BITS>
__device__ __forceinline__ int signed_field(const u32* s) {
    if constexpr (AT % 32 + BITS <= 32) return (int)(s[AT / 32] << (32 - BITS - AT % 32)) >> (32 - BITS);
    else return (int)(bits<AT>(s) << (32 - BITS)) >> (32 - BITS);
}

// Two tables of 256 entries, one for each byte of the seed: an entry is a GF(2)-linear image of that byte, and the XOR of
// both the seed's. Each entry fills 128 bytes with copies of itself, one for each lane that reads at the same time: no
// conflicts between banks. Entries of the two tables alternate, so that the seed's high byte is an address as it stands.
constexpr int table_bytes = 256 * 256;
__constant__ const u32 basis[K][ENTRY] = {BASIS};

// Tables of words first .. first + WORDS - 1 of the entries, all XOR-ed with `flip`.
template <int WORDS>
__device__ __forceinline__ void build_table(char* table, int first, u32 flip) {
    for (int at = threadIdx.x; at < 512; at += WARPS * 32) {
        u32 entry[4];
#pragma unroll
        for (int i = 0; i < WORDS; i++) entry[i] = at < 256 ? flip : 0;
#pragma unroll
        for (int bit = 0; bit < K; bit++)
            if (at / 256 == bit / 8 && (at >> bit % 8 & 1)) {
#pragma unroll
                for (int i = 0; i < WORDS; i++) entry[i] ^= basis[bit][first + i];
            }
        if constexpr (WORDS == 2) entry[2] = entry[0], entry[3] = entry[1];
        uint4* row = (uint4*)(table + at % 256 * 256 + at / 256 * 128);
#pragma unroll
        for (int i = 0; i < 8; i++) row[(i + threadIdx.x) % 8] = make_uint4(entry[0], entry[1], entry[2], entry[3]);
    }
}

// (a & mask) | b in one instruction. The compiler would look for known bits and need two.
__device__ __forceinline__ u32 masked_or(u32 a, u32 mask, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
    return d;
}

// The seed's entry; seed: its K bits, with anything above; byte: an opaque 256, so that the shift is a product.
template <int WORDS>
__device__ __forceinline__ void look_up(const char* table, u32 lane_offset, u32 byte, u32 seed, u32* entry) {
    const char* low = table + masked_or(seed * byte, 0xff00, lane_offset);
    const char* high = table + masked_or(seed, low_bits(K - 8) << 8, lane_offset) + 128;
    if constexpr (WORDS == 2) {
        const uint2 a = *(const uint2*)low, b = *(const uint2*)high;
        entry[0] = a.x ^ b.x, entry[1] = a.y ^ b.y;
    } else {
        const uint4 a = *(const uint4*)low, b = *(const uint4*)high;
        entry[0] = a.x ^ b.x, entry[1] = a.y ^ b.y, entry[2] = a.z ^ b.z, entry[3] = a.w ^ b.w;
    }
}

// A value that the compiler must take for a variable: where two constants would cost a second instruction, or where a product
// by a power of two would become a shift, on the busier pipe. zero: a zero it does not know.
__device__ __forceinline__ u32 opaque(u32 value, u32 zero) { return value + zero; }

// Inputs and outputs: kind 0 is half, 1 bfloat16, 2 float.
__device__ __forceinline__ float load_value(const void* x, long long i, int kind) {
    float v;
    if (kind == 2) return ((const float*)x)[i];
    const u16 bits = ((const u16*)x)[i];
    if (kind == 1) return __int_as_float((u32)bits << 16);
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}

__device__ __forceinline__ u16 rounded(float v, bool bfloat) {
    u16 bits;
    if (bfloat) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

__device__ __forceinline__ void store_value(void* y, long long i, int kind, float v) {
    if (kind == 2) ((float*)y)[i] = v;
    else ((u16*)y)[i] = rounded(v, kind == 1);
}

__device__ __forceinline__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }  // -126 .. 127

// v * 2^e for any e of -252 .. 254.
__device__ __forceinline__ float scaled(float v, int e) { return v * power_of_two(e / 2) * power_of_two(e - e / 2); }

// With kernels that overlap (Hopper and later): the next in the stream may start, and this one has to see what the last wrote.
// Pointers to what a kernel before may write must not be __restrict__, or loads could move up past the wait.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The thread blocks that share rows have written their sums to part [splits][tokens][rows]; the last to arrive adds them up,
// always in the same order, and writes y [tokens][rows]. Counters are zero before and after.
__device__ __forceinline__ void finish_rows(const float* part, u32* counter, int splits, int tokens, int rows, int first,
                                            int last, int exponent_bias, float unit, const void* bias, void* y, int kind) {
    __shared__ u32 arrived;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(counter, 1);
    __syncthreads();
    if (arrived != splits - 1) return;
    if (threadIdx.x == 0) *counter = 0;
    __threadfence();
    const long long stride = (long long)tokens * rows;
    for (int token = 0; token < tokens; token++)
        for (int row = first + threadIdx.x; row < last; row += WARPS * 32) {
            const float* source = part + (long long)token * rows + row;
            const float shift = bias ? load_value(bias, row, kind) : 0;
            float sum = 0;
            for (int s = 0; s < splits; s += 8) {  // Eight loads at a time.
                float v[8];
#pragma unroll
                for (int i = 0; i < 8; i++) v[i] = s + i < splits ? __ldcg(source + (s + i) * stride) : 0;
#pragma unroll
                for (int i = 0; i < 8; i++) sum += v[i];
            }
            store_value(y, (long long)token * rows + row, kind, scaled(sum * unit, exponent_bias) + shift);
        }
}
