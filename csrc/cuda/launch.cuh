// Launching: one place that knows the attribute of a dependent launch.
#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include "lora_work.h"

namespace openlora {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int processor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Dependent launches exist from compute capability 9.0 on.
inline bool is_hopper() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

struct Shape {
  int blocks;
  int threads;
  int shared_bytes = 0;
};

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Shape& shape, Follow follow, cudaStream_t stream, Args&&... args) {
  if (shape.shared_bytes > 0) {
    cudaFuncAttributes found;  // what the kernel declares counts too: 48 KB of both together need no permission
    cudaError_t error = cudaFuncGetAttributes(&found, kernel);
    if (error == cudaSuccess && found.sharedSizeBytes + shape.shared_bytes > 48 * 1024)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = is_hopper() && follow != Follow::kPlain ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

}  // namespace openlora
