// The heart: M rows times P panels, in registers. Everything else brings rows and panels here.
#pragma once

#include "common.h"
#include "tile.h"

namespace finback {

constexpr i64 MOST = REGISTERS == 32 ? 8 : 3;      // rows at a time
constexpr i64 WIDE = REGISTERS == 32 ? 4 : 2;      // panels at a time, of few rows
constexpr i64 FEW = REGISTERS == 32 ? 4 : 1;       // rows that leave registers for WIDE panels

// Sums stay in registers only where the compiler sees all of a loop over them at once: what adds to them is inlined,
// and they are handed on by value.
#define FINBACK_INLINE inline __attribute__((always_inline))

template <i64 M, i64 P>
struct Sums {
    Floats at[M][P];
};

template <i64 M, i64 P>
FINBACK_INLINE Sums<M, P> zeros() {
    Sums<M, P> sums;
#pragma GCC unroll 16
    for (i64 m = 0; m < M; m++)
#pragma GCC unroll 16
        for (i64 p = 0; p < P; p++) sums.at[m][p] = zero();
    return sums;
}

// Columns k .. end in bfloat16, from `Pair::weight`s of `size` bytes each.
template <class Pair, i64 size, i64 M, i64 P>
FINBACK_INLINE void pairs(const uint8_t* const (&w)[P], const bf16* x, i64 stride, i64 k, i64 end, Sums<M, P>& sums) {
    for (; k < end; k += 2) {
        typename Pair::Weight weight[P];
#pragma GCC unroll 16
        for (i64 p = 0; p < P; p++) weight[p] = Pair::weight(w[p] + k / 2 * size);
#pragma GCC unroll 16
        for (i64 m = 0; m < M; m++) {
            auto row = Pair::row(x + m * stride + k);
#pragma GCC unroll 16
            for (i64 p = 0; p < P; p++) sums.at[m][p] = Pair::dot(sums.at[m][p], weight[p], row);
        }
    }
}

template <i64 M, i64 P>
FINBACK_INLINE Sums<M, P> product_bf16(const uint8_t* const (&w)[P], const Rows& x) {
    auto sums = zeros<M, P>();
    pairs<Pairs, 64>(w, x.plain, x.stride, 0, x.width, sums);
    return sums;
}

template <i64 M, i64 P>
FINBACK_INLINE Sums<M, P> product_fp8(const uint8_t* const (&w)[P], const Rows& x) {
    auto sums = zeros<M, P>();
    for (i64 block = 0; block * 128 < x.width; block++) {
        auto part = zeros<M, P>();
        i64 end = block * 128 + 128 < x.width ? block * 128 + 128 : x.width;
        pairs<Fp8Pairs, 32>(w, x.plain, x.stride, block * 128, end, part);
#pragma GCC unroll 16
        for (i64 p = 0; p < P; p++) {
            float scale;
            std::memcpy(&scale, w[p] + x.width * PANEL + block * 4, 4);
#pragma GCC unroll 16
            for (i64 m = 0; m < M; m++) sums.at[m][p] = fma(part.at[m][p], all(scale), sums.at[m][p]);
        }
    }
    return sums;
}

template <i64 M, i64 P>
FINBACK_INLINE Sums<M, P> product_int8(const uint8_t* const (&w)[P], const Rows& x) {
    auto sums = zeros<M, P>();
    for (i64 group = 0; group < x.groups; group++) {
        Ints part[M][P];
#pragma GCC unroll 16
        for (i64 m = 0; m < M; m++)
#pragma GCC unroll 16
            for (i64 p = 0; p < P; p++) part[m][p] = all_ints(x.offset[m * x.groups + group]);
        i64 end = group * 128 + 128 < x.width ? group * 128 + 128 : x.width;
        for (i64 k = group * 128; k < end; k += 4) {
            Ints weight[P];
#pragma GCC unroll 16
            for (i64 p = 0; p < P; p++) weight[p] = bytes(w[p] + k * PANEL);
#pragma GCC unroll 16
            for (i64 m = 0; m < M; m++) {
                Ints row = four(x.code + m * x.stride + k);
#pragma GCC unroll 16
                for (i64 p = 0; p < P; p++) part[m][p] = dot(part[m][p], weight[p], row);
            }
        }
#pragma GCC unroll 16
        for (i64 m = 0; m < M; m++)
#pragma GCC unroll 16
            for (i64 p = 0; p < P; p++)
                sums.at[m][p] = fma(to_floats(part[m][p]), all(x.scale[m * x.groups + group]), sums.at[m][p]);
    }
#pragma GCC unroll 16
    for (i64 p = 0; p < P; p++) {
        Floats scale = load((const float*)(w[p] + x.width * PANEL));
#pragma GCC unroll 16
        for (i64 m = 0; m < M; m++) sums.at[m][p] = mul(sums.at[m][p], scale);
    }
    return sums;
}

template <i64 M, i64 P>
FINBACK_INLINE Sums<M, P> product_int4(const uint8_t* const (&w)[P], const Rows& x) {
    constexpr i64 size = PANEL * 16 + PANEL * 2;  // of a group of 32 columns: codes, then scales
    auto sums = zeros<M, P>();
    for (i64 group = 0; group < x.groups; group++) {
        Ints part[M][P];
#pragma GCC unroll 16
        for (i64 m = 0; m < M; m++)
#pragma GCC unroll 16
            for (i64 p = 0; p < P; p++) part[m][p] = all_ints(x.offset[m * x.groups + group]);
        for (i64 quad = 0; quad < 4; quad++) {
            Ints low[P], high[P];
#pragma GCC unroll 16
            for (i64 p = 0; p < P; p++) {
                Ints both = bytes(w[p] + group * size + quad * 64);
                low[p] = low_half(both), high[p] = high_half(both);
            }
#pragma GCC unroll 16
            for (i64 m = 0; m < M; m++) {
                const int8_t* row = x.code + m * x.stride + group * 32 + quad * 4;
                Ints first = four(row), second = four(row + 16);
#pragma GCC unroll 16
                for (i64 p = 0; p < P; p++)
                    part[m][p] = dot_small(dot_small(part[m][p], low[p], first), high[p], second);
            }
        }
#pragma GCC unroll 16
        for (i64 p = 0; p < P; p++) {
            Floats scale = load((const bf16*)(w[p] + group * size + PANEL * 16));
#pragma GCC unroll 16
            for (i64 m = 0; m < M; m++)
                sums.at[m][p] =
                    fma(to_floats(part[m][p]), mul(scale, all(x.scale[m * x.groups + group])), sums.at[m][p]);
        }
    }
    return sums;
}

// Where sums go: sixteen of a row and panel at a time. One type for all takers, so that the loops are compiled once.
struct Sink {
    void* taker;
    void (*take)(void* taker, i64 row, i64 panel, Floats sums);

    void operator()(i64 row, i64 panel, Floats sums) const { take(taker, row, panel, sums); }
};

template <i64 M, i64 P>
inline void block(const Pack& pack, i64 first, const Rows& x, i64 row, Sink out) {
    const uint8_t* w[P];
#pragma GCC unroll 16
    for (i64 p = 0; p < P; p++) w[p] = pack.panel(first + p);
    auto give = [&](const Sums<M, P>& sums) {
#pragma GCC unroll 16
        for (i64 m = 0; m < M; m++)
#pragma GCC unroll 16
            for (i64 p = 0; p < P; p++) out(row + m, first + p, sums.at[m][p]);
    };
    switch (pack.form) {
        case Form::bf16: return give(product_bf16<M, P>(w, x));
        case Form::fp8: return give(product_fp8<M, P>(w, x));
        case Form::int8: return give(product_int8<M, P>(w, x));
        case Form::int4: return give(product_int4<M, P>(w, x));
    }
}

template <i64 P, i64 M>
inline void rows_left(const Pack& pack, i64 first, const Rows& x, i64 row, Sink out) {
    if constexpr (M > 0) {
        if (x.count - row == M)
            block<M, P>(pack, first, x.from(row, M), row, out);
        else
            rows_left<P, M - 1>(pack, first, x, row, out);
    }
}

template <i64 P, i64 M>
inline void all_rows(const Pack& pack, i64 first, const Rows& x, Sink out) {
    i64 row = 0;
    for (; row + M <= x.count; row += M) block<M, P>(pack, first, x.from(row, M), row, out);
    rows_left<P, M - 1>(pack, first, x, row, out);
}

inline void all_panels(const Pack& pack, i64 first, i64 count, const Rows& x, Sink out) {
#if FINBACK_TILES
    if (by_tiles(pack, x)) return tile_panels(pack, first, count, x, out);
#endif
    i64 end = first + count;
    if (x.count <= FEW)
        for (; first + WIDE <= end; first += WIDE) rows_left<WIDE, FEW>(pack, first, x, 0, out);
    for (; first + 2 <= end; first += 2) all_rows<2, MOST>(pack, first, x, out);
    if (first < end) all_rows<1, MOST>(pack, first, x, out);
}

// out(row, panel, sixteen sums) for every row and the panels first .. first + count - 1, of a row the panels in their
// order. A row's sums are the same numbers whatever other rows there are, as long as tiles take both numbers of rows or
// neither: in fixed order always.
template <class Out>
inline void panels(const Pack& pack, i64 first, i64 count, const Rows& x, Out out) {
    auto take = [](void* taker, i64 row, i64 panel, Floats sums) { (*static_cast<Out*>(taker))(row, panel, sums); };
    all_panels(pack, first, count, x, {&out, take});
}

// Panels that a piece of work on many rows takes.
inline i64 panels_of_many([[maybe_unused]] i64 panels, [[maybe_unused]] int threads) {
#if FINBACK_TILES
    return std::clamp<i64>(panels / (threads * 4) / 2 * 2, 2, 16);  // rows come from L3 once for all of them: tile.h
#else
    return 2;
#endif
}

}  // namespace finback
