// Weights in half precision, as an operand of mma.
//
// With v = V[c,0] / center - 1 and b[j] the bit by which state j of a weight goes on from state j - 1,
//
//     w = B[0] v + sum over j >= 1 of B[j] (b[j] - 1/2)        B[j] = sum over p >= j of q[p] 2^(j - p)
//
// up to the lowest bit of state j - 1, which is lost: on average b[j] - 1/2 is too large by a quarter of 1 / center, and v by a half
// of it, as the bits of its magnitude are flipped where it is negative. The constant takes both away with 12 bits; with 14 and
// more it has no bits for that, where they are 6e-5 and 1e-5 of a weight. The tables give a half word for each weight, and its parts are numbers as they are, without a
// conversion: bit 15 and bits 0 .. 10 are the sign and (as a denormal half, an integer times 2^-24) the magnitude of v, where
// the magnitude's bits are flipped with the sign; bits 11, 12, 13 alone are 2^-13, 2^-11, 2^-7. So a pair of weights takes P
// masks and P multiply-adds. Weights are right to about 2^-11 of their block's largest term (4e-4 of the whole, measured).

constexpr int pairs = C / 2, planes = (C + 7) / 8;
static_assert(C % 4 == 0 && C <= 16 && P >= 2 && P <= 4 && K >= 12 && K <= 16 && EB <= 5 && K + EB <= 23, "no such fast path");

constexpr int most_exponent = (1 << (EB - 1)) - 1;
constexpr int weight_exponent = 3 - QB - most_exponent;  // Weights are formed times 2^this, in half's range for every exponent.
constexpr int exponent_base = (127 + weight_exponent + 10 - (1 << (EB - 1))) >> EB << EB;  // Exponents are OR-ed in.
constexpr int exponent_rest = 127 + weight_exponent - exponent_base - (1 << (EB - 1));
constexpr u32 weight_exponent_flip = (exponent_base << 23) + (1 << (22 + EB));
__host__ __device__ constexpr float exact_power(int e) { return e < 0 ? 1.0f / (1u << -e) : (float)(1u << e); }
// 2^this is 1 / the value of bit j's place.
__host__ __device__ constexpr int place(int j) { return j == 0 || j == 1 ? 13 : j == 2 ? 11 : 7; }

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ u32 both_halves(float v) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(d) : "f"(v));
    return d;
}

// Minus half the value of place j, in both halves: places are 2^-13, 2^-11 and 2^-7.
__host__ __device__ constexpr u32 minus_half_place(int j) { return j == 1 ? 0x84008400u : j == 2 ? 0x8c008c00u : 0x9c009c00u; }

// Coefficients of the half words' parts, in both halves: part[0] of v, part[j] of bit j; and the constant.
struct Coefficients { u32 part[P], constant; };

template <int AT, int J>
__device__ __forceinline__ int suffix_sums(const u32* code, int* b) {
    if constexpr (J == P) return 0;
    else {
        const int later = suffix_sums<AT, J + 1>(code, b);
        return b[J] = signed_field<AT + J * QB, QB>(code) * (1 << (P - 1 - J)) + later;
    }
}

template <int AT>
__device__ __forceinline__ Coefficients coefficients(const u32* code, u32 exponent_flip) {
    Coefficients f;
    int b[P];  // B[j] 2^(P - 1 - j)
    suffix_sums<AT + K + EB, 0>(code, b);
    const float scale = __int_as_float((bits<AT>(code) << (23 - K) & low_bits(EB) << 23) ^ exponent_flip);
    float constant = 0;
#pragma unroll
    for (int j = 0; j < P; j++) {
        const float sum = (float)b[j] * (scale * exact_power(j + 1 - P + exponent_rest));
        f.part[j] = both_halves(sum * exact_power(place(j)));
        constant -= sum * (j ? 0.5f + exact_power(-K - 1) : exact_power(-K));
    }
    f.constant = both_halves(constant);
    return f;
}

// The same for two blocks at once, where a block's code is a word and its fields are four nibbles above the seed: a half word of
// R holds them, a nibble at bits 6 .. 9 is a (denormal) half, and all sums are exact. Numbers are those of `coefficients`.
constexpr bool nibbles = K == 16 && EB == 4 && QB == 4 && P == 3;

__device__ __forceinline__ u32 times2(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 low_twice(u32 v) {
    u32 d;
    asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %1;\nmov.b32 %0, {l, l};}" : "=r"(d) : "r"(v));
    return d;
}

__device__ __forceinline__ u32 high_twice(u32 v) {
    u32 d;
    asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %1;\nmov.b32 %0, {h, h};}" : "=r"(d) : "r"(v));
    return d;
}

struct Opaque { u32 byte, exponent_flip, nibble_flip, nibble_exponent_flip; };  // byte: 256.

__device__ __forceinline__ Opaque opaque_constants(u32 zero) {
    return {opaque(256, zero), opaque(weight_exponent_flip, zero), opaque(0x02000200u, zero), opaque(0x20002000u, zero)};
}

__device__ __forceinline__ void two_coefficients(u32 code0, u32 code1, const Opaque& o, Coefficients* f) {
    const u32 r = __byte_perm(code0, code1, 0x7632);
    const u32 q0 = (r << 2 & 0x03c003c0u) ^ o.nibble_flip, q1 = (r >> 2 & 0x03c003c0u) ^ o.nibble_flip,
              q2 = (r >> 6 & 0x03c003c0u) ^ o.nibble_flip;  // (q + 8) 2^-18
    const u32 scale = ((r << 10 & 0x3c003c00u) ^ o.nibble_exponent_flip) + 0x3c003c00u;  // 2^(e + 8)
    const u32 b2 = fma2(q2, 0x70007000u, 0xb400b400u);                                 // 2^13, -2^-2: q2 2^-5
    const u32 b1 = fma2(b2, 0x40004000u, fma2(q1, 0x78007800u, 0xbc00bc00u));          // 2, 2^15, -1: (2 q1 + q2) 2^-4
    const u32 b0 = fma2(b1, 0x38003800u, fma2(q0, 0x78007800u, 0xbc00bc00u));          // 1/2, 2^15, -1: (4 q0 + 2 q1 + q2) 2^-5
    const u32 part[4] = {times2(b0, scale), times2(b1, scale), times2(b2, scale), 0};
    const u32 constant = fma2(part[1], minus_half_place(1), times2(part[2], minus_half_place(2)));
#pragma unroll
    for (int j = 0; j < P; j++) f[0].part[j] = low_twice(part[j]), f[1].part[j] = high_twice(part[j]);
    f[0].constant = low_twice(constant), f[1].constant = high_twice(constant);
}

__device__ __forceinline__ u32 two_weights(u32 halves, const Coefficients& f) {
    u32 w = fma2(halves & 0x87ff87ffu, f.part[0], f.constant);
#pragma unroll
    for (int j = 1; j < P; j++) w = fma2(halves & (0x04000400u << j), f.part[j], w);
    return w;
}

// The weights of block I of a lane's codes, of rows g and g + 8.
template <int I>
__device__ __forceinline__ void form_block(const u32 (*code)[code_words + 1], const char* table, int lane, const Opaque& o,
                                           u32 (*w)[pairs]) {
    Coefficients f[2];
    if constexpr (nibbles) two_coefficients(code[0][I], code[1][I], o, f);
    else f[0] = coefficients<I * block_bits>(code[0], o.exponent_flip), f[1] = coefficients<I * block_bits>(code[1], o.exponent_flip);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int plane = 0; plane < planes; plane++) {
            u32 entry[4];
            look_up<4>(table + plane * table_bytes, lane * 16 % 128, o.byte, bits<I * block_bits>(code[r]), entry);
#pragma unroll
            for (int i = 0; i < 4 && plane * 4 + i < pairs; i++) w[r][plane * 4 + i] = two_weights(entry[i], f[r]);
        }
}

// What 1 in formed weights times activations stands for, but for the exponent bias.
constexpr float weight_unit = (float)((1 << (K - 1)) / ((1 << (K - 1)) - 1.0)) / exact_power(weight_exponent);
