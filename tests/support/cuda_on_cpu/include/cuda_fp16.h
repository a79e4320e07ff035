#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 0x1f;
  const int fraction = value.bits & 0x3ff;
  float result;
  if (exponent == 0x1f) {
    result = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    result = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    result = std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25);
  }
  return value.bits & 0x8000 ? -result : result;
}

// To the nearest, ties to even; infinity beyond the range; NaN stays NaN.
inline __half __float2half_rn(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (value != value) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  if (size == 0.0f) return {sign};
  int exponent;
  std::frexp(size, &exponent);  // size < 2^exponent
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  // Rounds to even: the default mode. A fraction of 0x800 carries into the exponent.
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  const int biased = unit + 25;
  const int bits = unit == -24 ? fraction : (biased - 1) * 0x400 + fraction;
  return {static_cast<std::uint16_t>(sign | bits)};
}
