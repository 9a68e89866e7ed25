// Host side of the sampling kernels: size of the teams, shared memory, the launch.
#pragma once

#include "jitgen/sampling_team.cuh"

// Unnamed, because statics of inline functions are otherwise one object for all modules that a process has loaded.
namespace jg {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kSliceUnit = 64;   // values; keeps groups of the widest load whole

// Dynamic shared memory a CTA of the kernel may have on this device, found out and asked for once per device.
template <class Kernel> cudaError_t shared_limit(Kernel kernel, int& limit) {
  static int known[kMaxDevices];   // two threads may both set it, to the same value
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  limit = device < kMaxDevices ? __atomic_load_n(&known[device], __ATOMIC_ACQUIRE) : 0;
  if (limit > 0) return cudaSuccess;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  limit -= static_cast<int>(sizeof(TeamShared)) + 1024;   // 1024: what else a kernel may have
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error == cudaSuccess && device < kMaxDevices) __atomic_store_n(&known[device], limit, __ATOMIC_RELEASE);
  return error;
}

// One team of `team` CTAs for each row. With `hold` every CTA keeps as much of its slice as fits.
template <class Args>
cudaError_t launch_teams(void (*kernel)(Args, int, int), const Args& args, int team, bool hold, int64_t rows, int64_t vocab,
                         int64_t stream) {
  if (rows <= 0 || vocab <= 0) return cudaSuccess;
  if (rows * team > 0x7fffffff) return cudaErrorInvalidConfiguration;
  int limit = 0;
  const cudaError_t error = shared_limit(kernel, limit);
  if (error != cudaSuccess) return error;
  const int64_t unit = int64_t{team} * kSliceUnit;
  int slice = static_cast<int>((vocab + unit - 1) / unit * kSliceUnit);
  int held = !hold ? 0 : slice * 4 <= limit ? slice : limit / (4 * kSliceUnit) * kSliceUnit;
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
