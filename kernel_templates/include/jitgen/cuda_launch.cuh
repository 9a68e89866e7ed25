// Kernel launches with the attributes that <<<>>> cannot give.
#pragma once

namespace jg {

// Launches `kernel`. `early`: its CTAs may start while the kernel before it in the stream still runs, as soon as all CTAs of that one
// have called start_next_kernel() or ended; it then has to call wait_for_previous_kernel() before it reads what that one writes.
template <class... Parameters, class... Values>
inline cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void* stream, bool early, const Values&... values) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap, config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, values...);
}

}  // namespace jg
