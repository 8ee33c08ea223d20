// Small products of blocks that lie in cache, and how their operands come into pairs: sums run over what lies in pairs.
#pragma once

#include <algorithm>

#include "common.h"
#include "panel.h"

namespace finback {

constexpr i64 BAND = 8;  // rows of a small product

// A panel holds 16 columns as [depth / 2][16][2]; the others of the same matrix lie `stride` numbers further each.
struct Panels {
    const bf16* at;
    i64 stride, count;
};

// M rows times P panels. Rows lie by themselves, `stride` numbers apart; or across, as such a panel's columns do, with
// `stride` numbers from one pair of all of them to the next.
template <bool across, i64 M, i64 P>
FINBACK_INLINE Sums<M, P> small_product(const bf16* w, i64 next, const bf16* x, i64 stride, i64 pairs) {
    auto sums = zeros<M, P>();
    for (i64 k = 0; k < pairs; k++) {
        Pairs::Weight weight[P];
#pragma GCC unroll 16
        for (i64 p = 0; p < P; p++) weight[p] = Pairs::weight(reinterpret_cast<const uint8_t*>(w + p * next + k * 32));
#pragma GCC unroll 16
        for (i64 m = 0; m < M; m++) {
            auto row = Pairs::row(across ? x + k * stride + 2 * m : x + m * stride + 2 * k);
#pragma GCC unroll 16
            for (i64 p = 0; p < P; p++) sums.at[m][p] = Pairs::dot(sums.at[m][p], weight[p], row);
        }
    }
    return sums;
}

// out(row, panel, sixteen sums) of BAND rows and all panels.
template <bool across, class Out>
FINBACK_INLINE void band_product(const Panels& w, const bf16* x, i64 stride, i64 pairs, Out out) {
    constexpr i64 M = REGISTERS == 32 ? BAND : BAND / 2;
    auto some = [&]<i64 P>(i64 row, i64 panel) {
        const bf16* from = x + row * (across ? 2 : stride);
        auto sums = small_product<across, M, P>(w.at + panel * w.stride, w.stride, from, stride, pairs);
#pragma GCC unroll 16
        for (i64 m = 0; m < M; m++)
#pragma GCC unroll 16
            for (i64 p = 0; p < P; p++) out(row + m, panel + p, sums.at[m][p]);
    };
    for (i64 row = 0; row < BAND; row += M) {
        i64 panel = 0;
        if constexpr (REGISTERS == 32) {
            for (; w.count - panel == 3 || w.count - panel > 4; panel += 3) some.template operator()<3>(row, panel);
            for (; w.count - panel >= 2; panel += 2) some.template operator()<2>(row, panel);
        }
        for (; panel < w.count; panel++) some.template operator()<1>(row, panel);
    }
}

// Eight words of eight rows, `stride` bytes apart, turned: the words of place k to out + 16 k.
inline void turn_words(const uint8_t* from, i64 stride, uint32_t* out) {
    __m256i row[8], two[8], four[8];
    for (int i = 0; i < 8; i++) row[i] = _mm256_loadu_si256((const __m256i*)(from + i * stride));
    for (int i = 0; i < 8; i += 2) {
        two[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
        two[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = _mm256_unpacklo_epi64(two[i + j], two[i + j + 2]);
            four[i + 2 * j + 1] = _mm256_unpackhi_epi64(two[i + j], two[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256((__m256i*)(out + 16 * i), _mm256_permute2x128_si256(four[i], four[i + 4], 0x20));
        _mm256_storeu_si256((__m256i*)(out + 16 * (i + 4)), _mm256_permute2x128_si256(four[i], four[i + 4], 0x31));
    }
}

// 16 rows, `token` numbers apart, into a panel over their numbers, [width / 2][16][2]; width a multiple of 16.
inline void panel_of_rows(const bf16* rows, i64 token, i64 width, bf16* out) {
    auto from = reinterpret_cast<const uint8_t*>(rows);
    auto words = reinterpret_cast<uint32_t*>(out);
    for (i64 k = 0; k < width / 2; k += 8)
        for (i64 half = 0; half < 2; half++)
            turn_words(from + (half * 8 * token + 2 * k) * 2, token * 2, words + k * 16 + half * 8);
}

// Rows first .. first + many - 1 of `count` into panels over the rows, [width / 16][count / 2][16][2].
inline void panels_over_rows(const bf16* rows, i64 token, i64 first, i64 many, i64 count, i64 width, bf16* out) {
    for (i64 r = 0; r < many; r += 2)
        for (i64 k = 0; k < width; k += 16)
            interleave(out + k * count + (first + r) * 16, rows + r * token + k, rows + (r + 1) * token + k);
}

inline void copy_rows(const bf16* from, i64 token, i64 count, i64 width, bf16* out) {
    for (i64 r = 0; r < count; r++)
        for (i64 k = 0; k < width; k += 16)
            _mm256_storeu_si256((__m256i*)(out + r * width + k), _mm256_loadu_si256((const __m256i*)(from + r * token + k)));
}

// take(first row, rows, numbers from one to the next) of `count` rows, 32 at a time, the last filled up with zeros.
template <class Take>
inline void by_strips(const bf16* from, i64 token, i64 count, i64 width, bf16* spare, Take take) {
    i64 first = 0;
    for (; first + 32 <= count; first += 32) take(first, from + first * token, token);
    if (first == count) return;
    copy_rows(from + first * token, token, count - first, width, spare);
    std::memset(spare + (count - first) * width, 0, (first + 32 - count) * width * 2);
    take(first, spare, width);
}

// 2^t to 3e-6 of itself, exactly 1 of 0; t at most 127.
inline Floats two_to_the(Floats t) {
    Floats n = rounded(t), r = sub(t, n);
    Floats y = fma(all(9.582853110e-3f), r, all(5.590642469e-2f));
    y = fma(fma(y, r, all(2.402409861e-1f)), r, all(6.931241934e-1f));
    return scaled(fma(y, r, all(1.0f)), n);
}

// log2 of numbers from 1 on, by Newton's steps to where two_to_the gives them back.
inline Floats log_two(Floats x) {
    Floats y = rough_log2(x);
    for (int step = 0; step < 3; step++) {
        Floats off = sub(mul(x, two_to_the(sub(zero(), y))), all(1.0f));
        y = fma(off, all(1.44269504f), y);
    }
    return y;
}

}  // namespace finback
