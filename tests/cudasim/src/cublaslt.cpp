// cuBLASLt: matrix products with an epilogue, D = epilogue(alpha op(A) op(B) + beta C).
//
// The rules are those of the cuBLAS manual ("Using the cuBLASLt API"), and where
// it leaves things to the heuristic, strict ones: an algorithm fits only the
// problem it was asked for, and needs the pointer alignments it was promised.
#include <cstdio>
#include <map>
#include <memory>

#include "gemm.h"
#include "library.h"

namespace {

// ---------------------------------------------------------------- attributes

struct Attribute {
  size_t size;
  int64_t value;
};

// A descriptor: integers and pointers by number, each of a fixed size.
struct Attributes {
  std::map<int, Attribute> values;

  int64_t operator[](int id) const { return values.at(id).value; }

  int set(int id, const void* buffer, size_t size) {
    auto found = values.find(id);
    if (!buffer || found == values.end() || size != found->second.size)
      return CUBLAS_STATUS_INVALID_VALUE;
    int32_t narrow;
    if (size == 4) {
      memcpy(&narrow, buffer, 4);
      found->second.value = narrow;
    } else {
      found->second.value = 0;
      memcpy(&found->second.value, buffer, size);
    }
    return CUBLAS_STATUS_SUCCESS;
  }

  int get(int id, void* buffer, size_t size, size_t* written) const {
    auto found = values.find(id);
    if (found == values.end()) return CUBLAS_STATUS_INVALID_VALUE;
    if (size ? !buffer || size < found->second.size : !written) return CUBLAS_STATUS_INVALID_VALUE;
    if (size) memcpy(buffer, &found->second.value, found->second.size);
    if (written) *written = found->second.size;
    return CUBLAS_STATUS_SUCCESS;
  }
};

// cublasLtMatmulDescAttributes_t
enum {
  COMPUTE_TYPE = 0, SCALE_TYPE = 1, POINTER_MODE = 2, TRANSA = 3, TRANSB = 4, TRANSC = 5,
  FILL_MODE = 6, EPILOGUE = 7, BIAS_POINTER = 8, BIAS_BATCH_STRIDE = 10, AUX_POINTER = 11,
  AUX_LD = 12, AUX_BATCH_STRIDE = 13, SM_COUNT_TARGET = 15, AUX_DATA_TYPE = 22, FAST_ACCUM = 25,
  BIAS_DATA_TYPE = 26
};
// cublasLtMatrixLayoutAttribute_t
enum { TYPE = 0, ORDER = 1, ROWS = 2, COLS = 3, LD = 4, BATCH_COUNT = 5, BATCH_OFFSET = 6 };
enum { ORDER_COL = 0, ORDER_ROW = 1 };
// cublasLtMatmulPreferenceAttributes_t
enum { SEARCH_MODE = 0, MAX_WORKSPACE = 1, REDUCTION_MASK = 3, MIN_ALIGNMENT_A = 5, IMPL_MASK = 12 };

// cublasLtEpilogue_t is made of these bits; DEFAULT is 1.
enum {
  RELU = 2, BIAS = 4, DRELU = 8, BGRAD = 16, GELU = 32, DGELU = 64, AUX = 128, BGRADA = 256,
  BGRADB = 512
};
bool known_epilogue(int e) {
  static const int known_ones[] = {
      1, RELU, BIAS, RELU | BIAS, RELU | AUX, RELU | AUX | BIAS, DRELU | AUX, DRELU | AUX | BGRAD,
      GELU, GELU | BIAS, GELU | AUX, GELU | AUX | BIAS, DGELU | AUX, DGELU | AUX | BGRAD, BGRADA,
      BGRADB};
  for (int known : known_ones)
    if (e == known) return true;
  return false;
}

// ------------------------------------------------------------------ problems

struct Matrix {
  cudaDataType type;
  int order;
  int64_t rows, cols, ld, offset;

  explicit Matrix(const Attributes& a)
      : type((cudaDataType)a[TYPE]), order((int)a[ORDER]), rows(a[ROWS]), cols(a[COLS]),
        ld(a[LD]), offset(a[BATCH_OFFSET]) {}
  int64_t at(int batch, int64_t i, int64_t j) const {
    return batch * offset + (order == ORDER_COL ? i + j * ld : i * ld + j);
  }
};

size_t size_of(cudaDataType type) {
  switch (type) {
    case CUDA_R_64F: return 8;
    case CUDA_R_32F: return 4;
    case CUDA_R_16F:
    case CUDA_R_16BF: return 2;
    default: return 0;
  }
}

struct Problem {
  Matrix a, b, c, d;
  int ta, tb, batch, epilogue;
  int64_t m, n, k;
  cudaDataType scale_type;
  bool device_scalars;
  cudaDataType bias_type;
  void* bias;
  int64_t bias_stride;
  void* aux;
  int64_t aux_ld, aux_stride;
  int compute;

  bool bitmask() const { return epilogue & AUX && epilogue & (RELU | DRELU); }
  bool uses_bias() const { return epilogue & (BIAS | BGRAD | BGRADA | BGRADB); }
  // What an algorithm is chosen for: everything but the pointers.
  uint64_t hash() const {
    uint64_t h = 14695981039346656037u;
    auto mix = [&h](int64_t v) { h = (h ^ (uint64_t)v) * 1099511628211u; };
    for (const Matrix* x : {&a, &b, &c, &d})
      for (int64_t v : {(int64_t)x->type, (int64_t)x->order, x->rows, x->cols, x->ld, x->offset})
        mix(v);
    for (int64_t v : {(int64_t)ta, (int64_t)tb, (int64_t)batch, (int64_t)epilogue,
                      (int64_t)scale_type, (int64_t)device_scalars, (int64_t)bias_type, aux_ld,
                      (int64_t)compute})
      mix(v);
    return h;
  }
};

// Why a problem is refused.
struct Refusal {
  int status;
  const char* why;
};
const Refusal FINE = {CUBLAS_STATUS_SUCCESS, nullptr};

Refusal check_types(const Problem& p) {
  auto all = [&p](cudaDataType t) { return p.a.type == t && p.b.type == t && p.d.type == t; };
  const Refusal unsupported = {CUBLAS_STATUS_NOT_SUPPORTED,
                               "this combination of compute, scale and matrix types"};
  if (p.c.type != p.d.type) return {CUBLAS_STATUS_NOT_SUPPORTED, "C and D of different types"};
  switch (p.compute & ~1) {
    case COMPUTE_16F:
      return all(CUDA_R_16F) && p.scale_type == CUDA_R_16F ? FINE : unsupported;
    case COMPUTE_64F:
      return all(CUDA_R_64F) && p.scale_type == CUDA_R_64F ? FINE : unsupported;
    case COMPUTE_32F: {
      bool half = p.a.type == CUDA_R_16F || p.a.type == CUDA_R_16BF;
      bool out = p.d.type == p.a.type || (half && p.d.type == CUDA_R_32F);
      bool in = p.a.type == p.b.type && (half || p.a.type == CUDA_R_32F);
      return in && out && p.scale_type == CUDA_R_32F ? FINE : unsupported;
    }
  }
  bool fast = p.compute >= COMPUTE_FAST && p.compute <= 78;
  return fast && all(CUDA_R_32F) && p.scale_type == CUDA_R_32F ? FINE : unsupported;
}

Refusal check_epilogue(const Problem& p, const Attributes& desc) {
  if (!known_epilogue(p.epilogue)) return {CUBLAS_STATUS_INVALID_VALUE, "no such epilogue"};
  if (p.epilogue == 1) return FINE;
  if (p.d.order != ORDER_COL)
    return {CUBLAS_STATUS_NOT_SUPPORTED, "an epilogue with D in CUBLASLT_ORDER_ROW"};
  if (p.uses_bias() && p.bias_type != p.d.type)
    return {CUBLAS_STATUS_NOT_SUPPORTED, "a bias of another type than D"};
  if (p.epilogue & AUX) {
    int64_t granularity = p.bitmask() ? 128 : 8;
    if (p.aux_ld % granularity || p.aux_ld < p.m)
      return {CUBLAS_STATUS_INVALID_VALUE,
              p.bitmask() ? "EPILOGUE_AUX_LD must be a multiple of 128 (bits), no less than D's rows"
                          : "EPILOGUE_AUX_LD must be a multiple of 8, no less than D's rows"};
    if (p.batch > 1 && (p.aux_stride % granularity || p.aux_stride < p.aux_ld * p.n))
      return {CUBLAS_STATUS_INVALID_VALUE, "EPILOGUE_AUX_BATCH_STRIDE lets the buffers overlap"};
    int64_t type = desc[AUX_DATA_TYPE];
    if (!p.bitmask() && type != -1 && type != p.d.type)
      return {CUBLAS_STATUS_NOT_SUPPORTED, "an auxiliary buffer of another type than D"};
  }
  return FINE;
}

// The problem that descriptors describe, checked.
Refusal make_problem(const Attributes* desc, const Attributes* a, const Attributes* b,
                     const Attributes* c, const Attributes* d, std::shared_ptr<Problem>* result) {
  if (!desc || !a || !b || !c || !d) return {CUBLAS_STATUS_INVALID_VALUE, "a descriptor is NULL"};
  const Attributes& s = *desc;
  result->reset(new Problem{Matrix(*a), Matrix(*b), Matrix(*c), Matrix(*d)});
  Problem& p = **result;
  p.ta = (int)s[TRANSA];
  p.tb = (int)s[TRANSB];
  p.batch = (int)(*d)[BATCH_COUNT];
  p.epilogue = (int)s[EPILOGUE];
  p.m = p.d.rows;
  p.n = p.d.cols;
  p.k = p.ta == OP_N ? p.a.cols : p.a.rows;
  p.compute = (int)s[COMPUTE_TYPE];
  p.scale_type = (cudaDataType)s[SCALE_TYPE];
  p.device_scalars = s[POINTER_MODE] == 1;
  p.bias_type = s[BIAS_DATA_TYPE] == -1 ? p.d.type : (cudaDataType)s[BIAS_DATA_TYPE];
  p.bias = (void*)s[BIAS_POINTER];
  p.bias_stride = s[BIAS_BATCH_STRIDE];
  p.aux = (void*)s[AUX_POINTER];
  p.aux_ld = s[AUX_LD];
  p.aux_stride = s[AUX_BATCH_STRIDE];

  if (s[POINTER_MODE] != 0 && s[POINTER_MODE] != 1)
    return {CUBLAS_STATUS_NOT_SUPPORTED, "alpha as a vector"};
  if (p.ta < OP_N || p.ta > OP_C || p.tb < OP_N || p.tb > OP_C)
    return {CUBLAS_STATUS_INVALID_VALUE, "TRANSA or TRANSB is no cublasOperation_t"};
  if (s[TRANSC] != OP_N) return {CUBLAS_STATUS_NOT_SUPPORTED, "TRANSC"};
  for (const Matrix* x : {&p.a, &p.b, &p.c, &p.d}) {
    if (x->order != ORDER_COL && x->order != ORDER_ROW)
      return {CUBLAS_STATUS_NOT_SUPPORTED, "an order that is neither COL nor ROW"};
    if (x->rows <= 0 || x->cols <= 0) return {CUBLAS_STATUS_INVALID_VALUE, "an empty matrix"};
    if (x->ld < (x->order == ORDER_COL ? x->rows : x->cols))
      return {CUBLAS_STATUS_INVALID_VALUE, "a leading dimension is too small"};
  }
  for (const Attributes* x : {a, b, c})
    if ((*x)[BATCH_COUNT] != p.batch || p.batch < 1)
      return {CUBLAS_STATUS_INVALID_VALUE, "the batch counts differ, or are not positive"};
  int64_t length = p.d.ld * (p.d.order == ORDER_COL ? p.d.cols : p.d.rows);
  if (p.batch > 1 && p.d.offset < (p.m == 1 || p.n == 1 ? 1 : length - p.d.ld + 1))
    return {CUBLAS_STATUS_INVALID_VALUE, "the matrices of D's batch overlap"};
  int64_t a_rows = p.ta == OP_N ? p.a.rows : p.a.cols;
  int64_t b_rows = p.tb == OP_N ? p.b.rows : p.b.cols;
  int64_t b_cols = p.tb == OP_N ? p.b.cols : p.b.rows;
  if (a_rows != p.m || b_rows != p.k || b_cols != p.n || p.c.rows != p.m || p.c.cols != p.n)
    return {CUBLAS_STATUS_INVALID_VALUE, "the shapes do not fit"};
  Refusal refusal = check_types(p);
  return refusal.status ? refusal : check_epilogue(p, s);
}

// ---------------------------------------------------------------- algorithms

struct Algorithm {  // cublasLtMatmulAlgo_t
  uint64_t magic, problem, workspace, alignments, reserved[4];
};
struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};
constexpr uint64_t MAGIC = 0x63756461736c74;
constexpr uint64_t WORKSPACE = 32 << 10;  // what an algorithm takes if it may

// The largest power of two up to 16 that divides a number; 16 for 0.
unsigned alignment(uint64_t x) { return x ? (unsigned)std::min<uint64_t>(x & -x, 16) : 16; }

// Of A, B, C, D, bias and auxiliary buffer: log2 of the alignment, 4 bits each.
uint64_t packed(std::initializer_list<unsigned> alignments) {
  uint64_t result = 0;
  int shift = 0;
  for (unsigned a : alignments) result |= (uint64_t)__builtin_ctz(a) << shift, shift += 4;
  return result;
}

// ------------------------------------------------------------------- running

template <class T>
T gelu(T x) {
  return T(0.5) * x * (1 + std::tanh(T(0.7978845608028654) * (x + T(0.044715) * x * x * x)));
}
template <class T>
T gelu_derivative(T x) {
  T t = std::tanh(T(0.7978845608028654) * (x + T(0.044715) * x * x * x));
  T inner = T(0.7978845608028654) * (1 + T(3 * 0.044715) * x * x);
  return T(0.5) * (1 + t) + T(0.5) * x * (1 - t * t) * inner;
}

// T is the type of the sums.
template <class T>
void run(const Problem& p, T alpha, T beta, const void* A, const void* B, const void* C, void* D) {
  auto left = [&](int r, int64_t i, int64_t q) {
    return load<T>(A, p.ta == OP_N ? p.a.at(r, i, q) : p.a.at(r, q, i), p.a.type);
  };
  auto right = [&](int r, int64_t q, int64_t j) {
    return load<T>(B, p.tb == OP_N ? p.b.at(r, q, j) : p.b.at(r, j, q), p.b.type);
  };
  for (int r = 0; r < p.batch; r++) {
    uint8_t* mask = (uint8_t*)p.aux + r * p.aux_stride / 8;
    std::vector<T> sums(p.epilogue & BGRAD ? p.m : p.epilogue & BGRADA ? p.m
                        : p.epilogue & BGRADB ? p.n : 0);
    product<T>(
        p.m, p.n, p.k, [&](int64_t i, int64_t q) { return left(r, i, q); },
        [&](int64_t q, int64_t j) { return right(r, q, j); },
        [&](int64_t i, int64_t j, T sum) {
          T v = alpha * sum;
          if (beta != 0) v += beta * load<T>(C, p.c.at(r, i, j), p.c.type);
          if (p.epilogue & BIAS) v += load<T>(p.bias, r * p.bias_stride + i, p.bias_type);
          int64_t aux = i + j * p.aux_ld;
          uint8_t bit = 1 << aux % 8;
          if (p.epilogue & RELU) {
            bool on = v > 0;  // false for NaN, which becomes 0, as on a GPU
            if (p.epilogue & AUX) mask[aux / 8] = on ? mask[aux / 8] | bit : mask[aux / 8] & ~bit;
            v = on ? v : T(0);
          }
          if (p.epilogue & GELU) {
            if (p.epilogue & AUX) store<T>(p.aux, r * p.aux_stride + aux, p.d.type, v);
            v = gelu(v);
          }
          if (p.epilogue & DRELU) v = mask[aux / 8] & bit ? v : T(0);
          if (p.epilogue & DGELU)
            v *= gelu_derivative(load<T>(p.aux, r * p.aux_stride + aux, p.d.type));
          if (p.epilogue & BGRAD) sums[i] += v;
          store<T>(D, p.d.at(r, i, j), p.d.type, v);
        });
    if (p.epilogue & BGRADA)
      for (int64_t i = 0; i < p.m; i++)
        for (int64_t q = 0; q < p.k; q++) sums[i] += left(r, i, q);
    if (p.epilogue & BGRADB)
      for (int64_t j = 0; j < p.n; j++)
        for (int64_t q = 0; q < p.k; q++) sums[j] += right(r, q, j);
    for (size_t i = 0; i < sums.size(); i++)
      store<T>(p.bias, r * p.bias_stride + (int64_t)i, p.bias_type, sums[i]);
  }
}

int refuse(const Refusal& refusal) {
  fprintf(stderr, "cudasim: cublasLtMatmul refuses: %s\n", refusal.why);
  return refusal.status;
}

int create(Attributes** result, std::map<int, Attribute> values) {
  if (!result) return CUBLAS_STATUS_INVALID_VALUE;
  *result = new Attributes{std::move(values)};
  return CUBLAS_STATUS_SUCCESS;
}
int destroy(Attributes* a) {
  delete a;
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

// ---------------------------------------------------------------- the API

SIM_EXPORT int cublasLtCreate(Handle** h) {
  *h = new Handle;
  return cudaGetDevice(&(*h)->device) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                     : CUBLAS_STATUS_NOT_INITIALIZED;
}
SIM_EXPORT int cublasLtDestroy(Handle* h) {
  delete h;
  return CUBLAS_STATUS_SUCCESS;
}
SIM_EXPORT size_t cublasLtGetVersion() { return 130000; }
SIM_EXPORT size_t cublasLtGetCudartVersion() { return SIM_CUDA_VERSION; }
SIM_EXPORT const char* cublasLtGetStatusName(int status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "unknown status";
  }
}
SIM_EXPORT const char* cublasLtGetStatusString(int status) { return cublasLtGetStatusName(status); }

SIM_EXPORT int cublasLtMatmulDescCreate(Attributes** desc, int compute, int scale_type) {
  return create(desc, {{COMPUTE_TYPE, {4, compute}}, {SCALE_TYPE, {4, scale_type}},
                       {POINTER_MODE, {4, 0}}, {TRANSA, {4, OP_N}}, {TRANSB, {4, OP_N}},
                       {TRANSC, {4, OP_N}}, {FILL_MODE, {4, 2}}, {EPILOGUE, {4, 1}},
                       {BIAS_POINTER, {8, 0}}, {BIAS_BATCH_STRIDE, {8, 0}}, {AUX_POINTER, {8, 0}},
                       {AUX_LD, {8, 0}}, {AUX_BATCH_STRIDE, {8, 0}}, {SM_COUNT_TARGET, {4, 0}},
                       {AUX_DATA_TYPE, {4, -1}}, {FAST_ACCUM, {1, 0}}, {BIAS_DATA_TYPE, {4, -1}}});
}
SIM_EXPORT int cublasLtMatrixLayoutCreate(Attributes** layout, int type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
  return create(layout, {{TYPE, {4, type}}, {ORDER, {4, ORDER_COL}}, {ROWS, {8, (int64_t)rows}},
                         {COLS, {8, (int64_t)cols}}, {LD, {8, ld}}, {BATCH_COUNT, {4, 1}},
                         {BATCH_OFFSET, {8, 0}}});
}
SIM_EXPORT int cublasLtMatmulPreferenceCreate(Attributes** pref) {
  return create(pref, {{SEARCH_MODE, {4, 0}}, {MAX_WORKSPACE, {8, 0}}, {REDUCTION_MASK, {4, -1}},
                       {MIN_ALIGNMENT_A, {4, 256}}, {MIN_ALIGNMENT_A + 1, {4, 256}},
                       {MIN_ALIGNMENT_A + 2, {4, 256}}, {MIN_ALIGNMENT_A + 3, {4, 256}},
                       {IMPL_MASK, {8, -1}}});
}

#define DESCRIPTOR(NAME)                                                                   \
  SIM_EXPORT int cublasLt##NAME##Destroy(Attributes* a) { return destroy(a); }             \
  SIM_EXPORT int cublasLt##NAME##SetAttribute(Attributes* a, int id, const void* buffer,   \
                                              size_t size) {                               \
    return a ? a->set(id, buffer, size) : CUBLAS_STATUS_INVALID_VALUE;                     \
  }                                                                                        \
  SIM_EXPORT int cublasLt##NAME##GetAttribute(const Attributes* a, int id, void* buffer,   \
                                              size_t size, size_t* written) {              \
    return a ? a->get(id, buffer, size, written) : CUBLAS_STATUS_INVALID_VALUE;            \
  }
DESCRIPTOR(MatmulDesc)
DESCRIPTOR(MatrixLayout)
DESCRIPTOR(MatmulPreference)

SIM_EXPORT int cublasLtMatmulAlgoGetHeuristic(Handle* h, const Attributes* desc,
                                              const Attributes* a, const Attributes* b,
                                              const Attributes* c, const Attributes* d,
                                              const Attributes* pref, int wanted,
                                              HeuristicResult* results, int* found) {
  if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!pref || wanted < 1 || !results || !found) return CUBLAS_STATUS_INVALID_VALUE;
  *found = 0;
  std::shared_ptr<Problem> p;
  Refusal refusal = make_problem(desc, a, b, c, d, &p);
  if (refusal.status) return refusal.status;
  auto promised = [&](int which, const Matrix& x) {
    return std::min(alignment((uint64_t)(*pref)[MIN_ALIGNMENT_A + which]),
                    alignment((uint64_t)x.ld * size_of(x.type)));
  };
  HeuristicResult& r = results[0];
  r = HeuristicResult();
  r.workspace = (uint64_t)(*pref)[MAX_WORKSPACE] >= WORKSPACE ? WORKSPACE : 0;
  uint64_t alignments = packed({promised(0, p->a), promised(1, p->b), promised(2, p->c),
                                promised(3, p->d), alignment((uint64_t)p->bias),
                                alignment((uint64_t)p->aux)});
  r.algorithm = {MAGIC, p->hash(), r.workspace, alignments};
  r.waves = 1;
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

SIM_EXPORT int cublasLtMatmul(Handle* h, const Attributes* desc, const void* alpha, const void* A,
                              const Attributes* a, const void* B, const Attributes* b,
                              const void* beta, const void* C, const Attributes* c, void* D,
                              const Attributes* d, const Algorithm* algorithm, void* workspace,
                              size_t workspace_size, cudaStream_t stream) {
  if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
  int device = -1;
  if (cudaGetDevice(&device) != cudaSuccess || device != h->device)
    return refuse({CUBLAS_STATUS_INVALID_VALUE, "the handle is of another device"});
  std::shared_ptr<Problem> p;
  Refusal refusal = make_problem(desc, a, b, c, d, &p);
  if (refusal.status) return refuse(refusal);
  if (!alpha || !beta || !A || !B || !D)
    return refuse({CUBLAS_STATUS_INVALID_VALUE, "a pointer is NULL"});
  if (p->uses_bias() && !p->bias)
    return refuse({CUBLAS_STATUS_INVALID_VALUE, "the epilogue needs BIAS_POINTER"});
  if (p->epilogue & AUX && !p->aux)
    return refuse({CUBLAS_STATUS_INVALID_VALUE, "the epilogue needs EPILOGUE_AUX_POINTER"});
  if (C == D && (p->c.ld != p->d.ld || p->c.order != p->d.order || p->c.offset != p->d.offset))
    return refuse({CUBLAS_STATUS_INVALID_VALUE, "C is D in another layout"});

  // Alignments: of an element always, and what the algorithm was promised.
  const void* pointers[] = {A, B, C, D, p->uses_bias() ? p->bias : nullptr,
                            p->epilogue & AUX ? p->aux : nullptr};
  size_t element[] = {size_of(p->a.type), size_of(p->b.type), size_of(p->c.type),
                      size_of(p->d.type), size_of(p->bias_type),
                      p->bitmask() ? 16 : size_of(p->d.type)};
  for (int i = 0; i < 6; i++) {
    size_t needed = element[i];
    if (algorithm)
      needed = std::max(needed, (size_t)1 << (algorithm->alignments >> 4 * i & 15));
    if ((uintptr_t)pointers[i] % needed)
      return refuse({CUBLAS_STATUS_INVALID_VALUE,
                     "a pointer is not aligned as the algorithm was promised"});
  }
  size_t scratch = 0;
  if (algorithm) {
    if (algorithm->magic != MAGIC || algorithm->problem != p->hash())
      return refuse({CUBLAS_STATUS_NOT_SUPPORTED, "the algorithm is for another problem"});
    scratch = algorithm->workspace;
    if (scratch && (!workspace || workspace_size < scratch || (uintptr_t)workspace % 16))
      return refuse({CUBLAS_STATUS_INVALID_VALUE,
                     "the workspace is missing, too small or not aligned to 16 bytes"});
  }

  auto go = [&](auto zero) -> int {
    typedef decltype(zero) T;
    bool on_device = p->device_scalars;
    T x = on_device ? T() : load<T>(alpha, 0, p->scale_type);
    T y = on_device ? T() : load<T>(beta, 0, p->scale_type);
    if (!C && (on_device || y != 0))
      return refuse({CUBLAS_STATUS_INVALID_VALUE, "C is NULL and beta may not be 0"});
    int error = sim::submit_library(stream, "cublasLtMatmul", [=] {
      memset(workspace, 0xFF, scratch);  // whoever else uses it now will notice
      run<T>(*p, on_device ? load<T>(alpha, 0, p->scale_type) : x,
             on_device ? load<T>(beta, 0, p->scale_type) : y, A, B, C, D);
    });
    return error ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
  };
  return (p->compute & ~1) == COMPUTE_64F ? go(0.0) : go(0.0f);
}
