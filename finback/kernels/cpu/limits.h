// What this machine can do at most: the loops of the kernels with nothing in their way. `finback bench machine`.
#pragma once

#include <algorithm>

#include "common.h"

namespace finback {

constexpr int CHAINS = REGISTERS == 32 ? 12 : 4;  // sums at a time, enough to hide how long one takes

// `dot` again and again in registers. Forgetting what they hold keeps every one of them, and adds no instruction.
template <class Sum, class Weight, class Row, class Dot>
inline void rounds(i64 steps, Weight weight, Row row, Dot dot) {
    Sum sums[CHAINS] = {};
    for (i64 step = 0; step < steps; step++) {
        forget(weight);
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) {
            forget(row);
            sums[i] = dot(sums[i], weight, row);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; i++) forget(sums[i]);
}

inline i64 float_rounds(i64 steps) {
    rounds<Floats>(steps, all(1.0f), all(1.0f), [](Floats sum, Floats w, Floats x) { return fma(w, x, sum); });
    return steps * CHAINS * PANEL * 2;
}

// The operations of `steps` rounds of what panel.h multiplies numbers of this form by. Where a path has other means,
// tiles for instance, it specialises this for the forms that they take.
template <Form form>
struct Peak {
    static i64 run(i64 steps) {
        alignas(64) uint8_t weight[64];
        alignas(64) bf16 row[32];
        std::memset(weight, 0x3c, sizeof(weight)), std::memset(row, 0x3c, sizeof(row));
        if constexpr (by_integers(form)) {
            auto codes = four((const int8_t*)row);
            if constexpr (form == Form::int8)
                rounds<Ints>(steps, bytes(weight), codes, [](Ints s, const Ints& w, const Ints& x) { return dot(s, w, x); });
            else
                rounds<Ints>(steps, low_half(bytes(weight)), codes,
                             [](Ints s, const Ints& w, const Ints& x) { return dot_small(s, w, x); });
            return steps * CHAINS * PANEL * 4 * 2;
        } else {
            rounds<Floats>(steps, Pairs::weight(weight), Pairs::row(row),
                           [](Floats s, const Pairs::Weight& w, const Pairs::Row& x) { return Pairs::dot(s, w, x); });
            return steps * CHAINS * PANEL * 2 * 2;
        }
    }
};

inline i64 peak(Form form, i64 steps) {
    switch (form) {
        case Form::bf16:
        case Form::fp8: return Peak<Form::bf16>::run(steps);  // FP8 is multiplied as bfloat16
        case Form::int8: return Peak<Form::int8>::run(steps);
        case Form::int4: return Peak<Form::int4>::run(steps);
    }
    return 0;
}

// The operations of all threads, each of which calls `loop`.
template <class Loop>
inline i64 by_all(int threads, Loop loop) {
    i64 total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    total += loop();
    return total;
}

// The sum of `count` floats, a multiple of 128, shared out in pieces of a mebibyte: a thread that others slow down holds
// up nobody.
inline double read(const float* memory, i64 count, int threads) {
    constexpr i64 STRIDE = 128, PIECE = i64(1) << 18;
    double total = 0;
    Team team;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    team.share(0, (count + PIECE - 1) / PIECE, [&](i64 piece) {
        const float* x = memory + piece * PIECE;
        const float* end = memory + std::min(count, (piece + 1) * PIECE);
        Floats a = zero(), b = zero(), c = zero(), d = zero();
        for (; x < end; x += STRIDE) {
            a = add(a, add(load(x), load(x + 16)));
            b = add(b, add(load(x + 32), load(x + 48)));
            c = add(c, add(load(x + 64), load(x + 80)));
            d = add(d, add(load(x + 96), load(x + 112)));
        }
        total += double(sum(add(add(a, b), add(c, d))));
    });
    return total;
}

// A call that opens a team which meets `barriers` times, with nothing to do.
inline void meet(i64 barriers, int threads) {
    Team team;
#pragma omp parallel num_threads(threads)
    for (i64 i = 0; i < barriers; i++) team.share(0, 0, [](i64) {});
}

}  // namespace finback
