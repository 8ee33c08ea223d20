// Latent attention of one layer: projections, cache, attention, output, residual, in one call.
#pragma once

#include "attention.h"

namespace finback {

class LatentRun : AttentionRun {
  public:
    LatentRun(const Latent& spec, const AttentionCall& call, int threads)
        : AttentionRun(spec, call, threads, spec.rank + spec.rope, spec.rank + spec.rope, spec.rank,
                       (spec.heads + PANEL - 1) / PANEL, spec.heads * spec.value),
          spec_(spec), each_(spec.nope + spec.rope) {
        if (spec.q_a.rows) compressed_ = arena_.rows(call.rows, spec.q_a.rows, form_);
        kv_ = arena_.take<float>(call.rows * round_up(entry_, PANEL));
        query_ = arena_.take<bf16>(call.rows * spec.heads * each_);
        heads_in_ = arena_.rows(spec.heads * call.singles, spec.nope, Form::bf16);
        mixed_ = arena_.rows(spec.heads * call.singles, spec.rank, Form::bf16);
        prepare_spans(each_, spec.value);
    }

    void run() {
#pragma omp parallel num_threads(threads_)
        {
            team_.share(0, call_.rows, [&](i64 row) { norm(row); });
            i64 first = spec_.q_a.rows ? pieces(spec_.q_a) : 0;
            team_.share(1, first + pieces(spec_.kv_a), [&](i64 piece) {
                if (piece < first) compress(piece);
                else remember(piece - first);
            });
            team_.share(2, call_.rows, [&](i64 row) { finish(row); });
            team_.share(3, pieces(spec_.q_b), [&](i64 piece) { ask(piece); });
            team_.share(10, call_.rows, [&](i64 row) { turn(row); });
            if (call_.singles) singles();
            if (call_.n_spans)
                team_.share(11, call_.n_spans * spec_.heads,
                            [&](i64 piece) { naive(span(piece / spec_.heads), piece % spec_.heads); });
            leave(spec_.heads * spec_.value);
        }
    }

  private:
    const Latent& spec_;
    i64 each_;  // numbers of a head's query
    Rows compressed_{}, heads_in_{}, mixed_{};
    float* kv_;
    bf16* query_;

    // In the absorbed form, whatever else is in the pass.
    void singles() {
        team_.share(4, spec_.heads, [&](i64 head) { absorb(head); });
        team_.share(5, first_chunk_[call_.singles] * streams_, [&](i64 piece) {
            attend(piece, {0, entry_, 0, spec_.rank}, std::min(PANEL, spec_.heads - piece % streams_ * PANEL));
        });
        team_.share(6, call_.singles * spec_.heads, [&](i64 piece) {
            i64 row = piece / spec_.heads, head = piece % spec_.heads;
            bf16* out = mixed_.plain + (head * call_.singles + row) * mixed_.stride;
            join_lane(row, head / PANEL, head % PANEL, out);
            std::memset(out + spec_.rank, 0, (mixed_.width - spec_.rank) * 2);
        });
        team_.share(7, spec_.heads, [&](i64 head) { expand(head); });
    }

    void compress(i64 piece) {
        product(spec_.q_a, piece, x_, [&](i64 row, i64 panel, Floats sums) {
            put(compressed_.plain + row * compressed_.stride, panel, spec_.q_a.rows, sums);
        });
    }

    void remember(i64 piece) {
        i64 stride = round_up(entry_, PANEL);
        product(spec_.kv_a, piece, x_, [&](i64 row, i64 panel, Floats sums) { store(kv_ + row * stride + panel * PANEL, sums); });
    }

    // The normed query in between, and the token's entry: normed latent, turned key.
    void finish(i64 row) {
        if (spec_.q_a.rows) {
            bf16* q = compressed_.plain + row * compressed_.stride;
            rms_norm(q, spec_.q_norm, spec_.latent_eps, spec_.q_a.rows, q, compressed_.width);
            round(compressed_, row);
        }
        float* kv = kv_ + row * round_up(entry_, PANEL);
        // Rounded as the plain form rounds it, before its norm.
        for (i64 i = 0; i < entry_; i++) kv[i] = widen(narrow(kv[i]));
        bf16* entry = call_.cache + call_.slot[row] * entry_;
        rms_norm(kv, spec_.kv_norm, spec_.latent_eps, spec_.rank, entry, spec_.rank);
        rotate(kv + spec_.rank, call_.turn + row * spec_.rope, spec_.rope, entry + spec_.rank);
    }

    void ask(i64 piece) {
        i64 size = spec_.heads * each_;
        product(spec_.q_b, piece, spec_.q_a.rows ? compressed_ : x_,
                [&](i64 row, i64 panel, Floats sums) { put(query_ + row * size, panel, size, sums); });
    }

    // The roped part of a token's queries, in place.
    void turn(i64 row) {
        bf16* q = query_ + row * spec_.heads * each_ + spec_.nope;
        for (i64 head = 0; head < spec_.heads; head++, q += each_) rotate(q, call_.turn + row * spec_.rope, spec_.rope, q);
    }

    static Pack of(Pack pack, i64 head, i64 bytes) {
        pack.data += head * bytes;
        return pack;
    }

    // A head's queries, moved into the latent's space, as one lane of the panel that scores are made with.
    void absorb(i64 head) {
        i64 rows = call_.singles, stream = head / PANEL, lane = head % PANEL;
        Rows in = heads_in_.from(head * rows, rows);
        for (i64 row = 0; row < rows; row++) {
            const bf16* q = query_ + (call_.single[row] * spec_.heads + head) * each_;
            bring(Form::bf16, q, spec_.nope, in, row);
            for (i64 i = 0; i < spec_.rope; i++) place(query_lane(row, stream, lane), spec_.rank + i) = q[spec_.nope + i];
        }
        Pack key_up = of(spec_.key_up, head, spec_.key_up_bytes);
        panels(key_up, 0, key_up.panels(), in, [&](i64 row, i64 panel, Floats sums) {
            alignas(64) bf16 numbers[PANEL];
            store(numbers, sums);
            for (i64 i = panel * PANEL; i < std::min(spec_.rank, (panel + 1) * PANEL); i++)
                place(query_lane(row, stream, lane), i) = numbers[i - panel * PANEL];
        });
    }

    void expand(i64 head) {
        Pack value_up = of(spec_.value_up, head, spec_.value_up_bytes);
        Rows in = mixed_.from(head * call_.singles, call_.singles);
        panels(value_up, 0, value_up.panels(), in, [&](i64 row, i64 panel, Floats sums) {
            put(out_.plain + call_.single[row] * out_.stride + head * spec_.value, panel, spec_.value, sums);
        });
    }

    void naive(const Span& span, i64 head) {
        ExpandedHead expanded(expanded_ + omp_get_thread_num() * expanded_bytes_, span.slots(), each_, spec_.value);
        Entries entries{call_.cache, entry_, call_.tables + span.table, span.slots()};
        expanded.multiply(entries, of(spec_.key_rows, head, spec_.key_rows_bytes),
                          of(spec_.value_up, head, spec_.value_up_bytes), spec_.rank);
        expanded.copy_keys(entries, spec_.rank, spec_.rope, spec_.nope);
        attend_span(span, expanded, query_, spec_.heads * each_, each_, spec_.value, head);
    }
};

inline void latent(const Latent& spec, const AttentionCall& call, int threads) { LatentRun(spec, call, threads).run(); }

}  // namespace finback
