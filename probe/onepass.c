/* One pass over a tensor on a CPU: onepass.py's contract, in loops that any C compiler vectorizes.

   A task takes a run of rows and stays with one row until it is done with it, so that the tensor
   comes from memory once and the rest happens in the cache. Sums of a row are float32 about the
   row's own mean, scaled by a power of two (moments.py says why); sums of channels are float32 over
   BLOCK rows and float64 beyond. "omp simd" names the sums that may be reordered: nothing else is. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 64
#define MOST_THREADS 256
#define INFINITE 0x7F800000u
#define SMALLEST 0x1p-100f /* a group below it has squared errors of zero in float32 */

enum { FLOAT32, BFLOAT16, FLOAT16 };

typedef struct {
  const void *x; /* [rows, width] */
  int64_t rows, width, dtype, formats;
  const int64_t *group; /* elements that share a scale, by format */
  const float *half;    /* 2^(bits - 1), by format */
  double *found;        /* [rows, 6 + formats] */
  int32_t *histogram;   /* [2, bins], like the next ones added to */
  float *absmax;        /* [width] */
  double *squares, *counts, *nonfinite; /* [width], [width], NaN and infinite */
  int64_t shift, lowest, bins; /* histogram.py */
} Pass;

/* A thread's rows, and what it adds up over them. */
typedef struct {
  const Pass *pass;
  int64_t first, last;
  float *scratch; /* [5, width]: see read_row */
  float *absmax;
  double *squares, *bad, nonfinite[2];
  int32_t *histogram;
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
static const float *load(const Pass *t, int64_t row, float *buffer) {
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

static void count(const Pass *t, const float *x, int32_t *index, int32_t *histogram) {
  const int32_t shift = (int32_t)t->shift, lowest = (int32_t)t->lowest, bins = (int32_t)t->bins;
  for (int64_t i = 0; i < t->width; i++) {
    uint32_t bits = to_bits(x[i]);
    int32_t bin = (int32_t)((bits & 0x7FFFFFFF) >> shift) - lowest;
    bin = bin < 0 ? 0 : bin;
    bin = bin < bins ? bin : bins - 1;
    index[i] = bin + (bits >> 31 ? bins : 0);
  }
  for (int64_t i = 0; i < t->width; i++)
    histogram[index[i]]++;
}

/* scratch: the row as float32, two more of it, one for extremes and bins, channels' squares. */
static void read_row(Task *task, int64_t row) {
  const Pass *t = task->pass;
  const int64_t width = t->width;
  float *scratch = task->scratch;
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
        task->nonfinite[magnitude == INFINITE]++;
        task->bad[i]++;
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
  memset(found, 0, 5 * sizeof(double));
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
  count(t, x, (int32_t *)(scratch + 3 * width), task->histogram);
  float *channel = task->absmax, *squares = scratch + 4 * width;
  for (int64_t i = 0; i < width; i++) {
    float magnitude = fabsf(x[i]);
    channel[i] = magnitude > channel[i] ? magnitude : channel[i];
    squares[i] += x[i] * x[i];
  }
}

static void read_rows(Task *task) {
  const int64_t width = task->pass->width;
  float *squares = task->scratch + 4 * width;
  for (int64_t row = task->first; row < task->last; row += BLOCK) {
    const int64_t end = row + BLOCK < task->last ? row + BLOCK : task->last;
    memset(squares, 0, (size_t)width * sizeof(float));
    for (int64_t i = row; i < end; i++)
      read_row(task, i);
    for (int64_t i = 0; i < width; i++)
      task->squares[i] += squares[i];
  }
}

/* Allocate what a task adds up, zeros; the first one counts straight into the pass's histogram. */
static int prepare(Task *task, const Pass *pass, int64_t i, int64_t count) {
  const size_t width = (size_t)pass->width;
  char *room = calloc(width, 2 * sizeof(double) + 6 * sizeof(float));
  *task = (Task){.pass = pass,
                 .first = pass->rows * i / count,
                 .last = pass->rows * (i + 1) / count};
  task->histogram = i ? calloc(2 * (size_t)pass->bins, sizeof(int32_t)) : pass->histogram;
  task->squares = (double *)room, task->bad = task->squares + width;
  task->absmax = (float *)(task->bad + width), task->scratch = task->absmax + width;
  return room != NULL && task->histogram != NULL;
}

/* Add what a task found to the pass's results. */
static void finish(const Task *task, int64_t i) {
  const Pass *t = task->pass;
  for (int64_t c = 0; c < t->width; c++) {
    t->absmax[c] = task->absmax[c] > t->absmax[c] ? task->absmax[c] : t->absmax[c];
    t->squares[c] += task->squares[c];
    t->counts[c] += (double)(task->last - task->first) - task->bad[c];
  }
  t->nonfinite[0] += task->nonfinite[0];
  t->nonfinite[1] += task->nonfinite[1];
  for (int64_t b = 0; i && b < 2 * t->bins; b++)
    t->histogram[b] += task->histogram[b];
}

typedef struct {
  Task *tasks;
  int64_t count;
  atomic_int_fast64_t next;
} Work;

static void take(void *argument) {
  Work *work = argument;
  for (int64_t i; (i = atomic_fetch_add(&work->next, 1)) < work->count;)
    read_rows(work->tasks + i);
}

static void *take_in_thread(void *argument) {
  take(argument);
  return NULL;
}

/* The OpenMP runtime that torch has loaded, where it has one that speaks like GNU's. Its threads wait
   for work by spinning, and would keep threads of our own from the cores. */
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));

static void run(Work *work) {
  if (work->count == 1) {
    take(work);
  } else if (GOMP_parallel) {
    GOMP_parallel(take, work, (unsigned)work->count, 0);
  } else {
    pthread_t threads[MOST_THREADS];
    int64_t started = 1;
    while (started < work->count &&
           pthread_create(threads + started, NULL, take_in_thread, work) == 0)
      started++;
    take(work);
    for (int64_t i = 1; i < started; i++)
      pthread_join(threads[i], NULL);
  }
}

/* Do a pass in `count` threads; 0 where all is well, else there was no memory and nothing is done. */
int bitplan_one_pass(const Pass *pass, int64_t count) {
  Task tasks[MOST_THREADS];
  Work work = {tasks, count < MOST_THREADS ? count : MOST_THREADS, 0};
  int well = 1;
  for (int64_t i = 0; i < work.count; i++)
    well &= prepare(tasks + i, pass, i, work.count);
  if (well)
    run(&work);
  for (int64_t i = 0; i < work.count; i++) {
    if (well)
      finish(tasks + i, i);
    free(tasks[i].squares);
    if (i)
      free(tasks[i].histogram);
  }
  return !well;
}
