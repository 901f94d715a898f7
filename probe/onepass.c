/* One pass over a tensor on a CPU: onepass.py's contract, in loops that any C compiler vectorizes.

   A thread takes a run of rows and stays with one row until it is done with it, so that the tensor
   comes from memory once and the rest happens in the cache. Sums of a row are float32 about the
   row's own mean, scaled by a power of two (moments.py says why); sums of channels are float32 over
   BLOCK rows and float64 beyond. "omp simd" names the sums that may be reordered: nothing else is. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 64
#define INFINITE 0x7F800000u
#define SMALLEST 0x1p-100f /* a group below it has squared errors of zero in float32 */

enum { FLOAT32, BFLOAT16, FLOAT16 };

typedef struct {
  const void *x; /* [rows, width] */
  int64_t width, first, last; /* of the rows, this thread's */
  int64_t dtype, formats;
  const int64_t *group; /* elements that share a scale, by format */
  const float *half;    /* 2^(bits - 1), by format */
  double *found;        /* [rows, 6 + formats] */
  float *channel_absmax; /* [width] */
  double *channel_squares, *channel_bad; /* [width] */
  double *nonfinite; /* NaN, infinite */
  int32_t *histogram;
  int64_t shift, lowest, bins; /* histogram.py */
} Task;

static float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

/* IEEE half to float with integers and one product, by which subnormals come out exact. */
static float from_half(uint16_t h) {
  uint32_t magnitude = (uint32_t)(h & 0x7FFF) << 13;
  uint32_t bits = to_bits(from_bits(magnitude) * 0x1p112f);
  bits = magnitude >= 0x0F800000 ? magnitude | INFINITE : bits;
  return from_bits(bits | (uint32_t)(h & 0x8000) << 16);
}

/* The row as float32: in the tensor itself, or in `buffer`. */
static const float *load(const Task *t, int64_t row, float *buffer) {
  const int64_t n = t->width;
  const uint16_t *x = (const uint16_t *)t->x + row * n;
  if (t->dtype == FLOAT32)
    return (const float *)t->x + row * n;
  if (t->dtype == BFLOAT16)
    for (int64_t i = 0; i < n; i++)
      buffer[i] = from_bits((uint32_t)x[i] << 16);
  else
    for (int64_t i = 0; i < n; i++)
      buffer[i] = from_half(x[i]);
  return buffer;
}

static float largest(const float *x, int64_t n) {
  float found = 0;
#pragma omp simd reduction(max : found)
  for (int64_t i = 0; i < n; i++) {
    float magnitude = fabsf(x[i]);
    found = magnitude > found ? magnitude : found;
  }
  return found;
}

/* n, mean and central power sums about `center`; what is not finite counts as `center` in x. */
static void central(const float *x, int64_t width, double n, float center, float absmax, float low,
                    float high, double *out) {
  const uint32_t inverse = (254u << 23) - (to_bits(absmax) & INFINITE);
  const float scale = from_bits(inverse < 1u << 23 ? 1u << 23 : inverse);
  float s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma omp simd reduction(+ : s1, s2, s3, s4)
  for (int64_t i = 0; i < width; i++) {
    float d = (x[i] - center) * scale;
    float d2 = d * d;
    s1 += d;
    s2 += d2;
    s3 += d2 * d;
    s4 += d2 * d2;
  }
  /* A row of one value has no spread; rounding would give it some. */
  const double unit = scale, square = unit * unit, e = s1 / n;
  const int spread = high > low;
  out[0] = n;
  out[1] = spread ? center + e / unit : low;
  out[2] = spread ? (s2 - n * e * e) / square : 0;
  out[3] = spread ? (s3 - 3 * e * s2 + 2 * n * e * e * e) / square / unit : 0;
  out[4] = spread ? (s4 - 4 * e * s3 + 6 * e * e * s2 - 3 * n * e * e * e * e) / square / square : 0;
}

/* Squared error of integers with one scale per group (quantize.py), from each group's largest. */
static double squared_error(const float *x, int64_t width, int64_t group, const float *absmax,
                            float half) {
  const float top = half - 1;
  double total = 0;
  for (int64_t start = 0; start < width; start += group) {
    const int64_t n = width - start < group ? width - start : group;
    const float *part = x + start, extreme = absmax[start / group];
    if (extreme < SMALLEST)
      continue;
    const float inverse = half / extreme, scale = extreme / half;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
      float r = rintf(part[i] * inverse);
      float d = (r < top ? r : top) * scale - part[i];
      sum += d * d;
    }
    total += sum;
  }
  return total;
}

static void count(const Task *t, const float *x, int32_t *index) {
  const int32_t shift = (int32_t)t->shift, lowest = (int32_t)t->lowest, bins = (int32_t)t->bins;
  for (int64_t i = 0; i < t->width; i++) {
    uint32_t bits = to_bits(x[i]);
    int32_t bin = (int32_t)((bits & 0x7FFFFFFF) >> shift) - lowest;
    bin = bin < 0 ? 0 : bin;
    bin = bin < bins ? bin : bins - 1;
    index[i] = bin + (bits >> 31 ? bins : 0);
  }
  for (int64_t i = 0; i < t->width; i++)
    t->histogram[index[i]]++;
}

/* scratch: the row as float32, two more of it, one for extremes and bins, channels' squares. */
static void read_row(const Task *t, int64_t row, float *scratch) {
  const int64_t width = t->width;
  const float *x = load(t, row, scratch), *about;
  uint32_t bad = 0;
  float sum = 0, low = INFINITY, high = -INFINITY;
#pragma omp simd reduction(+ : sum) reduction(min : low) reduction(max : high) reduction(| : bad)
  for (int64_t i = 0; i < width; i++) {
    sum += x[i];
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    bad |= (to_bits(x[i]) & INFINITE) == INFINITE;
  }
  double n = (double)width;
  float center = (float)(sum / (float)n);
  about = x;
  if (bad) {
    float *zeroed = scratch + width, *centered = scratch + 2 * width;
    sum = 0, low = INFINITY, high = -INFINITY;
    for (int64_t i = 0; i < width; i++) {
      uint32_t magnitude = to_bits(x[i]) & 0x7FFFFFFF;
      zeroed[i] = x[i];
      if (magnitude >= INFINITE) {
        zeroed[i] = 0;
        t->nonfinite[magnitude == INFINITE]++;
        t->channel_bad[i]++;
        n--;
        continue;
      }
      sum += x[i];
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
    center = n > 0 ? (float)(sum / (float)n) : 0;
    for (int64_t i = 0; i < width; i++)
      centered[i] = (to_bits(x[i]) & INFINITE) == INFINITE ? center : x[i];
    x = zeroed, about = centered;
  }
  const float absmax = n > 0 ? (high > -low ? high : -low) : 0;
  double *found = t->found + row * (6 + t->formats);
  if (n > 0)
    central(about, width, n, center, absmax, low, high, found);
  found[5] = absmax;
  float *extremes = scratch + 3 * width;
  for (int64_t f = 0; f < t->formats; f++) {
    const int64_t group = t->group[f] < width ? t->group[f] : width;
    if (f == 0 || t->group[f] != t->group[f - 1])
      for (int64_t i = 0; i < width; i += group)
        extremes[i / group] = largest(x + i, width - i < group ? width - i : group);
    found[6 + f] = squared_error(x, width, group, extremes, t->half[f]);
  }
  count(t, x, (int32_t *)(scratch + 3 * width));
  float *channel = t->channel_absmax, *squares = scratch + 4 * width;
  for (int64_t i = 0; i < width; i++) {
    float magnitude = fabsf(x[i]);
    channel[i] = magnitude > channel[i] ? magnitude : channel[i];
    squares[i] += x[i] * x[i];
  }
}

static void *read_rows(void *argument) {
  const Task *t = argument;
  float *scratch = malloc(5 * (size_t)t->width * sizeof(float));
  if (scratch == NULL)
    return argument;
  float *squares = scratch + 4 * t->width;
  for (int64_t row = t->first; row < t->last; row += BLOCK) {
    const int64_t end = row + BLOCK < t->last ? row + BLOCK : t->last;
    memset(squares, 0, (size_t)t->width * sizeof(float));
    for (int64_t i = row; i < end; i++)
      read_row(t, i, scratch);
    for (int64_t i = 0; i < t->width; i++)
      t->channel_squares[i] += squares[i];
  }
  free(scratch);
  return NULL;
}

/* Run the tasks, one thread each; 0 where all is well. Results are zeros before. */
int bitplan_one_pass(Task *tasks, int64_t count) {
  pthread_t *threads = malloc((size_t)count * sizeof(pthread_t));
  int64_t started = 1;
  int failed = threads == NULL;
  if (!failed) {
    while (started < count &&
           pthread_create(threads + started, NULL, read_rows, tasks + started) == 0)
      started++;
    failed |= read_rows(tasks) != NULL;
    for (int64_t i = started; i < count; i++) /* no thread was left for it */
      failed |= read_rows(tasks + i) != NULL;
    for (int64_t i = 1; i < started; i++) {
      void *result;
      pthread_join(threads[i], &result);
      failed |= result != NULL;
    }
  }
  free(threads);
  return failed;
}
