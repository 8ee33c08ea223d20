// Softmax attention of single tokens over blocks of cached entries, all heads of a panel against one stream.
#pragma once

#include <algorithm>

#include "common.h"

namespace finback {

constexpr i64 BLOCK_SLOTS = 16;
constexpr i64 CHUNK = 256;  // slots that one piece of work sees; fixed, so that sums never depend on other rows
constexpr i64 SIDE = REGISTERS == 32 ? 8 : 2;  // heads at a time when values are mixed

// Up to 16 heads that share keys and values, as an entry holds them.
struct Stream {
    i64 key, key_width, value, value_width;  // where in the entry, and how many numbers
};

// Of 16 heads over a chunk of slots: the largest score, the sum of exp(score - largest), values mixed by these.
struct Partial {
    float *most, *total, *mixed;  // [16], [16], [16, value_width]
};

struct Entries {
    const bf16* cache;
    i64 width;              // numbers an entry
    const int64_t* table;   // this token's blocks
    i64 length;             // slots that it sees

    const bf16* block(i64 index) const { return cache + table[index] * BLOCK_SLOTS * width; }
    const bf16* entry(i64 slot) const { return block(slot / BLOCK_SLOTS) + slot % BLOCK_SLOTS * width; }
};

// Scores of one chunk, [slots, 16 heads]; `query` is a panel of 16 heads.
inline void scores(const Pack& query, const Entries& entries, const Stream& stream, i64 first, i64 end, float scale,
                   float* out) {
    for (i64 slot = first; slot < end; slot += BLOCK_SLOTS) {
        i64 many = std::min(BLOCK_SLOTS, end - slot);
        Rows keys{many, stream.key_width, entries.width,
                  const_cast<bf16*>(entries.block(slot / BLOCK_SLOTS)) + stream.key};
        panels(query, 0, 1, keys, [&](i64 row, i64, Floats sums) {
            store(out + (slot - first + row) * PANEL, mul(sums, all(scale)));
        });
    }
}

// out[head, v] = sum over slots of weight[slot, head] · value[slot, v], for SIDE heads and 32 or 16 numbers at a time.
template <i64 V>
inline void mix_part(const float* weight, const Entries& entries, i64 offset, i64 first, i64 end, i64 head, float* out,
                     i64 width) {
    Floats total[SIDE][V];
    for (auto& row : total)
        for (auto& each : row) each = zero();
    for (i64 slot = first; slot < end;) {
        i64 stop = std::min(end, slot + BLOCK_SLOTS - slot % BLOCK_SLOTS);
        const bf16* value = entries.block(slot / BLOCK_SLOTS) + offset;
        for (; slot < stop; slot++, value += entries.width) {
            Floats numbers[V];
            for (i64 v = 0; v < V; v++) numbers[v] = load(value + v * 16);
            const float* w = weight + (slot - first) * PANEL + head;
            for (i64 h = 0; h < SIDE; h++)
                for (i64 v = 0; v < V; v++) total[h][v] = fma(numbers[v], all(w[h]), total[h][v]);
        }
    }
    for (i64 h = 0; h < SIDE; h++)
        for (i64 v = 0; v < V; v++) store(out + (head + h) * width + v * 16, total[h][v]);
}

inline void attend_chunk(const Pack& query, const Entries& entries, const Stream& stream, i64 first, float scale,
                         i64 heads, Partial part) {
    alignas(64) float score[CHUNK * PANEL];
    i64 end = std::min(first + CHUNK, entries.length);
    scores(query, entries, stream, first, end, scale, score);
    Floats most = all(-INFINITY), total = zero();
    for (i64 slot = 0; slot < end - first; slot++) most = larger(most, load(score + slot * PANEL));
    for (i64 slot = 0; slot < end - first; slot++) {
        Floats weight = exponential(sub(load(score + slot * PANEL), most));
        total = add(total, weight);
        store(score + slot * PANEL, weight);
    }
    store(part.most, most);
    store(part.total, total);
    i64 width = stream.value_width;
    for (i64 head = 0; head < heads; head += SIDE) {
        i64 v = 0;
        for (; v + 32 <= width; v += 32)
            mix_part<2>(score, entries, stream.value + v, first, end, head, part.mixed + v, width);
        for (; v + 16 <= width; v += 16)
            mix_part<1>(score, entries, stream.value + v, first, end, head, part.mixed + v, width);
        for (; v < width; v++)  // odd widths: of tests
            for (i64 h = head; h < head + SIDE; h++) {
                float one = 0;
                for (i64 slot = first; slot < end; slot++)
                    one += score[(slot - first) * PANEL + h] *
                           widen(entries.entry(slot)[stream.value + v]);
                part.mixed[h * width + v] = one;
            }
    }
}

// One head's chunks put together, as bfloat16.
inline void join(const float* most, const float* total, const float* mixed, i64 chunks, i64 next, i64 next_mixed,
                 i64 width, bf16* out) {
    float largest_of_all = -INFINITY, sum_of_all = 0;
    for (i64 c = 0; c < chunks; c++) largest_of_all = std::max(largest_of_all, most[c * next]);
    for (i64 c = 0; c < chunks; c++) sum_of_all += total[c * next] * std::exp(most[c * next] - largest_of_all);
    for (i64 v = 0; v < width; v++) {
        float value = 0;
        for (i64 c = 0; c < chunks; c++)
            value += std::exp(most[c * next] - largest_of_all) * mixed[c * next_mixed + v];
        out[v] = narrow(value / sum_of_all);
    }
}

}  // namespace finback
