// Norm, router, gated experts and the shared one, weighted sum: one call, x is read and written once.
#pragma once

#include <algorithm>

#include "common.h"
#include "calls.h"

namespace finback {

inline float dot_row(const float* w, const bf16* x, i64 n) {
    Floats total = zero();
    i64 i = 0;
    for (; i + 16 <= n; i += 16) total = fma(load(w + i), load(x + i), total);
    float rest = sum(total);
    for (; i < n; i++) rest += w[i] * widen(x[i]);
    return rest;
}

// From a row of logits to the chosen experts and their weights: model/moe.py, Router.
class Choice {
  public:
    explicit Choice(const FeedForward& spec) : spec_(spec), score_(spec.experts), rank_(spec.experts) {}

    void of(const float* logits, int64_t* experts, float* weights, bool replay) {
        scores(logits);
        if (!replay) select(experts);
        float total = 0;
        for (i64 k = 0; k < spec_.chosen; k++) total += weights[k] = score_[experts[k]];
        float factor = spec_.softmax && spec_.normalise ? 1.0f : spec_.factor;
        if (spec_.normalise) factor /= total + 1e-20f;
        for (i64 k = 0; k < spec_.chosen; k++) weights[k] *= factor;
    }

  private:
    const FeedForward& spec_;
    std::vector<float> score_, rank_;

    void scores(const float* logits) {
        if (!spec_.softmax) {
            for (i64 e = 0; e < spec_.experts; e++) score_[e] = 1.0f / (1.0f + std::exp(-logits[e]));
            return;
        }
        float most = *std::max_element(logits, logits + spec_.experts), total = 0;
        for (i64 e = 0; e < spec_.experts; e++) total += score_[e] = std::exp(logits[e] - most);
        for (float& score : score_) score /= total;
    }

    void select(int64_t* experts) {
        for (i64 e = 0; e < spec_.experts; e++) rank_[e] = score_[e] + (spec_.bias ? spec_.bias[e] : 0.0f);
        if (spec_.groups > 1) keep_groups();
        for (i64 k = 0; k < spec_.chosen; k++) {
            experts[k] = std::max_element(rank_.begin(), rank_.end()) - rank_.begin();
            rank_[experts[k]] = -INFINITY;
        }
    }

    void keep_groups() {
        i64 size = spec_.experts / spec_.groups;
        std::vector<float> judged(spec_.groups);
        for (i64 g = 0; g < spec_.groups; g++) {
            auto start = rank_.begin() + g * size;
            std::vector<float> best(spec_.group_best);
            std::partial_sort_copy(start, start + size, best.begin(), best.end(), std::greater<float>());
            for (float score : best) judged[g] += score;
        }
        std::vector<float> sorted = judged;
        std::sort(sorted.begin(), sorted.end(), std::greater<float>());
        i64 left = spec_.kept_groups;
        for (i64 g = 0; g < spec_.groups; g++) {
            if (left > 0 && judged[g] >= sorted[spec_.kept_groups - 1]) left--;
            else std::fill(rank_.begin() + g * size, rank_.begin() + (g + 1) * size, -INFINITY);
        }
    }
};

// Which rows every expert gets: its choices are order[start[e]] .. order[start[e + 1] - 1], each row x chosen + k.
struct Deal {
    i64 *start, *order;

    void make(const int64_t* experts, i64 choices, i64 n_experts) {
        std::fill(start, start + n_experts + 1, 0);
        for (i64 c = 0; c < choices; c++) start[experts[c] + 1]++;
        for (i64 e = 0; e < n_experts; e++) start[e + 1] += start[e];
        for (i64 c = 0; c < choices; c++) order[start[experts[c]]++] = c;
        for (i64 e = n_experts; e > 0; e--) start[e] = start[e - 1];
        start[0] = 0;
    }
};

inline void copy_row(const Rows& from, i64 source, const Rows& to, i64 target) {
    std::memcpy(to.plain + target * to.stride, from.plain + source * from.stride, from.width * 2);
    if (!from.code) return;
    std::memcpy(to.code + target * to.stride, from.code + source * from.stride, from.width);
    std::memcpy(to.scale + target * to.groups, from.scale + source * from.groups, from.groups * 4);
    std::memcpy(to.offset + target * to.groups, from.offset + source * from.groups, from.groups * 4);
}

// silu(gate) · up of some panels that stand by turns. Rows past the last are zeros, and so are their results.
inline void gated(const Pack& gate_up, i64 first, i64 count, const Rows& x, const Rows& act) {
    Floats gate;
    i64 last = gate_up.panels() - 1;
    panels(gate_up, first, count, x, [&](i64 row, i64 panel, Floats sums) {
        if (panel % 2 == 0) {
            gate = silu(sums);
            return;
        }
        bf16* out = act.plain + row * act.stride + panel / 2 * PANEL;
        store(out, mul(gate, sums));
        if (panel == last && (panel / 2 + 1) * PANEL < act.width) store(out + PANEL, zero());
    });
}

class FeedForwardRun {
  public:
    FeedForwardRun(const FeedForward& spec, const FeedForwardCall& call, int threads)
        : spec_(spec), call_(call), threads_(threads), arena_(Arena::fresh()) {
        form_ = spec.experts ? spec.gate_up.form : spec.shared_gate_up.form;
        i64 rows = call.rows;
        choices_ = rows * spec.chosen;
        x_ = arena_.rows(rows, spec.hidden, form_);
        if (spec.shared_width) shared_act_ = arena_.rows(rows, spec.shared_width, form_);
        if (spec.experts) {
            act_ = arena_.rows(choices_, spec.width, form_);
            // One row: every expert gets it as it is.
            given_ = rows == 1 ? x_ : arena_.rows(choices_, spec.hidden, form_);
            logits_ = arena_.take<float>(rows * spec.experts);
            weights_ = arena_.take<float>(choices_);
            experts_ = call.experts ? call.experts : arena_.take<int64_t>(choices_);
            deal_ = {arena_.take<i64>(spec.experts + 1), arena_.take<i64>(choices_)};
            busy_ = arena_.take<i64>(spec.experts);
        }
        step_ = rows * std::max<i64>(spec.chosen, 1) <= FEW * std::max<i64>(spec.experts, 1)
                    ? WIDE
                    : panels_of_many((spec.hidden + PANEL - 1) / PANEL, threads);
        sums_ = arena_.take<float>(threads * rows * step_ * PANEL);
    }

    void run() {
#pragma omp parallel num_threads(threads_)
        {
            team_.share(0, call_.rows, [&](i64 row) { norm(row); });
            i64 blocks = (spec_.experts + BLOCK - 1) / BLOCK * call_.rows;
            i64 shared = spec_.shared_width ? pieces(spec_.shared_gate_up) : 0;
            team_.share(1, blocks + shared, [&](i64 piece) {
                piece < blocks ? route(piece) : open(spec_.shared_gate_up, piece - blocks, x_, shared_act_);
            });
            if (spec_.experts) routed();
            if (by_integers(form_)) {
                i64 shared_rows = spec_.shared_width ? call_.rows : 0, routed_rows = spec_.experts ? choices_ : 0;
                team_.share(5, shared_rows + routed_rows, [&](i64 row) {
                    row < shared_rows ? round(shared_act_, row) : round(act_, row - shared_rows);
                });
            }
            i64 panels = (spec_.hidden + PANEL - 1) / PANEL;
            team_.share(6, (panels + step_ - 1) / step_, [&](i64 piece) { close(piece * step_, panels); });
        }
    }

  private:
    static constexpr i64 BLOCK = 8;  // experts whose logits are one piece of work
    const FeedForward& spec_;
    const FeedForwardCall& call_;
    int threads_;
    Arena& arena_;
    Team team_;
    Form form_;
    i64 choices_, step_, n_busy_ = 0;
    Rows x_{}, given_{}, act_{}, shared_act_{};
    float *logits_ = nullptr, *weights_ = nullptr, *sums_;
    int64_t* experts_ = nullptr;
    Deal deal_{};
    i64* busy_ = nullptr;

    i64 pieces(const Pack& pack) const { return (pack.panels() + step_ - 1) / step_; }

    void norm(i64 row) {
        bf16* out = x_.plain + row * x_.stride;
        rms_norm(call_.x + row * spec_.hidden, spec_.norm, spec_.eps, spec_.hidden, out, x_.width);
        if (by_integers(form_)) round(x_, row);
    }

    void route(i64 piece) {
        i64 row = piece % call_.rows, first = piece / call_.rows * BLOCK;
        for (i64 e = first; e < std::min(first + BLOCK, spec_.experts); e++)
            logits_[row * spec_.experts + e] = dot_row(spec_.router + e * spec_.hidden, x_.plain + row * x_.stride, spec_.hidden);
    }

    void open(const Pack& pack, i64 piece, const Rows& x, const Rows& act) {
        i64 first = piece * step_;
        gated(pack, first, std::min(step_, pack.panels() - first), x, act);
    }

    void routed() {
        team_.share(2, call_.rows, [&](i64 row) {
            Choice choice(spec_);
            choice.of(logits_ + row * spec_.experts, experts_ + row * spec_.chosen, weights_ + row * spec_.chosen, call_.replay);
        });
        team_.share(3, 1, [&](i64) {
            deal_.make(experts_, choices_, spec_.experts);
            for (i64 e = 0; e < spec_.experts; e++)
                if (deal_.start[e] < deal_.start[e + 1]) busy_[n_busy_++] = e;
        });
        if (call_.rows > 1)
            team_.share(7, choices_, [&](i64 at) { copy_row(x_, deal_.order[at] / spec_.chosen, given_, at); });
        i64 each = pieces(spec_.gate_up);
        team_.share(4, n_busy_ * each, [&](i64 piece) {
            i64 expert = busy_[piece / each], start = deal_.start[expert], many = deal_.start[expert + 1] - start;
            open(of(spec_.gate_up, expert, spec_.gate_up_bytes), piece % each,
                 call_.rows == 1 ? given_ : given_.from(start, many), act_.from(start, many));
        });
    }

    static Pack of(Pack pack, i64 expert, i64 bytes) {
        pack.data += expert * bytes;
        return pack;
    }

    void round(const Rows& x, i64 row) {
        round_row(form_, x.plain + row * x.stride, x.width, x.code + row * x.stride, x.scale + row * x.groups,
                  x.offset + row * x.groups);
    }

    // Columns of the result: shared expert first, then the routed ones in their order, whatever other rows there are.
    void close(i64 first, i64 panels_in_all) {
        i64 count = std::min(step_, panels_in_all - first), size = step_ * PANEL;
        float* total = sums_ + omp_get_thread_num() * call_.rows * size;
        std::fill(total, total + call_.rows * size, 0.0f);
        if (spec_.shared_width)
            panels(spec_.shared_down, first, count, shared_act_,
                   [&](i64 row, i64 panel, Floats sums) { store(total + row * size + (panel - first) * PANEL, sums); });
        for (i64 b = 0; b < n_busy_; b++) {
            i64 expert = busy_[b], start = deal_.start[expert], many = deal_.start[expert + 1] - start;
            panels(of(spec_.down, expert, spec_.down_bytes), first, count, act_.from(start, many),
                   [&](i64 row, i64 panel, Floats sums) {
                       i64 choice = deal_.order[start + row];
                       float* at = total + choice / spec_.chosen * size + (panel - first) * PANEL;
                       store(at, fma(sums, all(weights_[choice]), load((const float*)at)));
                   });
        }
        for (i64 row = 0; row < call_.rows; row++)
            for (i64 p = 0; p < count; p++) add_to(call_.x + row * spec_.hidden, first + p, total + row * size + p * PANEL);
    }

    void add_to(bf16* row, i64 panel, const float* sums) {
        i64 start = panel * PANEL;
        if (start + PANEL <= spec_.hidden) return store(row + start, add(load((const bf16*)row + start), load(sums)));
        for (i64 i = start; i < spec_.hidden; i++) row[i] = narrow(widen(row[i]) + sums[i - start]);
    }
};

inline void feed_forward(const FeedForward& spec, const FeedForwardCall& call, int threads) {
    FeedForwardRun(spec, call, threads).run();
}

}  // namespace finback
