// Signs and Hadamard blocks over a line of n numbers, of which each lane of a warp holds E neighbours (E = 8 or 16).
//
// Blocks have HADAMARD numbers while they fit, then descending powers of two. Every block starts at a multiple of its size,
// so a stage of stride h concerns a number exactly if its block is larger than h, and its partner is h further or before.
// Only the last lane in use can hold blocks smaller than E. SIGN_WORD(i): bit k says that position 32 * i + k of a
// block is negated; no array, since kernels that run once would wait longer for its first read than they do for some selections.
constexpr int E = LANE_NUMBERS;

struct Place {
  int size;  // of the block that all E numbers belong to; 0: the numbers end here
  int tail;  // how many numbers there are if size is 0; their blocks are its binary digits, largest first
  u32 signs;

  DEVICE Place(int first, int n) {
    size = tail = 0;
    signs = 0;
    if (first >= n) return;
    if (n % E && first + E > n) {
      tail = n - first;
      int at = 0;
#pragma unroll
      for (int s = E / 2; s; s /= 2)
        if (tail & s) signs |= (SIGN_WORD(0) & ((1u << s) - 1)) << at, at += s;
      return;
    }
    int start = first & ~(HADAMARD - 1);
    size = HADAMARD;
    if (n % HADAMARD && start + HADAMARD > n)
      for (size = HADAMARD / 2; first >= start + size || !((n - start) & size); size /= 2)
        if ((n - start) & size) start += size;
    signs = SIGN_WORD((first - start) >> 5) >> ((first - start) & 31);
  }

  DEVICE int size_of(int e) const {
    if (size) return size;
    int end = 0;
#pragma unroll
    for (int s = E / 2; s; s /= 2) {
      end += tail & s;
      if (e < end && (tail & s)) return s;
    }
    return 1;
  }
};

DEVICE float signed_by(float v, u32 signs, int e) { return __uint_as_float(__float_as_uint(v) ^ ((signs >> e & 1u) << 31)); }

// 1 / sqrt(size), size a power of two.
DEVICE float block_factor(int size) {
  const int log = 31 - __clz(size);
  return __uint_as_float((127 - (log + 1) / 2) << 23) * (log & 1 ? 1.41421356237309504880f : 1.0f);
}

// All stages, strides ascending, in float32. Every lane of the warp takes part.
DEVICE void butterflies(float (&v)[E], const Place& place, int lane) {
#pragma unroll
  for (int h = 1; h < E; h *= 2) {
#pragma unroll
    for (int e = 0; e < E; e++)
      if (!(e & h) && (place.size || place.size_of(e) > h)) {
        const float a = v[e], b = v[e + h];
        v[e] = a + b, v[e + h] = a - b;
      }
  }
#pragma unroll
  for (int h = E; h < HADAMARD; h *= 2) {
    const bool mine = place.size > h;
    const float own = lane & (h / E) ? -1.0f : 1.0f;
#pragma unroll
    for (int e = 0; e < E; e++) {
      const float other = __shfl_xor_sync(~0u, v[e], h / E);
      if (mine) v[e] = __fmaf_rn(v[e], own, other);  // one instruction, and as exact as a sum
    }
  }
}

// Whether E neighbours of a line of n numbers that begins at `row` are whole 16 bytes of 16-bit numbers.
DEVICE bool in_words(const void* x, u64 row, int first, int n, int type) {
  return type != FLOAT32 && first + E <= n && ((u64)((const u16*)x + row + first) & 15) == 0;
}
DEVICE void load_words(uint4 (&words)[E / 8], const void* x, u64 at) {
#pragma unroll
  for (int i = 0; i < E / 8; i++) words[i] = ((const uint4*)((const u16*)x + at))[i];
}
DEVICE void from_words(float (&v)[E], const uint4 (&words)[E / 8], int type) {
#pragma unroll
  for (int e = 0; e < E; e++) {
    const uint4& q = words[e / 8];
    const u32 pair = e % 8 / 2 == 0 ? q.x : e % 8 / 2 == 1 ? q.y : e % 8 / 2 == 2 ? q.z : q.w;
    const u16 bits = (u16)(pair >> (e % 2 * 16));
    v[e] = type == FLOAT16 ? from_half(bits) : from_bfloat(bits);
  }
}

// E neighbours of a line of n numbers, zero past its end.
DEVICE void load_numbers(float (&v)[E], const void* x, u64 row, int first, int n, int type) {
  if (in_words(x, row, first, n, type)) {
    uint4 words[E / 8];
    load_words(words, x, row + first), from_words(v, words, type);
    return;
  }
#pragma unroll
  for (int e = 0; e < E; e++) v[e] = first + e < n ? load_number(x, row + first + e, type) : 0.0f;
}

// Those of two lines, both under way together.
DEVICE void load_both(float (&v)[E], float (&w)[E], const void* x, const void* y, u64 row, int first, int n, int type) {
  if (in_words(x, row, first, n, type) && in_words(y, row, first, n, type)) {
    uint4 of_x[E / 8], of_y[E / 8];
    load_words(of_x, x, row + first), load_words(of_y, y, row + first);
    from_words(v, of_x, type), from_words(w, of_y, type);
    return;
  }
  load_numbers(v, x, row, first, n, type), load_numbers(w, y, row, first, n, type);
}

// The first `count` of E neighbours, to place `at`; what is not read again soon.
DEVICE void store_numbers(void* to, u64 at, const float (&v)[E], int count, int type) {
  if (type != FLOAT32 && count >= E && (at & 7) == 0) {
#pragma unroll
    for (int e = 0; e < E; e += 8) {
      u32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float a = v[e + 2 * i], b = v[e + 2 * i + 1];
        pairs[i] = type == FLOAT16 ? to_half(a) | (u32)to_half(b) << 16 : to_bfloat(a) | (u32)to_bfloat(b) << 16;
      }
      __stcs((uint4*)((u16*)to + at + e), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < E; e++)
    if (e < count) store_number(to, at + e, type, v[e]);
}
