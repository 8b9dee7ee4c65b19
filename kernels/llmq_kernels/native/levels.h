/* What codes stand for where levels are in tables: w = level * scale. Part of unpack.h, with -DTABLE.

   The wide ways look 16-bit values up by permutations, 32 codes at once, in as many registers as the levels take; a
   float32 level is two such values. Lanes may hold anything above their codes. */

/* Whether groups have tables of their own, or pick one. */
INLINE int varies(const Weight *w) { return w->own || w->zero_type != NONE; }

/* Whether each half of a step is a group, and looked up like the other: pairs of bfloat16 keep their sums apart. */
INLINE int in_halves(const Weight *w) { return 2 * w->group == STEP && !varies(w); }

/* The first level of group `at` in the tables. */
INLINE int64_t first_level(const Weight *w, int64_t at)
{
    return LEVELS * (w->own ? at : w->zero_type == NONE ? 0 : zero_at(w, at));
}

/* The levels of group `at` in float32; `spare` is for those that are not. */
INLINE const float *levels_of(const Weight *w, int64_t at, float *spare)
{
    const int64_t first = first_level(w, at);
    if (w->table_type == FLOAT32)
        return (const float *)w->table + first;
    for (int i = 0; i < LEVELS; i++)
        spare[i] = number(w->table, w->table_type, first + i);
    return spare;
}

#ifdef WIDE
#define PARTS ((LEVELS + 31) / 32)  /* registers of 16-bit values */

/* 16 levels of group `at` from `place` on; where there are less, they stand there several times. */
INLINE __m512 sixteen(const Weight *w, int64_t at, int place)
{
    const int64_t first = first_level(w, at) + place % LEVELS;
    const __mmask16 there = BITS < 4 ? (1 << LEVELS) - 1 : -1;
    const uint16_t *from = (const uint16_t *)w->table + first;
    __m512 found;
    if (w->table_type == FLOAT32)
        found = _mm512_maskz_loadu_ps(there, (const float *)w->table + first);
    else if (w->table_type == FLOAT16)
        found = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from));
    else
        found = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16);
#if BITS < 4
    const __m512i ramp = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    found = _mm512_permutexvar_ps(_mm512_and_si512(ramp, _mm512_set1_epi32(LEVELS - 1)), found);
#endif
    return found;
}

/* What stands in `part` for STEP codes. */
INLINE __m512i values_of(__m512i codes, const __m512i *part)
{
#if BITS <= 5
    return _mm512_permutexvar_epi16(codes, part[0]);
#elif BITS == 6
    return _mm512_permutex2var_epi16(part[0], codes, part[1]);
#else
    const __mmask32 second = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
    __m512i found = _mm512_mask_blend_epi16(second, _mm512_permutex2var_epi16(part[0], codes, part[1]),
                                            _mm512_permutex2var_epi16(part[2], codes, part[3]));
#if BITS == 8
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(128));
    const __m512i others = _mm512_mask_blend_epi16(second, _mm512_permutex2var_epi16(part[4], codes, part[5]),
                                                   _mm512_permutex2var_epi16(part[6], codes, part[7]));
    found = _mm512_mask_blend_epi16(upper, found, others);
#endif
    return found;
#endif
}

/* Levels in float32: as they are, or their upper and lower 16 bits. */
#if BITS <= 5
typedef struct { __m512 low, high; } Levels;
#else
typedef struct { __m512i upper[PARTS], lower[PARTS]; } Levels;
#endif

/* The lower halves of 32 numbers. */
INLINE __m512i narrow(__m512i a, __m512i b)
{
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(a));
    return _mm512_inserti64x4(low, _mm512_cvtepi32_epi16(b), 1);
}

INLINE Levels levels_at(const Weight *w, int64_t at)
{
    Levels found;
#if BITS <= 5
    found.low = sixteen(w, at, 0);
    found.high = sixteen(w, at, 16);
#else
    for (int i = 0; i < PARTS; i++) {
        const __m512i a = (__m512i)sixteen(w, at, 32 * i), b = (__m512i)sixteen(w, at, 32 * i + 16);
        found.lower[i] = narrow(a, b);
        found.upper[i] = narrow(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));
    }
#endif
    return found;
}

/* The levels of 16 of STEP codes. */
INLINE __m512 half_levels(__m512i codes, int upper, const Levels *of)
{
#if BITS <= 4
    return _mm512_permutexvar_ps(half_lanes(codes, upper), of->low);
#elif BITS == 5
    return _mm512_permutex2var_ps(of->low, half_lanes(codes, upper), of->high);
#else
    const __m512i high = half_lanes(values_of(codes, of->upper), upper);
    return (__m512)_mm512_or_si512(_mm512_slli_epi32(high, 16), half_lanes(values_of(codes, of->lower), upper));
#endif
}
#endif

/* Columns `k` to `to` of an output, all of one group, as float32; k is a multiple of 8. */
INLINE void group_float(const Weight *w, int64_t row, int64_t k, int64_t to, float *out)
{
    const int64_t at = row * groups_of(w) + k / w->group;
    const float scale = scale_at(w, at);
    const uint8_t *from = w->codes + row * w->stride, *end = from + w->stride;
    from += k / 8 * BITS;
#ifdef WIDE
    if (to - k >= STEP / 2) {
        const __m512 scales = _mm512_set1_ps(scale);
        const Levels of = levels_at(w, at);
        for (; to - k >= STEP; k += STEP, from += STEP_BYTES) {
            ahead(from + AHEAD, STEP_BYTES);
            const __m512i codes = lanes(from, readable(STEP));
            _mm512_storeu_ps(out + k, _mm512_mul_ps(half_levels(codes, 0, &of), scales));
            _mm512_storeu_ps(out + k + 16, _mm512_mul_ps(half_levels(codes, 1, &of), scales));
        }
        if (to - k >= STEP / 2) {
            _mm512_storeu_ps(out + k, _mm512_mul_ps(half_levels(lanes(from, readable(STEP / 2)), 0, &of), scales));
            k += STEP / 2;
            from += STEP_BYTES / 2;
        }
    }
#endif
    if (k == to)
        return;
    float spare[LEVELS];
    const float *levels = levels_of(w, at, spare);
    for (; k < to; k += 8, from += BITS) {
        const uint64_t codes = eight(from, end - from);
        for (int j = 0; j < least(8, to - k); j++)
            out[k + j] = levels[codes >> BITS * j & (LEVELS - 1)] * scale;
    }
}

#ifdef PAIRS
/* Levels times a scale, rounded to bfloat16. */
typedef struct { __m512i part[PARTS]; } Group;

INLINE Group rounded(const Weight *w, int64_t at, float scale)
{
    const __m512 scales = _mm512_set1_ps(scale);
    Group found;
    for (int i = 0; i < PARTS; i++) {
        const __m512 a = _mm512_mul_ps(sixteen(w, at, 32 * i), scales);
        found.part[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(sixteen(w, at, 32 * i + 16), scales), a);
    }
    return found;
}

INLINE Group unscaled(const Weight *w, int64_t at) { return rounded(w, at, 1); }
INLINE Group scaled(const Weight *w, int64_t at) { return rounded(w, at, scale_at(w, at)); }
INLINE __m512i look_up(__m512i codes, Group group) { return values_of(codes, group.part); }

/* An output as bfloat16, if its groups are halves of steps. */
INLINE void row_of_halves(const Weight *w, int64_t row, uint16_t *out)
{
    const Levels of = levels_at(w, 0);
    const uint8_t *from = w->codes + row * w->stride;
    const int64_t groups = groups_of(w), at = row * groups;
    for (int64_t k = 0, g = 0; k < w->k; k += STEP, g += 2, from += STEP_BYTES) {
        const int64_t left = w->k - k;
        const float scale = scale_at(w, at + g), next = scale_at(w, at + least(g + 1, groups - 1));
        const __m512i codes = lanes(from, readable(left));
        const __m512 low = _mm512_mul_ps(half_levels(codes, 0, &of), _mm512_set1_ps(scale));
        const __m512 high = _mm512_mul_ps(half_levels(codes, 1, &of), _mm512_set1_ps(next));
        const __mmask32 there = (left < STEP ? 1u << left : 0) - 1;
        _mm512_mask_storeu_epi16(out + k, there, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}
#endif
