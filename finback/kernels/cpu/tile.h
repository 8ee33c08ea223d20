// Many rows times panels, by tiles: the order of a panel is that of a tile, so panels are read as they lie.
//
// How far numbers travel. A product of two tiles takes 16 cycles and 16 x 16 x 32 x 2 = 16,384 operations of bfloat16.
// Two row tiles x two panels need 4 loads of 1 KiB for 4 products: 1/16 byte an operation, 64 bytes a cycle, which L1
// gives (128) and L2 nearly. L3 gives about 10 and memory 5, so what goes through tiles must lie in L2: HOME bytes of
// rows stay there beside HOME bytes of panels. From L3 or memory a number of a row then comes once for every group of
// panels, 1 / (16 x panels) byte an operation: with 16 panels 4 bytes a cycle. A number of a matrix comes once for
// all rows (1 / rows byte an operation) as long as its group of panels stays. Past 8,192 columns of bfloat16 two panels
// are more than HOME, and L3 is the limit.
#pragma once

#include <algorithm>

#include "common.h"

namespace finback {

// In fixed order every product goes this way, however many rows it has.
inline bool fixed_order = false;

#if FINBACK_TILES

// Rows from which tiles pay. By reckoning, to be measured on a machine with AMX: a line of 64 bytes of weights takes a
// core about 13 cycles to come from memory, as long as 7 rows' products in registers; to write int4 out as bfloat16
// costs as much as 16 rows' products of it.
inline i64 least_rows(Form form) { return form == Form::int4 ? 16 : 8; }

inline bool by_tiles(const Pack& pack, const Rows& x) {
    return x.width % STEP == 0 && (fixed_order || x.count >= least_rows(pack.form));
}

constexpr i64 HOME = 512 << 10;  // of an L2 of 2 MiB: rows, panels, and as much again for what passes through
constexpr i64 TILE = 16;         // rows
constexpr i64 SIDE_BY_SIDE = 2 * PANEL;

// Sums of 32 rows x 2 panels, and the whole numbers that they are made of.
struct TileSums {
    static constexpr i64 GROUPS = 4;  // groups of columns whose sums are scaled together: all stay in L1
    alignas(64) float at[2 * TILE][SIDE_BY_SIDE];
    alignas(64) int32_t part[GROUPS][2 * TILE][SIDE_BY_SIDE];
};

// Up to 32 rows and 2 panels of one product.
struct TileBlock {
    const uint8_t* row;  // bytes: bfloat16 numbers or codes
    i64 stride;          // bytes
    i64 rows;
    const uint8_t* panel[2];  // in the order of tiles
};

template <bool whole, i64 M, i64 P>
inline void tile_steps(const TileBlock& block, i64 from, i64 end, i64 depth, void* sums) {
    auto dot = []<int sum, int a, int b>() {
        if constexpr (whole) tile_dot_int8<sum, a, b>(); else tile_dot_bf16<sum, a, b>();
    };
    shape_tiles(std::min(TILE, block.rows), M == 2 ? block.rows - TILE : 0, depth);
    tile_zero<0>();
    if constexpr (P == 2) tile_zero<1>();
    if constexpr (M == 2) tile_zero<2>();
    if constexpr (M == 2 && P == 2) tile_zero<3>();
    for (i64 at = from; at < end; at += depth) {
        tile_load<4>(block.row + at, block.stride);
        if constexpr (M == 2) tile_load<5>(block.row + TILE * block.stride + at, block.stride);
        tile_load<6>(block.panel[0] + at * PANEL, 64);
        dot.template operator()<0, 4, 6>();
        if constexpr (M == 2) dot.template operator()<2, 5, 6>();
        if constexpr (P == 2) {
            tile_load<7>(block.panel[1] + at * PANEL, 64);
            dot.template operator()<1, 4, 7>();
            if constexpr (M == 2) dot.template operator()<3, 5, 7>();
        }
    }
    constexpr i64 next = SIDE_BY_SIDE * 4;
    char* out = static_cast<char*>(sums);
    tile_store<0>(out, next);
    if constexpr (P == 2) tile_store<1>(out + PANEL * 4, next);
    if constexpr (M == 2) tile_store<2>(out + TILE * next, next);
    if constexpr (M == 2 && P == 2) tile_store<3>(out + TILE * next + PANEL * 4, next);
}

template <bool whole>
inline void tile_steps(const TileBlock& block, i64 panels, i64 from, i64 end, i64 depth, void* sums) {
    if (block.rows > TILE)
        panels == 2 ? tile_steps<whole, 2, 2>(block, from, end, depth, sums)
                    : tile_steps<whole, 2, 1>(block, from, end, depth, sums);
    else
        panels == 2 ? tile_steps<whole, 1, 2>(block, from, end, depth, sums)
                    : tile_steps<whole, 1, 1>(block, from, end, depth, sums);
}

// As product_int8 (panel.h), bit for bit. `x`: from the block's first row on.
inline void tile_int8(const TileBlock& block, i64 panels, const Rows& x, TileSums& sums) {
    std::memset(sums.at, 0, sizeof(sums.at));
    for (i64 group = 0; group < x.groups; group += TileSums::GROUPS) {
        i64 many = std::min(TileSums::GROUPS, x.groups - group);
        for (i64 g = 0; g < many; g++) {
            i64 from = (group + g) * 128, end = std::min(from + 128, x.width);
            tile_steps<true>(block, panels, from, end, (end - from) % 64 ? 32 : 64, sums.part[g]);
        }
        for (i64 m = 0; m < block.rows; m++) {
            const float* scale = x.scale + m * x.groups + group;
            const int32_t* offset = x.offset + m * x.groups + group;
            for (i64 p = 0; p < panels; p++) {
                Floats sum = load(sums.at[m] + p * PANEL);
                for (i64 g = 0; g < many; g++) {
                    Ints part = _mm512_load_si512(sums.part[g][m] + p * PANEL);
                    sum = fma(to_floats(_mm512_add_epi32(part, all_ints(offset[g]))), all(scale[g]), sum);
                }
                store(sums.at[m] + p * PANEL, sum);
            }
        }
    }
    for (i64 p = 0; p < panels; p++) {
        Floats scale = load((const float*)(block.panel[p] + x.width * PANEL));
        for (i64 m = 0; m < block.rows; m++) store(sums.at[m] + p * PANEL, mul(load(sums.at[m] + p * PANEL), scale));
    }
}

// Two columns of 16 rows as the pairs of a tile's row, rounded once.
inline void store_pair(bf16* out, Floats first, Floats second) {
    const __m512i by_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(by_turns, (__m512i)_mm512_cvtne2ps_pbh(second, first)));
}

inline void unpack_int4(const uint8_t* w, i64 width, bf16* out) {
    const Floats levels = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    for (i64 column = 0; column < width; column += 32, w += PANEL * 18, out += 32 * PANEL) {
        Floats scale = load((const bf16*)(w + PANEL * 16));
        auto values = [&](Ints codes) { return mul(_mm512_permutexvar_ps(codes, levels), scale); };  // by its low 4 bits
        for (i64 quad = 0; quad < 4; quad++) {
            Ints codes = bytes(w + quad * 64);
            bf16 *low = out + quad * 4 * PANEL, *high = low + 16 * PANEL;
            store_pair(low, values(codes), values(_mm512_srli_epi32(codes, 8)));
            store_pair(low + 2 * PANEL, values(_mm512_srli_epi32(codes, 16)), values(_mm512_srli_epi32(codes, 24)));
            store_pair(high, values(_mm512_srli_epi32(codes, 4)), values(_mm512_srli_epi32(codes, 12)));
            store_pair(high + 2 * PANEL, values(_mm512_srli_epi32(codes, 20)), values(_mm512_srli_epi32(codes, 28)));
        }
    }
}

inline void unpack_fp8(const uint8_t* w, i64 width, bf16* out) {
    for (i64 block = 0; block * 128 < width; block++) {
        float scale;
        std::memcpy(&scale, w + width * PANEL + block * 4, 4);
        const Fp8Table table(Fp8Table::exact(), scale);
        for (i64 k = block * 128; k < std::min(block * 128 + 128, width); k += 2)
            _mm512_storeu_si512(out + k * PANEL, (__m512i)Fp8Pairs::look_up(w + k * PANEL, table));
    }
}

// Panels in the order of tiles: as they lie, or written out by this thread.
struct TilePanels {
    const uint8_t* data;
    i64 stride;

    TilePanels(const Pack& pack, i64 first, i64 count, i64 width) : data(pack.panel(first)), stride(pack.stride) {
        if (pack.form != Form::fp8 && pack.form != Form::int4) return;
        static thread_local std::unique_ptr<bf16[], Free> numbers;
        static thread_local i64 room = 0;
        i64 each = width * PANEL;
        if (count * each > room) {
            numbers.reset(static_cast<bf16*>(allocate((room = count * each) * 2)));
        }
        for (i64 p = 0; p < count; p++)
            (pack.form == Form::fp8 ? unpack_fp8 : unpack_int4)(pack.panel(first + p), width, numbers.get() + p * each);
        data = reinterpret_cast<const uint8_t*>(numbers.get()), stride = each * 2;
    }
};

template <class Out>
inline void tile_group(const Pack& pack, i64 first, i64 count, const Rows& x, Out out) {
    bool whole = pack.form == Form::int8;
    i64 row_bytes = x.width * (whole ? 1 : 2), stay = std::max<i64>(HOME / row_bytes / (2 * TILE), 1) * 2 * TILE;
    const TilePanels panels(pack, first, count, x.width);
    TileSums sums;
    for (i64 start = 0; start < x.count; start += stay)
        for (i64 p = 0; p < count; p += 2)
            for (i64 row = start; row < std::min(start + stay, x.count); row += 2 * TILE) {
                const uint8_t* panel = panels.data + p * panels.stride;
                i64 many = std::min<i64>(2, count - p), rows = std::min(2 * TILE, x.count - row);
                const Rows part = x.from(row, rows);
                const void* numbers = whole ? static_cast<const void*>(part.code) : part.plain;
                const TileBlock block{static_cast<const uint8_t*>(numbers), x.stride * (whole ? 1 : 2), rows,
                                      {panel, panel + (many - 1) * panels.stride}};
                if (whole) tile_int8(block, many, part, sums);
                else tile_steps<false>(block, many, 0, row_bytes, 64, sums.at);
                for (i64 m = 0; m < rows; m++)
                    for (i64 q = 0; q < many; q++) out(row + m, first + p + q, load(sums.at[m] + q * PANEL));
            }
}

template <class Out>
inline void tile_panels(const Pack& pack, i64 first, i64 count, const Rows& x, Out out) {
    i64 each = x.width * PANEL * (pack.form == Form::int8 ? 1 : 2), end = first + count;
    i64 group = std::max<i64>(HOME / each / 2, 1) * 2;  // panels of a gate and its up projection stay together
    for (; first < end; first += group) tile_group(pack, first, std::min(group, end - first), x, out);
}

#endif

}  // namespace finback
