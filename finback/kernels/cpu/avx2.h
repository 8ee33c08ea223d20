// AVX2 with FMA and F16C: the same sixteen numbers in two registers, bfloat16 widened on the way.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace finback {

struct Floats {
    __m256 a, b;
};
struct Ints {
    __m256i a, b;
};
constexpr int REGISTERS = 8;  // of this size

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline void store(float* out, Floats x) {
    _mm256_storeu_ps(out, x.a);
    _mm256_storeu_ps(out + 8, x.b);
}
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats smaller(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats absolute(Floats x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline Floats fma(Floats x, Floats y, Floats s) {
    return {_mm256_fmadd_ps(x.a, y.a, s.a), _mm256_fmadd_ps(x.b, y.b, s.b)};
}
inline float sum(Floats x) {
    __m256 y = _mm256_add_ps(x.a, x.b);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
inline float largest(Floats x) {
    __m256 y = _mm256_max_ps(x.a, x.b);
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}
inline Floats rounded(Floats x) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
inline __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Floats power_of_two(Floats n) { return {power_of_two(n.a), power_of_two(n.b)}; }  // whole numbers -126 .. 127
// Pairs of neighbouring lanes, each a complex number, times those of `by`, or times their conjugates.
inline __m256 crossed(__m256 x, __m256 by) { return _mm256_mul_ps(_mm256_permute_ps(x, 0xb1), _mm256_movehdup_ps(by)); }
inline Floats turned(Floats x, Floats by) {
    return {_mm256_fmaddsub_ps(x.a, _mm256_moveldup_ps(by.a), crossed(x.a, by.a)),
            _mm256_fmaddsub_ps(x.b, _mm256_moveldup_ps(by.b), crossed(x.b, by.b))};
}
inline Floats turned_back(Floats x, Floats by) {
    return {_mm256_fmsubadd_ps(x.a, _mm256_moveldup_ps(by.a), crossed(x.a, by.a)),
            _mm256_fmsubadd_ps(x.b, _mm256_moveldup_ps(by.b), crossed(x.b, by.b))};
}
inline __m256 widened(const bf16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
}
inline Floats load(const bf16* x) { return {widened(x), widened(x + 8)}; }
inline __m256i narrowed(__m256 x) {  // as `narrow`, into the low halves of the lanes
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(64 << 16));
    __m256 unordered = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(unordered)), 16);
}
inline void store(bf16* out, Floats x) {
    __m256i mixed = _mm256_packus_epi32(narrowed(x.a), narrowed(x.b));
    _mm256_storeu_si256((__m256i*)out, _mm256_permute4x64_epi64(mixed, 0xd8));
}
inline void store(int8_t* out, Floats x) {
    __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    pairs = _mm256_permute4x64_epi64(pairs, 0xd8);
    _mm_storeu_si128((__m128i*)out, _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

// Sixteen numbers of each, by turns.
inline void interleave(bf16* out, const bf16* a, const bf16* b) {
    __m256i x = _mm256_loadu_si256((const __m256i*)a), y = _mm256_loadu_si256((const __m256i*)b);
    __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
    _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((__m256i*)out + 1, _mm256_permute2x128_si256(low, high, 0x31));
}
// x · 2^n of whole numbers n, next to nothing of x where n is far below zero; and log2 x to one digit.
inline Floats scaled(Floats x, Floats n) { return mul(x, power_of_two(larger(n, all(-126.0f)))); }
inline Floats rough_log2(Floats x) {
    Floats bits = {_mm256_cvtepi32_ps(_mm256_castps_si256(x.a)), _mm256_cvtepi32_ps(_mm256_castps_si256(x.b))};
    return fma(bits, all(1.0f / (1 << 23)), all(-127.0f));
}
// The lanes of x whose bit is set, of `other` the rest.
inline __m256 chosen(int lanes, __m256 x, __m256 other) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(lanes), bit), bit);
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(set));
}
inline Floats chosen(uint16_t lanes, Floats x, Floats other) {
    return {chosen(lanes, x.a, other.a), chosen(lanes >> 8, x.b, other.b)};
}
// Both as bfloat16, by turns: first[0], second[0], first[1], ...
inline __m256i paired(__m256 first, __m256 second) {
    return _mm256_blend_epi16(narrowed(first), _mm256_slli_epi32(narrowed(second), 16), 0xaa);
}
inline void store_pairs(bf16* out, Floats first, Floats second) {
    _mm256_storeu_si256((__m256i*)out, paired(first.a, second.a));
    _mm256_storeu_si256((__m256i*)out + 1, paired(first.b, second.b));
}

// What registers hold becomes unknown to the compiler.
inline void forget(__m256& x) { asm volatile("" : "+x"(x)); }
inline void forget(Floats& x) { forget(x.a), forget(x.b); }
inline void forget(Ints& x) { asm volatile("" : "+x"(x.a), "+x"(x.b)); }

inline Ints all_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

// Two neighbouring columns of 16 rows, as the first and the second of each.
struct Pairs {
    struct Weight {
        Floats first, second;
    };
    struct Row {
        __m256 first, second;
    };
    static Floats firsts(__m256i a, __m256i b) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    }
    static Floats seconds(__m256i a, __m256i b) {
        const __m256i mask = _mm256_set1_epi32(int(0xffff0000));
        return {_mm256_castsi256_ps(_mm256_and_si256(a, mask)), _mm256_castsi256_ps(_mm256_and_si256(b, mask))};
    }
    static Weight weight(const uint8_t* w) {
        __m256i a = _mm256_loadu_si256((const __m256i*)w), b = _mm256_loadu_si256((const __m256i*)w + 1);
        return {firsts(a, b), seconds(a, b)};
    }
    static Row row(const bf16* x) { return {_mm256_set1_ps(widen(x[0])), _mm256_set1_ps(widen(x[1]))}; }
    static Floats dot(Floats s, const Weight& w, const Row& x) {
        s = {_mm256_fmadd_ps(w.first.a, x.first, s.a), _mm256_fmadd_ps(w.first.b, x.first, s.b)};
        return {_mm256_fmadd_ps(w.second.a, x.second, s.a), _mm256_fmadd_ps(w.second.b, x.second, s.b)};
    }

    // Sixteen columns of two rows; both of 16 rows' numbers, and how they are kept to be told to all lanes.
    using Share = float;
    static Weight of(const bf16* first, const bf16* second) { return {load(first), load(second)}; }
    static Row row(const float* x) { return {_mm256_broadcast_ss(x), _mm256_broadcast_ss(x + 1)}; }
    static void keep(Share* out, Floats first, Floats second) {
        alignas(32) float a[16], b[16];
        store(a, first), store(b, second);
        for (int lane = 0; lane < 16; lane++) out[2 * lane] = a[lane], out[2 * lane + 1] = b[lane];
    }
};

inline void forget(Pairs::Weight& w) { forget(w.first), forget(w.second); }
inline void forget(Pairs::Row& x) { forget(x.first), forget(x.second); }

// The same of E4M3 codes: sign and the other bits one exponent bit apart are a float16, value x 2^-8.
struct Fp8Pairs : Pairs {
    static __m256 halves(__m128i h) { return _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256.0f)); }
    static Weight weight(const uint8_t* w) {
        Weight out;
        for (int half = 0; half < 2; half++) {
            __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)w + half));
            __m256i size = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(127)), 7);
            __m256i sign = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(128)), 8);
            __m256i both = _mm256_or_si256(size, sign);
            // Even columns into the low words of each half, odd ones into the high words.
            const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                                   0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
            both = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(both, order), 0xd8);
            __m256 first = halves(_mm256_castsi256_si128(both)), second = halves(_mm256_extracti128_si256(both, 1));
            (half ? out.first.b : out.first.a) = first;
            (half ? out.second.b : out.second.a) = second;
        }
        return out;
    }
};

// Four neighbouring columns of 16 rows as bytes without a sign, and four codes of a row in every lane.
inline Ints bytes(const uint8_t* w) {
    return {_mm256_loadu_si256((const __m256i*)w), _mm256_loadu_si256((const __m256i*)w + 1)};
}
inline Ints low_half(Ints w) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
}
inline Ints high_half(Ints w) { return low_half({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)}); }
inline Ints four(const int8_t* x) {
    int32_t codes;
    std::memcpy(&codes, x, 4);
    return all_ints(codes);
}
inline __m256i dot_small(__m256i s, __m256i w, __m256i x) {  // weights below 16: no sum of two passes 16 bits
    return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
inline Ints dot_small(Ints s, Ints w, Ints x) { return {dot_small(s.a, w.a, x.a), dot_small(s.b, w.b, x.b)}; }
inline __m256i dot(__m256i s, __m256i w, __m256i x) {
    // Two products of larger bytes may pass 16 bits: the high and the low half of each byte by themselves do not.
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(w, mask), x), _mm256_set1_epi16(1));
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
    high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(16));
    return _mm256_add_epi32(s, _mm256_add_epi32(low, high));
}
inline Ints dot(Ints s, Ints w, Ints x) { return {dot(s.a, w.a, x.a), dot(s.b, w.b, x.b)}; }

}  // namespace finback
