/* Products of activations with rows that were dequantized beside them. Included for each NUMBER that they may be of:
   COUNT numbers are loaded together, and ADD_PRODUCT adds their products to the lanes of a sum. */

/* The sums `of` tokens m to m + M and outputs n to n + ROWS, with bias, to where they belong. */
INLINE void NAME(put)(const Job *job, int64_t n, int64_t m, const int M, const Lanes *of)
{
    const int64_t left = job->weight->n - n;
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
        NUMBER *y = (NUMBER *)job->y + (job->rows ? job->rows[m + i] : m + i) * job->pitch;
        float found[ROWS];
        sums(of + ROWS * i, found);
        for (int r = 0; job->bias && r < ROWS && r < left; r++)
            found[r] += job->bias[n + r];
        if (left >= ROWS)
            STORE(y + n, found);
        else
            for (int r = 0; r < left; r++)
                y[n + r] = RESULT(found[r]);
    }
}

/* Outputs n to n + ROWS, whose rows are `pitch` numbers apart, of M tokens from m. */
INLINE void NAME(tile)(const Job *job, const NUMBER *rows, int64_t pitch, int64_t n, int64_t m, const int M)
{
    const NUMBER *x = (const NUMBER *)job->x + m * job->width;
    Lanes total[ROWS * TOKENS];
#pragma GCC unroll 24
    for (int i = 0; i < ROWS * M; i++)
        total[i] = (Lanes){0};
    for (int64_t k = 0; k < job->width; k += COUNT, x += COUNT * M) {
#pragma GCC unroll 6
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
                total[ROWS * i + r] = ADD_PRODUCT(total[ROWS * i + r], LOAD(rows + r * pitch + k), LOAD(x + COUNT * i));
    }
    NAME(put)(job, n, m, M, total);
}

#define TILE(M) \
    static void NAME(tile_##M)(const Job *job, const NUMBER *rows, int64_t pitch, int64_t n, int64_t m) \
    { \
        NAME(tile)(job, rows, pitch, n, m, M); \
    }
TILE(1) TILE(2) TILE(3)
#if TOKENS > 3
TILE(4) TILE(5) TILE(6)
#endif

/* Some rows at a time for all tokens. */
static void NAME(rows)(void *argument)
{
    static void (*const tiles[])(const Job *, const NUMBER *, int64_t, int64_t, int64_t) = {
        NAME(tile_1), NAME(tile_2), NAME(tile_3),
#if TOKENS > 3
        NAME(tile_4), NAME(tile_5), NAME(tile_6),
#endif
    };
    Job *job = argument;
    const Weight *w = job->weight;
    const int64_t pitch = job->width + 64 / sizeof(NUMBER);  /* a power of two would be one set of the cache */
    NUMBER *rows = calloc(SHARE * pitch, sizeof(NUMBER));
    float *spare = malloc(4 * w->k);
    if (!rows || !spare)
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    else
        for (int64_t n; (n = take(job)) >= 0;) {
            const int64_t end = least(job->end, n + SHARE);
            for (int64_t row = n; row < end; row++)
                ROW(w, row, rows + (row - n) * pitch, spare);
            for (int64_t m = 0, count; m < job->m; m += count) {
                count = tokens(job->m - m);
                for (int64_t row = n; row < end; row += ROWS)
                    tiles[count - 1](job, rows + (row - n) * pitch, pitch, row, m);
            }
        }
    free(rows);
    free(spare);
}

/* Tokens m of x [.., k] as one panel after the other, each of a tile's tokens: COUNT inputs of every token, then the
   next COUNT. They are those of `rows`, of which each `slots` share a token; NULL: those from the first on. */
static void NAME(fill_panels)(const NUMBER *x, int64_t stride, const int64_t *rows, int64_t slots, int64_t m, int64_t k,
                              int64_t width, NUMBER *out)
{
    for (int64_t first = 0, count; first < m; first += count, out += count * width) {
        count = tokens(m - first);
        for (int64_t i = 0; i < count; i++) {
            const NUMBER *from = x + (rows ? rows[first + i] / slots : first + i) * stride;
            for (int64_t at = 0; at < width; at += COUNT) {
                NUMBER *to = out + at * count + COUNT * i;
                const int64_t there = least(COUNT, at < k ? k - at : 0);
                memset(to, 0, COUNT * sizeof(NUMBER));
                memcpy(to, from + at, there * sizeof(NUMBER));
            }
        }
    }
}

/* How many of m tokens of `width` inputs rows are multiplied with at a time. */
INLINE int64_t NAME(span)(int64_t m, int64_t width)
{
    const int64_t row = width * sizeof(NUMBER);
    const int64_t most = row * LEAST_SPAN < NEAR ? NEAR / row : LEAST_SPAN, spans = (m + most - 1) / most;
    return up((m + spans - 1) / spans, TOKENS);
}

static int NAME(product)(const Weight *w, const NUMBER *x, int64_t stride, const float *bias, NUMBER *y, int64_t m,
                         Region *region, Parallel *parallel, int64_t threads)
{
    const int64_t width = up(w->k, STEP), span = NAME(span)(m, width);
    NUMBER *panels = aligned_alloc(64, up(span * width * sizeof(NUMBER), 64));
    int outcome = panels ? DONE : NO_MEMORY;
    for (int64_t first = 0; first < m && outcome == DONE; first += span) {
        const int64_t count = least(span, m - first);
        NAME(fill_panels)(x + first * stride, stride, NULL, 1, count, w->k, width, panels);
        Job job = {w, panels, bias, y + first * w->n, count, width, 0, w->n, 0, NULL, w->n};
        outcome = run(region, &job, parallel, threads);
    }
    free(panels);
    return outcome;
}
