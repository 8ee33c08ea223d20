// Products of training: many rows, weights that change with every step, and gradients that are sums over tokens.
#pragma once

#include <algorithm>

#include "common.h"
#include "linear.h"
#include "panel.h"
#include "train_block.h"

namespace finback {

constexpr i64 ROWS_A_PIECE = 128;
constexpr i64 TOKENS_A_SUM = 512;  // fixed: sums over tokens are joined in the same order whoever makes them

// The left side of a product: rows that lie by themselves, `stride` numbers apart; or across, as a panel's columns do,
// with `stride` numbers from one pair of all of them to the next.
template <bool across>
struct Left {
    const bf16* data;
    i64 rows, stride;
};

inline Left<false> left_of(const Rows& x) { return {x.plain, x.count, x.stride}; }
// Rows first .. first + 7 of a matrix in panels.
inline Left<true> left_of(const Pack& pack, i64 first) {
    auto panel = reinterpret_cast<const bf16*>(pack.panel(first / PANEL)) + first % PANEL * 2;
    return {panel, std::min(BAND, pack.rows - first), 2 * PANEL};
}

template <i64 M, i64 P, bool across, class Out>
inline void train_block(const Left<across>& left, const Pack& right, i64 first, i64 row, Out out) {
    alignas(64) float held[M][P][PANEL];  // what takes sums must not take registers from the loop that makes them
    auto w = reinterpret_cast<const bf16*>(right.panel(first));
    const bf16* x = left.data + row * (across ? 2 : left.stride);
    auto sums = small_product<across, M, P>(w, right.stride / 2, x, left.stride, right.padded() / 2);
#pragma GCC unroll 16
    for (i64 m = 0; m < M; m++)
#pragma GCC unroll 16
        for (i64 p = 0; p < P; p++) store(held[m][p], sums.at[m][p]);
    for (i64 m = 0; m < M; m++)
        for (i64 p = 0; p < P; p++) out(row + m, first + p, load((const float*)held[m][p]));
}

template <i64 P, i64 M, bool across, class Out>
inline void train_rows(const Left<across>& left, const Pack& right, i64 first, i64 row, Out out) {
    for (; row + M <= left.rows; row += M) train_block<M, P>(left, right, first, row, out);
    if constexpr (M > 1)
        if (row < left.rows) train_rows<P, M / 2>(left, right, first, row, out);
}

// out(row, panel, sixteen sums) of all rows of the left and `count` panels of the right.
template <bool across, class Out>
inline void train_panels(const Left<across>& left, const Pack& right, i64 first, i64 count, Out out) {
    constexpr i64 M = REGISTERS == 32 ? BAND : 2;
    i64 end = first + count;
    for (; first + 2 <= end; first += 2) train_rows<2, M>(left, right, first, 0, out);
    if (first < end) train_rows<1, M>(left, right, first, 0, out);
}

// A matrix as training keeps it; `stride` numbers from one row to the next.
struct Stored {
    const void* data;
    i64 rows, cols, stride;
    bool wide;  // float, else bfloat16

    // Numbers column .. column + count - 1 of a row as bfloat16, filled up with zeros to `width`.
    void read(i64 row, i64 column, i64 count, i64 width, bf16* out) const {
        if (wide) {
            auto from = static_cast<const float*>(data) + row * stride + column;
            i64 i = 0;
            for (; i + 16 <= count; i += 16) store(out + i, load(from + i));
            for (; i < count; i++) out[i] = narrow(from[i]);
        } else {
            std::memcpy(out, static_cast<const bf16*>(data) + row * stride + column, count * 2);
        }
        std::memset(out + count, 0, (width - count) * 2);
    }

    // Sixteen numbers of a row, `count` of them its own: where they lie, or in `room`.
    const bf16* sixteen(i64 row, i64 column, i64 count, bf16* room) const {
        if (!wide && count == PANEL) return static_cast<const bf16*>(data) + row * stride + column;
        if (count == PANEL) store(room, load(static_cast<const float*>(data) + row * stride + column));
        else read(row, column, count, PANEL, room);
        return room;
    }
};

// Panel `panel` of a matrix by rows, as panels.py has it; `row` says where its row r is found.
template <class At>
inline void lay_rows(const Pack& to, i64 panel, At at) {
    alignas(64) bf16 part[PANEL][STEP];
    auto out = reinterpret_cast<uint32_t*>(const_cast<uint8_t*>(to.panel(panel)));
    for (i64 column = 0; column < to.padded(); column += STEP) {
        i64 count = std::clamp<i64>(to.cols - column, 0, STEP);
        for (i64 lane = 0; lane < PANEL; lane++)
            if (panel * PANEL + lane < to.rows) at(panel * PANEL + lane, column, count, part[lane]);
            else std::memset(part[lane], 0, sizeof part[lane]);
        for (i64 pair = 0; pair < STEP / 2; pair++, out += PANEL)
            for (i64 lane = 0; lane < PANEL; lane++) std::memcpy(out + lane, part[lane] + 2 * pair, 4);
    }
}

// Rows row .. row + rows - 1, STEP of them with zeros, of a matrix into the panels of its transpose: two neighbouring
// rows are a pair there. `at` gives sixteen numbers of a row.
template <class At>
inline void lay_columns(const Pack& to, i64 row, i64 rows, At at) {
    alignas(64) bf16 room[2][PANEL];
    static constexpr bf16 none[PANEL] = {};
    for (i64 panel = 0; panel < to.panels(); panel++) {
        i64 count = std::min(PANEL, to.rows - panel * PANEL);
        auto out = reinterpret_cast<bf16*>(const_cast<uint8_t*>(to.panel(panel))) + row * PANEL;
        auto numbers = [&](i64 r) { return r < rows ? at(row + r, panel * PANEL, count, room[r % 2]) : none; };
        for (i64 r = 0; r < STEP; r += 2, out += 2 * PANEL) interleave(out, numbers(r), numbers(r + 1));
    }
}

// The transpose of [tokens, numbers] in panels, a stretch of tokens after the other: what a sum over tokens reads
// together lies together, and never a power of two apart.
struct Columns {
    i64 numbers, tokens;
    uint8_t* data;

    i64 panels() const { return (numbers + PANEL - 1) / PANEL; }
    i64 stretches() const { return (tokens + TOKENS_A_SUM - 1) / TOKENS_A_SUM; }
    static i64 bytes(i64 numbers, i64 tokens) { return (numbers + PANEL - 1) / PANEL * round_up(tokens, STEP) * PANEL * 2; }
    Pack stretch(i64 index) const {
        i64 count = std::min(TOKENS_A_SUM, tokens - index * TOKENS_A_SUM), size = round_up(count, STEP) * PANEL * 2;
        return {Form::bf16, numbers, count, data + index * panels() * TOKENS_A_SUM * PANEL * 2, size};
    }
    // Tokens first .. first + STEP - 1, `count` of them; first is a multiple of STEP.
    template <class At>
    void lay(i64 first, i64 count, At at) const {
        i64 before = first / TOKENS_A_SUM * TOKENS_A_SUM;
        lay_columns(stretch(first / TOKENS_A_SUM), first - before, count,
                    [&](i64 row, i64 column, i64 many, bf16* room) { return at(before + row, column, many, room); });
    }
};

// Both ways for a whole matrix, in pieces.
inline void lay_rows_piece(const Pack& to, const Stored& from, i64 piece) {
    lay_rows(to, piece, [&](i64 row, i64 column, i64 count, bf16* out) { from.read(row, column, count, STEP, out); });
}
inline i64 columns_pieces(const Pack& to) { return to.padded() / STEP; }
inline void lay_columns_piece(const Pack& to, const Stored& from, i64 piece) {
    lay_columns(to, piece * STEP, std::min(STEP, from.rows - piece * STEP),
                [&](i64 row, i64 column, i64 count, bf16* room) { return from.sixteen(row, column, count, room); });
}

inline Columns arena_columns(Arena& arena, i64 numbers, i64 tokens) {
    return {numbers, tokens, arena.take<uint8_t>(Columns::bytes(numbers, tokens))};
}

inline Pack arena_pack(Arena& arena, i64 rows, i64 cols, i64 matrices = 1) {
    i64 bytes = panel_bytes(Form::bf16, cols), panels = (rows + PANEL - 1) / PANEL;
    return {Form::bf16, rows, cols, arena.take<uint8_t>(matrices * panels * bytes), bytes};
}

// x times a matrix, transposed, as bfloat16: rows of `out` are `stride` numbers apart.
inline void times(const Rows& x, const Pack& weight, bf16* out, i64 stride) {
    auto give = [&](i64 row, i64 panel, Floats sums) { put(out + row * stride, panel, weight.rows, sums); };
#if FINBACK_TILES
    panels(weight, 0, weight.panels(), x, give);
#else
    train_panels(left_of(x), weight, 0, weight.panels(), give);
#endif
}

// Part of aᵀ b: rows of a's panels first .. first + count - 1, columns of b's panels side .. end - 1.
inline void contract(const Columns& a, const Columns& b, i64 first, i64 count, i64 side, i64 end, float* out) {
    i64 last = std::min((first + count) * PANEL, a.numbers);
    for (i64 row = first * PANEL; row < last; row++)
        std::fill(out + row * b.numbers + side * PANEL, out + row * b.numbers + std::min(b.numbers, end * PANEL), 0.0f);
    for (i64 stretch = 0; stretch < a.stretches(); stretch++) {
        Pack left = a.stretch(stretch), right = b.stretch(stretch);
        for (i64 row = first * PANEL; row < last; row += BAND)
            train_panels(left_of(left, row), right, side, end - side, [&](i64 m, i64 panel, Floats sums) {
                float* to = out + (row + m) * b.numbers;
                if ((panel + 1) * PANEL <= b.numbers)
                    return store(to + panel * PANEL, add(load((const float*)to + panel * PANEL), sums));
                alignas(64) float before[PANEL] = {};
                std::memcpy(before, to + panel * PANEL, (b.numbers - panel * PANEL) * 4);
                put(to, panel, b.numbers, add(load((const float*)before), sums));
            });
    }
}

// The pieces of aᵀ b: up to 16 panels of b with a few of a.
struct Contraction {
    static constexpr i64 SIDE_PANELS = 16;
    i64 panels, sides, together;

    Contraction(i64 rows, i64 cols, i64 threads)
        : panels((rows + PANEL - 1) / PANEL), sides(((cols + PANEL - 1) / PANEL + SIDE_PANELS - 1) / SIDE_PANELS),
          together(std::clamp<i64>(panels * sides / (threads * 4), 1, 4)) {}

    i64 pieces() const { return (panels + together - 1) / together * sides; }
    void run(const Columns& a, const Columns& b, i64 piece, float* out) const {
        i64 first = piece / sides * together, side = piece % sides * SIDE_PANELS;
        contract(a, b, first, std::min(together, panels - first), side, std::min(side + SIDE_PANELS, b.panels()), out);
    }
};

}  // namespace finback
