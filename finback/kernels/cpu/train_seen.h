// What training's attention is told, and which keys its strips of queries see.
#pragma once

#include <algorithm>

#include "common.h"
#include "train_block.h"

namespace finback {

constexpr i64 STRIP = 32;  // queries that go through the keys together: two panels

// Heads inside tokens, [rows, tokens, heads, width]: numbers from one row, token and head to the next.
struct Heads {
    bf16* data;
    i64 row, token, head;

    bf16* at(i64 b, i64 h) const { return data + b * row + h * head; }
};

// key, value: numbers of a head's keys and values, multiples of 16. scale above 0.
struct TrainAttention {
    i64 rows, queries, keys, heads, key, value;
    float scale;
    const uint8_t* mask;  // [rows, queries, keys], not 0 where a query may look; null: causal, as many keys as queries
    i64 mask_row, mask_query;
    float* log_sum;  // [rows, heads, queries]: log2 of the sum of 2^(score · scale · log2 e), or null
    Heads query_at, key_at, value_at, out_at;

    i64 strips() const { return (queries + STRIP - 1) / STRIP; }
    i64 key_rows() const { return round_up(keys, STRIP); }
    i64 query_rows() const { return strips() * STRIP; }
    float factor() const { return scale * 1.44269504f; }
};

// Of a strip of 32 queries the keys from the first to the last that one of them sees, by tiles of 8; and who sees which.
class Seen {
  public:
    Seen(const TrainAttention& call, Arena& arena) : call_(call) {
        if (!call.mask) return;
        bits_ = arena.take<uint16_t>(call.rows * call.strips() * 2 * call.key_rows());
        span_ = arena.take<i64>(call.rows * call.strips() * 2);
    }

    i64 pieces() const { return call_.mask ? call_.rows * call_.strips() : 0; }

    // One strip of one row of the mask, in bits.
    void read(i64 piece) {
        i64 b = piece / call_.strips(), strip = piece % call_.strips(), width = call_.key_rows();
        i64 first = call_.keys, last = -1;
        for (i64 panel = 0; panel < 2; panel++) {
            uint16_t* bits = bits_ + (piece * 2 + panel) * width;
            std::fill(bits, bits + width, uint16_t(0));
            for (i64 lane = 0; lane < PANEL; lane++) {
                i64 query = strip * STRIP + panel * PANEL + lane;
                if (query >= call_.queries) break;
                const uint8_t* mask = call_.mask + b * call_.mask_row + query * call_.mask_query;
                for (i64 s = 0; s < call_.keys; s++) bits[s] |= uint16_t(uint16_t(mask[s] != 0) << lane);
            }
            for (i64 s = 0; s < first; s++)
                if (bits[s]) first = s;
            for (i64 s = call_.keys - 1; s > last; s--)
                if (bits[s]) last = s;
        }
        span_[2 * piece] = std::min(first, last + 1) / BAND * BAND;
        span_[2 * piece + 1] = round_up(last + 1, BAND);
    }

    i64 first(i64 b, i64 strip) const { return call_.mask ? span_[2 * (b * call_.strips() + strip)] : 0; }
    i64 end(i64 b, i64 strip) const {
        return call_.mask ? span_[2 * (b * call_.strips() + strip) + 1] : (strip + 1) * STRIP;
    }

    // Whether all of a strip see all keys of a tile; which panels of it see some.
    bool whole(i64 strip, i64 s) const { return !call_.mask && s + BAND <= strip * STRIP + 1; }
    i64 first_panel(i64 strip, i64 s) const { return !call_.mask && s >= strip * STRIP + PANEL; }

    uint16_t lanes(i64 b, i64 strip, i64 panel, i64 s) const {
        if (call_.mask) return bits_[((b * call_.strips() + strip) * 2 + panel) * call_.key_rows() + s];
        i64 before = s - strip * STRIP - panel * PANEL;
        return before <= 0 ? 0xffff : before >= PANEL ? 0 : uint16_t(0xffff << before);
    }

    // Which of a strip's keys its queries from `query` to the seventh after it see none behind.
    i64 end_of(i64 b, i64 strip, i64 query) const {
        return call_.mask ? end(b, strip) : strip * STRIP + query + BAND;
    }

  private:
    const TrainAttention& call_;
    uint16_t* bits_ = nullptr;
    i64* span_ = nullptr;
};

}  // namespace finback
