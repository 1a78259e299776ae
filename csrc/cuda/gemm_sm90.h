// The skinny bf16 GEMM for Hopper: y = x W^T with 1 to 320 rows of x, where reading W is the whole cost.
//
// Shape letters: T rows of x (tokens), K inputs, N outputs, S planes. All matrices are row-major, elements adjacent.
// Semantics: planes[s, t, n] = sum of x[t, k] W[n, k] over the s-th range of k; their sum over s, in order, is x W^T.
// S and the ranges depend on (N, K) alone and every sum runs over k in the same order for every T, so the bits of a row do
// not depend on the batch it is in.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace openlora {

struct SkinnyGemmPlan;  // gemm_plan.h

enum class GemmOutput : int {
  kFloatPlanes = 0,  // [S, T, N] float32; every element is written, nothing has to be cleared first
  kBfloat16 = 1,     // [S, T, N] bfloat16, each plane rounded once
  kSiluMul = 2,      // [T, N / 2] bfloat16: silu(y[:, i]) * y[:, N / 2 + i], rounded once; where S is 1 and N a multiple of 16
  kLogits = 3,       // [T, N] float32 of the rows of x that want it, and each block's largest of every row; where S is 1
};

struct SkinnyGemmArgs {
  const void* x;     // [T, K] bfloat16, 16-byte aligned
  int64_t x_stride;  // elements from one row of x to the next, a multiple of 8, at least K
  const void* w;     // [N, K] bfloat16 as the checkpoint has it, contiguous, 16-byte aligned
  void* y;           // see GemmOutput, contiguous, 16-byte aligned
  GemmOutput output;
  int tokens;   // T
  int outputs;  // N
  int inputs;   // K
  // Programmatic dependent launch: start while the kernels before it still run and read the first blocks of W meanwhile.
  // W must not be written by a kernel still in flight; x and y may.
  bool use_pdl;
  // Of kLogits alone.
  const int32_t* wanted = nullptr;  // [T], not 0 where a row of y is to be written
  void* bests = nullptr;            // [T, skinny_gemm_parts] pairs of 8 bytes: the largest y of a part, its lowest column (int32)
};

// Whether the kernel computes this shape: T 1 to 320 (kLogits: to 256), K a multiple of 64, N of 8. Host arithmetic only; the caller
// checks that the device is of compute capability 9.0.
bool can_run_skinny_gemm(int64_t tokens, int64_t outputs, int64_t inputs);

// Whether it was also measured to be at least as fast as cuBLAS (csrc/README.md). Deterministic logits need the kernel even
// where it is not, because cuBLAS chooses its order of summation by T.
// has_adapters: the linear has a shrink, before or behind it.
bool is_skinny_gemm_faster(int64_t tokens, int64_t outputs, int64_t inputs, bool has_adapters);

// S of the planes for these outputs and inputs; 1 to 8, the same for every T and every device.
int skinny_gemm_planes(int64_t outputs, int64_t inputs);

// Parts of N whose largest y kLogits tells, the same for every T and device. A part with a NaN has a
// NaN; where the largest is not finite, its column means nothing.
int skinny_gemm_parts(int64_t outputs, int64_t inputs);

// Enqueues one kernel: no allocation, no synchronisation, capturable in a graph (the tensor maps are kernel parameters).
// Returns cudaErrorInvalidValue for a shape or alignment the kernel cannot do, cudaErrorNotSupported off Hopper.
cudaError_t launch_skinny_gemm(const SkinnyGemmArgs& args, cudaStream_t stream);

// The same cut as `plan` says: what measurements and tests call. `plan.planes` takes the place of skinny_gemm_planes.
cudaError_t launch_skinny_gemm_as(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan, cudaStream_t stream);

}  // namespace openlora
