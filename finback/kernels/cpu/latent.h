// Absorbed latent attention of one layer: projections, cache, attention, output, residual, in one call.
#pragma once

#include <algorithm>

#include "common.h"
#include "calls.h"

namespace finback {

class LatentRun {
  public:
    LatentRun(const Latent& spec, const LatentCall& call, int threads)
        : spec_(spec), call_(call), threads_(threads), arena_(Arena::fresh()) {
        i64 rows = call.rows;
        form_ = spec.output.form;
        entry_ = spec.rank + spec.rope;
        x_ = arena_.rows(rows, spec.hidden, form_);
        if (spec.q_a.rows) compressed_ = arena_.rows(rows, spec.q_a.rows, form_);
        kv_ = arena_.take<float>(rows * round_up(entry_, PANEL));
        query_ = arena_.take<bf16>(rows * spec.heads * (spec.nope + spec.rope));
        panels_ = (spec.heads + PANEL - 1) / PANEL;
        query_panel_ = panel_bytes(Form::bf16, entry_);
        queries_ = arena_.take<uint8_t>(rows * panels_ * query_panel_);
        heads_in_ = arena_.rows(spec.heads * rows, spec.nope, Form::bf16);
        mixed_ = arena_.rows(spec.heads * rows, spec.rank, Form::bf16);
        out_ = arena_.rows(rows, spec.heads * spec.value, form_);
        first_chunk_ = arena_.take<i64>(rows + 1);
        first_chunk_[0] = 0;
        for (i64 row = 0; row < rows; row++)
            first_chunk_[row + 1] = first_chunk_[row] + (call.length[row] + CHUNK - 1) / CHUNK;
        i64 parts = first_chunk_[rows] * panels_;
        row_of_ = arena_.take<i64>(first_chunk_[rows]);
        for (i64 row = 0; row < rows; row++) std::fill(row_of_ + first_chunk_[row], row_of_ + first_chunk_[row + 1], row);
        most_ = arena_.take<float>(parts * PANEL);
        total_ = arena_.take<float>(parts * PANEL);
        mixed_parts_ = arena_.take<float>(parts * PANEL * spec.rank);
        step_ = rows <= FEW ? WIDE : panels_of_many((spec.hidden + PANEL - 1) / PANEL, threads);
    }

    void run() {
#pragma omp parallel num_threads(threads_)
        {
            team_.share(0, call_.rows, [&](i64 row) {
                bf16* out = x_.plain + row * x_.stride;
                rms_norm(call_.x + row * spec_.hidden, spec_.norm, spec_.eps, spec_.hidden, out, x_.width);
                round(x_, row);
            });
            i64 first = spec_.q_a.rows ? pieces(spec_.q_a) : 0;
            team_.share(1, first + pieces(spec_.kv_a), [&](i64 piece) {
                if (piece < first) compress(piece);
                else remember(piece - first);
            });
            team_.share(2, call_.rows, [&](i64 row) { finish(row); });
            team_.share(3, pieces(spec_.q_b), [&](i64 piece) { ask(piece); });
            team_.share(4, spec_.heads, [&](i64 head) { absorb(head); });
            team_.share(5, first_chunk_[call_.rows] * panels_, [&](i64 piece) { attend(piece); });
            team_.share(6, call_.rows * spec_.heads, [&](i64 piece) { join_head(piece / spec_.heads, piece % spec_.heads); });
            team_.share(7, spec_.heads, [&](i64 head) { expand(head); });
            if (by_integers(form_) || out_.width > spec_.heads * spec_.value)
                team_.share(8, call_.rows, [&](i64 row) {
                    bf16* out = out_.plain + row * out_.stride;
                    bring(form_, out, spec_.heads * spec_.value, out_, row);
                });
            team_.share(9, pieces(spec_.output), [&](i64 piece) { put_out(piece); });
        }
    }

  private:
    const Latent& spec_;
    const LatentCall& call_;
    int threads_;
    Arena& arena_;
    Team team_;
    Form form_;
    i64 entry_, panels_, query_panel_, step_;
    Rows x_{}, compressed_{}, heads_in_{}, mixed_{}, out_{};
    float *kv_, *most_, *total_, *mixed_parts_;
    bf16* query_;
    uint8_t* queries_;
    i64 *first_chunk_, *row_of_;

    i64 pieces(const Pack& pack) const { return (pack.panels() + step_ - 1) / step_; }

    void round(const Rows& x, i64 row) {
        if (by_integers(form_)) bring(form_, x.plain + row * x.stride, x.width, x, row);
    }

    template <class Out>
    void product(const Pack& pack, i64 piece, const Rows& x, Out out) {
        i64 first = piece * step_;
        panels(pack, first, std::min(step_, pack.panels() - first), x, out);
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
        i64 size = spec_.heads * (spec_.nope + spec_.rope);
        product(spec_.q_b, piece, spec_.q_a.rows ? compressed_ : x_,
                [&](i64 row, i64 panel, Floats sums) { put(query_ + row * size, panel, size, sums); });
    }

    // A head's queries, moved into the latent's space, as one lane of the panel that scores are made with.
    void absorb(i64 head) {
        i64 rows = call_.rows, each = spec_.nope + spec_.rope, pairs = entry_ / 2;
        Rows in = heads_in_.from(head * rows, rows);
        bf16* lane = reinterpret_cast<bf16*>(queries_) + head / PANEL * query_panel_ / 2 + head % PANEL * 2;
        i64 next = panels_ * query_panel_ / 2;
        bool last = head == spec_.heads - 1;
        for (i64 row = 0; row < rows; row++) {
            const bf16* q = query_ + (row * spec_.heads + head) * each;
            bring(Form::bf16, q, spec_.nope, in, row);
            bf16 turned[1024];
            rotate(q + spec_.nope, call_.turn + row * spec_.rope, spec_.rope, turned);
            for (i64 i = 0; i < spec_.rope; i++) place(lane + row * next, spec_.rank + i) = turned[i];
            for (i64 unused = 1; last && unused < PANEL - head % PANEL; unused++)
                for (i64 pair = 0; pair < pairs; pair++) std::memset(lane + row * next + pair * PANEL * 2 + unused * 2, 0, 4);
        }
        Pack key_up = spec_.key_up;
        key_up.data += head * spec_.key_up_bytes;
        panels(key_up, 0, key_up.panels(), in, [&](i64 row, i64 panel, Floats sums) {
            alignas(64) bf16 numbers[PANEL];
            store(numbers, sums);
            for (i64 i = panel * PANEL; i < std::min(spec_.rank, (panel + 1) * PANEL); i++)
                place(lane + row * next, i) = numbers[i - panel * PANEL];
        });
    }

    static bf16& place(bf16* lane, i64 column) { return lane[column / 2 * PANEL * 2 + column % 2]; }

    Partial partial(i64 part) const {
        return {most_ + part * PANEL, total_ + part * PANEL, mixed_parts_ + part * PANEL * spec_.rank};
    }

    void attend(i64 piece) {
        i64 chunk = piece / panels_, panel = piece % panels_, row = row_of_[chunk];
        Pack query{Form::bf16, PANEL, entry_, queries_ + (row * panels_ + panel) * query_panel_, query_panel_};
        Entries entries{call_.cache, entry_, call_.tables + call_.table[row], call_.length[row]};
        i64 heads = std::min(PANEL, spec_.heads - panel * PANEL);
        attend_chunk(query, entries, {0, entry_, 0, spec_.rank}, (chunk - first_chunk_[row]) * CHUNK, spec_.scale, heads,
                     partial(chunk * panels_ + panel));
    }

    void join_head(i64 row, i64 head) {
        i64 chunks = first_chunk_[row + 1] - first_chunk_[row], lane = head % PANEL;
        Partial first = partial(first_chunk_[row] * panels_ + head / PANEL);
        bf16* out = mixed_.plain + (head * call_.rows + row) * mixed_.stride;
        join(first.most + lane, first.total + lane, first.mixed + lane * spec_.rank, chunks, panels_ * PANEL,
             panels_ * PANEL * spec_.rank, spec_.rank, out);
        std::memset(out + spec_.rank, 0, (mixed_.width - spec_.rank) * 2);
    }

    void expand(i64 head) {
        Pack value_up = spec_.value_up;
        value_up.data += head * spec_.value_up_bytes;
        Rows in = mixed_.from(head * call_.rows, call_.rows);
        panels(value_up, 0, value_up.panels(), in, [&](i64 row, i64 panel, Floats sums) {
            put(out_.plain + row * out_.stride + head * spec_.value, panel, spec_.value, sums);
        });
    }

    void put_out(i64 piece) {
        product(spec_.output, piece, out_, [&](i64 row, i64 panel, Floats sums) {
            bf16* x = call_.x + row * spec_.hidden;
            alignas(64) bf16 before[PANEL] = {};
            i64 start = panel * PANEL;
            std::memcpy(before, x + start, std::min(PANEL, spec_.hidden - start) * 2);
            put(x, panel, spec_.hidden, add(load((const bf16*)before), sums));
        });
    }
};

inline void latent(const Latent& spec, const LatentCall& call, int threads) { LatentRun(spec, call, threads).run(); }

}  // namespace finback
