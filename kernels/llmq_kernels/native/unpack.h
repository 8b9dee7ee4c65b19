/* Codes to numbers: some in a register, or an output of a weight in memory. Part of product.c. */

typedef float Eight __attribute__((vector_size(32)));

/* 8 codes in the low bits, of which `bytes` bytes may be read. */
INLINE uint64_t eight(const uint8_t *from, int64_t bytes)
{
    uint64_t found = 0;
    if (bytes >= 8)
        memcpy(&found, from, 8);
    else
        memcpy(&found, from, bytes);
    return found;
}

INLINE Eight numbers(uint64_t codes)
{
    typedef uint32_t Words __attribute__((vector_size(32)));
    typedef int32_t Signed __attribute__((vector_size(32)));
    const uint32_t low = codes, high = codes >> 4 * BITS;
    const Words shifts = {0, BITS, 2 * BITS, 3 * BITS, 0, BITS, 2 * BITS, 3 * BITS};
    const Words found = ((Words){low, low, low, low, high, high, high, high} >> shifts) & (LEVELS - 1);
    return __builtin_convertvector((Signed)found, Eight);
}

#ifdef WIDE
/* Asks for memory that is needed soon: processors foresee little of rows that are read side by side. */
INLINE void ahead(const uint8_t *from, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch(from + at);
}

#if defined(__AVX512VBMI__) && BITS < 8
/* Four codes are 4·BITS bits, which begin at bit 0 or 4 of a byte. Their bytes move to the 64-bit lane that they go
   to, and there each code to its place. */
#define SOURCE(lane, byte) (lane) * 4 * BITS / 8 + (byte)
#define SHIFT(lane, byte) (lane) * 4 * BITS % 8 + BITS * ((byte) / 2)
#define LANE(of, i) of(i, 0), of(i, 1), of(i, 2), of(i, 3), of(i, 4), of(i, 5), of(i, 6), of(i, 7)
#define LANES(of) \
    LANE(of, 0), LANE(of, 1), LANE(of, 2), LANE(of, 3), LANE(of, 4), LANE(of, 5), LANE(of, 6), LANE(of, 7)
static const uint8_t source[64] = {LANES(SOURCE)}, shift[64] = {LANES(SHIFT)};
#endif

/* Which bytes of a step may be read that has `left` columns of the row. */
INLINE __mmask64 readable(int64_t left) { return (1ull << (least(left, STEP) * BITS + 7) / 8) - 1; }

/* STEP codes in the low bits of 16-bit lanes, from bytes that are `there`. What lies above them is arbitrary. */
INLINE __m512i lanes(const uint8_t *from, __mmask64 there)
{
    __m512i bytes = _mm512_maskz_loadu_epi8(there, from);
#if BITS == 8
    return _mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes));
#elif defined(__AVX512VBMI__)
    bytes = _mm512_permutexvar_epi8(_mm512_loadu_si512(source), bytes);
    return _mm512_multishift_epi64_epi8(_mm512_loadu_si512(shift), bytes);
#else
    uint8_t copy[64];
    uint16_t found[STEP];
    _mm512_storeu_si512(copy, bytes);
    for (int unit = 0; unit < STEP / 8; unit++) {
        uint64_t codes = eight(copy + BITS * unit, BITS);
        for (int j = 0; j < 8; j++)
            found[8 * unit + j] = codes >> BITS * j & (LEVELS - 1);
    }
    return _mm512_loadu_si512(found);
#endif
}

INLINE __m512i half_lanes(__m512i codes, int upper)
{
    return _mm512_cvtepu16_epi32(upper ? _mm512_extracti64x4_epi64(codes, 1) : _mm512_castsi512_si256(codes));
}

/* 16 of STEP codes as numbers. */
INLINE __m512 half(__m512i codes, int upper)
{
    return _mm512_cvtepi32_ps(_mm512_and_si512(half_lanes(codes, upper), _mm512_set1_epi32(LEVELS - 1)));
}
#endif

#ifdef TABLE
#include "levels.h"
#else
/* Whether groups differ in what codes stand for before they are scaled. */
INLINE int varies(const Weight *w) { return w->zero_type != NONE; }

/* Whether halves of steps are groups and all the same is taken as whole steps: with tables only (levels.h). */
INLINE int in_halves(const Weight *w) { (void)w; return 0; }

/* Columns `k` to `to` of an output, all of one group, as float32; k is a multiple of 8. */
INLINE void group_float(const Weight *w, int64_t row, int64_t k, int64_t to, float *out)
{
    const int64_t at = row * groups_of(w) + k / w->group;
    const float scale = scale_at(w, at), zero = zero_at(w, at);
    const uint8_t *from = w->codes + row * w->stride, *end = from + w->stride;
    from += k / 8 * BITS;
#ifdef WIDE
    const __m512 scales = _mm512_set1_ps(scale), zeros = _mm512_set1_ps(zero);
    for (; to - k >= STEP; k += STEP, from += STEP_BYTES) {
        ahead(from + AHEAD, STEP_BYTES);
        const __m512i codes = lanes(from, readable(STEP));
        _mm512_storeu_ps(out + k, _mm512_mul_ps(_mm512_sub_ps(half(codes, 0), zeros), scales));
        _mm512_storeu_ps(out + k + 16, _mm512_mul_ps(_mm512_sub_ps(half(codes, 1), zeros), scales));
    }
#endif
    for (; k < to; k += 8, from += BITS) {
        const Eight found = (numbers(eight(from, end - from)) - zero) * scale;
        if (to - k >= 8)
            memcpy(out + k, &found, sizeof found);
        else
            memcpy(out + k, &found, sizeof(float) * (to - k));
    }
}

#ifdef PAIRS
#if BITS <= 6
/* What a code of a group stands for, as bfloat16, in as many registers as that takes. Codes of less than 5 bits stand
   there several times: a look-up takes 5 bits of a lane, whatever is above the code. */
typedef struct { __m512i low, high; } Group;

#define ENTRIES (BITS == 6 ? 64 : 32)
static uint16_t differences[LEVELS + 1][ENTRIES];  /* code - zero, by zero and code */

__attribute__((constructor)) static void fill_differences(void)
{
    for (int zero = 0; zero <= LEVELS; zero++)
        for (int code = 0; code < ENTRIES; code++)
            differences[zero][code] = bfloat16(code % LEVELS - zero);
}

INLINE Group unscaled(const Weight *w, int64_t at)
{
    const int zero = zero_at(w, at);
    Group found = {_mm512_loadu_si512(differences[zero]), _mm512_loadu_si512(differences[zero] + ENTRIES - 32)};
    return found;
}

/* (code - zero) * scale for 16 codes. */
INLINE __m512 products(int first, float scale, float zero)
{
    const __m512 ramp = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i repeated = _mm512_and_si512(_mm512_cvtps_epi32(ramp), _mm512_set1_epi32(LEVELS - 1));
    const __m512 codes = BITS < 4 ? _mm512_cvtepi32_ps(repeated) : _mm512_add_ps(ramp, _mm512_set1_ps(first));
    return _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
}

INLINE Group scaled(const Weight *w, int64_t at)
{
    const float scale = scale_at(w, at), zero = zero_at(w, at);
    Group found;
#if BITS <= 4
    found.low = found.high = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(products(0, scale, zero)));
#else
    found.low = (__m512i)_mm512_cvtne2ps_pbh(products(16, scale, zero), products(0, scale, zero));
    found.high = (__m512i)_mm512_cvtne2ps_pbh(products(48, scale, zero), products(32, scale, zero));
#endif
    return found;
}

INLINE __m512i look_up(__m512i codes, Group group)
{
#if BITS < 6
    return _mm512_permutexvar_epi16(codes, group.low);
#else
    return _mm512_permutex2var_epi16(group.low, codes, group.high);
#endif
}
#else
typedef struct { __m512 scale, zero; } Group;

INLINE Group scaled(const Weight *w, int64_t at)
{
    Group found = {_mm512_set1_ps(scale_at(w, at)), _mm512_set1_ps(zero_at(w, at))};
    return found;
}

INLINE Group unscaled(const Weight *w, int64_t at)
{
    Group found = {_mm512_set1_ps(1), _mm512_set1_ps(zero_at(w, at))};
    return found;
}

INLINE __m512i look_up(__m512i codes, Group group)
{
    const __m512 low = _mm512_mul_ps(_mm512_sub_ps(half(codes, 0), group.zero), group.scale);
    const __m512 high = _mm512_mul_ps(_mm512_sub_ps(half(codes, 1), group.zero), group.scale);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
#endif
#endif
#endif

static void row_float(const Weight *w, int64_t row, float *out)
{
    for (int64_t k = 0; k < w->k; k += w->group)
        group_float(w, row, k, least(w->k, k + w->group), out);
}

/* `spare` [k] is for processors and groups that have no faster way. */
static void row_bfloat16(const Weight *w, int64_t row, uint16_t *out, float *spare)
{
#if defined(PAIRS) && defined(TABLE)
    if (in_halves(w)) {
        row_of_halves(w, row, out);
        return;
    }
#endif
#ifdef PAIRS
    if (in_steps(w)) {
        const uint8_t *from = w->codes + row * w->stride;
        const int64_t k = w->k, whole = k / STEP * STEP;
        int64_t at = row * groups_of(w);
        for (int64_t first = 0, c = 0; first < k; first += w->group, at++) {
            const Group group = scaled(w, at);
            for (const int64_t end = least(whole, first + w->group); c < end; c += STEP, from += STEP_BYTES) {
                ahead(from + AHEAD, STEP_BYTES);
                _mm512_storeu_si512(out + c, look_up(lanes(from, readable(STEP)), group));
            }
            if (c == whole && c < k && k <= first + w->group)
                _mm512_mask_storeu_epi16(out + c, (1u << (k - c)) - 1, look_up(lanes(from, readable(k - c)), group));
        }
        return;
    }
#endif
    row_float(w, row, spare);
    for (int64_t k = 0; k < w->k; k++)
        out[k] = bfloat16(spare[k]);
}
