// Attention of training, forward: a row of the batch and a head at a time, 32 queries against chunks of 256 keys.
#pragma once

#include <cmath>

#include "train_seen.h"

namespace finback {

constexpr float UNSEEN = -1e30f;  // the score of a key that a query does not see

class AttentionForward {
  public:
    static constexpr i64 KEYS = 256;

    AttentionForward(const TrainAttention& call, int threads)
        : call_(call), threads_(threads), d_(call.key), e_(call.value), arena_(Arena::fresh()), seen_(call, arena_) {
        i64 keys = call.key_rows();
        spare_ = arena_.take<bf16>(threads * STRIP * std::max(d_, e_));
        keys_ = arena_.take<bf16>(threads * keys * d_);
        values_ = arena_.take<bf16>(threads * keys * e_);
        strips_ = arena_.take<Strip>(threads);
        queries_ = arena_.take<bf16>(threads * STRIP * d_);
        mixed_ = arena_.take<float>(threads * STRIP * e_);
    }

    void run() {
#pragma omp parallel num_threads(threads_)
        {
            team_.share(0, seen_.pieces(), [&](i64 piece) { seen_.read(piece); });
            team_.share(1, call_.rows * call_.heads, [&](i64 piece) { head(piece / call_.heads, piece % call_.heads); });
        }
    }

  private:
    // What a strip knows of its queries, and a chunk of its scores and of 2^(score - largest) in pairs of keys.
    struct Strip {
        alignas(64) float score[KEYS * STRIP];
        alignas(64) bf16 weight[KEYS * STRIP];
        alignas(64) float most[STRIP], total[STRIP], kept[STRIP];
    };

    const TrainAttention& call_;
    int threads_;
    i64 d_, e_;
    Arena& arena_;
    Team team_;
    Seen seen_;
    Strip* strips_;
    bf16 *spare_, *keys_, *values_, *queries_;
    float* mixed_;

    void head(i64 b, i64 h) {
        i64 rows = call_.key_rows(), mine = omp_get_thread_num();
        bf16* keys = keys_ + mine * rows * d_;
        bf16* values = values_ + mine * rows * e_;
        bf16* spare = spare_ + mine * STRIP * std::max(d_, e_);
        bf16* queries = queries_ + mine * STRIP * d_;
        auto strips = [&](const Heads& x, i64 count, i64 width, auto take) {
            by_strips(x.at(b, h), x.token, count, width, spare, take);
        };
        strips(call_.key_at, call_.keys, d_, [&](i64 first, const bf16* from, i64 token) {
            copy_rows(from, token, STRIP, d_, keys + first * d_);
        });
        strips(call_.value_at, call_.keys, e_, [&](i64 first, const bf16* from, i64 token) {
            panels_over_rows(from, token, first, STRIP, rows, e_, values);
        });
        strips(call_.query_at, call_.queries, d_, [&](i64 first, const bf16* from, i64 token) {
            for (i64 q = 0; q < STRIP; q += PANEL) panel_of_rows(from + q * token, token, d_, queries + q * d_);
            run(b, h, first / STRIP, keys, values, queries);
        });
    }

    void run(i64 b, i64 h, i64 index, const bf16* keys, const bf16* values, const bf16* queries) {
        Strip& strip = strips_[omp_get_thread_num()];
        float* mixed = mixed_ + omp_get_thread_num() * STRIP * e_;
        std::fill(strip.most, strip.most + STRIP, -1e38f);
        std::fill(strip.total, strip.total + STRIP, 0.0f);
        std::fill(mixed, mixed + STRIP * e_, 0.0f);
        i64 first = seen_.first(b, index), end = seen_.end(b, index);
        for (i64 start = first; start < end; start += KEYS) {
            i64 stop = std::min(start + KEYS, end);
            scores(b, index, start, stop, keys, queries, strip);
            weigh(stop - start, strip);
            for (i64 q = 0; q < STRIP; q += BAND) {
                i64 pairs = (std::min(stop, seen_.end_of(b, index, q)) - start) / 2;
                Panels w{values + start * PANEL, call_.key_rows() * PANEL, e_ / PANEL};
                band_product<true>(w, strip.weight + 2 * q, STRIP * 2, pairs, [&](i64 m, i64 panel, Floats sums) {
                    float* at = mixed + (q + m) * e_ + panel * PANEL;
                    store(at, fma(load((const float*)at), all(strip.kept[q + m]), sums));
                });
            }
        }
        leave(b, h, index, mixed, strip);
    }

    // Scores of keys start .. stop - 1 times scale and log2 e, [keys, 32], and the largest of each query.
    void scores(i64 b, i64 index, i64 start, i64 stop, const bf16* keys, const bf16* queries, Strip& strip) {
        Floats most[2] = {load((const float*)strip.most), load((const float*)strip.most + PANEL)};
        const Floats before[2] = {most[0], most[1]}, factor = all(call_.factor());
        for (i64 s = start; s < stop; s += BAND) {
            i64 skip = seen_.first_panel(index, s);
            float* score = strip.score + (s - start) * STRIP;
            Panels w{queries + skip * PANEL * d_, PANEL * d_, 2 - skip};
            band_product<false>(w, keys + s * d_, d_, d_ / 2, [&](i64 m, i64 panel, Floats sums) {
                store(score + m * STRIP + (skip + panel) * PANEL, mul(sums, factor));
            });
            bool whole = seen_.whole(index, s);
            for (i64 m = 0; m < BAND; m++)
                for (i64 panel = 0; panel < 2; panel++) {
                    float* at = score + m * STRIP + panel * PANEL;
                    Floats x = load((const float*)at);
                    if (!whole) store(at, x = chosen(seen_.lanes(b, index, panel, s + m), x, all(UNSEEN)));
                    most[panel] = larger(most[panel], x);
                }
        }
        for (i64 panel = 0; panel < 2; panel++) {
            store(strip.kept + panel * PANEL, two_to_the(sub(before[panel], most[panel])));
            store(strip.most + panel * PANEL, most[panel]);
        }
    }

    // 2^(score - largest) as bfloat16, and what they sum to.
    void weigh(i64 keys, Strip& strip) {
        for (i64 panel = 0; panel < 2; panel++) {
            Floats most = load((const float*)strip.most + panel * PANEL), sums[2] = {zero(), zero()};
            const float* score = strip.score + panel * PANEL;
            bf16* weight = strip.weight + panel * PANEL * 2;
            for (i64 s = 0; s < keys; s += 2) {
                Floats first = two_to_the(sub(load(score + s * STRIP), most));
                Floats second = two_to_the(sub(load(score + (s + 1) * STRIP), most));
                sums[0] = add(sums[0], first), sums[1] = add(sums[1], second);
                store_pairs(weight + s * STRIP, first, second);
            }
            float* total = strip.total + panel * PANEL;
            Floats kept = load((const float*)strip.kept + panel * PANEL);
            store(total, fma(load((const float*)total), kept, add(sums[0], sums[1])));
        }
    }

    // A query that sees nothing mixes nothing: zeros.
    void leave(i64 b, i64 h, i64 index, const float* mixed, const Strip& strip) {
        alignas(64) float logs[STRIP];
        for (i64 panel = 0; panel < 2; panel++) {
            Floats total = larger(load((const float*)strip.total + panel * PANEL), all(1.0f));
            store(logs + panel * PANEL, add(load((const float*)strip.most + panel * PANEL), log_two(total)));
        }
        i64 first = index * STRIP, count = std::min(STRIP, call_.queries - first);
        for (i64 q = 0; q < count; q++) {
            bool none = strip.most[q] <= UNSEEN;
            Floats inverse = all(none ? 0.0f : 1.0f / strip.total[q]);
            bf16* out = call_.out_at.at(b, h) + (first + q) * call_.out_at.token;
            for (i64 v = 0; v < e_; v += PANEL) store(out + v, mul(load(mixed + q * e_ + v), inverse));
            if (call_.log_sum) call_.log_sum[(b * call_.heads + h) * call_.queries + first + q] = none ? -UNSEEN : logs[q];
        }
    }
};

}  // namespace finback
