// What loops over blocks of cells have in common: vectors, their exponentials, and products with rows of weights.
//
// A block is as many cells as fill the vector registers. What belongs to its cells lies channel by channel, side by side.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <vector>

// How wide vectors are, how many of them make a block, and how many blocks a stretch; the last two by registers and cache.
#if defined(VECTOR_BYTES)  // a test's
#elif defined(__AVX512F__)
#define VECTOR_BYTES 64
#define ACROSS 6
#define BLOCKS 2
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define ACROSS 3
#define BLOCKS 4
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define ACROSS 6
#define BLOCKS 4
#else
#define VECTOR_BYTES 16
#define ACROSS 3
#define BLOCKS 8
#endif

#if defined(__x86_64__) && VECTOR_BYTES <= 32
#define IN_REGISTER(value) asm("" : "+x"(value))
#elif defined(__AVX512F__)
#define IN_REGISTER(value) asm("" : "+v"(value))
#elif defined(__aarch64__)
#define IN_REGISTER(value) asm("" : "+w"(value))
#else
#define IN_REGISTER(value)
#endif

namespace {

using Index = std::int64_t;

template <class T> struct Bits;
template <> struct Bits<float> {
    using Int = std::int32_t;
    static constexpr float magic = 12582912.0f;  // 1.5 2^23: adding it rounds to a whole number
    static constexpr float most = 28.0f;
    static constexpr int mantissa = 23, bias = 127, terms = 7;
};
template <> struct Bits<double> {
    using Int = std::int64_t;
    static constexpr double magic = 6755399441055744.0;
    static constexpr double most = 40.0;
    static constexpr int mantissa = 52, bias = 1023, terms = 13;
};

template <class T> struct Lanes {
    typedef T V __attribute__((vector_size(VECTOR_BYTES)));
    typedef typename Bits<T>::Int I __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int count = VECTOR_BYTES / sizeof(T);
    static constexpr int block = count * ACROSS, stretch = block * BLOCKS;
};

template <class T> inline typename Lanes<T>::V load(const T* from) {
    typename Lanes<T>::V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T> inline void store(T* to, typename Lanes<T>::V value) { std::memcpy(to, &value, sizeof value); }

template <class T> inline T sum(typename Lanes<T>::V value) {
    T total = 0;
    for (int lane = 0; lane < Lanes<T>::count; ++lane) total += value[lane];
    return total;
}

// x, at most so far from 0; what is no number stays none. The compiler does not make one instruction of the first way.
template <class V, class T> inline V bounded(V x, T most) {
    const V high = V{} + most, low = V{} - most;
    x = x < low ? low : x;
    return x > high ? high : x;
}
#if defined(__AVX512F__) && VECTOR_BYTES == 64
inline Lanes<float>::V bounded(Lanes<float>::V x, float most) {
    return _mm512_min_ps(_mm512_set1_ps(most), _mm512_max_ps(_mm512_set1_ps(-most), x));
}
#elif defined(__AVX__) && VECTOR_BYTES == 32
inline Lanes<float>::V bounded(Lanes<float>::V x, float most) {
    return _mm256_min_ps(_mm256_set1_ps(most), _mm256_max_ps(_mm256_set1_ps(-most), x));
}
#endif

// exp(x) of a block, for x within 28 of 0, beyond which gates are 0 or 1 to float32: 2^n times a polynomial. (40 for
// float64.) The vectors go side by side from one operation to the next, as each waits for the one before it.
template <class T> inline void bounded_exp(typename Lanes<T>::V (&x)[ACROSS]) {
    using V = typename Lanes<T>::V;
    using I = typename Lanes<T>::I;
    V rest[ACROSS], value[ACROSS];
    I power[ACROSS];
    for (int s = 0; s < ACROSS; ++s) {
        const V within = bounded(x[s], Bits<T>::most), shifted = within * T(1.4426950408889634) + Bits<T>::magic;
        const V whole = shifted - Bits<T>::magic;
        std::memcpy(&power[s], &shifted, sizeof shifted);
        rest[s] = within - whole * T(0.693145751953125) - whole * T(1.42860682030941723212e-6);
        value[s] = V{} + T(1);
    }
    for (int term = Bits<T>::terms; term > 0; --term)
        for (int s = 0; s < ACROSS; ++s) value[s] = value[s] * (rest[s] * T(1.0 / term)) + T(1);
    for (int s = 0; s < ACROSS; ++s) {
        power[s] = (power[s] << Bits<T>::mantissa) + (typename Bits<T>::Int(Bits<T>::bias) << Bits<T>::mantissa);
        V scale;
        std::memcpy(&scale, &power[s], sizeof scale);
        x[s] = value[s] * scale;
    }
}

// The channels of one stretch of cells, block by block, side by side; cells beyond the last are 0.
template <class T> inline void copy_stretch(T* to, const T* from, Index channels, Index stride, Index cells) {
    constexpr int block = Lanes<T>::block;
    for (Index channel = 0; channel < channels; ++channel)
        for (Index first = 0; first < cells; first += block) {
            T* row = to + first * channels + channel * block;
            const Index here = cells - first < block ? cells - first : block;
            if (here < block) std::memset(row, 0, block * sizeof(T));
            std::memcpy(row, from + channel * stride + first, here * sizeof(T));
        }
}

template <class T> inline void load_row(typename Lanes<T>::V* to, const T* from, Index cells) {
    T whole[Lanes<T>::block] = {};
    if (cells < Lanes<T>::block) {
        std::memcpy(whole, from, cells * sizeof(T));
        from = whole;
    }
    for (int s = 0; s < ACROSS; ++s) to[s] = load(from + s * Lanes<T>::count);
}

template <class T> inline void store_row(T* to, const typename Lanes<T>::V* from, Index cells) {
    if (cells == Lanes<T>::block) {
        for (int s = 0; s < ACROSS; ++s) store(to + s * Lanes<T>::count, from[s]);
    } else {
        std::memcpy(to, from, cells * sizeof(T));
    }
}

// ROWS rows of a product: total[r] += weight[r][k] x[k], x being a block of cells.
template <class T, int ROWS>
inline void multiply(typename Lanes<T>::V (*total)[ACROSS], const T* const* weight, Index weight_step, const T* x, Index inner) {
    using V = typename Lanes<T>::V;
    V sums[ROWS][ACROSS];
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < ACROSS; ++s) sums[r][s] = total[r][s];
    for (Index k = 0; k < inner; ++k) {
        V cells[ACROSS];
        for (int s = 0; s < ACROSS; ++s) {
            cells[s] = load(x + k * Lanes<T>::block + s * Lanes<T>::count);
            IN_REGISTER(cells[s]);  // or it is loaded again for every row
        }
        for (int r = 0; r < ROWS; ++r) {
            const T factor = weight[r][k * weight_step];
            for (int s = 0; s < ACROSS; ++s) sums[r][s] += factor * cells[s];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < ACROSS; ++s) total[r][s] = sums[r][s];
}

}  // namespace
