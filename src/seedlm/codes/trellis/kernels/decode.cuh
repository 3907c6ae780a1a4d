// What every kernel of this family shares: windows of the stream, their hashes, asynchronous copies, number formats.
//
// Compile-time: RATE (R, bits a weight), STATE_BITS (L), MULTIPLIER, MASKS_BY_DOT (every how many rows; 0: none). One
// column of one segment is R words = 32 rows; the state of row t is the L bits from bit R*t on, and the last rows run into
// the first word of the strip's next segment.
constexpr int R = RATE;
constexpr int L = STATE_BITS;
constexpr u32 STATE_MASK = (1u << L) - 1u;

DEVICE void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// The same for what nobody reads again soon: it leaves the L2 cache before anything else does.
DEVICE u64 read_once() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE void copy16(u32 to, const void* from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}
DEVICE void copy4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// 32 bits of the column's stream from bit `start` on. q holds its R words and the next segment's first.
DEVICE u32 stream_bits(const u32 (&q)[R + 1], int start) {
  const int word = start >> 5, shift = start & 31;
  return shift ? __funnelshift_r(q[word], q[word + 1], shift) : q[word];
}

// The lower 16 bits, by the multiplying pipe, where the shifting one is the busier: bits.low * 1 + bits.high * 0.
DEVICE u32 low_half(u32 bits) {
  u32 d;
  asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(bits), "r"(1u), "r"(0u));
  return d;
}

// The state of a row. A 16-bit window at a whole byte of a 32-bit register is one PRMT. Where R divides 8, rows whose
// windows start at the same bit of a byte follow each other 8 bits apart, so three of them share one shifted register.
DEVICE u32 window(const u32 (&q)[R + 1], int row) {
  const int at = row * R, shift = at & 31, odd = at & 7;
  if (L == 16) {
    if (shift == 16) return q[at >> 5] >> 16;
    if (odd == 0 && shift < 16) return __byte_perm(q[at >> 5], 0, shift ? 0x4421 : 0x4410);
    if (8 % R == 0 && odd) {
      const int start = odd + 24 * ((at - odd) / 24), byte = (at - start) / 8;
      return __byte_perm(stream_bits(q, start), 0, 0x4410 + 0x11 * byte);
    }
  }
  const u32 bits = shift + L <= 32 ? q[at >> 5] >> shift : stream_bits(q, at);
  return MASKS_BY_DOT && L == 16 && row % MASKS_BY_DOT == 0 ? low_half(bits) : bits & STATE_MASK;
}

// Four bytes whose sum is the weight plus 510.
DEVICE u32 hash(const u32 (&q)[R + 1], int row) { return window(q, row) * MULTIPLIER; }

DEVICE u32 dot4(u32 a, u32 b, u32 c) {
  u32 d;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Number formats of activations, outputs and bias, chosen at run time: the conversions are a negligible part.
enum { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2 };

DEVICE float from_half(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
DEVICE float from_bfloat(u16 h) { return __uint_as_float((u32)h << 16); }
DEVICE u16 to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
DEVICE u16 to_bfloat(float f) {
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
DEVICE float load_number(const void* p, u64 i, int type) {
  if (type == FLOAT32) return ((const float*)p)[i];
  const u16 bits = ((const u16*)p)[i];
  return type == FLOAT16 ? from_half(bits) : from_bfloat(bits);
}
DEVICE void store_number(void* p, u64 i, int type, float value) {
  if (type == FLOAT32) ((float*)p)[i] = value;
  else ((u16*)p)[i] = type == FLOAT16 ? to_half(value) : to_bfloat(value);
}

// The segment after `segment` in its strip, cyclically; the last strip may be shorter. strip: segments in a full one.
DEVICE int next_segment(int segment, int segments, int strip) {
  const int first = segment - segment % strip;
  const int last = min(first + strip, segments) - 1;
  return segment >= last ? first : segment + 1;
}
