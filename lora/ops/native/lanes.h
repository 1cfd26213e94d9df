// Sixteen numbers at a time, or pairs of sixteen, on whatever vectors a processor has.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
// One copy of what is inlined into it for each kind of processor; the loader picks.
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Masks __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

INLINE void load(const float* from, Lanes& to) { memcpy(&to, from, sizeof to); }

INLINE void load(const bfloat16* from, Lanes& to) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    Words words = __builtin_convertvector(halves, Words) << 16;
    memcpy(&to, &words, sizeof to);
}

INLINE void store(float* to, Lanes value) { memcpy(to, &value, sizeof value); }

// In the upper halves, as bfloat16: to the nearest, ties to even; not a number stays none.
INLINE Words rounded(Lanes value) {
    Words words;
    memcpy(&words, &value, sizeof words);
    Words near = words + 0x7fff + ((words >> 16) & 1), none = words | 0x400000;
    Words is_none = (Words)(value != value);
    return (is_none & none) | (~is_none & near);
}

INLINE void store(bfloat16* to, Lanes value) {
    Halves halves = __builtin_convertvector(rounded(value) >> 16, Halves);
    memcpy(to, &halves, sizeof halves);
}

constexpr int PAIR = 2 * LANES;

// Numbers at even places and those at odd ones: two of bfloat16 lie in one word, and are taken apart without a shuffle.
struct Pair {
    Lanes even, odd;
};

INLINE void load(const bfloat16* from, Pair& to) {
    Words words;
    memcpy(&words, from, sizeof words);
    Words even = words << 16, odd = words & 0xffff0000u;
    memcpy(&to.even, &even, sizeof even);
    memcpy(&to.odd, &odd, sizeof odd);
}

INLINE void load(const float* from, Pair& to) {
    constexpr Masks even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    Lanes first, second;
    load(from, first), load(from + LANES, second);
    to.even = __builtin_shuffle(first, second, even);
    to.odd = __builtin_shuffle(first, second, even + 1);
}

INLINE void store(bfloat16* to, const Pair& value) {
    Words words = (rounded(value.even) >> 16) | (rounded(value.odd) & 0xffff0000u);
    memcpy(to, &words, sizeof words);
}

INLINE void store(float* to, const Pair& value) {
    constexpr Masks low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    store(to, __builtin_shuffle(value.even, value.odd, low));
    store(to + LANES, __builtin_shuffle(value.even, value.odd, low + 8));
}

// `Some` is Lanes or a Pair; numbers beyond the count are 0.
template <typename T, typename Some>
INLINE void load_some(const T* from, int count, Some& to) {
    T some[sizeof(Some) / sizeof(float)] = {};
    memcpy(some, from, count * sizeof(T));
    load(some, to);
}

template <typename T, typename Some>
INLINE void store_some(T* to, int count, const Some& value) {
    T some[sizeof(Some) / sizeof(float)];
    store(some, value);
    memcpy(to, some, count * sizeof(T));
}

// e to the power of each, for values of at most 0 (Cody and Waite's reduction, a polynomial of degree 6).
INLINE void exp_of(Lanes& x) {
    const Lanes lowest = Lanes{} - 87.0f;
    x = x < lowest ? lowest : x;
    const float to_nearest = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds
    Lanes n = (x * 1.44269504f + to_nearest) - to_nearest;
    Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Masks power = (__builtin_convertvector(n, Masks) + 127) << 23;
    Lanes scale;
    memcpy(&scale, &power, sizeof scale);
    x = p * scale;
}

// What a number is after it was written down.
INLINE void round_as(const float*, Lanes&) {}

INLINE void round_as(const bfloat16*, Lanes& value) {
    bfloat16 written[LANES];
    store(written, value);
    load(written, value);
}

INLINE float sum(Lanes value) {
    float lane[LANES];
    memcpy(lane, &value, sizeof lane);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int at = 0; at < width; at++) lane[at] += lane[at + width];
    return lane[0];
}

}  // namespace
