// What cuBLAS and cuBLASLt share: the product itself, storage types, the handle.
#pragma once
#include <cuda_runtime_api.h>
#include <library_types.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

typedef std::complex<float> cfloat;
typedef std::complex<double> cdouble;

enum Status {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_NOT_INITIALIZED = 1,
  CUBLAS_STATUS_INVALID_VALUE = 7,
  CUBLAS_STATUS_EXECUTION_FAILED = 13,
  CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum { OP_N = 0, OP_T = 1, OP_C = 2 };
enum { FILL_LOWER = 0, FILL_UPPER = 1 };
enum { SIDE_LEFT = 0, SIDE_RIGHT = 1 };
enum { DIAG_NON_UNIT = 0, DIAG_UNIT = 1 };

// Also a cuBLASLt handle: there, only the device of its creation counts.
struct Handle {
  cudaStream_t stream = nullptr;
  int pointer_mode = 0;  // 0: scalars on the host, 1: on the device
  int math_mode = 0;
  int device = 0;
};

template <class T> struct real_of { typedef T type; };
template <class T> struct real_of<std::complex<T>> { typedef T type; };
template <class T> constexpr bool is_complex = !std::is_same_v<T, typename real_of<T>::type>;

template <class T> T conj_(T x) { return x; }
template <class T> std::complex<T> conj_(std::complex<T> x) { return std::conj(x); }
template <class T> T abs1(T x) { return std::abs(x); }
template <class T> T abs1(std::complex<T> x) { return std::abs(x.real()) + std::abs(x.imag()); }

// Complex products without the checks for infinities of std::complex.
template <class T> T mul(T a, T b) { return a * b; }
template <class T> std::complex<T> mul(std::complex<T> a, std::complex<T> b) {
  return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
}

// What the compute type says of the type of the sums and of alpha and beta.
enum { COMPUTE_16F = 64, COMPUTE_32F = 68, COMPUTE_64F = 70, COMPUTE_32I = 72, COMPUTE_FAST = 74 };

// ------------------------------------------------------------ matrix product

// C[m,n] += A * B for packed operands: a in panels of MR rows, b in panels of
// NR columns, both k deep.
template <class T, int MR, int NR>
void micro_kernel(int64_t k, const T* a, const T* b, T* acc) {
  constexpr int lanes = 32 / sizeof(T), vectors = MR / lanes;
  typedef T V __attribute__((vector_size(32)));
  V sum[vectors][NR] = {};
  for (int64_t p = 0; p < k; p++) {
    V va[vectors];
    for (int v = 0; v < vectors; v++) memcpy(&va[v], a + p * MR + v * lanes, 32);
    for (int j = 0; j < NR; j++)
      for (int v = 0; v < vectors; v++) sum[v][j] += va[v] * b[p * NR + j];
  }
  for (int j = 0; j < NR; j++)
    for (int v = 0; v < vectors; v++) memcpy(acc + j * MR + v * lanes, &sum[v][j], 32);
}
template <class T, int MR, int NR>
void scalar_kernel(int64_t k, const T* a, const T* b, T* acc) {
  for (int i = 0; i < MR * NR; i++) acc[i] = T();
  for (int64_t p = 0; p < k; p++)
    for (int j = 0; j < NR; j++)
      for (int i = 0; i < MR; i++) acc[j * MR + i] += mul(a[p * MR + i], b[p * NR + j]);
}

// Computes op(A) op(B) in type T and hands each element to `store(i, j, sum)`.
// `a(i, p)` and `b(p, j)` give the operands' elements.
template <class T, class A, class B, class Store>
void product(int64_t m, int64_t n, int64_t k, A a, B b, Store store) {
  constexpr bool vector = std::is_floating_point_v<T>;
  constexpr int MR = vector ? 64 / (int)sizeof(T) : 4, NR = 4;
  int64_t mp = (m + MR - 1) / MR, np = (n + NR - 1) / NR;
  std::vector<T> pa(mp * MR * k), pb(np * NR * k);
  for (int64_t ip = 0; ip < mp; ip++)
    for (int64_t p = 0; p < k; p++)
      for (int i = 0; i < MR; i++)
        pa[(ip * k + p) * MR + i] = ip * MR + i < m ? a(ip * MR + i, p) : T();
  for (int64_t jp = 0; jp < np; jp++)
    for (int64_t p = 0; p < k; p++)
      for (int j = 0; j < NR; j++)
        pb[(jp * k + p) * NR + j] = jp * NR + j < n ? b(p, jp * NR + j) : T();
  alignas(64) T acc[MR * NR];
  for (int64_t jp = 0; jp < np; jp++)
    for (int64_t ip = 0; ip < mp; ip++) {
      if constexpr (vector)
        micro_kernel<T, MR, NR>(k, &pa[ip * k * MR], &pb[jp * k * NR], acc);
      else
        scalar_kernel<T, MR, NR>(k, &pa[ip * k * MR], &pb[jp * k * NR], acc);
      for (int j = 0; j < NR && jp * NR + j < n; j++)
        for (int i = 0; i < MR && ip * MR + i < m; i++)
          store(ip * MR + i, jp * NR + j, acc[j * MR + i]);
    }
}

// Storage types of the ...Ex functions.
inline float load_half(uint16_t bits) {
  _Float16 h;
  memcpy(&h, &bits, 2);
  return (float)h;
}
inline uint16_t store_half(float v) {
  _Float16 h = (_Float16)v;
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}
inline float load_bf16(uint16_t bits) {
  uint32_t b = (uint32_t)bits << 16;
  float f;
  memcpy(&f, &b, 4);
  return f;
}
inline uint16_t store_bf16(float v) {
  uint32_t b;
  memcpy(&b, &v, 4);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (uint16_t)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

template <class T>
T load(const void* p, int64_t i, cudaDataType type) {
  if constexpr (is_complex<T>) {
    typedef typename real_of<T>::type R;
    switch (type) {
      case CUDA_C_32F: {
        cfloat v = ((const cfloat*)p)[i];
        return T((R)v.real(), (R)v.imag());
      }
      case CUDA_C_64F: {
        cdouble v = ((const cdouble*)p)[i];
        return T((R)v.real(), (R)v.imag());
      }
      default: return T();
    }
  } else {
    switch (type) {
      case CUDA_R_32F: return (T)((const float*)p)[i];
      case CUDA_R_64F: return (T)((const double*)p)[i];
      case CUDA_R_16F: return (T)load_half(((const uint16_t*)p)[i]);
      case CUDA_R_16BF: return (T)load_bf16(((const uint16_t*)p)[i]);
      case CUDA_R_8I: return (T)((const int8_t*)p)[i];
      case CUDA_R_32I: return (T)((const int32_t*)p)[i];
      default: return T();
    }
  }
}
template <class T>
void store(void* p, int64_t i, cudaDataType type, T v) {
  if constexpr (is_complex<T>) {
    if (type == CUDA_C_32F)
      ((cfloat*)p)[i] = cfloat((float)v.real(), (float)v.imag());
    else
      ((cdouble*)p)[i] = cdouble(v.real(), v.imag());
  } else {
    switch (type) {
      case CUDA_R_32F: ((float*)p)[i] = (float)v; break;
      case CUDA_R_64F: ((double*)p)[i] = (double)v; break;
      case CUDA_R_16F: ((uint16_t*)p)[i] = store_half((float)v); break;
      case CUDA_R_16BF: ((uint16_t*)p)[i] = store_bf16((float)v); break;
      case CUDA_R_32I: ((int32_t*)p)[i] = (int32_t)v; break;
      default: break;
    }
  }
}

}  // namespace
