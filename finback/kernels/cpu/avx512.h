// AVX-512 with BF16 and VNNI: 16 numbers a register, two products of bfloat16 or four of bytes a lane and instruction.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace finback {

using Floats = __m512;
using Ints = __m512i;
constexpr int REGISTERS = 32;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* out, Floats x) { _mm512_storeu_ps(out, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats absolute(Floats a) { return _mm512_abs_ps(a); }
inline Floats fma(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats rounded(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats power_of_two(Floats n) {  // of whole numbers -126 .. 127
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
// Pairs of neighbouring lanes, each a complex number, times those of `by`, or times their conjugates.
inline Floats turned(Floats x, Floats by) {
    return _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(by), mul(_mm512_permute_ps(x, 0xb1), _mm512_movehdup_ps(by)));
}
inline Floats turned_back(Floats x, Floats by) {
    return _mm512_fmsubadd_ps(x, _mm512_moveldup_ps(by), mul(_mm512_permute_ps(x, 0xb1), _mm512_movehdup_ps(by)));
}
inline Floats load(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}
inline void store(bf16* out, Floats x) { _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh(x)); }
inline void store(int8_t* out, Floats x) {
    _mm_storeu_si128((__m128i*)out, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

// Sixteen numbers of each, by turns.
inline __m512i by_turns(__m512i low_and_high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, low_and_high);
}
inline __m512i by_turns(const bf16* first, const bf16* second) {
    __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)first));
    return by_turns(_mm512_inserti64x4(both, _mm256_loadu_si256((const __m256i*)second), 1));
}
inline void interleave(bf16* out, const bf16* a, const bf16* b) { _mm512_storeu_si512(out, by_turns(a, b)); }
// Both as bfloat16, by turns: first[0], second[0], first[1], ...
inline void store_pairs(bf16* out, Floats first, Floats second) {
    _mm512_storeu_si512(out, by_turns((__m512i)_mm512_cvtne2ps_pbh(second, first)));
}

// What a register holds becomes unknown to the compiler.
template <class Register>
inline void forget(Register& x) {
    asm volatile("" : "+v"(x));
}

// x · 2^n of whole numbers n, nothing of x where n is far below zero; and log2 x to one digit.
inline Floats scaled(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline Floats rough_log2(Floats x) {
    return fma(_mm512_cvtepi32_ps(_mm512_castps_si512(x)), all(1.0f / (1 << 23)), all(-127.0f));
}
// The lanes of x whose bit is set, of `other` the rest.
inline Floats chosen(uint16_t lanes, Floats x, Floats other) { return _mm512_mask_blend_ps(__mmask16(lanes), other, x); }

inline Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

// Two neighbouring columns of 16 rows, and two numbers of a row in every lane.
struct Pairs {
    using Weight = __m512bh;
    using Row = __m512bh;
    static Weight weight(const uint8_t* w) { return (__m512bh)_mm512_loadu_si512(w); }
    static Row row(const bf16* x) {
        int32_t pair;
        std::memcpy(&pair, x, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static Floats dot(Floats sum, Weight w, Row x) { return _mm512_dpbf16_ps(sum, w, x); }

    // Sixteen columns of two rows; both of 16 rows' numbers, and how they are kept to be told to all lanes.
    using Share = bf16;
    static Weight of(const bf16* first, const bf16* second) { return (__m512bh)by_turns(first, second); }
    static void keep(Share* out, Floats first, Floats second) { store_pairs(out, first, second); }
};

// The bfloat16 of every E4M3 code without its sign: exact, or times a scale and rounded once.
struct Fp8Table {
    alignas(64) bf16 value[128];

    static const Fp8Table& exact() {
        static const Fp8Table table;
        return table;
    }
    Fp8Table(const Fp8Table& exact, float scale) {
        for (int code = 0; code < 128; code += 16) store(value + code, mul(load(exact.value + code), all(scale)));
    }
    __m512i part(int index) const { return _mm512_load_si512(value + 32 * index); }

  private:
    Fp8Table() {
        for (int code = 0; code < 128; code++) {
            int exponent = code >> 3, mantissa = code & 7;
            float size = exponent ? float(8 + mantissa) * float(1 << exponent) / 1024.0f : float(mantissa) / 512.0f;
            value[code] = narrow(size);
        }
    }
};

// The same of E4M3 codes: a table gives every code's bfloat16.
struct Fp8Pairs : Pairs {
    static Weight weight(const uint8_t* w) { return look_up(w, Fp8Table::exact()); }
    static Weight look_up(const uint8_t* w, const Fp8Table& table) {
        __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)w));
        __m512i low = _mm512_permutex2var_epi16(table.part(0), code, table.part(1));
        __m512i high = _mm512_permutex2var_epi16(table.part(2), code, table.part(3));
        __m512i size = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), low, high);
        __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(128)), 8);
        return (__m512bh)_mm512_or_si512(size, sign);
    }
};

// Four neighbouring columns of 16 rows as bytes without a sign, and four codes of a row in every lane.
inline Ints bytes(const uint8_t* w) { return _mm512_loadu_si512(w); }
inline Ints low_half(Ints w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline Ints high_half(Ints w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
inline Ints four(const int8_t* x) {
    int32_t codes;
    std::memcpy(&codes, x, 4);
    return _mm512_set1_epi32(codes);
}
inline Ints dot(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline Ints dot_small(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }

}  // namespace finback
