// Block code to weights, bit for bit what codec.dequantize gives and then rounded once to the output's type.
//
// A thread dequantizes one block; the 32 blocks of a warp, all of one row, are staged in shared memory and written 16 bytes
// at a time where rows allow it. The register is not stepped: the C*P states of a block are the K-bit
// windows of one bit string, the seed followed by the bits it feeds back, and the string grows word-parallel. From a register
// of length K whose highest tap is t, K - t bits follow at once; once 2K bits are known, the square of the feedback
// polynomial (same taps, twice as far apart) gives twice as many, and so on.
//
// Constants from the host: K, C, P, QB, EB (the format), TAPS (the register's, comma-separated), WIDE (1 if a sum needs 64 bits),
// OUT (0 half, 1 bfloat16, 2 float).

typedef unsigned int u32;
typedef unsigned short u16;
#if WIDE
typedef long long sum_t;
#else
typedef int sum_t;
#endif

constexpr int taps[] = {TAPS};
constexpr int num_taps = sizeof(taps) / sizeof(int);
__host__ __device__ constexpr int highest_tap() {
    int t = 0;
    for (int i = 0; i < num_taps; i++) t = taps[i] > t ? taps[i] : t;
    return t;
}
constexpr int block_bits = K + EB + P * QB;
constexpr int string_bits = K + C * P;
constexpr int string_words = (string_bits + 31) / 32 + 1;
__host__ __device__ constexpr u32 low_bits(int n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

// 32 bits of a register array from a constant position on.
template <int AT>
__device__ __forceinline__ u32 bits(const u32* s) {
    if constexpr (AT % 32 == 0) return s[AT / 32];
    else return __funnelshift_r(s[AT / 32], s[AT / 32 + 1], AT % 32);
}

// Grow the string from KNOWN bits to all of them.
template <int KNOWN>
__device__ __forceinline__ void grow(u32* s) {
    if constexpr (KNOWN < string_bits) {
        constexpr int power = KNOWN / K >= 16 ? 16 : KNOWN / K >= 8 ? 8 : KNOWN / K >= 4 ? 4 : KNOWN / K >= 2 ? 2 : 1;
        constexpr int gap = (K - highest_tap()) * power;
        constexpr int room = gap < 32 ? gap : 32;
        constexpr int count = room < string_bits - KNOWN ? room : string_bits - KNOWN;
        u32 v = bits<KNOWN - K * power + taps[0] * power>(s);
        if constexpr (num_taps > 1) v ^= bits<KNOWN - K * power + taps[1 % num_taps] * power>(s);
        if constexpr (num_taps > 2) v ^= bits<KNOWN - K * power + taps[2 % num_taps] * power>(s);
        if constexpr (num_taps > 3) v ^= bits<KNOWN - K * power + taps[3 % num_taps] * power>(s);
        v &= low_bits(count);
        s[KNOWN / 32] |= v << (KNOWN % 32);
        if constexpr (KNOWN % 32 + count > 32) s[KNOWN / 32 + 1] |= v >> (32 - KNOWN % 32);
        grow<KNOWN + count>(s);
    }
}

template <int AT, int BITS>
__device__ __forceinline__ int signed_field(const u32* code) {
    return (int)(bits<AT>(code) << (32 - BITS)) >> (32 - BITS);
}

template <int I>
__device__ __forceinline__ void coefficients(const u32* code, int* q) {
    if constexpr (I < P) {
        q[I] = signed_field<K + EB + I * QB, QB>(code);
        coefficients<I + 1>(code, q);
    }
}

__device__ __forceinline__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }  // -126 .. 127

// float32(2^e * reciprocal): the first product is exact, so only the second rounds, and only where it is denormal.
__device__ __forceinline__ float block_scale(int e) {
    const float reciprocal = (float)(1.0 / ((1 << (K - 1)) - 1));
    int first = max(min(e, 100), -100), rest = max(min(e - first, 127), -126);
    return __fmul_rn(__fmul_rn(reciprocal, power_of_two(first)), power_of_two(max(min(rest, 127), -126)));
}

// Sums of states times coefficients are exact in float where they fit its 24 bits, and cheaper there: the bits of a window, as
// they stand in a 32-bit word, are a (denormal) float, the integer times 2^-149.
constexpr int sum_bits = K - 1 + QB - 1 + (P > 4 ? 3 : P > 2 ? 2 : P - 1);
constexpr bool in_float = sum_bits <= 23 && K + P - 1 <= 24;

// sum, and to it coefficients I and up times the states of one weight, whose first state starts at bit AT.
template <int AT, int I>
__device__ __forceinline__ sum_t integer_sum(const u32* s, const int* q, sum_t sum) {
    if constexpr (I == P) return sum;
    else return integer_sum<AT, I + 1>(s, q, sum + (sum_t)(bits<AT + I>(s) & low_bits(K)) * q[I]);
}

// The same in units of 2^(-21 - QB). q: coefficients times 2^(128 - QB - I), since state I stands I places higher in the word.
template <int I>
__device__ __forceinline__ float float_sum(u32 window, const float* q, float sum) {
    if constexpr (I == P) return sum;
    else return float_sum<I + 1>(window, q, __fmaf_rn(__int_as_float(window & (low_bits(K) << I)), q[I], sum));
}

template <int I>
__device__ __forceinline__ void weights(const u32* s, const int* q, const float* scaled_q, int total, float scale, float* w) {
    if constexpr (I < C) {
        float sum;
        if constexpr (in_float) sum = float_sum<0>(bits<P * I + 1>(s), scaled_q, -total * power_of_two(K - 22 - QB)) * power_of_two(21 + QB);
        else sum = (float)integer_sum<P * I + 1, 0>(s, q, -((sum_t)total << (K - 1)));
        w[I] = __fmul_rn(sum, scale);
        weights<I + 1>(s, q, scaled_q, total, scale, w);
    }
}

#if OUT == 2
typedef float out_t;
__device__ __forceinline__ out_t rounded(float w) { return w; }
#else
typedef u16 out_t;
__device__ __forceinline__ out_t rounded(float w) {
    out_t bits;
#if OUT == 0
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(w));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(w));
#endif
    return bits;
}
__device__ __forceinline__ u32 rounded_pair(float low, float high) {
    u32 bits;
#if OUT == 0
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#endif
    return bits;
}
#endif

constexpr int warps = 4, each = 16 / sizeof(out_t);

// words int32 [rows, row_words]; bias int32 [1]; out [rows, columns]. whole: rows of the output start at a multiple of 16
// bytes. A task is 32 blocks of a row; there are fewer than 2^31, and the warps of the grid take turns.
extern "C" __global__ void __launch_bounds__(32 * warps)
dequantize(const u32* __restrict__ words, const int* __restrict__ bias, out_t* __restrict__ out,
           u32 rows, u32 columns, u32 row_words, int whole) {
    __shared__ __align__(16) out_t stages[warps][32 * C];
    out_t* stage = stages[threadIdx.x / 32];
    const u32 row_tasks = (columns + 32 * C - 1) / (32 * C), lane = threadIdx.x % 32;
    const u32 stride = gridDim.x * warps, stride_rows = stride / row_tasks, stride_parts = stride - stride_rows * row_tasks;
    u32 task = blockIdx.x * warps + threadIdx.x / 32, row = task / row_tasks, part = task - row * row_tasks;
    const int exponent_bias = __ldg(bias);
    const float scales = block_scale(((int)lane << (32 - EB) >> (32 - EB)) + exponent_bias);  // Lane i: of the exponent with bits i.

    for (; row < rows; row += stride_rows, part += stride_parts, row += part >= row_tasks, part -= part >= row_tasks ? row_tasks : 0) {
        // The block's bits, moved down to bit 0. 32 blocks start at a word; words past the row's end are not read.
        const u32 word = part * block_bits + lane * block_bits / 32, shift = lane * block_bits % 32;
        const u32* source = words + (unsigned long long)row * row_words + word;
        u32 code[3], raw[3];
#pragma unroll
        for (int i = 0; i < 3; i++)
            raw[i] = i * 32 < block_bits + (block_bits % 32 ? 31 : 0) && word + i < row_words ? __ldcs(source + i) : 0;
        code[0] = __funnelshift_r(raw[0], raw[1], shift);
        code[1] = __funnelshift_r(raw[1], raw[2], shift);
        code[2] = 0;

        u32 string[string_words];
#pragma unroll
        for (int i = 0; i < string_words; i++) string[i] = 0;
        string[0] = code[0] & low_bits(K);
        grow<K>(string);
        int q[P], total = 0;
        float w[C], scaled_q[P], scale;
        coefficients<0>(code, q);
#pragma unroll
        for (int i = 0; i < P; i++) total += q[i], scaled_q[i] = q[i] * power_of_two(128 - QB - i);
        if constexpr (EB <= 5) scale = __shfl_sync(~0u, scales, bits<K>(code) & low_bits(EB));
        else scale = block_scale(signed_field<K, EB>(code) + exponent_bias);
        weights<0>(string, q, scaled_q, total, scale, w);

        out_t* mine = stage + lane * C;
#if OUT != 2 && C % 2 == 0
#pragma unroll
        for (int i = 0; i < C; i += 2) ((u32*)mine)[i / 2] = rounded_pair(w[i], w[i + 1]);
#else
#pragma unroll
        for (int i = 0; i < C; i++) mine[i] = rounded(w[i]);
#endif
        __syncwarp();
        const u32 first = part * 32 * C, count = min(columns - first, 32u * C);
        out_t* target = out + (unsigned long long)row * columns + first;
        if (whole) {
#pragma unroll
            for (int i = 0; i < (C + each - 1) / each; i++)
                if ((i * 32 + lane) * each < count) __stcs((uint4*)target + i * 32 + lane, ((const uint4*)stage)[i * 32 + lane]);
        } else {
#pragma unroll 1
            for (u32 i = lane; i < count; i += 32) target[i] = stage[i];
        }
        __syncwarp();
    }
}
