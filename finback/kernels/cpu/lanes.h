// Rows of any length by registers of 16 numbers, and many rows by pieces that are the same whoever takes them.
#pragma once

#include "common.h"

namespace finback {

// All lanes of a register, or the first few where a row ends; what is not there reads as `fill`.
struct Whole {
    template <class T>
    Floats load(const T* x, float = 0) const { return finback::load(x); }
    template <class T>
    void store(T* out, Floats x) const { finback::store(out, x); }
};

struct First {
    i64 count;

    template <class T>
    Floats load(const T* x, float fill = 0) const {
        T part[PANEL];
        for (T& each : part) {
            if constexpr (sizeof(T) == 2) each = narrow(fill); else each = fill;
        }
        std::memcpy(part, x, count * sizeof(T));
        return finback::load(part);
    }
    template <class T>
    void store(T* out, Floats x) const {
        T part[PANEL];
        finback::store(part, x);
        std::memcpy(out, part, count * sizeof(T));
    }
};

template <class Work>
inline void by_lanes(i64 n, Work work) {
    i64 i = 0;
    for (; i + PANEL <= n; i += PANEL) work(i, Whole{});
    if (i < n) work(i, First{n - i});
}

// Numbers whose rows lie `stride` apart.
template <class T>
struct Matrix {
    T* data;
    i64 stride;

    T* row(i64 index) const { return data + index * stride; }
    explicit operator bool() const { return data != nullptr; }
};

// At most 128 pieces of at least 64 rows: their number, and with it every order of sums, depends on `rows` alone.
struct Pieces {
    i64 rows, size, count;

    explicit Pieces(i64 rows) : rows(rows), size(rows > 128 * 64 ? (rows + 127) / 128 : 64), count((rows + size - 1) / size) {}

    // work(piece, first row, row behind the last)
    template <class Work>
    void share(int threads, Work work) const {
        auto one = [&](i64 piece) {
            i64 first = piece * size, end = first + size < rows ? first + size : rows;
            work(piece, first, end);
        };
        if (count <= 1 || threads == 1) {
            for (i64 piece = 0; piece < count; piece++) one(piece);
            return;
        }
        Team team;
#pragma omp parallel num_threads(threads)
        team.share(0, count, one);
    }
};

}  // namespace finback
