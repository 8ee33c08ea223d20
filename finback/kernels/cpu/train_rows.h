// What training does row by row, forward and backward, each in one pass over memory; float32 inside.
#pragma once

#include <cmath>
#include <limits>

#include "lanes.h"
#include "rows.h"

namespace finback {

// The sums of `pieces` rows of n numbers, in their order.
inline void join(i64 pieces, i64 n, const float* part, float* out) {
    by_lanes(n, [&](i64 i, auto lanes) {
        Floats total = zero();
        for (i64 piece = 0; piece < pieces; piece++) total = add(total, lanes.load(part + piece * n + i));
        lanes.store(out + i, total);
    });
}

// sum = x + added, out = sum / rms(sum) · weight, inverse = 1 / rms. Without `added` the norm is x's own.
template <class In, class Out>
struct Norm {
    i64 rows, n;
    Matrix<const In> x;
    Matrix<const Out> added;  // or null
    In* sum;                  // [rows, n], used with `added`
    const float* weight;
    float eps;
    float* inverse;  // [rows]
    Out* out;        // [rows, n]

    void row(i64 m) const {
        const In* from = x.row(m);
        if (added) {
            const Out* more = added.row(m);
            In* to = sum + m * n;
            by_lanes(n, [&](i64 i, auto lanes) { lanes.store(to + i, add(lanes.load(from + i), lanes.load(more + i))); });
            from = to;  // as it was rounded
        }
        inverse[m] = 1.0f / std::sqrt(sum_of_squares(from, n) / float(n) + eps);
        Floats scale = all(inverse[m]);
        by_lanes(n, [&](i64 i, auto lanes) {
            lanes.store(out + m * n + i, mul(mul(lanes.load(from + i), scale), lanes.load(weight + i)));
        });
    }

    void run(int threads) const {
        Pieces(rows).share(threads, [&](i64, i64 first, i64 end) {
            for (i64 m = first; m < end; m++) row(m);
        });
    }
};

// With y = x / rms: dx = (g·w - y · mean(g·w·y)) / rms, and what reaches x beside the norm; d_weight = Σ g·y.
template <class In, class Out>
struct NormBackward {
    i64 rows, n;
    Matrix<const In> x;
    const float *weight, *inverse;
    Matrix<const Out> grad;
    Matrix<const In> beside;  // or null
    In* dx;                   // [rows, n]
    Out* d_added;             // the same once more in the other type, or null
    float* d_weight;          // [n]

    void row(i64 m, float* d_weight_here) const {
        const In* from = x.row(m);
        const Out* g = grad.row(m);
        Floats scale = all(inverse[m]), dot = zero();
        by_lanes(n, [&](i64 i, auto lanes) {
            dot = fma(mul(lanes.load(g + i), lanes.load(weight + i)), mul(lanes.load(from + i), scale), dot);
        });
        Floats mean = all(finback::sum(dot) / float(n));
        by_lanes(n, [&](i64 i, auto lanes) {
            Floats here = lanes.load(g + i), y = mul(lanes.load(from + i), scale);
            Floats d = mul(scale, sub(mul(here, lanes.load(weight + i)), mul(y, mean)));
            if (beside) d = add(d, lanes.load(beside.row(m) + i));
            lanes.store(dx + m * n + i, d);
            if (d_added) lanes.store(d_added + m * n + i, d);
            lanes.store(d_weight_here + i, fma(here, y, lanes.load(d_weight_here + i)));
        });
    }

    void run(int threads) const {
        Pieces pieces(rows);
        float* part = Arena::fresh().take<float>(pieces.count * n);
        pieces.share(threads, [&](i64 piece, i64 first, i64 end) {
            float* here = part + piece * n;
            std::memset(here, 0, n * sizeof(float));
            for (i64 m = first; m < end; m++) row(m, here);
        });
        join(pieces.count, n, part, d_weight);
    }
};

// silu(g) = g · s with s = sigmoid(g); its slope is s + g·s·(1 - s).
struct Silu {
    Floats value, slope;

    explicit Silu(Floats gate) {
        Floats s = div(all(1.0f), add(all(1.0f), exponential(sub(zero(), gate))));
        value = mul(gate, s);
        slope = fma(value, sub(all(1.0f), s), s);
    }
};

// active = silu(gate) · up. Gate and up may be the halves of one matrix: rows lie as far apart as it says.
template <class T>
inline void swiglu(i64 rows, i64 n, Matrix<const T> gate, Matrix<const T> up, T* active, int threads) {
    Pieces(rows).share(threads, [&](i64, i64 first, i64 end) {
        for (i64 m = first; m < end; m++) {
            const T *g = gate.row(m), *u = up.row(m);
            by_lanes(n, [&](i64 i, auto lanes) {
                lanes.store(active + m * n + i, mul(Silu(lanes.load(g + i)).value, lanes.load(u + i)));
            });
        }
    });
}

// The gradients of gate and up from that of `active`, and, with a weight for every row (a token's weight of an expert):
// they are scaled by it; active = silu(gate) · up · weight is made again, so that the gradient of the down projection
// is grad_outᵀ · active with rows of grad_out as they came, never scaled; and d_weight[m] = Σ grad · silu(gate) · up.
// `grad` is without the weight in it, as grad_out · down gives it. A row of weight 0 adds to no gradient.
template <class T>
struct SwigluBackward {
    i64 rows, n;
    Matrix<const T> gate, up, grad;
    Matrix<T> d_gate, d_up;
    const float* weight;  // [rows], or null: then the last two are not written
    Matrix<T> active;     // [rows, n]
    float* d_weight;      // [rows]

    void row(i64 m) const {
        const T *g = gate.row(m), *u = up.row(m), *d = grad.row(m);
        Floats scale = all(weight ? weight[m] : 1.0f), dot = zero();
        by_lanes(n, [&](i64 i, auto lanes) {
            Silu silu(lanes.load(g + i));
            Floats up_here = lanes.load(u + i), here = lanes.load(d + i);
            if (weight) {
                Floats product = mul(silu.value, up_here);
                lanes.store(active.row(m) + i, mul(product, scale));
                dot = fma(here, product, dot);
            }
            here = mul(here, scale);
            lanes.store(d_gate.row(m) + i, mul(mul(here, up_here), silu.slope));
            lanes.store(d_up.row(m) + i, mul(here, silu.value));
        });
        if (weight) d_weight[m] = sum(dot);
    }

    void run(int threads) const {
        Pieces(rows).share(threads, [&](i64, i64 first, i64 end) {
            for (i64 m = first; m < end; m++) row(m);
        });
    }
};

// A row's -log softmax(logits)[target]; the logits become softmax - onehot. `powers` [n]: e^logit is taken once.
template <class T>
inline double loss_row(T* logits, i64 n, i64 target, float* powers) {
    constexpr float lowest = -std::numeric_limits<float>::infinity();
    Floats most = all(lowest), total = zero();
    by_lanes(n, [&](i64 i, auto lanes) { most = larger(most, lanes.load(logits + i, lowest)); });
    float limit = largest(most), wanted;
    by_lanes(n, [&](i64 i, auto lanes) {
        Floats power = exponential(sub(lanes.load(logits + i, lowest), all(limit)));
        lanes.store(powers + i, power);
        total = add(total, power);
    });
    if constexpr (sizeof(T) == 2) wanted = widen(logits[target]); else wanted = logits[target];
    float whole = sum(total), chosen = std::exp(wanted - limit) / whole - 1.0f;
    Floats scale = all(1.0f / whole);
    by_lanes(n, [&](i64 i, auto lanes) { lanes.store(logits + i, mul(lanes.load(powers + i), scale)); });
    if constexpr (sizeof(T) == 2) logits[target] = narrow(chosen); else logits[target] = chosen;
    return double(limit) - double(wanted) + std::log(double(whole));
}

// The sum of the rows' losses; see `loss_row`.
template <class T>
inline double loss_to_gradient(i64 rows, i64 n, T* logits, const int64_t* targets, int threads) {
    Pieces pieces(rows);
    double* part = Arena::fresh().take<double>(pieces.count);
    pieces.share(threads, [&](i64 piece, i64 first, i64 end) {
        static thread_local std::vector<float> powers;
        powers.resize(n);
        double total = 0;
        for (i64 m = first; m < end; m++) total += loss_row(logits + m * n, n, targets[m], powers.data());
        part[piece] = total;
    });
    double total = 0;
    for (i64 piece = 0; piece < pieces.count; piece++) total += part[piece];
    return total;
}

// out [rows, count] = x · weightᵀ in float32, weight [count, n]: a router's few rows, which stay in cache.
template <class In>
struct Scores {
    i64 rows, n, count;
    Matrix<const In> x;
    const float* weight;

    void run(float* out, int threads) const {
        Pieces(rows).share(threads, [&](i64, i64 first, i64 end) {
            for (i64 m = first; m < end; m++) {
                i64 e = 0;
                for (; e + 8 <= count; e += 8) some<8>(x.row(m), e, out + m * count + e);
                for (; e < count; e++) some<1>(x.row(m), e, out + m * count + e);
            }
        });
    }

    template <int N>
    void some(const In* from, i64 e, float* out) const {
        Floats total[N];
        for (Floats& each : total) each = zero();
        by_lanes(n, [&](i64 i, auto lanes) {
            Floats here = lanes.load(from + i);
            for (int j = 0; j < N; j++) total[j] = fma(here, lanes.load(weight + (e + j) * n + i), total[j]);
        });
        for (int j = 0; j < N; j++) out[j] = sum(total[j]);
    }

    // dx [rows, n] = grad · weight and d_weight = gradᵀ · x, from grad [rows, count].
    void back(const float* grad, In* dx, float* d_weight, int threads) const {
        Pieces pieces(rows);
        i64 size = count * n;
        float* part = Arena::fresh().take<float>(pieces.count * size);
        pieces.share(threads, [&](i64 piece, i64 first, i64 end) {
            float* sums = part + piece * size;
            std::memset(sums, 0, size * sizeof(float));
            for (i64 m = first; m < end; m++)
                by_lanes(n, [&](i64 i, auto lanes) {
                    Floats here = lanes.load(x.row(m) + i), total = zero();
                    for (i64 e = 0; e < count; e++) {
                        Floats by = all(grad[m * count + e]);
                        total = fma(by, lanes.load(weight + e * n + i), total);
                        lanes.store(sums + e * n + i, fma(by, here, lanes.load(sums + e * n + i)));
                    }
                    lanes.store(dx + m * n + i, total);
                });
        });
        join(pieces.count, size, part, d_weight);
    }
};

}  // namespace finback
