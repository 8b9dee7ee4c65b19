/* Products with weights on a codebook of vectors: y = x Wᵀ + bias, w[n, p d + i] = book[code[n, p], i] scale[n, group].

   Some outputs at a time are looked up, next to the processor, and multiplied with all tokens there. What is looked up
   is an entry as it is, which bfloat16 holds exactly: scales are applied to sums, in float32.

   With AVX512_VBMI 64 codes become numbers at once (lookup.h): for every place i in a vector, and each byte of a
   number, the codebook has a table of bytes, and permutations of bytes read it. Numbers then lie in an order of their
   own, and tokens are brought into the same before: a quarter of every register belongs to 16 neighbouring codes, so
   that groups of whole quarters can be scaled in their lanes. Plain C keeps the order of columns.

   Compiled once for all codebooks. All of the file's addresses are a base and int64_t. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VBMI__)
#include <immintrin.h>
#define WIDE 1
#if defined(__AVX512BF16__)
#define PAIRS 1
#endif
#endif

#define CODES 64     /* that are looked up together: a step */
#define QUARTER 16   /* of them that share lanes */
#define MOST 8       /* columns per code */
#define ROWS 4       /* outputs of a tile */
#define SHARE 16     /* outputs that a thread takes at a time */
#define NEAR (1 << 20)  /* bytes of tokens that rows are multiplied with at a time: a second-level cache */
#define ALIGNED 64
#ifdef WIDE
#define TOKENS 6     /* of a tile, at most: sums are in registers */
#define LANES 16
#define PARTS 1      /* of a step: what has a register of scales */
#else
#define TOKENS 2
#define LANES 8
#define PARTS 4
#endif
#define HALF ((TOKENS + 1) / 2)  /* of a tile where a step's sums and all before it are apart */
#define INLINE static inline __attribute__((always_inline))

enum { DONE, NO_MEMORY };
enum { FLOAT32, BFLOAT16 };

typedef float Lanes __attribute__((vector_size(4 * LANES)));

typedef struct {
    const uint8_t *codes;
    int64_t stride;       /* bytes from one output to the next, all of which can be read */
    const int8_t *book;   /* [2^bits, d] */
    const float *scales;  /* [n, groups] */
    const float *bias;    /* [n] or NULL */
    const void *x;        /* [m, k], x_stride numbers from one token to the next */
    void *y;              /* [m, n], of the type of x */
    int64_t type, x_stride, n, k, m;
    int64_t bits, d;      /* of a code; columns that it stands for */
    int64_t group;        /* columns: k or more, or a multiple of QUARTER d */
} Product;

typedef struct {
#ifdef WIDE
    uint8_t planes[2 * MOST][256];  /* bytes of the entries' numbers: low and high ones in turn, or whole int8 */
    uint8_t places[CODES];          /* of the bytes with a code's bits, */
    uint8_t shifts[CODES];          /* and which they are */
#else
    float entries[256 * MOST];
#endif
} Tables;

typedef struct {
    const Product *product;
    const Tables *tables;
    int64_t first, m;     /* tokens of this span */
    int64_t steps;        /* of a row */
    int64_t pitch;        /* bytes from one token to the next */
    char *tokens;         /* [m, pitch], in the order of numbers, 0 from k on */
    int64_t next, end, share;  /* what no thread has taken */
    int failed;
} Job;

typedef void Region(void *);
typedef void Parallel(Region *, void *, unsigned, unsigned);  /* GOMP_parallel */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t groups_of(const Product *p) { return (p->k + p->group - 1) / p->group; }
INLINE int64_t step_bytes(const Product *p, int type) { return CODES * p->d * (type == BFLOAT16 ? 2 : 4); }

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

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Where in a step the number of a code at place i of its vector lies. */
INLINE int64_t place(int64_t code, int64_t i, int64_t d, int type)
{
#ifdef WIDE
    const int64_t lanes = type == BFLOAT16 ? 8 : 4;  /* of a quarter of a register */
    const int64_t vector = i * (QUARTER / lanes) + code % QUARTER / lanes;
    (void)d;
    return 4 * lanes * vector + lanes * (code / QUARTER) + code % lanes;
#else
    (void)type;
    return code * d + i;
#endif
}

/* ----------------------------------------------------------------------------------------------------- tokens */

INLINE void arrange(Job *job, int64_t m, int type)
{
    const Product *p = job->product;
    const int64_t size = type == BFLOAT16 ? 2 : 4, d = p->d;
    const char *x = (const char *)p->x + (job->first + m) * p->x_stride * size;
    char *to = job->tokens + m * job->pitch;
    memset(to, 0, job->steps * step_bytes(p, type));
    for (int64_t step = 0; step < job->steps; step++, to += step_bytes(p, type))
        for (int64_t code = 0; code < CODES; code++)
            for (int64_t i = 0; i < d; i++) {
                const int64_t k = (step * CODES + code) * d + i;
                if (k < p->k)
                    memcpy(to + size * place(code, i, d, type), x + size * k, size);
            }
}

static void arrange_region(void *argument)
{
    Job *job = argument;
    for (int64_t m; (m = take(job)) >= 0;)
        if (job->product->type == BFLOAT16)
            arrange(job, m, BFLOAT16);
        else
            arrange(job, m, FLOAT32);
}

#include "lookup.h"

/* --------------------------------------------------------------------------------------------------- products */

/* The sum of a token and an output, to where it belongs. */
INLINE void put(const Job *job, int64_t n, int64_t m, float value)
{
    const Product *p = job->product;
    const int64_t at = (job->first + m) * p->n + n;
    if (p->bias)
        value += p->bias[n];
    if (p->type != BFLOAT16) {
        ((float *)p->y)[at] = value;
        return;
    }
    const uint32_t bits = bits_of(value);
    ((uint16_t *)p->y)[at] = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE Lanes load(const char *from)
{
    Lanes found;
    memcpy(&found, from, sizeof found);
    return found;
}

INLINE Lanes added(Lanes sum, Lanes a, Lanes b, const int type)
{
#ifdef PAIRS
    if (type == BFLOAT16)
        return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#endif
    (void)type;
    return sum + a * b;
}

INLINE float sum_of(Lanes lanes)
{
#ifdef WIDE
    return _mm512_reduce_add_ps((__m512)lanes);
#else
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
#endif
}

/* The scales of an output's codes in a part of a row: of a quarter of a step, or of each in its lanes. */
INLINE Lanes scales_at(const Product *p, int64_t n, int64_t part)
{
    const int64_t groups = groups_of(p), quarters = 4 / PARTS, shared = LANES / quarters;
    float spread[LANES];
    for (int64_t q = 0; q < quarters; q++) {
        const int64_t group = (part * quarters + q) * QUARTER * p->d / p->group;
        for (int64_t lane = 0; lane < shared; lane++)
            spread[shared * q + lane] = p->scales[n * groups + least(group, groups - 1)];
    }
    return load((const char *)spread);
}

/* total += x w of so many bytes of M tokens and ROWS outputs. */
INLINE void sums_of(Lanes *total, const char *rows, int64_t row_pitch, const char *x, int64_t pitch, int64_t bytes,
                    const int M, const int type)
{
    for (int64_t at = 0; at < bytes; at += sizeof(Lanes)) {
        Lanes values[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            values[r] = load(rows + r * row_pitch + at);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
            const Lanes token = load(x + i * pitch + at);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
                total[ROWS * i + r] = added(total[ROWS * i + r], values[r], token, type);
        }
    }
}

/* Outputs n to n + ROWS, whose numbers are `rows`, of M tokens from m. */
INLINE void tile(const Job *job, const char *rows, int64_t row_pitch, int64_t n, int64_t m, const int M,
                 const int type, const int grouped)
{
    const Product *p = job->product;
    const char *x = job->tokens + m * job->pitch;
    const int64_t bytes = step_bytes(p, type) / PARTS, parts = job->steps * PARTS;
    Lanes total[ROWS * TOKENS];
#pragma GCC unroll 24
    for (int i = 0; i < ROWS * M; i++)
        total[i] = (Lanes){0};
    if (!grouped)
        sums_of(total, rows, row_pitch, x, job->pitch, parts * bytes, M, type);
    else
        for (int64_t at = 0; at < parts; at++) {
            Lanes part[ROWS * TOKENS];
#pragma GCC unroll 24
            for (int i = 0; i < ROWS * M; i++)
                part[i] = (Lanes){0};
            sums_of(part, rows + at * bytes, row_pitch, x + at * bytes, job->pitch, bytes, M, type);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const Lanes scales = load(rows + r * row_pitch + parts * bytes + at * sizeof(Lanes));
#pragma GCC unroll 6
                for (int i = 0; i < M; i++)
                    total[ROWS * i + r] += part[ROWS * i + r] * scales;
            }
        }
#pragma GCC unroll 24
    for (int i = 0; i < ROWS * M; i++) {
        const int64_t row = n + i % ROWS;
        if (row < p->n)
            put(job, row, m + i / ROWS, sum_of(total[i]) * (grouped ? 1 : p->scales[row]));
    }
}

#define TILE(M, type, grouped, name) \
    static void name##_##M(const Job *job, const char *rows, int64_t pitch, int64_t n, int64_t m) \
    { \
        tile(job, rows, pitch, n, m, M, type, grouped); \
    }
#ifdef WIDE
#define TILES(type, grouped, name) TILE(1, type, grouped, name) TILE(2, type, grouped, name) \
    TILE(3, type, grouped, name) TILE(4, type, grouped, name) TILE(5, type, grouped, name) TILE(6, type, grouped, name)
#define TABLE(name) {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}
#else
#define TILES(type, grouped, name) TILE(1, type, grouped, name) TILE(2, type, grouped, name)
#define TABLE(name) {name##_1, name##_2}
#endif
TILES(FLOAT32, 0, whole_float)
TILES(FLOAT32, 1, grouped_float)
#ifdef PAIRS
TILES(BFLOAT16, 0, whole_pairs)
TILES(BFLOAT16, 1, grouped_pairs)
#endif

typedef void Tile(const Job *, const char *, int64_t, int64_t, int64_t);

static void product_region(void *argument)
{
    static Tile *const tiles[][TOKENS] = {
        TABLE(whole_float), TABLE(grouped_float),
#ifdef PAIRS
        TABLE(whole_pairs), TABLE(grouped_pairs),
#endif
    };
    Job *job = argument;
    const Product *p = job->product;
    const int grouped = p->group < p->k, kind = (p->type == BFLOAT16 ? 2 : 0) + grouped;
    const int64_t numbers = job->steps * step_bytes(p, p->type), parts = grouped * job->steps * PARTS;
    const int64_t pitch = numbers + parts * sizeof(Lanes) + ALIGNED;
    Expand *const expanded = expands(p);
    char *rows = aligned_alloc(ALIGNED, ROWS * pitch);
    if (!rows) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t n; (n = take(job)) >= 0;)
        for (int64_t row = n; row < least(job->end, n + job->share); row += ROWS) {
            for (int r = 0; r < ROWS; r++) {
                const int64_t from = least(row + r, p->n - 1);
                expanded(job, from, rows + r * pitch);
                for (int64_t part = 0; part < parts; part++) {
                    const Lanes scales = scales_at(p, from, part);
                    memcpy(rows + r * pitch + numbers + part * sizeof scales, &scales, sizeof scales);
                }
            }
            const int64_t most = grouped ? HALF : TOKENS;
            for (int64_t m = 0, count; m < job->m; m += count) {
                const int64_t left = job->m - m, turns = (left + most - 1) / most;
                count = (left + turns - 1) / turns;  /* as many as can be, or less if that makes tiles even */
                tiles[kind][count - 1](job, rows, pitch, row, m);
            }
        }
    free(rows);
}

/* Returns DONE or NO_MEMORY. bfloat16 needs llmq_vector_pairs. */
int llmq_vectors(const Product *p, Parallel *parallel, int64_t threads)
{
    Tables tables;
    const int64_t steps = ((p->k + p->d - 1) / p->d + CODES - 1) / CODES;
    /* a line more: tokens at multiples of 4096 bytes would push each other out of the cache */
    const int64_t pitch = steps * step_bytes(p, p->type) + ALIGNED;
    const int64_t fit = NEAR / pitch / TOKENS * TOKENS, span = least(p->m, fit < 4 * TOKENS ? 4 * TOKENS : fit);
    Job job = {.product = p, .tables = &tables, .steps = steps, .pitch = pitch};
    job.tokens = aligned_alloc(ALIGNED, span * pitch);
    if (!job.tokens)
        return NO_MEMORY;
    tables_of(p, &tables);
    for (; !job.failed && job.first < p->m; job.first += span) {
        job.m = least(span, p->m - job.first);
        run(arrange_region, &job, job.m, 1, parallel, least(threads, 1 + job.m * p->k / (1 << 17)));
        run(product_region, &job, p->n, SHARE, parallel, threads);
    }
    free(job.tokens);
    return job.failed ? NO_MEMORY : DONE;
}

#ifdef WIDE
const int llmq_vector_wide = 1;
#else
const int llmq_vector_wide = 0;
#endif
#ifdef PAIRS
const int llmq_vector_pairs = 1;
#else
const int llmq_vector_pairs = 0;
#endif
