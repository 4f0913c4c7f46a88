// The passes over all cells of a step as loops for a CPU; native.py builds them and says what each computes.
//
// Tensors are (batch, channels, cells), cells side by side; where there are some rows of a tile, its channels are a
// plane apart. A stretch is some blocks (blocks.hpp), so that
// memory is read and written in runs that are worth it. A stretch's channels are copied together, block by block, stay in
// the cache next to the processor, and all that depends on them is computed there: what is expanded to 4 C_h channels
// never goes through memory.

#include <omp.h>

#include "blocks.hpp"

namespace {

// into (batch, rows, cells) = weight (rows, inner) x (batch, inner, cells), or added to it.
template <class T>
void product(T* into, Index into_batch, const T* weight, Index weight_row, Index weight_step, const T* x, Index x_batch,
             Index batch, Index rows, Index inner, Index cells, bool add, Index threads) {
    constexpr int block = Lanes<T>::block, stretch = Lanes<T>::stretch;
    const Index stretches = (cells + stretch - 1) / stretch;
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> copied(inner * stretch);
        typename Lanes<T>::V total[4][ACROSS];
#pragma omp for collapse(2) schedule(static)
        for (Index b = 0; b < batch; ++b)
            for (Index number = 0; number < stretches; ++number) {
                const Index start = number * stretch, end = cells - start < stretch ? cells - start : stretch;
                copy_stretch(copied.data(), x + b * x_batch + start, inner, cells, end);
                for (Index row = 0; row < rows; row += 4) {
                    const int count = rows - row < 4 ? int(rows - row) : 4;
                    const T* weights[4];
                    for (int r = 0; r < 4; ++r) weights[r] = weight + (row + (r < count ? r : 0)) * weight_row;
                    for (Index first = 0; first < end; first += block) {
                        const Index here = end - first < block ? end - first : block;
                        T* target = into + b * into_batch + row * cells + start + first;
                        for (int r = 0; r < 4; ++r) {
                            for (int s = 0; s < ACROSS; ++s) total[r][s] = typename Lanes<T>::V{};
                            if (add && r < count) load_row<T>(total[r], target + r * cells, here);
                        }
                        multiply<T, 4>(total, weights, weight_step, copied.data() + first * inner, inner);
                        for (int r = 0; r < count; ++r) store_row<T>(target + r * cells, total[r], here);
                    }
                }
            }
    }
}

// The pre-activations i, f, g, o of one channel of a block, with their bias.
template <class T>
inline void expand(typename Lanes<T>::V (&a)[4][ACROSS], const T* weight, const T* bias, const T* mixed, Index channel,
                   Index channels, Index inner) {
    const T* weights[4];
    for (int gate = 0; gate < 4; ++gate) {
        weights[gate] = weight + (gate * channels + channel) * inner;
        for (int s = 0; s < ACROSS; ++s) a[gate][s] = typename Lanes<T>::V{} + bias[gate * channels + channel];
    }
    multiply<T, 4>(a, weights, 1, mixed, inner);
}

// From the pre-activations i, f and g to what their sigmoids 1 / (1 + e) and tanh (1 - e) / (1 + e) are made of.
template <class T>
inline void exponentials(typename Lanes<T>::V (&i)[ACROSS], typename Lanes<T>::V (&f)[ACROSS],
                         typename Lanes<T>::V (&g)[ACROSS], const typename Lanes<T>::V (&c)[ACROSS], T p_i, T p_f) {
    for (int s = 0; s < ACROSS; ++s) {
        i[s] = -(i[s] + p_i * c[s]);
        f[s] = -(f[s] + p_f * c[s]);
        g[s] *= T(-2);
    }
    bounded_exp<T>(i);
    bounded_exp<T>(f);
    bounded_exp<T>(g);
}

// c (batch, channels, cells) and h after a step, from what is mixed (batch, inner, cells) and the c before.
template <class T>
void advance(T* h, Index h_batch, T* c_after, Index after_batch, const T* mixed, Index mixed_batch, const T* c,
             Index c_batch, Index plane, const T* weight, const T* bias, const T* peephole, Index batch, Index channels,
             Index inner, Index cells, Index threads) {
    using V = typename Lanes<T>::V;
    constexpr int block = Lanes<T>::block, stretch = Lanes<T>::stretch;
    const Index stretches = (cells + stretch - 1) / stretch;
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> copied(inner * stretch);
#pragma omp for collapse(2) schedule(static)
        for (Index b = 0; b < batch; ++b)
            for (Index number = 0; number < stretches; ++number) {
                const Index start = number * stretch, end = cells - start < stretch ? cells - start : stretch;
                copy_stretch(copied.data(), mixed + b * mixed_batch + start, inner, plane, end);
                for (Index channel = 0; channel < channels; ++channel)
                for (Index first = 0; first < end; first += block) {
                    const Index here = end - first < block ? end - first : block;
                    V a[4][ACROSS], before[ACROSS], after[ACROSS], out[ACROSS];
                    expand<T>(a, weight, bias, copied.data() + first * inner, channel, channels, inner);
                    const Index place = channel * plane + start + first;
                    load_row<T>(before, c + b * c_batch + place, here);
                    const T p_i = peephole[channel], p_f = peephole[channels + channel], p_o = peephole[2 * channels + channel];
                    V (&e_i)[ACROSS] = a[0], (&e_f)[ACROSS] = a[1], (&e_g)[ACROSS] = a[2], (&e_o)[ACROSS] = a[3], e_c[ACROSS];
                    exponentials<T>(e_i, e_f, e_g, before, p_i, p_f);
                    for (int s = 0; s < ACROSS; ++s) {
                        const V input = (T(1) + e_i[s]) * (T(1) + e_g[s]), forget = T(1) + e_f[s];
                        after[s] = (before[s] * input + (T(1) - e_g[s]) * forget) / (input * forget);  // divisions are slow
                        e_o[s] = -(e_o[s] + p_o * after[s]);
                        e_c[s] = T(-2) * after[s];
                    }
                    bounded_exp<T>(e_o);
                    bounded_exp<T>(e_c);
                    for (int s = 0; s < ACROSS; ++s)
                        out[s] = (T(1) - e_c[s]) / ((T(1) + e_o[s]) * (T(1) + e_c[s]));
                    store_row<T>(c_after + b * after_batch + place, after, here);
                    store_row<T>(h + b * h_batch + place, out, here);
                }
            }
    }
}

// total[gate] += sum over a stretch of a gate's gradient times what is mixed, for COUNT of its channels side by side.
template <class T, int COUNT>
inline void add_products(T* totals, const T* grads, Index channels, const T* mixed, Index inner, Index cells) {
    using V = typename Lanes<T>::V;
    constexpr int lanes = Lanes<T>::count, block = Lanes<T>::block;
    V sums[COUNT][4];
    for (int k = 0; k < COUNT; ++k)
        for (int gate = 0; gate < 4; ++gate) sums[k][gate] = load(totals + (k * 4 + gate) * lanes);
    for (Index first = 0; first < cells; first += block)
        for (int s = 0; s < ACROSS; ++s) {
            V of_gates[4];
            for (int gate = 0; gate < 4; ++gate) of_gates[gate] = load(grads + (first * 4 + gate * block) * channels + s * lanes);
            for (int k = 0; k < COUNT; ++k) {
                V value = load(mixed + first * inner + k * block + s * lanes);
                IN_REGISTER(value);
                for (int gate = 0; gate < 4; ++gate) sums[k][gate] += value * of_gates[gate];
            }
        }
    for (int k = 0; k < COUNT; ++k)
        for (int gate = 0; gate < 4; ++gate) store(totals + (k * 4 + gate) * lanes, sums[k][gate]);
}

// The gradients of `advance`: of the weight, of bias (4 channels) and peepholes (3 channels), of the c before, and of
// what is mixed, in its place. Pre-activations are computed again, and neither they nor their gradients go through
// memory. A weight whose gradient has no place to go does not learn.
template <class T>
void retreat(T* grad_weight, T* grad_bias, T* grad_peephole, T* mixed, Index mixed_batch, T* grad_before,
             Index before_batch, const T* c, Index c_batch, const T* grad_h, Index h_batch, const T* grad_after,
             Index after_batch, Index plane, const T* weight, const T* bias, const T* peephole, Index batch,
             Index channels, Index inner, Index cells, Index threads) {
    using V = typename Lanes<T>::V;
    constexpr int block = Lanes<T>::block, lanes = Lanes<T>::count, stretch = Lanes<T>::stretch;
    const Index stretches = (cells + stretch - 1) / stretch;
    const bool learns = grad_weight != nullptr;
    const Index held_each = (7 + (learns ? 4 * inner : 0)) * channels * lanes;
    std::vector<T> held_by_all(threads * held_each, T(0));  // added up in their order: with as many threads the same bits
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> copied(inner * stretch), grads(4 * channels * stretch);
        T* sums = held_by_all.data() + omp_get_thread_num() * held_each;
        T* products = sums + 7 * channels * lanes;
#pragma omp for collapse(2) schedule(static)
        for (Index b = 0; b < batch; ++b)
            for (Index number = 0; number < stretches; ++number) {
                const Index start = number * stretch, end = cells - start < stretch ? cells - start : stretch;
                copy_stretch(copied.data(), mixed + b * mixed_batch + start, inner, plane, end);
                for (Index channel = 0; channel < channels; ++channel) {
                for (Index first = 0; first < end; first += block) {
                    const Index here = end - first < block ? end - first : block;
                    V a[4][ACROSS], before[ACROSS], d_h[ACROSS], d_c[ACROSS];
                    expand<T>(a, weight, bias, copied.data() + first * inner, channel, channels, inner);
                    const Index place = channel * plane + start + first;
                    load_row<T>(before, c + b * c_batch + place, here);
                    load_row<T>(d_c, grad_after + b * after_batch + place, here);
                    load_row<T>(d_h, grad_h + b * h_batch + place, here);
                    const T p_i = peephole[channel], p_f = peephole[channels + channel], p_o = peephole[2 * channels + channel];
                    V total[7] = {};
                    V (&e_i)[ACROSS] = a[0], (&e_f)[ACROSS] = a[1], (&e_g)[ACROSS] = a[2], (&e_o)[ACROSS] = a[3], e_c[ACROSS];
                    V after[ACROSS];
                    exponentials<T>(e_i, e_f, e_g, before, p_i, p_f);
                    for (int s = 0; s < ACROSS; ++s) {
                        e_i[s] = T(1) / (T(1) + e_i[s]);
                        e_f[s] = T(1) / (T(1) + e_f[s]);
                        e_g[s] = (T(1) - e_g[s]) / (T(1) + e_g[s]);
                        after[s] = e_f[s] * before[s] + e_i[s] * e_g[s];
                        e_o[s] = -(e_o[s] + p_o * after[s]);
                        e_c[s] = T(-2) * after[s];
                    }
                    bounded_exp<T>(e_o);
                    bounded_exp<T>(e_c);
                    for (int s = 0; s < ACROSS; ++s) {
                        const V i = e_i[s], f = e_f[s], g = e_g[s], o = T(1) / (T(1) + e_o[s]);
                        const V squashed = (T(1) - e_c[s]) / (T(1) + e_c[s]);
                        const V d_o = d_h[s] * squashed * o * (T(1) - o);
                        const V d_after = d_c[s] + d_h[s] * o * (T(1) - squashed * squashed) + d_o * p_o;
                        const V d_i = d_after * g * i * (T(1) - i), d_f = d_after * before[s] * f * (T(1) - f);
                        const V d_g = d_after * i * (T(1) - g * g);
                        d_c[s] = d_after * f + d_i * p_i + d_f * p_f;
                        a[0][s] = d_i, a[1][s] = d_f, a[2][s] = d_g, a[3][s] = d_o;
                        total[0] += d_i, total[1] += d_f, total[2] += d_g, total[3] += d_o;
                        total[4] += d_i * before[s], total[5] += d_f * before[s], total[6] += d_o * after[s];
                    }
                    for (int one = 0; one < 7; ++one) {
                        T* held = sums + (one * channels + channel) * lanes;
                        store(held, load(held) + total[one]);
                    }
                    store_row<T>(grad_before + b * before_batch + place, d_c, here);
                    for (int gate = 0; gate < 4; ++gate)
                        for (int s = 0; s < ACROSS; ++s)
                            store(grads.data() + first * 4 * channels + (gate * channels + channel) * block + s * lanes, a[gate][s]);
                }
                Index k = 0;
                for (; learns && k + 2 <= inner; k += 2)
                    add_products<T, 2>(products + (channel * inner + k) * 4 * lanes, grads.data() + channel * block, channels,
                                       copied.data() + k * block, inner, end);
                if (learns && k < inner)
                    add_products<T, 1>(products + (channel * inner + k) * 4 * lanes, grads.data() + channel * block, channels,
                                       copied.data() + k * block, inner, end);
                }
                for (Index k = 0; k < inner; k += 4) {
                    const int count = inner - k < 4 ? int(inner - k) : 4;
                    const T* weights[4];
                    for (int r = 0; r < 4; ++r) weights[r] = weight + k + (r < count ? r : 0);
                    for (Index first = 0; first < end; first += block) {
                        V total[4][ACROSS] = {};
                        multiply<T, 4>(total, weights, inner, grads.data() + first * 4 * channels, 4 * channels);
                        for (int r = 0; r < count; ++r)
                            store_row<T>(mixed + b * mixed_batch + (k + r) * plane + start + first, total[r],
                                         end - first < block ? end - first : block);
                    }
                }
            }
    }
    const auto of_all = [&](Index one) {
        T total = 0;
        for (int thread = 0; thread < threads; ++thread) total += sum<T>(load(held_by_all.data() + thread * held_each + one * lanes));
        return total;
    };
    for (Index one = 0; one < 4 * channels; ++one) grad_bias[one] = of_all(one);
    for (Index one = 0; one < 3 * channels; ++one) grad_peephole[one] = of_all(4 * channels + one);
    for (Index channel = 0; learns && channel < channels; ++channel)
        for (Index k = 0; k < inner; ++k)
            for (int gate = 0; gate < 4; ++gate)
                grad_weight[(gate * channels + channel) * inner + k] = of_all(7 * channels + (channel * inner + k) * 4 + gate);
}

// into (batch, channels, rows, columns) = the sum over taps of weight (batch, channels, taps) times the padded cells
// that lie there. Rows of `padded` and `into` follow each other; channels and samples are strides apart.
template <class T>
void mix(T* into, Index into_batch, Index into_plane, const T* padded, Index padded_batch, Index padded_plane,
         Index padded_columns, const T* weight, const Index* offsets, Index batch, Index channels, Index taps, Index rows,
         Index columns, Index threads) {
    using V = typename Lanes<T>::V;
    constexpr int block = Lanes<T>::block, lanes = Lanes<T>::count;
#pragma omp parallel num_threads(threads)
    {
        std::vector<Index> shifts(taps);
        for (Index tap = 0; tap < taps; ++tap) shifts[tap] = offsets[2 * tap] * padded_columns + offsets[2 * tap + 1];
#pragma omp for collapse(3) schedule(static)
        for (Index b = 0; b < batch; ++b)
            for (Index channel = 0; channel < channels; ++channel)
                for (Index row = 0; row < rows; ++row) {
                    const T* factors = weight + (b * channels + channel) * taps;
                    const T* from = padded + b * padded_batch + channel * padded_plane + row * padded_columns;
                    T* to = into + b * into_batch + channel * into_plane + row * columns;
                    Index column = 0;
                    for (; column + block <= columns; column += block) {
                        V total[ACROSS] = {};
                        for (Index tap = 0; tap < taps; ++tap) {
                            const T factor = factors[tap];
                            const T* cells = from + shifts[tap] + column;
                            for (int s = 0; s < ACROSS; ++s) total[s] += factor * load(cells + s * lanes);
                        }
                        for (int s = 0; s < ACROSS; ++s) store(to + column + s * lanes, total[s]);
                    }
                    for (; column < columns && columns >= lanes; column += lanes) {
                        column = column < columns - lanes ? column : columns - lanes;  // the last cells once more
                        V total = {};
                        for (Index tap = 0; tap < taps; ++tap) total += factors[tap] * load(from + shifts[tap] + column);
                        store(to + column, total);
                    }
                    for (; column < columns; ++column) {
                        T total = 0;
                        for (Index tap = 0; tap < taps; ++tap) total += factors[tap] * from[shifts[tap] + column];
                        to[column] = total;
                    }
                }
    }
}

// grad_weight (batch, channels, taps) of `mix`: for each tap the sum over cells of the padded cell times the gradient.
template <class T>
void mix_weights(T* grad_weight, const T* padded, Index padded_batch, Index padded_plane, Index padded_columns,
                 const T* grad, Index grad_batch, Index grad_plane, Index grad_columns, const Index* offsets, Index batch,
                 Index channels, Index taps, Index rows, Index columns, Index threads) {
    using V = typename Lanes<T>::V;
    constexpr int lanes = Lanes<T>::count, at_once = 8;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (Index b = 0; b < batch; ++b)
        for (Index channel = 0; channel < channels; ++channel)
            for (Index tap = 0; tap < taps; tap += at_once) {
                const int count = taps - tap < at_once ? int(taps - tap) : at_once;
                V total[at_once] = {};
                T rest[at_once] = {};
                double sums[at_once] = {};  // of the rows: float32 alone would lose digits on a large tile
                Index shifts[at_once];
                for (int one = 0; one < at_once; ++one) {
                    const Index* offset = offsets + 2 * (tap + (one < count ? one : 0));
                    shifts[one] = offset[0] * padded_columns + offset[1];
                }
                for (Index row = 0; row < rows; ++row) {
                    const T* from = padded + b * padded_batch + channel * padded_plane + row * padded_columns;
                    const T* values = grad + b * grad_batch + channel * grad_plane + row * grad_columns;
                    Index column = 0;
                    for (; column + lanes <= columns; column += lanes) {
                        const V value = load(values + column);
                        for (int one = 0; one < at_once; ++one) total[one] += value * load(from + shifts[one] + column);
                    }
                    if (column < columns && columns >= lanes) {  // the last cells, without those that have been counted
                        V value = load(values + columns - lanes);
                        for (Index lane = 0; lane < lanes - (columns - column); ++lane) value[lane] = 0;
                        for (int one = 0; one < at_once; ++one)
                            total[one] += value * load(from + shifts[one] + columns - lanes);
                        column = columns;
                    }
                    for (; column < columns; ++column)
                        for (int one = 0; one < at_once; ++one) rest[one] += values[column] * from[shifts[one] + column];
                    for (int one = 0; one < at_once; ++one) {
                        sums[one] += double(sum<T>(total[one])) + rest[one];
                        total[one] = V{};
                        rest[one] = 0;
                    }
                }
                for (int one = 0; one < count; ++one) grad_weight[(b * channels + channel) * taps + tap + one] = T(sums[one]);
            }
}

}  // namespace

#define EXPORTED(T, NAME)                                                                                              \
    extern "C" void NAME##_product(T* into, Index into_batch, const T* weight, Index weight_row, Index weight_step,    \
                                   const T* x, Index x_batch, Index batch, Index rows, Index inner, Index cells,       \
                                   Index add, Index threads) {                                                             \
        product<T>(into, into_batch, weight, weight_row, weight_step, x, x_batch, batch, rows, inner, cells, add != 0, \
                   threads);                                                                                           \
    }                                                                                                                  \
    extern "C" void NAME##_advance(T* h, Index h_batch, T* c_after, Index after_batch, const T* mixed,                 \
                                   Index mixed_batch, const T* c, Index c_batch, Index plane, const T* weight,         \
                                   const T* bias, const T* peephole, Index batch, Index channels, Index inner,         \
                                   Index cells, Index threads) {                                                       \
        advance<T>(h, h_batch, c_after, after_batch, mixed, mixed_batch, c, c_batch, plane, weight, bias, peephole,    \
                   batch, channels, inner, cells, threads);                                                            \
    }                                                                                                                  \
    extern "C" void NAME##_retreat(T* grad_weight, T* grad_bias, T* grad_peephole, T* mixed, Index mixed_batch,        \
                                   T* grad_before, Index before_batch, const T* c, Index c_batch, const T* grad_h,     \
                                   Index h_batch, const T* grad_after, Index after_batch, Index plane,                 \
                                   const T* weight, const T* bias, const T* peephole, Index batch, Index channels,     \
                                   Index inner, Index cells, Index threads) {                                          \
        retreat<T>(grad_weight, grad_bias, grad_peephole, mixed, mixed_batch, grad_before, before_batch, c, c_batch,   \
                   grad_h, h_batch, grad_after, after_batch, plane, weight, bias, peephole, batch, channels, inner,    \
                   cells, threads);                                                                                    \
    }                                                                                                                  \
    extern "C" void NAME##_mix(T* into, Index into_batch, Index into_plane, const T* padded, Index padded_batch,       \
                               Index padded_plane, Index padded_columns, const T* weight, const Index* offsets,        \
                               Index batch, Index channels, Index taps, Index rows, Index columns, Index threads) {    \
        mix<T>(into, into_batch, into_plane, padded, padded_batch, padded_plane, padded_columns, weight, offsets,      \
               batch, channels, taps, rows, columns, threads);                                                         \
    }                                                                                                                  \
    extern "C" void NAME##_mix_weights(T* grad_weight, const T* padded, Index padded_batch, Index padded_plane,        \
                                       Index padded_columns, const T* grad, Index grad_batch, Index grad_plane,        \
                                       Index grad_columns, const Index* offsets, Index batch, Index channels,          \
                                       Index taps, Index rows, Index columns, Index threads) {                         \
        mix_weights<T>(grad_weight, padded, padded_batch, padded_plane, padded_columns, grad, grad_batch, grad_plane,  \
                       grad_columns, offsets, batch, channels, taps, rows, columns, threads);                          \
    }

EXPORTED(float, float32)
EXPORTED(double, float64)
