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
// Slots go in pairs, their weights side by side: [pair of slots, 16 heads, 2]. Behind an odd end stands a weight of 0.
template <i64 V>
inline void mix_part(const Pairs::Share* weight, const Entries& entries, i64 offset, i64 first, i64 end, i64 head,
                     float* out, i64 width) {
    Floats total[SIDE][V];
    for (auto& row : total)
        for (auto& each : row) each = zero();
    for (i64 slot = first; slot < end;) {
        i64 stop = std::min(end, slot + BLOCK_SLOTS - slot % BLOCK_SLOTS);
        const bf16* value = entries.block(slot / BLOCK_SLOTS) + offset;
        for (; slot < stop; slot += 2, value += 2 * entries.width) {
            const bf16* next = slot + 1 < end ? value + entries.width : value;
            Pairs::Weight numbers[V];
            for (i64 v = 0; v < V; v++) numbers[v] = Pairs::of(value + v * 16, next + v * 16);
            const Pairs::Share* w = weight + ((slot - first) / 2 * PANEL + head) * 2;
            for (i64 h = 0; h < SIDE; h++) {
                Pairs::Row both = Pairs::row(w + 2 * h);
                for (i64 v = 0; v < V; v++) total[h][v] = Pairs::dot(total[h][v], numbers[v], both);
            }
        }
    }
    for (i64 h = 0; h < SIDE; h++)
        for (i64 v = 0; v < V; v++) store(out + (head + h) * width + v * 16, total[h][v]);
}

// The same of number `v` alone: odd widths, of tests.
inline float mix_one(const float* score, const Entries& entries, i64 v, i64 first, i64 end, i64 head) {
    float total = 0;
    for (i64 slot = first; slot < end; slot++)
        total += score[(slot - first) * PANEL + head] * widen(entries.entry(slot)[v]);
    return total;
}

inline void attend_chunk(const Pack& query, const Entries& entries, const Stream& stream, i64 first, float scale,
                         i64 heads, Partial part) {
    alignas(64) float score[CHUNK * PANEL];
    alignas(64) Pairs::Share share[CHUNK * PANEL];
    i64 end = std::min(first + CHUNK, entries.length), count = end - first;
    scores(query, entries, stream, first, end, scale, score);
    Floats most = all(-INFINITY), total = zero();
    for (i64 slot = 0; slot < count; slot++) most = larger(most, load(score + slot * PANEL));
    for (i64 slot = 0; slot < count; slot++) {
        Floats weight = exponential(sub(load(score + slot * PANEL), most));
        total = add(total, weight);
        store(score + slot * PANEL, weight);
    }
    if (count % 2) store(score + count * PANEL, zero());
    for (i64 slot = 0; slot < count; slot += 2)
        Pairs::keep(share + slot * PANEL, load(score + slot * PANEL), load(score + (slot + 1) * PANEL));
    store(part.most, most);
    store(part.total, total);
    // All heads take their share of some numbers before the next: these come into the first cache once.
    auto mix = [&](i64 v, auto part_of) {
        for (i64 head = 0; head < heads; head += SIDE)
            part_of(share, entries, stream.value + v, first, end, head, part.mixed + v, stream.value_width);
    };
    i64 v = 0;
    for (; v + 32 <= stream.value_width; v += 32) mix(v, mix_part<2>);
    for (; v + 16 <= stream.value_width; v += 16) mix(v, mix_part<1>);
    for (; v < stream.value_width; v++)
        for (i64 h = 0; h < heads; h++)
            part.mixed[h * stream.value_width + v] = mix_one(score, entries, stream.value + v, first, end, h);
}

// One head's chunks put together, as bfloat16. share: [chunks], room for what each counts.
inline void join(const float* most, const float* total, const float* mixed, i64 chunks, i64 next, i64 next_mixed,
                 i64 width, float* share, bf16* out) {
    float largest_of_all = -INFINITY, sum_of_all = 0;
    for (i64 c = 0; c < chunks; c++) largest_of_all = std::max(largest_of_all, most[c * next]);
    for (i64 c = 0; c < chunks; c++) {
        share[c] = std::exp(most[c * next] - largest_of_all);
        sum_of_all += total[c * next] * share[c];
    }
    i64 v = 0;
    for (; v + 16 <= width; v += 16) {
        Floats value = zero();
        for (i64 c = 0; c < chunks; c++) value = fma(load(mixed + c * next_mixed + v), all(share[c]), value);
        store(out + v, mul(value, all(1.0f / sum_of_all)));
    }
    for (; v < width; v++) {
        float value = 0;
        for (i64 c = 0; c < chunks; c++) value += share[c] * mixed[c * next_mixed + v];
        out[v] = narrow(value / sum_of_all);
    }
}

}  // namespace finback
