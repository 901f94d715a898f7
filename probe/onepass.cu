// One pass over a tensor on a GPU: onepass.py's contract; onepass_gpu.py says how it is launched.
//
// A block takes a segment of channels (32 lanes of VECTORS x 16 bytes) and a run of rows, a warp one
// row of it at a time; so a lane keeps its channels' extremes and squares in registers all the way.
// What a row needs (power sums, errors) is summed over the lanes a few rows at a time, through
// shared memory: shuffles would cost more than all the arithmetic.
//
// Power sums are float32 about zero over one row's segment, which is exact enough as long as the
// mean is within two standard deviations of zero and fourth powers stay in range. Where not, the
// segment is read again (from the cache) about its own mean, as moments.py does it. Beyond a segment
// everything is float64, in a fixed order; atomics count integers only. So results are the same
// every time.
//
// The histogram lies in shared memory. For 16-bit values a bin's place is the value's bit pattern, so
// that a shift makes an address; magnitudes at the end of the range have no place, and a row that
// holds some is counted one by one. For float32 it is 16 octaves around the block's first row, and
// what falls outside goes to device memory. The first bin of each sign, zeros, is not kept up.
//
// Integer formats round by adding: t = saturate(x / scale * 2^-24 + B) with B = 1 - top * 2^-24 has
// a last place of 2^-24 between 1/2 and 1, so t - B is round(x / scale) * 2^-24, clamped to the
// largest value `top` at no cost. Ties may round to odd, which leaves the squared error alone.
//
// Defined by the host: DTYPE 0 float32, 1 bfloat16, 2 float16; VECTORS; ALIGNED (rows start at
// multiples of 16 bytes); FORMATS and its lists HALVES, 2^(bits - 1), and LANES, how many lanes hold
// a group, ascending; SHIFT, LOWEST, BINS (histogram.py); WARPS; PASSES, tensors in a launch.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

struct Pass {
  const void *x;          // [rows, width]
  double *parts;          // [rows, segments, PART]
  double *squares_parts;  // [chunks, width]
  float *absmax_parts;    // [chunks, width]
  double *found;          // [RECORD, rows]: moments, absmax, errors
  int *histogram;
  float *absmax;      // [width], like the next ones updated in place
  double *squares;    // [width]
  double *counts;     // [width]
  double *nonfinite;  // [2]
  i64 rows;
  int width, segments, chunks, row_blocks;
  int first_reader, first_joiner;  // blocks before this tensor's in read_tensors, in join_parts
};

struct Batch {  // tensors that one launch reads; in 4 KB, which any driver takes as an argument
  Pass passes[PASSES];
  int count;
};

constexpr int PER_WORD = DTYPE == 0 ? 1 : 2;   // elements in 32 bits
constexpr int PER_LANE = 4 * PER_WORD;         // elements in 16 bytes
constexpr int SEGMENT = 32 * PER_LANE * VECTORS;
constexpr int RECORD = 6 + FORMATS;
constexpr int PART = RECORD + RECORD % 2;      // of a segment: in steps of 16 bytes
constexpr int JOINERS = 8;                     // threads that join a row's segments
constexpr int VALUES = 4 + FORMATS;            // summed over the lanes, per row
constexpr int PAIRS = (VALUES + 1) / 2;        // two values share a line, half a line each
constexpr int PITCH = 36;                      // of a line; keeps 16-byte reads off each other's banks
constexpr int SUMS = 32 * 20;                  // floats of a warp to sum in
constexpr int SLOTS = 32 / VALUES < SUMS / PITCH / PAIRS ? 32 / VALUES : SUMS / PITCH / PAIRS;
constexpr u32 MAGNITUDE = DTYPE == 0 ? 0x7FFFFFFFu : 0x7FFF7FFFu;
constexpr u32 INFINITE = DTYPE == 0 ? 0x7F800000u : DTYPE == 1 ? 0x7F80u : 0x7C00u;
constexpr u32 BINS_AT = 1024;                  // in shared memory, past what the system takes
// Bins of each sign: of float32 a window, and one for what is outside it; of the others the bit
// patterns from FIRST to before END, each at its own number, so that sums fit in between the signs.
constexpr int FIRST = DTYPE == 1 ? LOWEST >> 3 : 0;
constexpr int END = DTYPE == 0 ? 1 << 14 : DTYPE == 1 ? (LOWEST + BINS) >> 3 : 0x5800;
constexpr int NEGATIVE = DTYPE == 0 ? END + 4 : 1 << 15;  // the first bin of negative values
constexpr int SUMS_AT = DTYPE == 0 ? 2 * NEGATIVE : END;
static_assert(DTYPE == 0 || END + WARPS * SUMS <= NEGATIVE, "sums lie between the signs");
constexpr int PACKED = DTYPE == 0 ? VECTORS : (VECTORS + 1) / 2;
__device__ constexpr float HALF[] = {HALVES};
__device__ constexpr int GROUP_LANES[] = {LANES};

// The larger magnitude, of each half; the signs are lost, NaN stays.
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
#if DTYPE == 0
#define LARGER "max.NaN.xorsign.abs.f32"
#elif DTYPE == 1
#define LARGER "max.NaN.xorsign.abs.bf16x2"
#else
#define LARGER "max.NaN.xorsign.abs.f16x2"
#endif
  u32 found;
#if DTYPE == 0
  float value;
  asm(LARGER " %0, %1, %2;" : "=f"(value) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
  found = __float_as_uint(value);
#else
  asm(LARGER " %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
#endif
  return found;
}

// Element `i` of a word, float32.
__device__ __forceinline__ float element(u32 word, int i) {
#if DTYPE == 0
  return __uint_as_float(word);
#elif DTYPE == 1
  return __uint_as_float(i ? word & 0xFFFF0000u : word << 16);
#else
  float value;
  u16 half = (u16)(i ? word >> 16 : word);
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#endif
}

// The float of an element's magnitude bits.
__device__ __forceinline__ float magnitude(u32 bits) { return element(bits, 0); }

__device__ __forceinline__ u32 raw(const void *x, i64 at) {
  return DTYPE == 0 ? ((const u32 *)x)[at] : ((const u16 *)x)[at];
}

// Read a lane's vectors, the first of which lies at `at`; its row goes on for `left` elements.
template <bool WHOLE>
__device__ __forceinline__ void load(const char *at, int left, uint4 (&v)[VECTORS]) {
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    const int before = k * 32 * PER_LANE;
    if (!WHOLE)
      v[k] = make_uint4(0, 0, 0, 0);
#if ALIGNED
    if (WHOLE || before < left)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[k].x), "=r"(v[k].y), "=r"(v[k].z), "=r"(v[k].w)
                   : "l"(at + k * 512));
#else
    u32 *words = &v[k].x;
    for (int i = 0; i < PER_LANE; i++)
      if (before + i < left)
        words[i / PER_WORD] |= raw(at, before + i) << (i % PER_WORD * 16);
#endif
  }
}

__device__ __forceinline__ u32 word(const uint4 &v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The largest magnitudes of a lane's vectors, two 16-bit ones to a word.
__device__ __forceinline__ void lane_extremes(const uint4 (&v)[VECTORS], u32 (&out)[PACKED]) {
  u32 m[VECTORS + 1];
  m[VECTORS] = 0;
#pragma unroll
  for (int k = 0; k < VECTORS; k++)
    m[k] = larger(larger(v[k].x, v[k].y), larger(v[k].z, v[k].w));
#pragma unroll
  for (int i = 0; i < PACKED; i++)
    out[i] = DTYPE == 0 ? m[i]
                        : larger(__byte_perm(m[2 * i], m[2 * i + 1], 0x5410),
                                 __byte_perm(m[2 * i], m[2 * i + 1], 0x7632));
}

__device__ __forceinline__ u32 extreme_of(const u32 (&packed)[PACKED], int k) {
  const u32 word = packed[DTYPE == 0 ? k : k / 2] & MAGNITUDE;
  return DTYPE == 0 ? word : k % 2 ? word >> 16 : word & 0xFFFFu;
}

__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
  for (int s = 16; s; s >>= 1)
    value += __shfl_xor_sync(~0u, value, s);
  return value;
}

// Zero what is not finite and count it; the warp does so together. Returns how many there were.
__device__ __noinline__ int clean(const Pass &p, int column, uint4 (&v)[VECTORS]) {
  int nan = 0, inf = 0;
  for (int k = 0; k < VECTORS; k++) {
    u32 words[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
    for (int i = 0; i < PER_LANE; i++) {
      const u32 shift = i % PER_WORD * 16, mask = DTYPE == 0 ? ~0u : 0xFFFFu << shift;
      const u32 bits = (words[i / PER_WORD] & MAGNITUDE & mask) >> shift;
      if (bits < INFINITE)
        continue;
      nan += bits > INFINITE;
      inf += bits == INFINITE;
      words[i / PER_WORD] &= ~mask;
      atomicAdd(p.counts + column + k * 32 * PER_LANE + i, -1.0);
    }
    v[k] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  nan = __reduce_add_sync(~0u, nan);
  inf = __reduce_add_sync(~0u, inf);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(p.nonfinite, (double)nan);
    atomicAdd(p.nonfinite + 1, (double)inf);
  }
  return nan + inf;
}

// Moments of one row's segment about its mean, as moments.row_moments; the warp does so together.
__device__ __noinline__ void centered(const Pass &p, i64 row, int start, double *out) {
  const int lane = threadIdx.x % 32, end = min(start + SEGMENT, p.width);
  float sum = 0, low = __int_as_float(0x7F800000), high = -low, n = 0;
  for (int c = start + lane; c < end; c += 32) {
    const u32 bits = raw(p.x, row * p.width + c);
    const float value = element(bits, 0);
    if ((bits & MAGNITUDE) >= INFINITE)
      continue;
    n += 1, sum += value, low = fminf(low, value), high = fmaxf(high, value);
  }
  n = sum_lanes(n);
  const float center = sum_lanes(sum) / n;
  for (int s = 16; s; s >>= 1) {
    low = fminf(low, __shfl_xor_sync(~0u, low, s));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, s));
  }
  const u32 inverse = (254u << 23) - (__float_as_uint(fmaxf(high, -low)) & 0x7F800000u);
  const float scale = __uint_as_float(max(inverse, 1u << 23));
  float s1 = 0, s2 = 0, s3 = 0, s4 = 0;
  for (int c = start + lane; c < end; c += 32) {
    const u32 bits = raw(p.x, row * p.width + c);
    if ((bits & MAGNITUDE) >= INFINITE)
      continue;
    const float d = (element(bits, 0) - center) * scale, d2 = d * d;
    s1 += d, s2 += d2, s3 += d2 * d, s4 += d2 * d2;
  }
  s1 = sum_lanes(s1), s2 = sum_lanes(s2), s3 = sum_lanes(s3), s4 = sum_lanes(s4);
  if (lane)
    return;
  const double unit = scale, square = unit * unit, e = (double)s1 / n;
  const bool spread = high > low;
  out[0] = n;
  out[1] = spread ? center + e / unit : n > 0 ? low : 0;
  out[2] = spread ? (s2 - n * e * e) / square : 0;
  out[3] = spread ? (s3 - 3 * e * s2 + 2 * n * e * e * e) / square / unit : 0;
  out[4] =
      spread ? (s4 - 4 * e * s3 + 6 * e * e * s2 - 3 * n * e * e * e * e) / square / square : 0;
}

// Add one to a bin of the block, by its offset in bytes.
__device__ __forceinline__ void count(u32 offset) {
  asm volatile("red.shared.add.u32 [%0 + %1], 1;" ::"r"(offset), "n"(BINS_AT) : "memory");
}

// Shift right, by 32 too.
__device__ __forceinline__ u32 shifted(u32 bits, u32 by) {
  u32 found;
  asm("shr.b32 %0, %1, %2;" : "=r"(found) : "r"(bits), "r"(by));
  return found;
}

// The bin of histogram.py that a value falls into, before those of negative ones.
__device__ __forceinline__ int global_bin(float value) {
  const int bin = (int)((__float_as_uint(value) & 0x7FFFFFFFu) >> SHIFT) - LOWEST;
  return min(max(bin, 0), BINS - 1);
}

// The value sums of two lanes each: of a in the lower half of the warp, of b in the upper one.
__device__ __forceinline__ float halves(float a, float b) {
  const bool upper = threadIdx.x & 16;
  return (upper ? b : a) + __shfl_xor_sync(~0u, upper ? a : b, 16);
}

// Add the sums of squares and the sums of eight elements per lane to c. The matrix units have
// nothing else to do: with x as the columns of B, and x and ones as rows of A, the diagonal of the
// upper half of A B is the squares of four lanes each, and any row of the lower half their sums.
__device__ __forceinline__ void sum_powers(const uint4 &v, float (&c)[4]) {
#if DTYPE == 1
#define MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
  constexpr u32 ONES = 0x3F803F80u;
#else
#define MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
  constexpr u32 ONES = 0x3C003C00u;
#endif
#pragma unroll
  for (int i = 0; i < 4; i += 2)
    asm(MULTIPLY " {%0, %1, %2, %3}, {%4, %6, %5, %6}, {%4, %5}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(word(v, i)), "r"(word(v, i + 1)), "r"(ONES));
}

// What is outside the block's bins goes to device memory; zeros go nowhere. Of 16-bit values what
// is inside is counted too.
__device__ __forceinline__ void count_outside(int *histogram, int base, const uint4 &v) {
#pragma unroll 1
  for (int i = 0; i < PER_LANE; i++) {
    const u32 part = word(v, i / PER_WORD) >> (i % PER_WORD * 16);
    const float value = element(part, 0);
    const u32 bits = __float_as_uint(value);
    const bool inside = DTYPE == 0 ? ((bits & 0x7FFFFFFFu) >> SHIFT) - base < END
                                   : (part & 0x7FFFu) < END;
    if (inside && DTYPE != 0)
      count(4 * (part & 0xFFFFu));
    if (!inside && global_bin(value))
      atomicAdd(histogram + global_bin(value) + (bits >> 31 ? BINS : 0), 1);
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
    read_tensors(const __grid_constant__ Batch batch) {
  int which = 0;
  while (which + 1 < batch.count && (int)blockIdx.x >= batch.passes[which + 1].first_reader)
    which++;
  const Pass &p = batch.passes[which];
  const int block = blockIdx.x - p.first_reader, segment = block % p.segments;
  const int chunk = block / p.segments;
  extern __shared__ int shared[];
  int *const bins = shared + (BINS_AT - (u32)__cvta_generic_to_shared(shared)) / 4;
  float *const all_sums = (float *)(bins + SUMS_AT);
  float *const sums = all_sums + threadIdx.x / 32 * SUMS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int start = segment * SEGMENT, column = start + lane * PER_LANE;
  const i64 first = p.rows * chunk / p.chunks + warp;
  const i64 steps = (p.rows * (chunk + 1) / p.chunks - first + WARPS - 1) / WARPS;
  const int left = p.width - column;  // where the row goes on
  const bool whole = ALIGNED && start + SEGMENT <= p.width;
  const char *at = (const char *)p.x + (first * p.width + column) * (4 / PER_WORD);
  const i64 stride = (i64)p.width * (WARPS * 4 / PER_WORD);

  for (int i = threadIdx.x; i < (END - FIRST) / 4; i += 32 * WARPS)
    ((uint4 *)(bins + FIRST))[i] = ((uint4 *)(bins + NEGATIVE + FIRST))[i] = make_uint4(0, 0, 0, 0);

  uint4 v[VECTORS], next[VECTORS];
  if (steps > 0)
    load<false>(at, left, next);
#if DTYPE == 0
  if (warp == 0) {  // the window reaches from 2^-10 to 2^5 times the mean |x| of the first row
    float sum = 0;
    for (int k = 0; k < VECTORS; k++)
      for (int i = 0; i < PER_LANE; i++) {
        const float value = fabsf(element(word(next[k], i / PER_WORD), i % PER_WORD));
        sum += value <= 3.4e38f ? value : 0;
      }
    const int octave = (int)(__float_as_uint(sum_lanes(sum) / SEGMENT) >> 23);
    if (lane == 0)
      *all_sums = __int_as_float(min(max(octave - 10 << 10, LOWEST), LOWEST + BINS - END));
  }
#endif
  __syncthreads();
#if DTYPE == 0
  const int base = __float_as_int(*all_sums);
  __syncthreads();
#endif

  float squares[VECTORS * PER_LANE];
  u32 extremes[VECTORS * 4];
#pragma unroll
  for (int i = 0; i < VECTORS * PER_LANE; i++)
    squares[i] = 0;
#pragma unroll
  for (int i = 0; i < VECTORS * 4; i++)
    extremes[i] = 0;

  const int value = lane % VALUES;  // the one, of slot lane / VALUES, that this lane sums
  const float *const my_sums = sums + (lane / VALUES * PAIRS + value / 2) * PITCH + value % 2 * 16;
  int slot = 0, slot_bad = 0;
  u32 slot_extreme = 0;
  i64 slot_row = first;  // of slot 0
  for (int remain = (int)steps; remain > 0; remain--) {
#pragma unroll
    for (int k = 0; k < VECTORS; k++)
      v[k] = next[k];
    at += stride;
    if (remain > 1 && whole)
      load<true>(at, left, next);
    else if (remain > 1)
      load<false>(at, left, next);

    u32 packed[PACKED], row_extreme;
    float inverse[FORMATS + 1][VECTORS], scale[FORMATS + 1][VECTORS];
    for (;;) {
      lane_extremes(v, packed);
      int lanes = 1;
#pragma unroll
      for (int f = 0; f < FORMATS; f++) {
#pragma unroll
        for (int s = 1; s < 32; s <<= 1)
          if (s >= lanes && s < GROUP_LANES[f]) {
#pragma unroll
            for (int i = 0; i < PACKED; i++)
              packed[i] = larger(packed[i], __shfl_xor_sync(~0u, packed[i], s));
          }
        lanes = GROUP_LANES[f];
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
          const float absmax = magnitude(extreme_of(packed, k));
          asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse[f][k]) : "f"(absmax));
          inverse[f][k] *= HALF[f] * 0x1p-24f;
          scale[f][k] = absmax * (0x1p24f / HALF[f]);
        }
      }
      u32 all = packed[0];
#pragma unroll
      for (int i = 1; i < PACKED; i++)
        all = larger(all, packed[i]);
#pragma unroll
      for (int s = 1; s < 32; s <<= 1)
        if (s >= lanes)
          all = larger(all, __shfl_xor_sync(~0u, all, s));
      all &= MAGNITUDE;
      row_extreme = DTYPE == 0 ? all : max(all & 0xFFFFu, all >> 16);
      if (row_extreme < INFINITE)
        break;
      uint4 copy[VECTORS];  // what is passed by reference lies in memory; v must not
#pragma unroll
      for (int k = 0; k < VECTORS; k++)
        copy[k] = v[k];
      const int bad = clean(p, column, copy);
#pragma unroll
      for (int k = 0; k < VECTORS; k++)
        v[k] = copy[k];
      slot_bad = lane == slot ? bad : slot_bad;
    }

#if DTYPE != 0
    // An element's upper 16 bits, times 4, are the place of its bin. Where the row has elements
    // beyond the last one, all go to the bin of zeros now, which is not kept up.
    const u32 shift = row_extreme < END ? 14 : 32;
    if (row_extreme >= END)
#pragma unroll
      for (int k = 0; k < VECTORS; k++)
        count_outside(p.histogram, 0, v[k]);
#endif
    float s1 = 0, s2 = 0, s3 = 0, s4 = 0, c[4] = {0, 0, 0, 0}, errors[FORMATS + 1];
#pragma unroll
    for (int f = 0; f <= FORMATS; f++)
      errors[f] = 0;
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
      if (DTYPE != 0)
        sum_powers(v[k], c);
#if DTYPE == 0
      u32 outside = 0;
#endif
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 w = word(v[k], i);
        extremes[4 * k + i] = larger(extremes[4 * k + i], w);
#pragma unroll
        for (int j = 0; j < PER_WORD; j++) {
          const float x = element(w, j), x2 = x * x;
          squares[(4 * k + i) * PER_WORD + j] += x2;
          if (DTYPE == 0) {
            s1 += x;
            s2 += x2;
          }
          s3 = fmaf(x2, x, s3);
          s4 = fmaf(x2, x2, s4);
#pragma unroll
          for (int f = 0; f < FORMATS; f++) {
            const float zero = 1.0f - (HALF[f] - 1.0f) * 0x1p-24f;
            float t;
            asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(t) : "f"(x), "f"(inverse[f][k]), "f"(zero));
            const float e = fmaf(zero - t, scale[f][k], x);
            errors[f] = fmaf(e, e, errors[f]);
          }
#if DTYPE == 0
          const u32 bits = __float_as_uint(x);
          const u32 bin = ((bits & 0x7FFFFFFFu) >> SHIFT) - base;
          count(4 * min(bin, END) + (bits >> 31) * (4 * NEGATIVE));
          outside |= bin;
#else
          count(shifted(j ? w & 0xFFFF0000u : w << 16, shift));
#endif
        }
      }
#if DTYPE == 0
      if (outside >= END)
        count_outside(p.histogram, base, v[k]);
#endif
    }

    if (DTYPE != 0) {
      s1 = lane < 4 ? c[2] + c[3] : 0;
      s2 = lane / 8 != lane % 4 ? 0 : lane & 4 ? c[1] : c[0];
    }
    float *const mine = sums + slot * PAIRS * PITCH + lane;
    mine[0] = halves(s1, s2);
    mine[PITCH] = halves(s3, s4);
#pragma unroll
    for (int f = 0; f < FORMATS; f += 2)
      mine[(2 + f / 2) * PITCH] = halves(errors[f], errors[f + 1]);
    slot_extreme = lane == slot ? row_extreme : slot_extreme;
    if (++slot < SLOTS && remain > 1)
      continue;

    __syncwarp();
    float sum = 0;
    if (lane < slot * VALUES)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float4 four = *(const float4 *)(my_sums + 4 * i);
        sum += (four.x + four.y) + (four.z + four.w);
      }
    __syncwarp();
    const int from = lane * VALUES;
    s1 = __shfl_sync(~0u, sum, from & 31);
    s2 = __shfl_sync(~0u, sum, from + 1 & 31);
    s3 = __shfl_sync(~0u, sum, from + 2 & 31);
    s4 = __shfl_sync(~0u, sum, from + 3 & 31);
#pragma unroll
    for (int f = 0; f < FORMATS; f++)
      errors[f] = __shfl_sync(~0u, sum, from + 4 + f & 31);
    bool exact = true;
    if (lane < slot) {
      double *const out = p.parts + ((slot_row + (i64)lane * WARPS) * p.segments + segment) * PART;
      const float absmax = magnitude(slot_extreme);
      const double n = min(SEGMENT, p.width - start) - slot_bad;
      float inverse;  // of n; one step of Newton's makes up for what it lacks
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fmaxf((float)n, 1)));
      const double about = (double)s1 * inverse, m = about + (s1 - about * n) * inverse;
      const double q2 = s2, q3 = s3, q4 = s4;
      exact = absmax == 0 ||
              (absmax > 0x1p-20f && absmax < 0x1p24f && 5 * m * m * n < 4 * q2);
      out[0] = n;
      out[1] = m;
      out[2] = q2 - n * m * m;
      out[3] = q3 - 3 * m * q2 + 2 * n * m * m * m;
      out[4] = q4 - 4 * m * q3 + 6 * m * m * q2 - 3 * n * m * m * m * m;
      out[5] = absmax;
#pragma unroll
      for (int f = 0; f < FORMATS; f++)
        out[6 + f] = errors[f];
    }
    u32 again = __ballot_sync(~0u, !exact);
    while (again) {
      const i64 row = slot_row + (i64)(__ffs(again) - 1) * WARPS;
      again &= again - 1;
      centered(p, row, start, p.parts + (row * p.segments + segment) * PART);
    }
    slot_row += (i64)slot * WARPS;
    slot = slot_bad = 0;
  }

  __syncthreads();
  constexpr int FOURS = (END - FIRST) / 4;  // of bins, of each sign: most are empty
  const int turn = blockIdx.x * 32 * WARPS % (2 * FOURS);  // not all at one address
  for (int i = threadIdx.x; i < 2 * FOURS; i += 32 * WARPS) {
    const int at = i + turn - (i + turn < 2 * FOURS ? 0 : 2 * FOURS), negative = at >= FOURS;
    const int bin = FIRST + 4 * (at - negative * FOURS);
    const uint4 four = *(const uint4 *)(bins + bin + negative * NEGATIVE);
    if (!(four.x | four.y | four.z | four.w))
      continue;
#pragma unroll
    for (int j = 0; j < 4; j++) {
#if DTYPE == 0
      const int global = base - LOWEST + bin + j;
#else
      const int global = global_bin(element(bin + j, 0));
#endif
      if (word(four, j) && global)
        atomicAdd(p.histogram + global + negative * BINS, (int)word(four, j));
    }
  }
  __syncthreads();

  // The warps' channels, in the room of the bins: squares [WARPS, SEGMENT], then extremes.
  float *const all_squares = (float *)bins, *const all_extremes = all_squares + WARPS * SEGMENT;
#pragma unroll
  for (int k = 0; k < VECTORS; k++)
#pragma unroll
    for (int i = 0; i < PER_LANE; i += 4) {
      const int at = warp * SEGMENT + (k * 32 + lane) * PER_LANE + i;
      float square[4], extreme[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        square[j] = squares[k * PER_LANE + i + j];
        extreme[j] = fabsf(element(extremes[4 * k + (i + j) / PER_WORD], (i + j) % PER_WORD));
      }
      *(float4 *)(all_squares + at) = make_float4(square[0], square[1], square[2], square[3]);
      *(float4 *)(all_extremes + at) = make_float4(extreme[0], extreme[1], extreme[2], extreme[3]);
    }
  __syncthreads();
  for (int i = threadIdx.x; i < SEGMENT && start + i < p.width; i += 32 * WARPS) {
    double sum = 0;
    float extreme = 0;
    for (int w = 0; w < WARPS; w++) {
      sum += all_squares[w * SEGMENT + i];
      extreme = fmaxf(extreme, all_extremes[w * SEGMENT + i]);
    }
    p.squares_parts[(i64)chunk * p.width + start + i] = sum;
    p.absmax_parts[(i64)chunk * p.width + start + i] = extreme;
  }
}

struct Moments {
  double n, mean, m2, m3, m4;
};

// Two sets joined (Pebay, SAND2008-6212).
__device__ Moments join(const Moments &a, const Moments &b) {
  const double n = a.n + b.n, d = b.mean - a.mean;
  if (b.n == 0)
    return a;
  const double r = d / n, ab = a.n * b.n;
  return {n, a.mean + r * b.n, a.m2 + b.m2 + d * r * ab,
          a.m3 + b.m3 + d * r * r * ab * (a.n - b.n) + 3 * r * (a.n * b.m2 - b.n * a.m2),
          a.m4 + b.m4 + d * r * r * r * ab * (a.n * a.n - ab + b.n * b.n) +
              6 * r * r * (a.n * a.n * b.m2 + b.n * b.n * a.m2) +
              4 * r * (a.n * b.m3 - b.n * a.m3)};
}

// Join the segments of the rows and the chunks of the channels, by JOINERS threads each.
extern "C" __global__ void join_parts(const __grid_constant__ Batch batch) {
  int which = 0;
  while (which + 1 < batch.count && (int)blockIdx.x >= batch.passes[which + 1].first_joiner)
    which++;
  const Pass &p = batch.passes[which];
  const int block = blockIdx.x - p.first_joiner;
  if (block >= p.row_blocks) {
    __shared__ double sums[JOINERS][32];
    __shared__ float largest[JOINERS][32];
    const int c = (block - p.row_blocks) * 32 + threadIdx.x % 32, part = threadIdx.x / 32;
    double squares = 0;
    float absmax = 0;
    if (c < p.width)
      for (int i = part; i < p.chunks; i += JOINERS) {
        squares += p.squares_parts[(i64)i * p.width + c];
        absmax = fmaxf(absmax, p.absmax_parts[(i64)i * p.width + c]);
      }
    sums[part][threadIdx.x % 32] = squares;
    largest[part][threadIdx.x % 32] = absmax;
    __syncthreads();
    if (part || c >= p.width)
      return;
    for (int i = 1; i < JOINERS; i++) {
      squares += sums[i][threadIdx.x];
      absmax = fmaxf(absmax, largest[i][threadIdx.x]);
    }
    p.absmax[c] = fmaxf(absmax, p.absmax[c]);
    p.squares[c] += squares;
    p.counts[c] += (double)p.rows;
    return;
  }
  const i64 row = ((i64)block * blockDim.x + threadIdx.x) / JOINERS;
  const int part = threadIdx.x % JOINERS;
  Moments total = {0, 0, 0, 0, 0};
  double absmax = 0, errors[FORMATS + 1];
#pragma unroll
  for (int f = 0; f < FORMATS; f++)
    errors[f] = 0;
  if (row < p.rows)
    for (int s = part; s < p.segments; s += JOINERS) {
      double in[PART];
#pragma unroll
      for (int i = 0; i < PART / 2; i++)
        ((double2 *)in)[i] = ((const double2 *)p.parts)[(row * p.segments + s) * (PART / 2) + i];
      total = join(total, {in[0], in[1], in[2], in[3], in[4]});
      absmax = fmax(absmax, in[5]);
#pragma unroll
      for (int f = 0; f < FORMATS; f++)
        errors[f] += in[6 + f];
    }
  for (int step = 1; step < JOINERS && step < p.segments; step *= 2) {
    const Moments other = {__shfl_down_sync(~0u, total.n, step), __shfl_down_sync(~0u, total.mean, step),
                           __shfl_down_sync(~0u, total.m2, step), __shfl_down_sync(~0u, total.m3, step),
                           __shfl_down_sync(~0u, total.m4, step)};
    total = join(total, other);
    absmax = fmax(absmax, __shfl_down_sync(~0u, absmax, step));
#pragma unroll
    for (int f = 0; f < FORMATS; f++)
      errors[f] += __shfl_down_sync(~0u, errors[f], step);
  }
  if (row >= p.rows || part)
    return;
  double *out = p.found + row;  // a column for each value
  const double moments[] = {total.n, total.mean, total.m2, total.m3, total.m4, absmax};
#pragma unroll
  for (int i = 0; i < 6; i++)
    out[i * p.rows] = moments[i];
#pragma unroll
  for (int f = 0; f < FORMATS; f++)
    out[(6 + f) * p.rows] = errors[f];
}
