// Grouped-query attention of one layer: projections, cache, attention, output, residual, in one call.
#pragma once

#include "attention.h"

namespace finback {

class GroupedRun : AttentionRun {
  public:
    GroupedRun(const Grouped& spec, const AttentionCall& call, int threads)
        : AttentionRun(spec, call, threads, 2 * spec.kv_heads * spec.head_dim, spec.head_dim, spec.head_dim,
                       spec.kv_heads * panels_of(spec), spec.heads * spec.head_dim),
          spec_(spec), dim_(spec.head_dim), group_(spec.heads / spec.kv_heads), keys_(spec.kv_heads * spec.head_dim) {
        raw_ = arena_.take<bf16>(call.rows * (spec.heads * dim_ + 2 * keys_));
        query_ = arena_.take<bf16>(call.rows * spec.heads * dim_);
        prepare_spans(dim_, dim_);
    }

    void run() {
#pragma omp parallel num_threads(threads_)
        {
            team_.share(0, call_.rows, [&](i64 row) { norm(row); });
            i64 queries = pieces(spec_.query), keys = pieces(spec_.key);
            team_.share(1, queries + 2 * keys, [&](i64 piece) {
                if (piece < queries) project(spec_.query, spec_.query_bias, piece, 0);
                else if (piece < queries + keys) project(spec_.key, spec_.key_bias, piece - queries, spec_.heads * dim_);
                else project(spec_.value, spec_.value_bias, piece - queries - keys, spec_.heads * dim_ + keys_);
            });
            team_.share(2, call_.rows, [&](i64 row) { finish(row); });
            if (call_.singles) singles();
            if (call_.n_spans)
                team_.share(11, call_.n_spans * spec_.kv_heads,
                            [&](i64 piece) { whole(span(piece / spec_.kv_heads), piece % spec_.kv_heads); });
            leave(spec_.heads * dim_);
        }
    }

  private:
    const Grouped& spec_;
    i64 dim_, group_, keys_;
    bf16 *raw_, *query_;

    static i64 panels_of(const Grouped& spec) { return (spec.heads / spec.kv_heads + PANEL - 1) / PANEL; }
    i64 raw_size() const { return spec_.heads * dim_ + 2 * keys_; }

    void project(const Pack& pack, const float* bias, i64 piece, i64 offset) {
        product(pack, piece, x_, [&](i64 row, i64 panel, Floats sums) {
            bf16* out = raw_ + row * raw_size() + offset;
            put(out, panel, pack.rows, sums);
            if (!bias) return;  // rounded before the bias is added, as the plain form does
            for (i64 i = panel * PANEL; i < std::min(pack.rows, (panel + 1) * PANEL); i++)
                out[i] = narrow(widen(out[i]) + widen(narrow(bias[i])));
        });
    }

    // Halves of a head dealt out to pairs, and turned.
    void turned(const bf16* from, i64 heads, const float* turn, bf16* out) const {
        bf16 pairs[1024];
        for (i64 head = 0; head < heads; head++, from += dim_, out += dim_) {
            for (i64 i = 0; i < dim_ / 2; i++) pairs[2 * i] = from[i], pairs[2 * i + 1] = from[i + dim_ / 2];
            rotate(pairs, turn, dim_, out);
        }
    }

    void finish(i64 row) {
        const bf16* raw = raw_ + row * raw_size();
        const float* turn = call_.turn + row * dim_;
        bf16* entry = call_.cache + call_.slot[row] * entry_;
        turned(raw, spec_.heads, turn, query_ + row * spec_.heads * dim_);
        turned(raw + spec_.heads * dim_, spec_.kv_heads, turn, entry);
        std::memcpy(entry + keys_, raw + spec_.heads * dim_ + keys_, keys_ * 2);
    }

    void singles() {
        i64 each = panels_of(spec_);
        team_.share(4, call_.singles * streams_, [&](i64 piece) { gather(piece / streams_, piece % streams_); });
        team_.share(5, first_chunk_[call_.singles] * streams_, [&](i64 piece) {
            i64 stream = piece % streams_, head = stream / each;
            attend(piece, {head * dim_, dim_, keys_ + head * dim_, dim_}, lanes(stream));
        });
        team_.share(6, call_.singles * spec_.heads, [&](i64 piece) {
            i64 row = piece / spec_.heads, head = piece % spec_.heads, in_group = head % group_;
            join_lane(row, head / group_ * each + in_group / PANEL, in_group % PANEL,
                      out_.plain + call_.single[row] * out_.stride + head * dim_);
        });
    }

    i64 lanes(i64 stream) const { return std::min(PANEL, group_ - stream % panels_of(spec_) * PANEL); }

    // Up to 16 heads of a group as the lanes of one panel.
    void gather(i64 row, i64 stream) {
        i64 each = panels_of(spec_), first = stream / each * group_ + stream % each * PANEL;
        for (i64 lane = 0; lane < lanes(stream); lane++) {
            const bf16* q = query_ + (call_.single[row] * spec_.heads + first + lane) * dim_;
            for (i64 i = 0; i < dim_; i += 2) std::memcpy(&place(query_lane(row, stream, lane), i), q + i, 4);
        }
    }

    void whole(const Span& span, i64 kv_head) {
        ExpandedHead expanded(expanded_ + omp_get_thread_num() * expanded_bytes_, span.slots(), dim_, dim_);
        Entries entries{call_.cache, entry_, call_.tables + span.table, span.slots()};
        expanded.copy_keys(entries, kv_head * dim_, dim_, 0);
        expanded.copy_values(entries, keys_ + kv_head * dim_);
        for (i64 head = kv_head * group_; head < (kv_head + 1) * group_; head++)
            attend_span(span, expanded, query_, spec_.heads * dim_, dim_, dim_, head);
    }
};

inline void grouped(const Grouped& spec, const AttentionCall& call, int threads) { GroupedRun(spec, call, threads).run(); }

}  // namespace finback
