// The gated feed-forward of routed experts in training, and its gradients.
#pragma once

#include <vector>

#include "lanes.h"
#include "rows.h"
#include "train_product.h"
#include "train_rows.h"

namespace finback {

struct TrainExperts {
    i64 tokens, hidden, width, experts, chosen;
    const bf16* x;          // [tokens, hidden]
    const int64_t* choice;  // [tokens, chosen]
    const float* weight;    // [tokens, chosen]
    Stored gate, up, down;  // of expert 0
    i64 gate_next, down_next;  // numbers from one expert's gate (and up) to the next one's, and of down
};

struct TrainExpertsGradients {
    const bf16* grad;                           // [tokens, hidden]
    bf16* dx;                                   // [tokens, hidden]
    float *d_gate, *d_up, *d_down, *d_weight;   // gate and up below each other in [experts, 2 width, hidden]
};

// Rows sorted by expert, each expert's filled up to a multiple of STEP by rows of no token.
struct TrainDeal {
    std::vector<i64> start, place, source;  // [experts + 1], [tokens · chosen], [rows]: a choice, or -1

    explicit TrainDeal(const TrainExperts& call) : start(call.experts + 1, 0), place(call.tokens * call.chosen) {
        i64 choices = call.tokens * call.chosen;
        for (i64 i = 0; i < choices; i++) start[call.choice[i] + 1]++;
        for (i64 e = 0; e < call.experts; e++) start[e + 1] = start[e] + round_up(start[e + 1], STEP);
        source.assign(start.back(), -1);
        std::vector<i64> next(start.begin(), start.end() - 1);
        for (i64 i = 0; i < choices; i++) source[place[i] = next[call.choice[i]]++] = i;
    }
    i64 rows() const { return start.back(); }
};

class TrainExpertsRun {
  public:
    TrainExpertsRun(const TrainExperts& call, int threads)
        : call_(call), threads_(threads), arena_(Arena::fresh()), deal_(call), both_(2 * call.width),
          wide_(round_up(call.hidden, STEP)), half_(round_up(call.width, STEP)), whole_(round_up(both_, STEP)) {
        for (i64 e = 0; e < call.experts; e++)
            for (i64 row = deal_.start[e]; row < deal_.start[e + 1]; row += ROWS_A_PIECE)
                pieces_.push_back({e, row, std::min(ROWS_A_PIECE, deal_.start[e + 1] - row)});
    }

    // hidden [rows of the deal, 2 width] is kept for the backward pass; out: [tokens, hidden].
    void forward(bf16* hidden, bf16* out) {
        const TrainExperts& c = call_;
        Pack gate_up = arena_pack(arena_, both_, c.hidden, c.experts);
        Pack down = arena_pack(arena_, c.hidden, c.width, c.experts);
        i64 first = gate_up.panels(), each = first + down.panels();
        bf16* result = arena_.take<bf16>(deal_.rows() * c.hidden);
        i64 room = ROWS_A_PIECE * (wide_ + half_);
        bf16* rooms = arena_.take<bf16>(threads_ * room);
#pragma omp parallel num_threads(threads_)
        {
            team_.share(0, c.experts * each, [&](i64 piece) {
                i64 expert = piece / each, panel = piece % each;
                if (panel < first) lay_gate_up(of(gate_up, expert), expert, panel);
                else lay_rows_piece(of(down, expert), down_of(expert), panel - first);
            });
            team_.share(1, i64(pieces_.size()), [&](i64 index) {
                const Piece& p = pieces_[index];
                bf16* x = rooms + omp_get_thread_num() * room;
                bf16* active = x + ROWS_A_PIECE * wide_;
                for (i64 r = 0; r < p.rows; r++) gather(c.x, p.first + r, x + r * wide_);
                times({p.rows, wide_, wide_, x}, of(gate_up, p.expert), hidden + p.first * both_, both_);
                for (i64 r = 0; r < p.rows; r++) activate(hidden + (p.first + r) * both_, active + r * half_);
                times({p.rows, half_, half_, active}, of(down, p.expert), result + p.first * c.hidden, c.hidden);
            });
            team_.share(2, c.tokens, [&](i64 token) { mix(result, token, c.weight, out + token * c.hidden); });
        }
    }

    void backward(const bf16* hidden, const TrainExpertsGradients& to) {
        const TrainExperts& c = call_;
        Pack gate_up = arena_pack(arena_, c.hidden, both_, c.experts);
        Pack down = arena_pack(arena_, c.width, c.hidden, c.experts);
        by_x_ = columns(c.hidden), by_grad_ = columns(c.hidden);
        by_gate_ = columns(c.width), by_up_ = columns(c.width), by_active_ = columns(c.width);
        row_dx_ = arena_.take<bf16>(deal_.rows() * c.hidden);
        weight_of_ = arena_.take<float>(deal_.rows());
        row_weight_ = arena_.take<float>(deal_.rows());
        i64 first = columns_pieces(gate_up), both = first + columns_pieces(down);
        i64 room = ROWS_A_PIECE * (2 * wide_ + 2 * half_ + whole_);
        bf16* rooms = arena_.take<bf16>(threads_ * room);
        Contraction in(c.width, c.hidden, threads_), out(c.hidden, c.width, threads_);
        i64 each = 2 * in.pieces() + out.pieces(), sums = c.experts * each;
#pragma omp parallel num_threads(threads_)
        {
            team_.share(0, c.experts * both, [&](i64 piece) {
                i64 expert = piece / both, at = piece % both;
                if (at < first) lay_back(of(gate_up, expert), expert, at);
                else lay_columns_piece(of(down, expert), down_of(expert), at - first);
            });
            team_.share(1, i64(pieces_.size()), [&](i64 index) {
                piece_backward(pieces_[index], hidden, to.grad, gate_up, down, rooms + omp_get_thread_num() * room);
            });
            team_.share(2, sums + c.tokens, [&](i64 piece) {
                if (piece < sums) sum(piece / each, piece % each, in, out, to);
                else leave(piece - sums, to);
            });
        }
    }

  private:
    struct Piece {
        i64 expert, first, rows;
    };
    const TrainExperts& call_;
    int threads_;
    Arena& arena_;
    TrainDeal deal_;
    i64 both_, wide_, half_, whole_;  // numbers of a hidden row; the sizes filled up
    std::vector<Piece> pieces_;
    Team team_;
    Columns by_x_{}, by_gate_{}, by_up_{}, by_active_{}, by_grad_{};
    bf16* row_dx_ = nullptr;
    float *weight_of_ = nullptr, *row_weight_ = nullptr;  // of rows: their weight, and its gradient

    static Pack of(Pack pack, i64 expert) {
        pack.data += expert * pack.panels() * pack.stride;
        return pack;
    }
    static Stored expert_of(Stored matrix, i64 expert, i64 next) {
        matrix.data = static_cast<const char*>(matrix.data) + expert * next * (matrix.wide ? 4 : 2);
        return matrix;
    }

    Stored down_of(i64 expert) const { return expert_of(call_.down, expert, call_.down_next); }

    // Gate rows first, then up rows.
    void lay_gate_up(const Pack& to, i64 expert, i64 panel) const {
        lay_rows(to, panel, [&](i64 row, i64 column, i64 count, bf16* out) {
            half(expert, row).read(row % call_.width, column, count, STEP, out);
        });
    }
    void lay_back(const Pack& to, i64 expert, i64 piece) const {
        i64 first = piece * STEP;
        lay_columns(to, first, std::min(STEP, both_ - first), [&](i64 row, i64 column, i64 count, bf16* room) {
            return half(expert, row).sixteen(row % call_.width, column, count, room);
        });
    }
    Stored half(i64 expert, i64 row) const {
        return expert_of(row < call_.width ? call_.gate : call_.up, expert, call_.gate_next);
    }

    // All rows of the deal by columns, expert by expert: an expert's part begins where its rows do.
    Columns columns(i64 numbers) { return arena_columns(arena_, numbers, deal_.rows()); }
    Columns part(const Columns& all, i64 expert) const {
        i64 first = deal_.start[expert], rows = deal_.start[expert + 1] - first;
        return {all.numbers, rows, all.data + Columns::bytes(all.numbers, first)};
    }

    void gather(const bf16* from, i64 row, bf16* out) const {
        i64 choice = deal_.source[row];
        if (choice < 0) return void(std::memset(out, 0, wide_ * 2));
        std::memcpy(out, from + choice / call_.chosen * call_.hidden, call_.hidden * 2);
        std::memset(out + call_.hidden, 0, (wide_ - call_.hidden) * 2);
    }

    void activate(const bf16* hidden, bf16* active) const {
        i64 n = call_.width;
        by_lanes(n, [&](i64 i, auto lanes) {
            lanes.store(active + i, mul(silu(lanes.load(hidden + i)), lanes.load(hidden + n + i)));
        });
        std::memset(active + n, 0, (half_ - n) * 2);
    }

    // The sum of a token's rows, each times its weight.
    void mix(const bf16* rows, i64 token, const float* weight, bf16* out) const {
        i64 n = call_.hidden, k = call_.chosen;
        by_lanes(n, [&](i64 i, auto lanes) {
            Floats total = zero();
            for (i64 choice = token * k; choice < (token + 1) * k; choice++) {
                Floats each = lanes.load(rows + deal_.place[choice] * n + i);
                total = weight ? fma(each, all(weight[choice]), total) : add(total, each);
            }
            lanes.store(out + i, total);
        });
    }

    void piece_backward(const Piece& p, const bf16* hidden, const bf16* grad, const Pack& gate_up, const Pack& down,
                        bf16* room) {
        bf16 *x = room, *g = x + ROWS_A_PIECE * wide_, *active = g + ROWS_A_PIECE * wide_;
        bf16 *d_active = active + ROWS_A_PIECE * half_, *d_hidden = d_active + ROWS_A_PIECE * half_;
        for (i64 r = 0; r < p.rows; r++) {
            gather(call_.x, p.first + r, x + r * wide_);
            gather(grad, p.first + r, g + r * wide_);
        }
        times({p.rows, wide_, wide_, g}, of(down, p.expert), d_active, half_);
        for (i64 row = p.first; row < p.first + p.rows; row++)
            weight_of_[row] = deal_.source[row] < 0 ? 0.0f : call_.weight[deal_.source[row]];
        const bf16* gate = hidden + p.first * both_;
        i64 n = call_.width;
        SwigluBackward<bf16> back{p.rows, n, {gate, both_}, {gate + n, both_}, {d_active, half_}, {d_hidden, whole_},
                                  {d_hidden + n, whole_}, weight_of_ + p.first, {active, half_}, row_weight_ + p.first};
        for (i64 r = 0; r < p.rows; r++) {
            back.row(r);
            std::memset(d_hidden + r * whole_ + both_, 0, (whole_ - both_) * 2);
        }
        bf16* dx = row_dx_ + p.first * call_.hidden;
        times({p.rows, whole_, whole_, d_hidden}, of(gate_up, p.expert), dx, call_.hidden);
        keep(by_x_, p, x, wide_), keep(by_grad_, p, g, wide_), keep(by_active_, p, active, half_), 
        keep(by_gate_, p, d_hidden, whole_), keep(by_up_, p, d_hidden + call_.width, whole_);
    }

    void keep(const Columns& all, const Piece& p, const bf16* rows, i64 stride) const {
        i64 before = p.first - deal_.start[p.expert];
        Stored from{rows, p.rows, all.numbers, stride, false};
        for (i64 first = before; first < before + p.rows; first += STEP)
            part(all, p.expert).lay(first, STEP, [&](i64 row, i64 column, i64 count, bf16* room) {
                return from.sixteen(row - before, column, count, room);
            });
    }

    // One piece of an expert's gradients: of its gate, its up and its down projection.
    void sum(i64 expert, i64 piece, const Contraction& in, const Contraction& out, const TrainExpertsGradients& to) const {
        i64 each = in.pieces(), size = call_.width * call_.hidden;
        Columns x = part(by_x_, expert), grad = part(by_grad_, expert);
        if (piece < each) in.run(part(by_gate_, expert), x, piece, to.d_gate + expert * 2 * size);
        else if (piece < 2 * each) in.run(part(by_up_, expert), x, piece - each, to.d_up + expert * 2 * size);
        else out.run(grad, part(by_active_, expert), piece - 2 * each, to.d_down + expert * size);
    }

    void leave(i64 token, const TrainExpertsGradients& to) const {
        mix(row_dx_, token, nullptr, to.dx + token * call_.hidden);
        for (i64 i = token * call_.chosen; i < (token + 1) * call_.chosen; i++)
            to.d_weight[i] = row_weight_[deal_.place[i]];
    }
};

}  // namespace finback
