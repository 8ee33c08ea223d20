// What latent and grouped attention share: norm before, chunks and spans of the cache, output and residual after.
#pragma once

#include <algorithm>

#include "common.h"
#include "calls.h"

namespace finback {

class AttentionRun {
  protected:
    const Attention& base_;
    const AttentionCall& call_;
    int threads_;
    Arena& arena_;
    Team team_;
    Form form_;
    i64 entry_, value_, streams_;  // numbers of an entry and of a mixed value; panels of 16 queries of a token
    i64 key_, query_panel_, step_;
    Rows x_, out_;
    float *most_ = nullptr, *total_ = nullptr, *mixed_parts_ = nullptr, *share_ = nullptr, *span_mixed_ = nullptr;
    uint8_t *queries_ = nullptr, *expanded_ = nullptr;
    i64 *first_chunk_ = nullptr, *row_of_ = nullptr, *turn_ = nullptr;
    i64 expanded_bytes_ = 0;

    // key: numbers of a query as the cache is asked; value: numbers that come of it; out: numbers of all heads.
    AttentionRun(const Attention& base, const AttentionCall& call, int threads, i64 entry, i64 key, i64 value,
                 i64 streams, i64 out)
        : base_(base), call_(call), threads_(threads), arena_(Arena::fresh()), form_(base.output.form), entry_(entry),
          value_(value), streams_(streams), key_(key), query_panel_(panel_bytes(Form::bf16, key)),
          step_(call.rows <= FEW ? WIDE : panels_of_many((base.hidden + PANEL - 1) / PANEL, threads)),
          x_(arena_.rows(call.rows, base.hidden, form_)),
          out_(arena_.rows(call.rows, out, form_)) {
        if (call.singles) prepare_singles(call.singles);
    }

    void prepare_singles(i64 count) {
        queries_ = arena_.take<uint8_t>(count * streams_ * query_panel_);
        first_chunk_ = arena_.take<i64>(count + 1);
        first_chunk_[0] = 0;
        for (i64 row = 0; row < count; row++)
            first_chunk_[row + 1] = first_chunk_[row] + (call_.length[call_.single[row]] + CHUNK - 1) / CHUNK;
        row_of_ = arena_.take<i64>(first_chunk_[count]);
        for (i64 row = 0; row < count; row++) std::fill(row_of_ + first_chunk_[row], row_of_ + first_chunk_[row + 1], row);
        turn_ = arena_.take<i64>(first_chunk_[count]);
        order_chunks(count);
        share_ = arena_.take<float>(first_chunk_[count] * threads_);
        i64 parts = first_chunk_[count] * streams_;
        most_ = arena_.take<float>(parts * PANEL);
        total_ = arena_.take<float>(parts * PANEL);
        mixed_parts_ = arena_.take<float>(parts * PANEL * value_);
    }

    // The same stretch of every token's slots before the next: neighbours of one sequence find it in the cache.
    void order_chunks(i64 count) {
        i64 turn = 0;
        for (i64 chunk = 0; turn < first_chunk_[count]; chunk++)
            for (i64 row = 0; row < count; row++)
                if (first_chunk_[row] + chunk < first_chunk_[row + 1]) turn_[turn++] = first_chunk_[row] + chunk;
    }

    // Memory of a head's expanded keys and values, for every thread.
    void prepare_spans(i64 key, i64 value) {
        for (i64 span = 0; span < call_.n_spans; span++)
            expanded_bytes_ = std::max(expanded_bytes_, ExpandedHead::bytes(this->span(span).slots(), key, value));
        if (!call_.n_spans) return;
        expanded_ = arena_.take<uint8_t>(expanded_bytes_ * threads_);
        span_mixed_ = arena_.take<float>(threads_ * QueryBlock::MANY * round_up(value, PANEL));
    }

    Span span(i64 index) const {
        const int64_t* s = call_.spans + 4 * index;
        return {s[0], s[1], s[2], s[3]};
    }

    i64 pieces(const Pack& pack) const { return (pack.panels() + step_ - 1) / step_; }

    void round(const Rows& x, i64 row) {
        if (by_integers(form_)) bring(form_, x.plain + row * x.stride, x.width, x, row);
    }

    template <class Out>
    void product(const Pack& pack, i64 piece, const Rows& x, Out out) {
        i64 first = piece * step_;
        panels(pack, first, std::min(step_, pack.panels() - first), x, out);
    }

    void norm(i64 row) {
        rms_norm(call_.x + row * base_.hidden, base_.norm, base_.eps, base_.hidden, x_.plain + row * x_.stride, x_.width);
        round(x_, row);
    }

    static bf16& place(bf16* lane, i64 column) { return lane[column / 2 * PANEL * 2 + column % 2]; }

    // Where query `lane` of a token's panel begins. What lanes without a head hold is never looked at.
    bf16* query_lane(i64 row, i64 stream, i64 lane) const {
        return reinterpret_cast<bf16*>(queries_ + (row * streams_ + stream) * query_panel_) + lane * 2;
    }

    Partial partial(i64 part) const {
        return {most_ + part * PANEL, total_ + part * PANEL, mixed_parts_ + part * PANEL * value_};
    }

    void attend(i64 piece, const Stream& stream, i64 heads) {
        i64 chunk = turn_[piece / streams_], panel = piece % streams_, row = row_of_[chunk], token = call_.single[row];
        Pack query{Form::bf16, PANEL, key_, queries_ + (row * streams_ + panel) * query_panel_, query_panel_};
        Entries entries{call_.cache, entry_, call_.tables + call_.table[token], call_.length[token]};
        attend_chunk(query, entries, stream, (chunk - first_chunk_[row]) * CHUNK, base_.scale, heads,
                     partial(chunk * streams_ + panel));
    }

    void join_lane(i64 row, i64 stream, i64 lane, bf16* out) {
        i64 chunks = first_chunk_[row + 1] - first_chunk_[row];
        Partial first = partial(first_chunk_[row] * streams_ + stream);
        join(first.most + lane, first.total + lane, first.mixed + lane * value_, chunks, streams_ * PANEL,
             streams_ * PANEL * value_, value_, share_ + omp_get_thread_num() * first_chunk_[call_.singles], out);
    }

    // All queries of one head over a span, its keys and values expanded.
    void attend_span(const Span& span, const ExpandedHead& expanded, const bf16* query, i64 stride, i64 key, i64 value,
                     i64 head) {
        float* mixed = span_mixed_ + omp_get_thread_num() * QueryBlock::MANY * round_up(value, PANEL);
        for (i64 q = 0; q < span.width; q += QueryBlock::MANY) {
            i64 row = span.first + q;
            Rows queries{std::min(QueryBlock::MANY, span.width - q), key, stride,
                         const_cast<bf16*>(query) + row * stride + head * key};
            QueryBlock(expanded, queries, span.start + q, base_.scale, value)
                .run(mixed, out_.plain + row * out_.stride + head * value, out_.stride);
        }
    }

    // The output projection, added to x.
    void leave(i64 numbers) {
        if (by_integers(form_) || out_.width > numbers)
            team_.share(8, call_.rows, [&](i64 row) { bring(form_, out_.plain + row * out_.stride, numbers, out_, row); });
        team_.share(9, pieces(base_.output), [&](i64 piece) {
            product(base_.output, piece, out_, [&](i64 row, i64 panel, Floats sums) {
                bf16* x = call_.x + row * base_.hidden;
                alignas(64) bf16 before[PANEL] = {};
                i64 start = panel * PANEL;
                std::memcpy(before, x + start, std::min(PANEL, base_.hidden - start) * 2);
                put(x, panel, base_.hidden, add(load((const bf16*)before), sums));
            });
        });
    }
};

}  // namespace finback
