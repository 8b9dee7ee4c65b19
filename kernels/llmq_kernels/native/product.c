/* Products with packed weights on a CPU: y = x Wᵀ + bias.

   Compiled once for each number of bits, with -DBITS. A weight [N, K] is a stream of codes per output, lowest bits
   first, with one scale and perhaps one zero for `group` neighbouring inputs: w = (code - zero) * scale. It is read as
   a checkpoint was turned into it at load; nothing is rearranged. With -DTABLE the codes are places in a table of
   levels, w = level * scale, and zeros say which table where there are several (levels.h).

   `llmq_pairs` is for bfloat16 and processors that multiply it in pairs (AVX512_BF16; sums are float32, subnormal
   numbers count as zero). Up to 4 tokens meet code - zero, which bfloat16 holds exactly, and scales are applied to the
   sums of groups; codes become numbers in registers, by table. For more tokens some rows at a time are dequantized to
   bfloat16, next to the processor, and meet all tokens there. `llmq_float` does the same in float32; without AVX-512 it
   always dequantizes rows. `llmq_dequantize` leaves the product to somebody else.

   All of the file's addresses are a base and int64_t. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE 1
#if defined(__AVX512BF16__)
#define PAIRS 1
#endif
#endif

#define LEVELS (1 << BITS)
#define STEP 32              /* codes that are unpacked together, in STEP_BYTES */
#define STEP_BYTES (4 * BITS)
#define SHARE 16             /* outputs that a thread takes at a time */
#define AHEAD 2048           /* bytes between what is unpacked and what is asked for */
#define NEAR (1 << 20)       /* bytes of activations that rows are multiplied with at a time: a second-level cache */
#define LEAST_SPAN 126       /* tokens for which rows are worth unpacking again */
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, FLOAT16, BFLOAT16, ONES };  /* of scales and tables */
enum { NONE, UINT8, INT16 };          /* of zeros; NONE: all are the middle code */
enum { DONE, NO_MEMORY };

typedef struct {
    const uint8_t *codes;
    int64_t stride;  /* bytes from one output to the next, all of which can be read */
    const void *scales, *zeros;  /* [n, groups] */
    int64_t scale_type, zero_type;
    int64_t n, k, group;
    const void *table;  /* [tables, LEVELS] or NULL */
    int64_t table_type, own;  /* whether every group has a table of its own, in order */
} Weight;

typedef struct {
    const Weight *weight;
    const void *x;      /* panels of [m, width] */
    const float *bias;  /* [n] or NULL */
    void *y;            /* [m, n] */
    int64_t m, width;
    int64_t next, end;  /* outputs that no thread has taken */
    int failed;
    const int64_t *rows;  /* which row of y each token has; NULL: they are in order */
    int64_t pitch;        /* numbers from one row of y to the next */
} Job;

typedef void Region(void *);
typedef void Parallel(Region *, void *, unsigned, unsigned);  /* GOMP_parallel */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

INLINE float of_bits(uint32_t bits)
{
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

INLINE uint16_t bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE int64_t groups_of(const Weight *w) { return (w->k + w->group - 1) / w->group; }

/* Whether no step of a row is of two groups. */
INLINE int in_steps(const Weight *w) { return w->group % STEP == 0 || w->group >= w->k; }

INLINE float number(const void *from, int64_t type, int64_t at)
{
    if (type == FLOAT32)
        return ((const float *)from)[at];
    uint32_t bits = ((const uint16_t *)from)[at];
    if (type == BFLOAT16)
        return of_bits(bits << 16);
    const uint32_t sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
    return of_bits(sign | 0x3f800000) * (rest < 0x7c00 << 13 ? of_bits(rest) * 0x1p112f : of_bits(rest | 0x7f800000));
}

INLINE float scale_at(const Weight *w, int64_t at)
{
    return w->scale_type == ONES ? 1 : number(w->scales, w->scale_type, at);
}

INLINE int zero_at(const Weight *w, int64_t at)
{
    if (w->zero_type == NONE)
        return LEVELS / 2;
    return w->zero_type == UINT8 ? ((const uint8_t *)w->zeros)[at] : ((const int16_t *)w->zeros)[at];
}

/* The next outputs for a thread, up to SHARE; -1: there are none. */
INLINE int64_t take(Job *job)
{
    int64_t first = __atomic_fetch_add(&job->next, SHARE, __ATOMIC_RELAXED);
    return first < job->end ? first : -1;
}

static int run(Region *region, Job *job, Parallel *parallel, int64_t threads)
{
    threads = least(threads, (job->end - job->next + SHARE - 1) / SHARE);
    if (threads > 1)
        parallel(region, job, (unsigned)threads, 0);
    else
        region(job);
    return job->failed ? NO_MEMORY : DONE;
}

#include "unpack.h"

/* -------------------------------------------------------------------------------------------------- products */

#ifdef WIDE
#define TOKENS 6  /* of a tile, at most: their sums, and those of ROWS outputs, are in registers */
#else
#define TOKENS 3
#endif
#define ROWS 4    /* outputs of a tile */
#define FEW_TOKENS 4  /* what multiplies codes as they are: for more, unpacking anew for each tile costs more */

/* The tokens of the next tile, of those that are `left`: as many as can be, or less if that makes tiles even. */
INLINE int64_t tokens(int64_t left)
{
    const int64_t tiles = (left + TOKENS - 1) / TOKENS;
    return (left + tiles - 1) / tiles;
}

#ifdef WIDE
typedef __m512 Lanes;

static __attribute__((noinline)) void scales_of(const Weight *w, int64_t row, float *out)
{
    const int64_t groups = groups_of(w);
    for (int64_t g = 0; g < groups; g++)
        out[g] = scale_at(w, row * groups + g);
}

/* The scale of group g in the lower lanes, that of the next one in the upper ones. */
INLINE __m512 two_scales(const float *scales, int64_t g, int64_t groups)
{
    const __m512 next = _mm512_set1_ps(scales[least(g + 1, groups - 1)]);
    return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[g]), next);
}

/* The sums of all lanes of four vectors. */
INLINE void sums(const Lanes *of, float *found)
{
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3]));
    __m512d e = _mm512_castps_pd(ab), f = _mm512_castps_pd(cd);
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(e, f)), _mm512_castpd_ps(_mm512_unpackhi_pd(e, f)));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(found, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#else
typedef Eight Lanes;

INLINE void sums(const Lanes *of, float *found)
{
    for (int i = 0; i < 4; i++)
        found[i] = ((of[i][0] + of[i][1]) + (of[i][2] + of[i][3])) + ((of[i][4] + of[i][5]) + (of[i][6] + of[i][7]));
}
#endif

#define NUMBER float
#define NAME(name) name##_float
#ifdef WIDE
#define COUNT 16
#define LOAD(from) _mm512_loadu_ps(from)
#define ADD_PRODUCT(sum, a, b) _mm512_fmadd_ps(a, b, sum)
#else
#define COUNT 8
INLINE Lanes load(const float *from) { Lanes found; memcpy(&found, from, sizeof found); return found; }
#define LOAD(from) load(from)
#define ADD_PRODUCT(sum, a, b) ((sum) + (a) * (b))
#endif
#define RESULT(value) (value)
#define STORE(to, from) memcpy(to, from, 4 * sizeof(float))
#define ROW(w, row, out, spare) row_float(w, row, out)
#include "rows.h"
#ifdef WIDE
#define VECTOR __m512
#ifdef TABLE
#define GROUP Levels
#define UNSCALED(w, at) levels_at(w, at)
#define PART(codes, upper, group) half_levels(codes, upper, &(group))
#else
#define GROUP __m512
#if BITS <= 4
#define UNSCALED(w, at) differences_of(zero_at(w, at))
#define PART(codes, upper, group) _mm512_permutexvar_ps(half_lanes(codes, upper), group)
INLINE __m512 differences_of(int zero)
{
    const __m512i ramp = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i codes = _mm512_and_si512(ramp, _mm512_set1_epi32(LEVELS - 1));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(zero)));
}
#else
#define UNSCALED(w, at) _mm512_set1_ps(zero_at(w, at))
#define PART(codes, upper, group) _mm512_sub_ps(half(codes, upper), group)
#endif
#endif
#include "few.h"
#endif
#include "grouped.h"
#include "undefine.h"

#ifdef PAIRS
#define NUMBER uint16_t
#define NAME(name) name##_pairs
#define COUNT 32
#define LOAD(from) ((__m512bh)_mm512_loadu_si512(from))
#define ADD_PRODUCT(sum, a, b) _mm512_dpbf16_ps(sum, a, b)
#define RESULT(value) bfloat16(value)
#define STORE(to, from) _mm_storel_epi64((__m128i *)(to), (__m128i)_mm_cvtneps_pbh(_mm_loadu_ps(from)))
#define ROW(w, row, out, spare) row_bfloat16(w, row, out, spare)
#include "rows.h"
#define VECTOR __m512bh
#define GROUP Group
#define UNSCALED(w, at) unscaled(w, at)
#define PART(codes, upper, group) ((__m512bh)look_up(codes, group))
#include "few.h"
#include "grouped.h"
#endif

/* ------------------------------------------------------------------------------------------ what Python calls */

/* x [m, k] float32, `x_stride` numbers from one token to the next; y [m, n] float32. */
int llmq_float(const Weight *w, const float *x, int64_t x_stride, const float *bias, float *y, int64_t m,
               Parallel *parallel, int64_t threads)
{
#ifdef WIDE
    Region *region = m <= FEW_TOKENS && in_steps(w) ? few_float : rows_float;
#else
    Region *region = rows_float;
#endif
    return product_float(w, x, x_stride, bias, y, m, region, parallel, threads);
}

#ifdef WIDE
const int llmq_wide = 1;
#else
const int llmq_wide = 0;
#endif

#ifdef PAIRS
/* The same with bfloat16 x and y, in groups of whole steps, or one. */
int llmq_pairs(const Weight *w, const uint16_t *x, int64_t x_stride, const float *bias, uint16_t *y, int64_t m,
               Parallel *parallel, int64_t threads)
{
    return product_pairs(w, x, x_stride, bias, y, m, m <= FEW_TOKENS ? few_pairs : rows_pairs, parallel, threads);
}
#endif

typedef struct { Job job; int64_t first; int as_float; } Slab;

static void slab_region(void *argument)
{
    Slab *slab = argument;
    const Weight *w = slab->job.weight;
    float *spare = malloc(4 * w->k);
    if (!spare)
        __atomic_store_n(&slab->job.failed, 1, __ATOMIC_RELAXED);
    else
        for (int64_t n; (n = take(&slab->job)) >= 0;)
            for (int64_t row = n; row < least(slab->job.end, n + SHARE); row++) {
                const int64_t at = (row - slab->first) * w->k;
                if (slab->as_float)
                    row_float(w, row, (float *)slab->job.y + at);
                else
                    row_bfloat16(w, row, (uint16_t *)slab->job.y + at, spare);
            }
    free(spare);
}

/* Outputs `first` to `end` as out [end - first, k], float32 or bfloat16. */
int llmq_dequantize(const Weight *w, int64_t first, int64_t end, void *out, int as_float, Parallel *parallel,
                    int64_t threads)
{
    Slab slab = {{w, NULL, NULL, out, 0, 0, first, end, 0}, first, as_float};
    return run(slab_region, &slab.job, parallel, threads);
}
