/* Products of 8-bit weights and activations that become 8-bit integers on the way: y = (xq wqᵀ) sx sw + bias.

   A weight [N, K] is bytes of code + 128, with a scale per output. Tokens are quantized first, some at a time, in memory
   of one byte per number; sums are int32 and exact (VNNI multiplies bytes of which one is unsigned: the weight is, and
   128 times the sum of a token's codes is taken away again; sums may wrap on the way, the differences do not).

   Compiled without fused multiply-adds: codes are those of the rounded product of x and 127 / max|x|. All of the file's
   addresses are a base and int64_t. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define VNNI 1
#endif

#define SHARE 32   /* outputs that a thread takes at a time */
#define ROWS 4     /* outputs of a tile */
#define TOKENS 6   /* of a tile, at most: its sums are in registers */
#define SPAN 510   /* tokens whose codes are there at a time: whole tiles */
#define STEP 64    /* codes that are multiplied together */
#define INLINE static inline __attribute__((always_inline))

enum { DONE, NO_MEMORY };
enum { FLOAT32, BFLOAT16 };

typedef struct {
    const uint8_t *codes;
    int64_t stride;      /* bytes from one output to the next */
    const float *scales, *bias;  /* [n]; bias may be NULL */
    const void *x;       /* [m, k], x_stride numbers from one token to the next */
    void *y;             /* [m, n], of the type of x */
    int64_t type, x_stride, n, k, m;
    float scale;         /* of all tokens; 0: each has its own */
} Product;

typedef struct {
    const Product *product;
    int64_t first, m;    /* tokens of this span */
    int64_t pitch;       /* bytes from one token to the next */
    int8_t *codes;       /* [m, pitch], 0 from k on */
    float *scales;       /* [m] */
    int32_t *offsets;    /* [m]: 128 times the sum of codes */
    int64_t next, end, share;  /* what no thread has taken */
} Job;

typedef void Region(void *);
typedef void Parallel(Region *, void *, unsigned, unsigned);  /* GOMP_parallel */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t take(Job *job)
{
    int64_t first = __atomic_fetch_add(&job->next, job->share, __ATOMIC_RELAXED);
    return first < job->end ? first : -1;
}

static void run(Region *region, Job *job, int64_t end, int64_t share, Parallel *parallel, int64_t threads)
{
    job->next = 0, job->end = end, job->share = share;
    threads = least(threads, (end + share - 1) / share);
    if (threads > 1)
        parallel(region, job, (unsigned)threads, 0);
    else
        region(job);
}

/* ----------------------------------------------------------------------------------------------------- tokens */

INLINE uint32_t bits_at(const void *x, int64_t k, int type)
{
    uint32_t bits;
    if (type == BFLOAT16)
        return (uint32_t)((const uint16_t *)x)[k] << 16;
    memcpy(&bits, (const float *)x + k, 4);
    return bits;
}

INLINE float of_bits(uint32_t bits)
{
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

INLINE void quantize(Job *job, int64_t m, int type)
{
    const Product *p = job->product;
    const void *x = (const char *)p->x + (job->first + m) * p->x_stride * (type == BFLOAT16 ? 2 : 4);
    int8_t *codes = job->codes + m * job->pitch;
    uint32_t top = 0;
    for (int64_t k = 0; k < p->k; k++) {
        const uint32_t magnitude = bits_at(x, k, type) & 0x7fffffff;
        top = magnitude > top ? magnitude : top;
    }
    memset(codes, 0, job->pitch);
    job->offsets[m] = 0;
    job->scales[m] = NAN;
    if (top >= 0x7f800000)
        return;
    const float most = of_bits(top) > 0x1p-100f ? of_bits(top) : 0x1p-100f;
    const float inverse = p->scale > 0 ? 1 / p->scale : 127 / most;
    int32_t sum = 0;
    for (int64_t k = 0; k < p->k; k++) {
        float value = of_bits(bits_at(x, k, type)) * inverse;
        value = value > 127 ? 127 : value;
        value = value < -127 ? -127 : value;
        value += 0x1.8p23f;  /* from 2^23 on numbers are whole: rounds, to even in ties */
        uint32_t bits;
        memcpy(&bits, &value, 4);
        codes[k] = (int8_t)bits;
        sum += (int8_t)bits;
    }
    job->scales[m] = p->scale > 0 ? p->scale : most / 127;
    job->offsets[m] = 128 * sum;
}

static void quantize_region(void *argument)
{
    Job *job = argument;
    for (int64_t m; (m = take(job)) >= 0;)
        for (int64_t i = m; i < least(job->end, m + job->share); i++)
            if (job->product->type == BFLOAT16)
                quantize(job, i, BFLOAT16);
            else
                quantize(job, i, FLOAT32);
}

/* --------------------------------------------------------------------------------------------------- products */

/* The sum of a token and an output, to where it belongs. */
INLINE void put(const Job *job, int64_t n, int64_t m, int32_t sum)
{
    const Product *p = job->product;
    float value = (float)(int32_t)((uint32_t)sum - (uint32_t)job->offsets[m]) * job->scales[m] * p->scales[n];
    const int64_t at = (job->first + m) * p->n + n;
    if (p->bias)
        value += p->bias[n];
    if (p->type != BFLOAT16) {
        ((float *)p->y)[at] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    ((uint16_t *)p->y)[at] = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#ifdef VNNI
/* The sums of the lanes of four vectors. */
INLINE void sums(const __m512i *of, int32_t *found)
{
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[0], of[1]));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(of[2], of[3]), _mm512_unpackhi_epi32(of[2], of[3]));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128((__m128i *)found, quarter);
}

/* sum += weights * codes, four neighbours to a lane. The intrinsic has gcc 12 copy sums about, and store most of them. */
INLINE __m512i added(__m512i sum, __m512i weights, __m512i codes)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(codes));
    return sum;
}

/* One step of M tokens and ROWS outputs, of which bytes are `there`: total += codes w. */
INLINE void step(__m512i *total, const uint8_t *const *rows, int64_t k, __mmask64 there, const int8_t *x,
                 int64_t pitch, const int M)
{
    __m512i values[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
        values[r] = _mm512_maskz_loadu_epi8(there, rows[r] + k);
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
        const __m512i token = _mm512_loadu_si512(x + i * pitch + k);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            total[ROWS * i + r] = added(total[ROWS * i + r], values[r], token);
    }
}

/* Outputs n to n + ROWS of M tokens from m. */
INLINE void tile(const Job *job, int64_t n, int64_t m, const int M)
{
    const Product *p = job->product;
    const int64_t whole = p->k / STEP * STEP, pitch = job->pitch;
    const int8_t *x = job->codes + m * pitch;
    const uint8_t *rows[ROWS];
    __m512i total[ROWS * TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
        rows[r] = p->codes + least(n + r, p->n - 1) * p->stride;
#pragma GCC unroll 24
    for (int i = 0; i < ROWS * M; i++)
        total[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < whole; k += STEP) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            if (M < TOKENS)
                __builtin_prefetch(rows[r] + ROWS * p->stride + k);  /* the next outputs: they lie behind */
        step(total, rows, k, ~0ull, x, pitch, M);
    }
    if (whole < p->k)
        step(total, rows, whole, (1ull << (p->k - whole)) - 1, x, pitch, M);
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
        int32_t found[ROWS];
        sums(total + ROWS * i, found);
        for (int r = 0; r < ROWS && n + r < p->n; r++)
            put(job, n + r, m + i, found[r]);
    }
}
#else
INLINE void tile(const Job *job, int64_t n, int64_t m, const int M)
{
    const Product *p = job->product;
    for (int64_t row = n; row < least(p->n, n + ROWS); row++)
        for (int i = 0; i < M; i++) {
            const uint8_t *codes = p->codes + row * p->stride;
            const int8_t *x = job->codes + (m + i) * job->pitch;
            uint32_t sum = 0;
            for (int64_t k = 0; k < p->k; k++)
                sum += (uint32_t)((int)codes[k] * (int)x[k]);
            put(job, row, m + i, (int32_t)sum);
        }
}
#endif

#define TILE(M) static void tile_##M(const Job *job, int64_t n, int64_t m) { tile(job, n, m, M); }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)

static void product_region(void *argument)
{
    static void (*const tiles[])(const Job *, int64_t, int64_t) = {tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};
    Job *job = argument;
    for (int64_t n; (n = take(job)) >= 0;) {
        const int64_t end = least(job->end, n + job->share);
        for (int64_t m = 0, count; m < job->m; m += count) {
            const int64_t left = job->m - m, turns = (left + TOKENS - 1) / TOKENS;
            count = (left + turns - 1) / turns;  /* TOKENS, or less if that makes tiles even */
            for (int64_t row = n; row < end; row += ROWS)
                tiles[count - 1](job, row, m);
        }
    }
}

/* Returns DONE or NO_MEMORY. */
int llmq_int8(const Product *p, Parallel *parallel, int64_t threads)
{
    const int64_t most = least(p->m, SPAN), pitch = (p->k + STEP - 1) / STEP * STEP + STEP;  /* see product.c: pitch */
    Job job = {.product = p, .pitch = pitch};
    job.codes = aligned_alloc(STEP, most * pitch);
    job.scales = malloc(most * sizeof(float));
    job.offsets = malloc(most * sizeof(int32_t));
    const int outcome = job.codes && job.scales && job.offsets ? DONE : NO_MEMORY;
    for (; outcome == DONE && job.first < p->m; job.first += SPAN) {
        job.m = least(SPAN, p->m - job.first);
        run(quantize_region, &job, job.m, 8, parallel, least(threads, 1 + job.m * p->k / (1 << 18)));
        run(product_region, &job, p->n, SHARE, parallel, threads);
    }
    free(job.codes);
    free(job.scales);
    free(job.offsets);
    return outcome;
}
