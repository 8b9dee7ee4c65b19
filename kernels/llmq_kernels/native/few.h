/* Products of up to 4 tokens, straight from codes. Included for each NUMBER, after rows.h: a VECTOR holds COUNT of STEP
   weights of a GROUP, unscaled, and PART makes it of codes. */

/* One step of M tokens and ROWS outputs: part += x w, of which bytes are `there`. */
INLINE void NAME(step)(__m512 *part, const uint8_t *const *codes, int64_t at, const GROUP *group, __mmask64 there,
                       const NUMBER *x, const int M)
{
    __m512i found[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
        found[r] = lanes(codes[r] + at, there);
#pragma GCC unroll 2
    for (int upper = 0; upper < STEP / COUNT; upper++) {
        VECTOR values[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            values[r] = PART(found[r], upper, group[r]);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
                part[ROWS * i + r] = ADD_PRODUCT(part[ROWS * i + r], values[r], LOAD(x + COUNT * (M * upper + i)));
    }
}

/* Outputs n to n + ROWS of all M tokens; `scales` has room for those of the outputs. */
INLINE void NAME(outputs)(const Job *job, int64_t n, float *scales, const int M)
{
    const Weight *w = job->weight;
    const NUMBER *x = job->x;
    const int64_t groups = groups_of(w), steps = w->k / STEP, tail = w->k % STEP;
    const int halves = in_halves(w);
    const int64_t span = halves ? STEP : w->group, spans = (w->k + span - 1) / span;
    const uint8_t *codes[ROWS];
    int64_t first[ROWS];
    __m512 total[4 * ROWS];
    GROUP group[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        const int64_t row = least(n + r, w->n - 1);
        codes[r] = w->codes + row * w->stride;
        first[r] = row * groups;
        scales_of(w, row, scales + r * groups);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * M; i++)
        total[i] = _mm512_setzero_ps();
    for (int64_t g = 0, at = 0; g < spans; g++) {
        __m512 part[4 * ROWS];
#pragma GCC unroll 16
        for (int i = 0; i < ROWS * M; i++)
            part[i] = _mm512_setzero_ps();
        if (!g || varies(w))
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
                group[r] = UNSCALED(w, first[r] + g);
        const int64_t end = STEP_BYTES * least(steps, (g + 1) * span / STEP);
        for (; at < end; at += STEP_BYTES, x += STEP * M) {
            ahead(codes[0] + ROWS * (w->stride + at), ROWS * STEP_BYTES);  /* the next outputs: they lie behind */
            NAME(step)(part, codes, at, group, readable(STEP), x, M);
        }
        if (g == spans - 1 && tail)
            NAME(step)(part, codes, at, group, readable(tail), x, M);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const float *own = scales + r * groups;
            const __m512 scale = halves ? two_scales(own, 2 * g, groups) : _mm512_set1_ps(own[g]);
#pragma GCC unroll 4
            for (int i = 0; i < M; i++)
                total[ROWS * i + r] = _mm512_fmadd_ps(part[ROWS * i + r], scale, total[ROWS * i + r]);
        }
    }
    NAME(put)(job, n, 0, M, total);
}

#define FEW(M) static void NAME(few_##M)(const Job *job, int64_t n, float *scales) { NAME(outputs)(job, n, scales, M); }
FEW(1) FEW(2) FEW(3) FEW(4)

static void NAME(few)(void *argument)
{
    static void (*const tiles[])(const Job *, int64_t, float *) = {NAME(few_1), NAME(few_2), NAME(few_3), NAME(few_4)};
    Job *job = argument;
    float *scales = malloc(ROWS * sizeof(float) * groups_of(job->weight));
    if (!scales)
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    else
        for (int64_t n; (n = take(job)) >= 0;)
            for (int64_t r = n; r < least(job->end, n + SHARE); r += ROWS)
                tiles[job->m - 1](job, r, scales);
    free(scales);
}
