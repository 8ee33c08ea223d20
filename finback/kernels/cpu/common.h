// What every file of the native kernels shares: numbers, packed matrices, rows, and the team of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include <omp.h>

#include "amx.h"

namespace finback {

using bf16 = uint16_t;
using i64 = int64_t;

constexpr i64 PANEL = 16;  // rows of a matrix that lie side by side: the lanes of a vector
constexpr i64 STEP = 32;   // columns are filled up with zeros to a multiple of it

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline bf16 narrow(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16(bits >> 16 | 64);
    return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline i64 round_up(i64 count, i64 step) { return (count + step - 1) / step * step; }

// How a matrix is stored; kernels/panels.py has the same list.
enum class Form : int { bf16, fp8, int8, int4 };

// Numbers of a row that share a scale when rows are rounded to 8 bits to meet integer weights.
inline i64 row_group(Form form) { return form == Form::int8 ? 128 : 32; }
constexpr bool by_integers(Form form) { return form == Form::int8 || form == Form::int4; }

// Bytes of a panel of 16 rows with `cols` columns: docs/kernels.md draws each form.
inline i64 panel_bytes(Form form, i64 cols) {
    i64 padded = round_up(cols, STEP);
    switch (form) {
        case Form::bf16: return padded * PANEL * 2;
        case Form::fp8: return round_up(padded * PANEL + (padded + 127) / 128 * 4, 64);
        case Form::int8: return padded * PANEL + PANEL * 4;
        case Form::int4: return padded / 32 * (PANEL * 16 + PANEL * 2);
    }
    return 0;
}

// A matrix [rows, cols] in panels, `stride` bytes from one to the next.
struct Pack {
    Form form;
    i64 rows, cols;
    const uint8_t* data;
    i64 stride;

    i64 panels() const { return (rows + PANEL - 1) / PANEL; }
    i64 padded() const { return round_up(cols, STEP); }
    const uint8_t* panel(i64 index) const { return data + index * stride; }
};

// Rows that a matrix is multiplied by, filled up with zeros to `width` numbers. For integer weights each group of
// numbers is code x scale, and `offset` is what its sum has too much of, because weights are stored without a sign.
struct Rows {
    i64 count, width, stride;  // stride: numbers from one row to the next
    bf16* plain;
    int8_t* code = nullptr;
    float* scale = nullptr;      // [count, groups]
    int32_t* offset = nullptr;   // [count, groups]
    i64 groups = 0;

    Rows from(i64 first, i64 many) const {
        Rows part = *this;
        part.count = many;
        part.plain += first * stride;
        if (code) part.code += first * stride, part.scale += first * groups, part.offset += first * groups;
        return part;
    }
};

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// At the start of a line of the cache, and not a byte longer than asked for.
inline void* allocate(i64 bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
    return memory;
}

#if defined(__SANITIZE_ADDRESS__)
constexpr bool APART = true;  // every piece of an arena by itself, so that going past its end is seen
#else
constexpr bool APART = false;
#endif

// Memory of one call, kept for the next one of the same thread.
class Arena {
  public:
    static Arena& fresh() {
        static thread_local Arena arena;
        if (arena.chunks_.size() > 1) {
            i64 whole = 0;
            for (auto& chunk : arena.chunks_) whole += chunk.size;
            arena.chunks_.clear();
            if (!APART) arena.grow(whole);
        }
        arena.used_ = 0;
        return arena;
    }

    template <class T>
    T* take(i64 count) {
        i64 bytes = count * i64(sizeof(T));
        if (!APART) bytes = round_up(bytes, 64);
        if (APART) grow(bytes);
        else if (chunks_.empty() || used_ + bytes > chunks_.back().size) grow(bytes > FIRST ? bytes : FIRST);
        char* start = chunks_.back().memory.get() + used_;
        used_ += bytes;
        return reinterpret_cast<T*>(start);
    }

    Rows rows(i64 count, i64 numbers, Form form) {
        i64 width = round_up(numbers, STEP);
        Rows x{count, width, width, take<bf16>(count * width)};
        if (by_integers(form)) {
            x.groups = (width + row_group(form) - 1) / row_group(form);
            x.code = take<int8_t>(count * width);
            x.scale = take<float>(count * x.groups);
            x.offset = take<int32_t>(count * x.groups);
        }
        return x;
    }

  private:
    static constexpr i64 FIRST = 1 << 20;
    struct Chunk {
        i64 size;
        std::unique_ptr<char, Free> memory;
    };
    std::vector<Chunk> chunks_;
    i64 used_ = 0;

    void grow(i64 bytes) {
        chunks_.push_back({bytes, std::unique_ptr<char, Free>(static_cast<char*>(allocate(bytes)))});
        used_ = 0;
    }
};

// The threads of one call. Work is taken piece by piece, so that a thread that is held up holds up nobody else.
struct Team {
    static constexpr int STAGES = 24;
    std::atomic<i64> next[STAGES] = {};

    // Every piece 0 .. pieces - 1 is done by one of the threads; all are done when it returns.
    template <class Work>
    void share(int stage, i64 pieces, Work work) {
        for (i64 piece; (piece = next[stage].fetch_add(1, std::memory_order_relaxed)) < pieces;) work(piece);
        release_tiles();
#pragma omp barrier
    }
};

}  // namespace finback
