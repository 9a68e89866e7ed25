// Host side of the sampling kernels: size of the teams, shared memory, the launch.
#pragma once

#include "jitgen/sampling_ranked.cuh"

// Unnamed, because statics of inline functions are otherwise one object for all modules that a process has loaded.
namespace jg {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kSliceUnit = 64;   // values; keeps groups of the widest load whole
constexpr int kCtasPerProcessor = 2;

// Dynamic shared memory a CTA of the kernel may have, and multiprocessors: found out, and asked for if the kernel
// holds rows, once per device.
struct Limits { int shared_bytes, processors; };
template <class Kernel> cudaError_t find_limits(Kernel kernel, bool holds, Limits& limits) {
  static Limits known[kMaxDevices];   // two threads may both set it, to the same values
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const bool kept = device < kMaxDevices;
  if (kept && __atomic_load_n(&known[device].shared_bytes, __ATOMIC_ACQUIRE) > 0) {
    limits = known[device];
    return cudaSuccess;
  }
  error = cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  limits.shared_bytes -= static_cast<int>(sizeof(TeamShared) + sizeof(RankedShared)) + 1024;   // 1024: what else a kernel may have
  if (holds) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes);
  if (error != cudaSuccess || !kept) return error;
  known[device].processors = limits.processors;
  __atomic_store_n(&known[device].shared_bytes, limits.shared_bytes, __ATOMIC_RELEASE);
  return cudaSuccess;
}

enum class Use { kHold, kStream, kOnce };   // of a row: kept on chip, streamed by as few CTAs as fill the device, visited once

// A team for each row, which is cut into `slices`.
template <class Args>
cudaError_t launch_teams(void (*kernel)(Args, int, int), const Args& args, int slices, Use use, int64_t rows, int64_t vocab,
                         int64_t stream) {
  if (rows <= 0 || vocab <= 0) return cudaSuccess;
  Limits limits;
  const cudaError_t error = find_limits(kernel, use == Use::kHold, limits);
  if (error != cudaSuccess) return error;
  int team = slices;
  while (use == Use::kStream && team > 1 && rows * team > kCtasPerProcessor * limits.processors) team /= 2;
  if (rows * team > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const int64_t unit = int64_t{slices} * kSliceUnit;
  int slice = static_cast<int>((vocab + unit - 1) / unit * kSliceUnit);
  const int most = limits.shared_bytes / (4 * kSliceUnit) * kSliceUnit;
  int held = use != Use::kHold ? 0 : slice < most ? slice : most;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(team);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(rows * team));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(held) * 4;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = team > 1 ? 1 : 0;
  Args copy = args;
  void* parameters[] = {&copy, &slice, &held};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters);
}

}  // namespace
}  // namespace jg
