// x Wᵀ (+ bias).
#pragma once

#include "common.h"
#include "calls.h"

namespace finback {

// Sixteen sums to a row of `size` numbers that need not be a multiple of 16.
template <class Number>
inline void put(Number* row, i64 panel, i64 size, Floats sums) {
    if ((panel + 1) * PANEL <= size) return store(row + panel * PANEL, sums);
    alignas(64) Number rest[PANEL];
    store(rest, sums);
    std::memcpy(row + panel * PANEL, rest, (size - panel * PANEL) * sizeof(Number));
}

// A copy of a row, filled up, and rounded where the weight is made of integers.
inline void bring(Form form, const bf16* x, i64 numbers, const Rows& to, i64 row) {
    bf16* out = to.plain + row * to.stride;
    if (x != out) std::memcpy(out, x, numbers * 2);
    std::memset(out + numbers, 0, (to.width - numbers) * 2);
    if (by_integers(form))
        round_row(form, out, to.width, to.code + row * to.stride, to.scale + row * to.groups,
                  to.offset + row * to.groups);
}

// Pieces of work of a matrix: enough for every thread, each a few panels that lie side by side.
inline i64 panels_a_piece(i64 panels, i64 rows, int threads) {
    i64 least = rows <= FEW ? WIDE : 2, most = rows <= FEW || !FINBACK_TILES ? 4 * least : 16;
    i64 fair = panels / (threads * 8) / least * least;
    return fair < least ? least : fair > most ? most : fair;
}

inline void linear(const LinearCall& call, int threads) {
    const Pack& weight = call.weight;
    Arena& arena = Arena::fresh();
    bool ready = !by_integers(weight.form) && weight.cols % STEP == 0;
    Rows x = ready ? Rows{call.rows, weight.cols, weight.cols, const_cast<bf16*>(call.x)}
                   : arena.rows(call.rows, weight.cols, weight.form);
    i64 step = panels_a_piece(weight.panels(), call.rows, threads);
    Team team;
#pragma omp parallel num_threads(threads)
    {
        if (!ready)
            team.share(0, call.rows, [&](i64 row) { bring(weight.form, call.x + row * weight.cols, weight.cols, x, row); });
        team.share(1, (weight.panels() + step - 1) / step, [&](i64 piece) {
            i64 first = piece * step, count = std::min(step, weight.panels() - first);
            panels(weight, first, count, x, [&](i64 row, i64 panel, Floats sums) {
                if (call.bias) {
                    alignas(64) float bias[PANEL] = {};
                    i64 start = panel * PANEL;
                    std::memcpy(bias, call.bias + start, std::min(PANEL, weight.rows - start) * 4);
                    sums = add(sums, load(bias));
                }
                if (call.wide) put((float*)call.out + row * weight.rows, panel, weight.rows, sums);
                else put((bf16*)call.out + row * weight.rows, panel, weight.rows, sums);
            });
        });
    }
}

}  // namespace finback
