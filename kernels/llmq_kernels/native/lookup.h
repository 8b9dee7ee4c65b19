/* Part of vectors.c: the numbers that codes stand for, `rows` of the products. */

#ifdef WIDE
static void tables_of(const Product *p, Tables *out)
{
    const int entries = 1 << p->bits;
    for (int64_t i = 0; i < p->d; i++)
        for (int at = 0; at < 256; at++) {  /* again and again: what a code has above its bits means nothing */
            const int8_t entry = p->book[at % entries * p->d + i];
            const uint32_t number = bits_of(entry) >> 16;
            out->planes[2 * i][at] = p->type == BFLOAT16 ? (uint8_t)number : (uint8_t)entry;
            out->planes[2 * i + 1][at] = (uint8_t)(number >> 8);
        }
    for (int at = 0; at < CODES; at++) {
        out->places[at] = at % 8 < p->bits ? at / 8 * p->bits + at % 8 : 0;
        out->shifts[at] = at % 8 * p->bits;
    }
}

/* Codes of a step, a byte each; bits above those of a code mean nothing. */
INLINE __m512i codes_at(const Product *p, const Tables *t, const uint8_t *row, int64_t step)
{
    const int64_t at = step * 8 * p->bits, there = p->stride - at;
    const __mmask64 mask = there >= 64 ? ~0ull : (1ull << there) - 1;
    const __m512i bytes = _mm512_maskz_loadu_epi8(mask, row + at);
    if (p->bits == 8)
        return bytes;
    const __m512i lanes = _mm512_permutexvar_epi8(_mm512_loadu_si512(t->places), bytes);
    return _mm512_multishift_epi64_epi8(_mm512_loadu_si512(t->shifts), lanes);
}

/* A byte of what codes stand for; large: there are more than 64 entries. */
INLINE __m512i looked_up(const uint8_t *plane, __m512i codes, __mmask64 upper, const int large)
{
    if (!large)
        return _mm512_permutexvar_epi8(codes, _mm512_loadu_si512(plane));
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(plane), codes, _mm512_loadu_si512(plane + 64));
    const __m512i high =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(plane + 128), codes, _mm512_loadu_si512(plane + 192));
    return _mm512_mask_blend_epi8(upper, low, high);
}

INLINE void expand(const Job *job, int64_t n, char *out, const int type, const int d, const int large)
{
    const Product *p = job->product;
    const Tables *t = job->tables;
    const uint8_t *row = p->codes + n * p->stride;
    const __m512i turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t step = 0; step < job->steps; step++) {
        __m512i codes = codes_at(p, t, row, step);
        if (type == FLOAT32)
            codes = _mm512_permutexvar_epi32(turned, codes);
        const __mmask64 upper = _mm512_movepi8_mask(codes);
#pragma GCC unroll 8
        for (int i = 0; i < d; i++) {
            const __m512i low = looked_up(t->planes[2 * i], codes, upper, large);
            if (type == BFLOAT16) {
                const __m512i high = looked_up(t->planes[2 * i + 1], codes, upper, large);
                _mm512_storeu_si512(out, _mm512_unpacklo_epi8(low, high));
                _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi8(low, high));
                out += 128;
                continue;
            }
            __m128i parts[4];
            _mm512_storeu_si512(parts, low);
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++, out += 64)
                _mm512_storeu_ps(out, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(parts[q])));
        }
    }
}
#else
static void tables_of(const Product *p, Tables *out)
{
    for (int64_t at = 0; at < p->d << p->bits; at++)
        out->entries[at] = p->book[at];
}

INLINE void expand(const Job *job, int64_t n, char *out, const int type, const int d, const int large)
{
    const Product *p = job->product;
    const uint8_t *row = p->codes + n * p->stride;
    const int64_t codes = (p->k + d - 1) / d, bits = large ? 8 : p->bits, bytes = 4 * d;
    for (int64_t at = 0; at < codes; at++) {
        const int64_t bit = at * bits;
        const unsigned next = bit % 8 + bits > 8 ? row[bit / 8 + 1] : 0;
        const unsigned code = (row[bit / 8] | next << 8) >> bit % 8 & ((1 << bits) - 1);
        memcpy(out + at * bytes, job->tables->entries + code * d, bytes);
    }
    memset(out + codes * bytes, 0, job->steps * step_bytes(p, type) - codes * bytes);
}
#endif

#define EXPAND(name, type, d, large) \
    static void name(const Job *job, int64_t n, char *out) { expand(job, n, out, type, d, large); }
EXPAND(float_2, FLOAT32, 2, 0) EXPAND(float_2_large, FLOAT32, 2, 1) EXPAND(float_4, FLOAT32, 4, 0)
EXPAND(float_4_large, FLOAT32, 4, 1) EXPAND(float_8_large, FLOAT32, 8, 1)
#ifdef PAIRS
EXPAND(pairs_2, BFLOAT16, 2, 0) EXPAND(pairs_2_large, BFLOAT16, 2, 1) EXPAND(pairs_4, BFLOAT16, 4, 0)
EXPAND(pairs_4_large, BFLOAT16, 4, 1) EXPAND(pairs_8_large, BFLOAT16, 8, 1)
#endif

typedef void Expand(const Job *, int64_t, char *);

static Expand *expands(const Product *p)
{
    const int large = p->bits == 8;
#ifdef PAIRS
    if (p->type == BFLOAT16)
        return p->d == 8   ? pairs_8_large
               : p->d == 4 ? (large ? pairs_4_large : pairs_4)
                           : (large ? pairs_2_large : pairs_2);
#endif
    return p->d == 8   ? float_8_large
           : p->d == 4 ? (large ? float_4_large : float_4)
                       : (large ? float_2_large : float_2);
}
