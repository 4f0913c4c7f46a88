// Attention among the cells of lines as loops for a CPU; native.py builds them and says what each computes.
//
// Tensors are (batch, lines, cells, heads, size), the numbers of a head of a cell side by side; their other strides are
// given. Queries and keys are turned by the angles of their cells as they are copied together. A block of cells
// (blocks.hpp) meets all cells of its line one after the other, so that a logit is a number in a register, and what
// belongs to a block lies in the cache until it is used. Going back, blocks of queries meet all keys, then blocks of
// keys meet all queries: logits are computed once more, and nothing is added up over threads.

#include <cmath>
#include <limits>

#include "blocks.hpp"

namespace {

// The numbers of one tensor.
template <class T> struct Heads {
    T* numbers;
    const Index* strides;  // of batch, lines, cells and heads
    T* line(Index b, Index l, Index h) const { return numbers + b * strides[0] + l * strides[1] + h * strides[3]; }
    Index step() const { return strides[2]; }
};

// What the cells of a whole line have, cell by cell: two kinds of numbers, and two numbers each that may be none.
template <class T> struct Rows {
    std::vector<T> first, second, shift, slope;
    explicit Rows(Index cells, Index size) : first(cells * size), second(cells * size), shift(cells), slope(cells) {}
};

// The same of a block of cells, side by side.
template <class T> struct Block {
    std::vector<T> first, second;
    typename Lanes<T>::V shift[ACROSS], slope[ACROSS];
    explicit Block(Index size) : first(size * Lanes<T>::block), second(size * Lanes<T>::block) {}
};

// Of every cell the angles by which its pairs are turned, (cells, size / 2): first and second half of its numbers.
template <class T> struct Turn {
    const T *cosine, *sine;
    Turn after(Index cells, Index size) const { return {cosine + cells * size / 2, sine + cells * size / 2}; }
};

template <class T> inline void copy_rows(T* to, const T* from, Index step, Index cells, Index size) {
    for (Index cell = 0; cell < cells; ++cell) std::memcpy(to + cell * size, from + cell * step, size * sizeof(T));
}

template <class T>
inline void copy_turned(T* to, const T* from, Index step, Index cells, Index size, Turn<T> turn, T factor) {
    const Index half = size / 2;
    for (Index cell = 0; cell < cells; ++cell)
        for (Index d = 0; d < half; ++d) {
            const T x = factor * from[cell * step + d], y = factor * from[cell * step + half + d];
            const T cosine = turn.cosine[cell * half + d], sine = turn.sine[cell * half + d];
            to[cell * size + d] = x * cosine - y * sine;
            to[cell * size + half + d] = x * sine + y * cosine;
        }
}

template <class T> inline void copy_block(T* to, const T* rows, Index cells, Index size) {
    constexpr int block = Lanes<T>::block;
    const Index here = cells < block ? cells : block;
    if (here < block) std::memset(to, 0, size * block * sizeof(T));
    for (Index cell = 0; cell < here; ++cell)
        for (Index d = 0; d < size; ++d) to[d * block + cell] = rows[cell * size + d];
}

template <class T> inline void copy_side(Block<T>& to, const Rows<T>& from, Index first, Index cells, Index size) {
    const Index here = cells < Lanes<T>::block ? cells : Lanes<T>::block;
    copy_block<T>(to.first.data(), from.first.data() + first * size, cells, size);
    copy_block<T>(to.second.data(), from.second.data() + first * size, cells, size);
    load_row<T>(to.shift, from.shift.data() + first, here);
    load_row<T>(to.slope, from.slope.data() + first, here);
}

template <class T> inline void copy_back(T* to, Index step, const T* from, Index cells, Index size) {
    constexpr int block = Lanes<T>::block;
    const Index here = cells < block ? cells : block;
    for (Index cell = 0; cell < here; ++cell)
        for (Index d = 0; d < size; ++d) to[cell * step + d] = from[d * block + cell];
}

// The same, turned back.
template <class T>
inline void turn_back(T* to, Index step, const T* from, Index cells, Index size, Turn<T> turn, T factor) {
    constexpr int block = Lanes<T>::block;
    const Index here = cells < block ? cells : block, half = size / 2;
    for (Index cell = 0; cell < here; ++cell)
        for (Index d = 0; d < half; ++d) {
            const T x = factor * from[d * block + cell], y = factor * from[(half + d) * block + cell];
            const T cosine = turn.cosine[cell * half + d], sine = turn.sine[cell * half + d];
            to[cell * step + d] = x * cosine + y * sine;
            to[cell * step + half + d] = y * cosine - x * sine;
        }
}

// The scalar products of four rows with a block of cells, added to what is there; of those beyond `count` the first's.
template <class T>
inline void products(typename Lanes<T>::V (&total)[4][ACROSS], const T* rows, int count, const T* block, Index size) {
    const T* four[4];
    for (int r = 0; r < 4; ++r) four[r] = rows + (r < count ? r : 0) * size;
    multiply<T, 4>(total, four, 1, block, size);
}

// to (size, block) = sum over rows of their numbers times what each of them is to the cells of a block.
template <class T> inline void weigh(T* to, const T* rows, const T* weights, Index count, Index size) {
    constexpr int block = Lanes<T>::block;
    for (Index d = 0; d < size; d += 4) {
        const int here = size - d < 4 ? int(size - d) : 4;
        const T* four[4];
        typename Lanes<T>::V total[4][ACROSS] = {};
        for (int r = 0; r < 4; ++r) four[r] = rows + d + (r < here ? r : 0);
        multiply<T, 4>(total, four, size, weights, count);
        for (int r = 0; r < here; ++r) store_row<T>(to + (d + r) * block, total[r], block);
    }
}

// attended (batch, lines, queries, heads, size), contiguous, and the logarithm of each query's sum of exponentials,
// (batch, lines, heads, queries); bias (keys) is added to logits, or null.
template <class T>
void attend(T* attended, T* logarithms, Heads<const T> q, Heads<const T> k, Heads<const T> v, Turn<T> turn_q,
            Turn<T> turn_k, const T* bias, Index batch, Index lines, Index heads, Index queries, Index keys, Index size,
            Index threads) {
    using V = typename Lanes<T>::V;
    constexpr int block = Lanes<T>::block, lanes = Lanes<T>::count;
    const T scale = T(1 / std::sqrt(double(size)));
#pragma omp parallel num_threads(threads)
    {
        Rows<T> of_keys(keys, size);
        Block<T> some(size);
        std::vector<T> of_queries(queries * size);
        std::vector<T> weights(keys * block);
#pragma omp for collapse(3) schedule(static)
        for (Index b = 0; b < batch; ++b)
            for (Index l = 0; l < lines; ++l)
                for (Index h = 0; h < heads; ++h) {
                    copy_turned<T>(of_queries.data(), q.line(b, l, h), q.step(), queries, size, turn_q, scale);
                    copy_turned<T>(of_keys.first.data(), k.line(b, l, h), k.step(), keys, size, turn_k, T(1));
                    copy_rows<T>(of_keys.second.data(), v.line(b, l, h), v.step(), keys, size);
                    for (Index first = 0; first < queries; first += block) {
                        copy_block<T>(some.first.data(), of_queries.data() + first * size, queries - first, size);
                        V most[ACROSS], sum[ACROSS] = {};
                        for (int s = 0; s < ACROSS; ++s) most[s] = V{} - std::numeric_limits<T>::infinity();
                        for (Index key = 0; key < keys; key += 4) {
                            const int count = keys - key < 4 ? int(keys - key) : 4;
                            V logit[4][ACROSS];
                            for (int r = 0; r < 4; ++r) {
                                const T of_key = bias && r < count ? bias[key + r] : T(0);
                                for (int s = 0; s < ACROSS; ++s) logit[r][s] = V{} + of_key;
                            }
                            products<T>(logit, of_keys.first.data() + key * size, count, some.first.data(), size);
                            for (int r = 0; r < count; ++r) {
                                for (int s = 0; s < ACROSS; ++s) most[s] = logit[r][s] > most[s] ? logit[r][s] : most[s];
                                store_row<T>(weights.data() + (key + r) * block, logit[r], block);
                            }
                        }
                        for (Index key = 0; key < keys; ++key) {
                            V weight[ACROSS];
                            T* held = weights.data() + key * block;
                            for (int s = 0; s < ACROSS; ++s) weight[s] = load(held + s * lanes) - most[s];
                            bounded_exp<T>(weight);
                            for (int s = 0; s < ACROSS; ++s) sum[s] += weight[s];
                            store_row<T>(held, weight, block);
                        }
                        weigh<T>(some.second.data(), of_keys.second.data(), weights.data(), keys, size);
                        for (Index d = 0; d < size; ++d)
                            for (int s = 0; s < ACROSS; ++s) {
                                T* held = some.second.data() + d * block + s * lanes;
                                store(held, load(held) / sum[s]);
                            }
                        T* to = attended + (((b * lines + l) * queries + first) * heads + h) * size;
                        copy_back<T>(to, heads * size, some.second.data(), queries - first, size);
                        T* told = logarithms + ((b * lines + l) * heads + h) * queries + first;
                        for (Index cell = 0; cell < block && first + cell < queries; ++cell)
                            told[cell] = most[cell / lanes][cell % lanes] + std::log(sum[cell / lanes][cell % lanes]);
                    }
                }
    }
}

// For each row and each cell of a block: the weight of one to the other, exp(first . first + shifts), kept where it is
// asked for, and the gradient of its logit, weight (second . second - slopes).
template <class T>
inline void meet(T* weights, T* gradients, const Rows<T>& rows, Index count, const Block<T>& cells, Index size) {
    using V = typename Lanes<T>::V;
    constexpr int block = Lanes<T>::block;
    for (Index row = 0; row < count; row += 4) {
        const int here = count - row < 4 ? int(count - row) : 4;
        V weight[4][ACROSS], gradient[4][ACROSS];
        for (int r = 0; r < 4; ++r) {
            const Index at = row + (r < here ? r : 0);
            for (int s = 0; s < ACROSS; ++s) {
                weight[r][s] = cells.shift[s] + rows.shift[at];
                gradient[r][s] = -cells.slope[s] - rows.slope[at];
            }
        }
        products<T>(weight, rows.first.data() + row * size, here, cells.first.data(), size);
        products<T>(gradient, rows.second.data() + row * size, here, cells.second.data(), size);
        for (int r = 0; r < here; ++r) {
            bounded_exp<T>(weight[r]);
            for (int s = 0; s < ACROSS; ++s) gradient[r][s] *= weight[r][s];
            if (weights) store_row<T>(weights + (row + r) * block, weight[r], block);
            store_row<T>(gradients + (row + r) * block, gradient[r], block);
        }
    }
}

// The gradients of `attend` from that of what was attended to.
template <class T>
void attend_back(Heads<T> grad_q, Heads<T> grad_k, Heads<T> grad_v, Heads<const T> grad, Heads<const T> attended,
                 const T* logarithms, Heads<const T> q, Heads<const T> k, Heads<const T> v, Turn<T> turn_q, Turn<T> turn_k, const T* bias,
                 Index batch, Index lines, Index heads, Index queries, Index keys, Index size, Index threads) {
    constexpr int block = Lanes<T>::block;
    const T scale = T(1 / std::sqrt(double(size)));
#pragma omp parallel num_threads(threads)
    {
        Rows<T> of_queries(queries, size), of_keys(keys, size);
        Block<T> some(size);
        const Index most = queries > keys ? queries : keys;
        std::vector<T> weights(most * block), gradients(most * block), found(size * block);
        if (bias) of_keys.shift.assign(bias, bias + keys);
#pragma omp for collapse(3) schedule(static)
        for (Index b = 0; b < batch; ++b)
            for (Index l = 0; l < lines; ++l)
                for (Index h = 0; h < heads; ++h) {
                    copy_turned<T>(of_queries.first.data(), q.line(b, l, h), q.step(), queries, size, turn_q, scale);
                    copy_rows<T>(of_queries.second.data(), grad.line(b, l, h), grad.step(), queries, size);
                    copy_turned<T>(of_keys.first.data(), k.line(b, l, h), k.step(), keys, size, turn_k, T(1));
                    copy_rows<T>(of_keys.second.data(), v.line(b, l, h), v.step(), keys, size);
                    for (Index cell = 0; cell < queries; ++cell) {
                        const T *result = attended.line(b, l, h) + cell * attended.step(), *by = of_queries.second.data() + cell * size;
                        T total = 0;
                        for (Index d = 0; d < size; ++d) total += result[d] * by[d];
                        of_queries.slope[cell] = total;
                        of_queries.shift[cell] = -logarithms[((b * lines + l) * heads + h) * queries + cell];
                    }
                    for (Index first = 0; first < queries; first += block) {
                        copy_side<T>(some, of_queries, first, queries - first, size);
                        meet<T>(nullptr, gradients.data(), of_keys, keys, some, size);
                        weigh<T>(found.data(), of_keys.first.data(), gradients.data(), keys, size);
                        turn_back<T>(grad_q.line(b, l, h) + first * grad_q.step(), grad_q.step(), found.data(), queries - first,
                                     size, turn_q.after(first, size), scale);
                    }
                    for (Index first = 0; first < keys; first += block) {
                        copy_side<T>(some, of_keys, first, keys - first, size);
                        meet<T>(weights.data(), gradients.data(), of_queries, queries, some, size);
                        weigh<T>(found.data(), of_queries.first.data(), gradients.data(), queries, size);
                        turn_back<T>(grad_k.line(b, l, h) + first * grad_k.step(), grad_k.step(), found.data(), keys - first,
                                     size, turn_k.after(first, size), T(1));
                        weigh<T>(found.data(), of_queries.second.data(), weights.data(), queries, size);
                        copy_back<T>(grad_v.line(b, l, h) + first * grad_v.step(), grad_v.step(), found.data(), keys - first, size);
                    }
                }
    }
}

}  // namespace

#define EXPORTED(T, NAME)                                                                                              \
    extern "C" void NAME##_attend(T* attended, T* logarithms, const T* q, const Index* q_strides, const T* k,          \
                                  const Index* k_strides, const T* v, const Index* v_strides, const T* q_cosine,       \
                                  const T* q_sine, const T* k_cosine, const T* k_sine, const T* bias, Index batch,     \
                                  Index lines, Index heads, Index queries, Index keys, Index size, Index threads) {    \
        attend<T>(attended, logarithms, {q, q_strides}, {k, k_strides}, {v, v_strides}, {q_cosine, q_sine},            \
                  {k_cosine, k_sine}, bias, batch, lines, heads, queries, keys, size, threads);                        \
    }                                                                                                                  \
    extern "C" void NAME##_attend_back(T* grad_q, const Index* grad_q_strides, T* grad_k, const Index* grad_k_strides, \
                                       T* grad_v, const Index* grad_v_strides, const T* grad,                          \
                                       const Index* grad_strides, const T* attended, const Index* attended_strides,    \
                                       const T* logarithms, const T* q, const Index* q_strides, const T* k,            \
                                       const Index* k_strides, const T* v, const Index* v_strides, const T* q_cosine,  \
                                       const T* q_sine, const T* k_cosine, const T* k_sine, const T* bias,             \
                                       Index batch, Index lines, Index heads, Index queries, Index keys, Index size,   \
                                       Index threads) {                                                                \
        attend_back<T>({grad_q, grad_q_strides}, {grad_k, grad_k_strides}, {grad_v, grad_v_strides},                   \
                       {grad, grad_strides}, {attended, attended_strides}, logarithms, {q, q_strides}, {k, k_strides}, \
                       {v, v_strides}, {q_cosine, q_sine}, {k_cosine, k_sine}, bias, batch, lines, heads, queries,     \
                       keys, size, threads);                                                                           \
    }

EXPORTED(float, float32)
EXPORTED(double, float64)
