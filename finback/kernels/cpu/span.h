// Softmax attention of many neighbouring tokens of one sequence, one head at a time: its keys and values are brought
// into panels, from the latents or as they are, and scores live for a block of queries and a chunk of slots only.
#pragma once

#include <algorithm>

#include "common.h"

namespace finback {

struct Span {
    i64 first, width, table, start;  // tokens of the pass; where its table begins; slots before its first token
    i64 slots() const { return start + width; }
};

// A head's keys as panels of 16 slots [d / 2][16][2], and its values as panels of 16 numbers [slots / 2][16][2].
class ExpandedHead {
  public:
    static i64 bytes(i64 slots, i64 key, i64 value) {
        return round_up(slots, STEP) * 2 * (key + round_up(value, PANEL));
    }

    ExpandedHead(uint8_t* memory, i64 slots, i64 key, i64 value)
        : slots_(round_up(slots, STEP)), key_(key), value_(value), keys_(memory), values_(memory + slots_ * 2 * key) {
        for (i64 slot = slots; slot < slots_; slot++) clear(slot);
    }

    // Keys and values from the latents of all entries.
    void multiply(const Entries& entries, const Pack& key_rows, const Pack& value_rows, i64 rank) {
        for (i64 first = 0; first < entries.length; first += BLOCK_SLOTS) {
            Rows latents{std::min(BLOCK_SLOTS, entries.length - first), rank, entries.width,
                         const_cast<bf16*>(entries.block(first / BLOCK_SLOTS))};
            panels(key_rows, 0, key_rows.panels(), latents, [&](i64 slot, i64 panel, Floats sums) {
                alignas(64) bf16 numbers[PANEL];
                store(numbers, sums);
                for (i64 i = 0; i < PANEL && panel * PANEL + i < key_rows.rows; i += 2)
                    std::memcpy(key(first + slot, panel * PANEL + i), numbers + i, 4);
            });
            panels(value_rows, 0, value_rows.panels(), latents, [&](i64 slot, i64 panel, Floats sums) {
                alignas(64) bf16 numbers[PANEL];
                store(numbers, sums);
                for (i64 i = 0; i < PANEL; i++) value(panel, first + slot)[2 * i] = numbers[i];
            });
        }
    }

    // `count` numbers of every entry, from number `from` on, as the keys' numbers from `to` on.
    void copy_keys(const Entries& entries, i64 from, i64 count, i64 to) {
        for (i64 slot = 0; slot < entries.length; slot++)
            for (i64 i = 0; i < count; i += 2) std::memcpy(key(slot, to + i), entries.entry(slot) + from + i, 4);
    }

    void copy_values(const Entries& entries, i64 from) {
        for (i64 slot = 0; slot < entries.length; slot++)
            for (i64 v = 0; v < round_up(value_, PANEL); v++)
                value(v / PANEL, slot)[v % PANEL * 2] = v < value_ ? entries.entry(slot)[from + v] : bf16(0);
    }

    Pack keys(i64 first, i64 count) const {
        return {Form::bf16, round_up(count, PANEL), key_, keys_ + first / PANEL * key_stride(), key_stride()};
    }
    Pack values(i64 first, i64 count) const {
        return {Form::bf16, value_, count, values_ + first * PANEL * 2, slots_ * PANEL * 2};
    }

  private:
    i64 slots_, key_, value_;
    uint8_t *keys_, *values_;

    i64 key_stride() const { return key_ * PANEL * 2; }
    bf16* key(i64 slot, i64 number) {  // numbers in pairs
        return reinterpret_cast<bf16*>(keys_ + slot / PANEL * key_stride()) + number * PANEL + slot % PANEL * 2;
    }
    bf16* value(i64 panel, i64 slot) {
        return reinterpret_cast<bf16*>(values_) + (panel * slots_ + slot - slot % 2) * PANEL + slot % 2;
    }
    void clear(i64 slot) {
        for (i64 i = 0; i < key_; i += 2) std::memset(key(slot, i), 0, 4);
        for (i64 v = 0; v < round_up(value_, PANEL); v++) value(v / PANEL, slot)[v % PANEL * 2] = 0;
    }
};

// The running softmax of a block of queries over chunks of slots.
class QueryBlock {
  public:
    static constexpr i64 MANY = 32;

    QueryBlock(const ExpandedHead& head, Rows queries, i64 position, float scale, i64 value)
        : head_(head), queries_(queries), position_(position), scale_(scale), value_(value),
          width_(round_up(value, PANEL)) {}

    // mixed: [MANY, round_up(value, 16)]; out: [queries, value], `stride` numbers from one query to the next.
    void run(float* mixed, bf16* out, i64 stride) {
        std::fill(mixed, mixed + queries_.count * width_, 0.0f);
        i64 end = position_ + queries_.count;
        for (i64 first = 0; first < end; first += CHUNK) chunk(first, std::min(CHUNK, end - first), mixed);
        for (i64 q = 0; q < queries_.count; q++)
            for (i64 v = 0; v < value_; v++) out[q * stride + v] = narrow(mixed[q * width_ + v] / total_[q]);
    }

  private:
    const ExpandedHead& head_;
    Rows queries_;
    i64 position_;
    float scale_;
    i64 value_, width_;
    float most_[MANY], total_[MANY] = {};
    alignas(64) float score_[MANY * CHUNK];
    alignas(64) bf16 weight_[MANY * CHUNK];

    void chunk(i64 first, i64 count, float* mixed) {
        i64 width = round_up(count, STEP);
        Pack keys = head_.keys(first, count);
        panels(keys, 0, keys.panels(), queries_,
               [&](i64 q, i64 panel, Floats sums) { store(score_ + q * CHUNK + panel * PANEL, sums); });
        for (i64 q = 0; q < queries_.count; q++) {
            i64 seen = std::clamp(position_ + q + 1 - first, i64(0), count);
            weigh(q, seen, width, first == 0, mixed + q * width_);
        }
        Rows weights{queries_.count, width, CHUNK, weight_};
        Pack values = head_.values(first, width);
        panels(values, 0, values.panels(), weights, [&](i64 q, i64 panel, Floats sums) {
            float* at = mixed + q * width_ + panel * PANEL;
            store(at, add(load((const float*)at), sums));
        });
    }

    // Of one query: exp(score - largest) as bfloat16, zero for slots that it does not see.
    void weigh(i64 q, i64 seen, i64 width, bool fresh, float* mixed) {
        float* score = score_ + q * CHUNK;
        bf16* weight = weight_ + q * CHUNK;
        for (i64 s = seen; s < width; s++) score[s] = -INFINITY;
        float before = fresh ? -INFINITY : most_[q];
        Floats most = all(-INFINITY);
        for (i64 s = 0; s < seen; s += PANEL) most = larger(most, load((const float*)score + s));
        float now = std::max(before, largest(most) * scale_);
        float kept = before == now ? 1.0f : std::exp(before - now);
        Floats total = zero();
        i64 s = 0;
        for (; s < seen; s += PANEL) {
            Floats w = exponential(fma(load((const float*)score + s), all(scale_), all(-now)));
            total = add(total, w);
            store(weight + s, w);
        }
        for (; s < width; s += PANEL) store(weight + s, zero());
        most_[q] = now;
        total_[q] = total_[q] * kept + sum(total);
        if (kept != 1.0f)
            for (i64 v = 0; v < width_; v += PANEL) store(mixed + v, mul(load((const float*)mixed + v), all(kept)));
    }
};

}  // namespace finback
