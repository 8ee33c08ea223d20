// Attention of training, backward: a row of the batch and a head at a time, its probabilities made again block by block.
#pragma once

#include "train_seen.h"

namespace finback {

class AttentionBackward {
  public:
    static constexpr i64 QUERIES = 128, KEYS = 256, STRIPS = QUERIES / STRIP;  // of a block

    AttentionBackward(const TrainAttention& call, Heads grad, Heads d_query, Heads d_key, Heads d_value, int threads)
        : call_(call), grad_at_(grad), d_query_at_(d_query), d_key_at_(d_key), d_value_at_(d_value), threads_(threads),
          d_(call.key), e_(call.value), k_rows_(call.key_rows()), q_rows_(call.query_rows()), arena_(Arena::fresh()),
          seen_(call, arena_), heads_(arena_.take<Head>(threads)) {
        for (int thread = 0; thread < threads; thread++) {
            Head& head = heads_[thread];
            head.spare = arena_.take<bf16>(STRIP * std::max(d_, e_));
            head.keys = arena_.take<bf16>(k_rows_ * d_), head.over_keys = arena_.take<bf16>(k_rows_ * d_);
            head.values = arena_.take<bf16>(k_rows_ * e_);
            head.queries = arena_.take<bf16>(q_rows_ * d_), head.over_queries = arena_.take<bf16>(q_rows_ * d_);
            head.grads = arena_.take<bf16>(q_rows_ * e_), head.over_grads = arena_.take<bf16>(q_rows_ * e_);
            head.delta = arena_.take<float>(q_rows_), head.log_sum = arena_.take<float>(q_rows_);
            head.d_keys = arena_.take<float>(k_rows_ * d_), head.d_values = arena_.take<float>(k_rows_ * e_);
            head.d_queries = arena_.take<float>(QUERIES * d_);
        }
    }

    void run() {
#pragma omp parallel num_threads(threads_)
        {
            team_.share(0, seen_.pieces(), [&](i64 piece) { seen_.read(piece); });
            team_.share(1, call_.rows * call_.heads, [&](i64 piece) { run(piece / call_.heads, piece % call_.heads); });
        }
    }

  private:
    // One head, all of it; "over" is in panels that sums over tokens take. Then a block: probabilities and gradients of
    // scores [keys, queries], the latter also in pairs of keys, strip by strip [keys / 2][32][2].
    struct Head {
        bf16 *spare, *keys, *over_keys, *values, *queries, *over_queries, *grads, *over_grads;
        float *delta, *log_sum, *d_keys, *d_values, *d_queries;
        alignas(64) float tile[2][BAND * STRIP];
        alignas(64) bf16 chosen[KEYS * QUERIES], d_score[KEYS * QUERIES], d_score_pairs[KEYS * QUERIES];
    };

    const TrainAttention& call_;
    Heads grad_at_, d_query_at_, d_key_at_, d_value_at_;
    int threads_;
    i64 d_, e_, k_rows_, q_rows_;
    Arena& arena_;
    Team team_;
    Seen seen_;
    Head* heads_;

    void run(i64 b, i64 h) {
        Head& head = heads_[omp_get_thread_num()];
        bring(b, h, head);
        for (i64 query = 0; query < call_.queries; query += QUERIES) block(b, h, query, head);
        leave(head.d_keys, call_.keys, d_, call_.scale, d_key_at_.at(b, h), d_key_at_.token);
        leave(head.d_values, call_.keys, e_, 1.0f, d_value_at_.at(b, h), d_value_at_.token);
    }

    // Everything of one head to where and as products take it, and delta: the sum of gradient · output of each query.
    void bring(i64 b, i64 h, Head& head) {
        auto strips = [&](const Heads& x, i64 count, i64 width, auto take) {
            by_strips(x.at(b, h), x.token, count, width, head.spare, take);
        };
        strips(call_.key_at, call_.keys, d_, [&](i64 first, const bf16* from, i64 token) {
            copy_rows(from, token, STRIP, d_, head.keys + first * d_);
            panels_over_rows(from, token, first, STRIP, k_rows_, d_, head.over_keys);
        });
        strips(call_.value_at, call_.keys, e_, [&](i64 first, const bf16* from, i64 token) {
            copy_rows(from, token, STRIP, e_, head.values + first * e_);
        });
        strips(call_.query_at, call_.queries, d_, [&](i64 first, const bf16* from, i64 token) {
            panels_over_rows(from, token, first, STRIP, q_rows_, d_, head.over_queries);
            for (i64 q = 0; q < STRIP; q += PANEL)
                panel_of_rows(from + q * token, token, d_, head.queries + (first + q) * d_);
        });
        strips(grad_at_, call_.queries, e_, [&](i64 first, const bf16* from, i64 token) {
            panels_over_rows(from, token, first, STRIP, q_rows_, e_, head.over_grads);
            for (i64 q = 0; q < STRIP; q += PANEL)
                panel_of_rows(from + q * token, token, e_, head.grads + (first + q) * e_);
            deltas(b, h, first, from, token, head);
        });
        std::fill(head.d_keys, head.d_keys + k_rows_ * d_, 0.0f);
        std::fill(head.d_values, head.d_values + k_rows_ * e_, 0.0f);
    }

    // Of a strip; queries past the last are given a sum by which their keys weigh nothing.
    void deltas(i64 b, i64 h, i64 first, const bf16* grads, i64 token, Head& head) {
        const bf16* out = call_.out_at.at(b, h) + first * call_.out_at.token;
        const float* log_sum = call_.log_sum + (b * call_.heads + h) * call_.queries + first;
        i64 count = std::min(STRIP, call_.queries - first);
        std::fill(head.delta + first, head.delta + first + STRIP, 0.0f);
        std::fill(head.log_sum + first, head.log_sum + first + STRIP, 1e30f);
        for (i64 q = 0; q < count; q++) {
            Floats total = zero();
            for (i64 v = 0; v < e_; v += PANEL)
                total = fma(load(out + q * call_.out_at.token + v), load(grads + q * token + v), total);
            head.delta[first + q] = sum(total), head.log_sum[first + q] = log_sum[q];
        }
    }

    void block(i64 b, i64 h, i64 query, Head& head) {
        i64 strips = std::min(STRIPS, call_.strips() - query / STRIP), first = k_rows_, end = 0;
        for (i64 strip = query / STRIP; strip < query / STRIP + strips; strip++)
            if (seen_.first(b, strip) < seen_.end(b, strip))
                first = std::min(first, seen_.first(b, strip)), end = std::max(end, seen_.end(b, strip));
        std::fill(head.d_queries, head.d_queries + QUERIES * d_, 0.0f);
        for (i64 start = first; start < end; start += KEYS) {
            i64 stop = std::min(start + KEYS, end);
            for (i64 strip = 0; strip < strips; strip++) {
                Part part{b, query, strip, start, std::max(start, seen_.first(b, query / STRIP + strip)),
                          std::min(stop, seen_.end(b, query / STRIP + strip))};
                if (call_.mask) clear(part, stop, head);
                for (i64 s = part.first; s < part.end; s += BAND) tile(part, s, head);
                to_queries(part, head);
            }
            for (i64 s = start; s < stop; s += BAND) to_keys(b, query, strips, start, s, head);
        }
        leave(head.d_queries, std::min(QUERIES, call_.queries - query), d_, call_.scale,
              d_query_at_.at(b, h) + query * d_query_at_.token, d_query_at_.token);
    }

    // A strip of a block and the keys first .. end - 1 that it sees of the chunk that begins at `start`.
    struct Part {
        i64 b, query, strip, start, first, end;
        i64 index() const { return query / STRIP + strip; }
    };

    // Keys of the chunk that a strip does not see weigh nothing: strips around it may see them.
    void clear(const Part& part, i64 stop, Head& head) {
        for (i64 s = part.start; s < stop; s++) {
            if (s >= part.first && s < part.end) continue;
            i64 place = (s - part.start) * QUERIES + part.strip * STRIP;
            std::memset(head.chosen + place, 0, STRIP * 2);
            std::memset(head.d_score + place, 0, STRIP * 2);
        }
    }

    // A strip's scores with eight keys, what they weigh, and the gradients of the scores.
    void tile(const Part& part, i64 s, Head& head) {
        i64 query = part.query + part.strip * STRIP, skip = seen_.first_panel(part.index(), s);
        float *score = head.tile[0] + skip * PANEL, *d_weight = head.tile[1] + skip * PANEL;
        Panels queries{head.queries + (query + skip * PANEL) * d_, PANEL * d_, 2 - skip};
        band_product<false>(queries, head.keys + s * d_, d_, d_ / 2, [&](i64 m, i64 panel, Floats sums) {
            store(score + m * STRIP + panel * PANEL, sums);
        });
        Panels grads{head.grads + (query + skip * PANEL) * e_, PANEL * e_, 2 - skip};
        band_product<false>(grads, head.values + s * e_, e_, e_ / 2, [&](i64 m, i64 panel, Floats sums) {
            store(d_weight + m * STRIP + panel * PANEL, sums);
        });
        bool whole = seen_.whole(part.index(), s);
        for (i64 panel = 0; panel < 2; panel++) {
            Floats delta = load((const float*)head.delta + query + panel * PANEL);
            Floats log_sum = load((const float*)head.log_sum + query + panel * PANEL);
            for (i64 m = 0; m < BAND; m += 2) {
                Floats weight[2], change[2];
                for (i64 i = 0; i < 2; i++) {
                    i64 at = (m + i) * STRIP + panel * PANEL;
                    // As forward, product by product: of a query that sees one key this is exactly 1.
                    Floats score = mul(load((const float*)head.tile[0] + at), all(call_.factor()));
                    weight[i] = two_to_the(sub(score, log_sum));
                    change[i] = mul(weight[i], sub(load((const float*)head.tile[1] + at), delta));
                    if (whole) continue;
                    uint16_t lanes = seen_.lanes(part.b, part.index(), panel, s + m + i);
                    weight[i] = chosen(lanes, weight[i], zero()), change[i] = chosen(lanes, change[i], zero());
                }
                i64 key = s + m - part.start, place = key * QUERIES + part.strip * STRIP + panel * PANEL;
                store(head.chosen + place, weight[0]), store(head.chosen + place + QUERIES, weight[1]);
                store(head.d_score + place, change[0]), store(head.d_score + place + QUERIES, change[1]);
                bf16* pairs = head.d_score_pairs + part.strip * KEYS * STRIP + key * STRIP + panel * PANEL * 2;
                store_pairs(pairs, change[0], change[1]);
            }
        }
    }

    // dQ += dS K of a strip.
    void to_queries(const Part& part, Head& head) {
        const bf16* pairs = head.d_score_pairs + part.strip * KEYS * STRIP + (part.first - part.start) * STRIP;
        Panels keys{head.over_keys + part.first * PANEL, k_rows_ * PANEL, d_ / PANEL};
        for (i64 q = 0; q < STRIP; q += BAND) {
            i64 count = std::min(part.end, seen_.end_of(part.b, part.index(), q)) - part.first;
            float* out = head.d_queries + (part.strip * STRIP + q) * d_;
            band_product<true>(keys, pairs + 2 * q, STRIP * 2, count / 2,
                               [&](i64 m, i64 panel, Floats sums) { add_to(out + m * d_ + panel * PANEL, sums); });
        }
    }

    // dV += Pᵀ g and dK += dSᵀ Q of eight keys, over the strips that see one of them.
    void to_keys(i64 b, i64 query, i64 strips, i64 start, i64 s, Head& head) {
        i64 from = strips, to = 0;
        for (i64 strip = 0; strip < strips; strip++)
            if (seen_.first(b, query / STRIP + strip) <= s && s < seen_.end(b, query / STRIP + strip))
                from = std::min(from, strip), to = strip + 1;
        from *= STRIP, to *= STRIP;
        if (!call_.mask) from = std::max(from, s - query);  // queries before a key do not see it
        if (from >= to) return;
        i64 place = (s - start) * QUERIES + from;
        Panels grads{head.over_grads + (query + from) * PANEL, q_rows_ * PANEL, e_ / PANEL};
        band_product<false>(grads, head.chosen + place, QUERIES, (to - from) / 2, [&](i64 m, i64 panel, Floats sums) {
            add_to(head.d_values + (s + m) * e_ + panel * PANEL, sums);
        });
        Panels queries{head.over_queries + (query + from) * PANEL, q_rows_ * PANEL, d_ / PANEL};
        band_product<false>(queries, head.d_score + place, QUERIES, (to - from) / 2, [&](i64 m, i64 panel, Floats sums) {
            add_to(head.d_keys + (s + m) * d_ + panel * PANEL, sums);
        });
    }

    static void add_to(float* at, Floats x) { store(at, add(load((const float*)at), x)); }

    static void leave(const float* sums, i64 count, i64 width, float factor, bf16* out, i64 token) {
        for (i64 r = 0; r < count; r++)
            for (i64 k = 0; k < width; k += PANEL) store(out + r * token + k, mul(load(sums + r * width + k), all(factor)));
    }
};

}  // namespace finback
