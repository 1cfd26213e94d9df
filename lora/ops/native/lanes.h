// Sixteen numbers at a time, on whatever vectors a processor has.

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

INLINE void store(bfloat16* to, Lanes value) {  // to the nearest, ties to even; not a number stays none
    Words words;
    memcpy(&words, &value, sizeof words);
    Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    Words none = (words >> 16) | 0x40;
    Words is_none = (Words)(value != value);
    Halves halves = __builtin_convertvector((is_none & none) | (~is_none & rounded), Halves);
    memcpy(to, &halves, sizeof halves);
}

template <typename T>
INLINE void load_some(const T* from, int count, Lanes& to) {
    T some[LANES] = {};
    memcpy(some, from, count * sizeof(T));
    load(some, to);
}

template <typename T>
INLINE void store_some(T* to, int count, Lanes value) {
    T some[LANES];
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
