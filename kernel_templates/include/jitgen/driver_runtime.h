// The part of the CUDA runtime that launchers use, on the driver's API: 15 kB in place of the 700 kB of libcudart_static, and
// nothing that must agree with the runtime which torch has loaded. It stands in front of the host's part of a module (see
// jitgen/host_part.py) in place of CUDA's headers, which take a compiler longer than all the rest.
// What it has of the runtime is declared in cuda_api.h.
#pragma once
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <typeinfo>

// glibc 2.34 gave these two a new version and kept the old: with the old one a module loads on older systems too.
#if defined(__x86_64__) && defined(__GLIBC__)
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
#endif

#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#include "jitgen/cuda_api.h"

// The device code of the module: what nvcc made, unchanged.
extern "C" __attribute__((visibility("hidden"))) const char jitgen_binary[];

namespace jg_runtime {
namespace {

constexpr int kErrorNoDriver = 35, kErrorNoKernel = 98;
constexpr int kCaptureRelaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED: loading is no part of a captured graph

// ---- the driver ----
// Functions are found by name on first use; all of them exist since driver 525 (CUDA 12.0).
void* driver() {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  return library;
}

thread_local int last_error = 0;
cudaError_t report(int error) { return static_cast<cudaError_t>(error ? last_error = error : 0); }

template <class... Args> struct Driver {
  const char* name;
  void* found = nullptr;

  int operator()(Args... args) {
    void* function = __atomic_load_n(&found, __ATOMIC_ACQUIRE);
    if (!function) {
      function = driver() ? dlsym(driver(), name) : nullptr;
      if (!function) return kErrorNoDriver;
      __atomic_store_n(&found, function, __ATOMIC_RELEASE);
    }
    return reinterpret_cast<int (*)(Args...)>(function)(args...);
  }
};

Driver<int*> cuCtxGetDevice{"cuCtxGetDevice"};

// Makes a context current as the runtime does: the thread's own, else the first device's primary one.
int ensure_context() {
  static Driver<unsigned> cuInit{"cuInit"};
  static Driver<void**> cuCtxGetCurrent{"cuCtxGetCurrent"};
  static Driver<void*> cuCtxSetCurrent{"cuCtxSetCurrent"};
  static Driver<void**, int> cuDevicePrimaryCtxRetain{"cuDevicePrimaryCtxRetain"};
  void* context = nullptr;
  int error = cuCtxGetCurrent(&context);
  if (error == 3) {  // CUDA_ERROR_NOT_INITIALIZED
    error = cuInit(0);
    if (!error) error = cuCtxGetCurrent(&context);
  }
  if (error || context) return error;
  error = cuDevicePrimaryCtxRetain(&context, 0);
  return error ? error : cuCtxSetCurrent(context);
}

// ---- kernels of this module ----
// Listed by constructors, loaded on first use: opening a module must not touch a device. On the host a kernel is a function
// that does nothing, and its address stands for it.
struct Here {};  // known to no other module; its name closes that of a kernel's type, which so is no symbol for others
struct Kernel {
  const void* host;
  const char *name, *type;
  void* handle = nullptr;
  Kernel* next;

  inline static Kernel* first = nullptr;
  template <class... Args>
  Kernel(const char* name, void (*kernel)(Args...))
      : host(reinterpret_cast<const void*>(kernel)), name(name), type(typeid(void(Args..., Here)).name()), next(first) {
    first = this;
  }
};
#define JITGEN_KERNEL(name) static jg_runtime::Kernel name##_entry(#name, name);

pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
void* library = nullptr;

Kernel* find_kernel(const void* host) {
  Kernel* kernel = Kernel::first;
  while (kernel && kernel->host != host) kernel = kernel->next;
  return kernel;
}

// The name that compilers give the kernel: _Z, its own with the length, its parameters. Those are in its type, which is F v,
// the parameters, Here, E.
bool mangle(const Kernel& kernel, char (&out)[512]) {
  const size_t length = strlen(kernel.name), parameters = strlen(kernel.type) - strlen(typeid(Here).name()) - 3;
  if (length + parameters > sizeof(out) - 16) return false;
  snprintf(out, sizeof(out), "_Z%zu%s%.*s", length, kernel.name, static_cast<int>(parameters), kernel.type + 2);
  return true;
}

int load_locked(Kernel& kernel) {
  static Driver<void**, const void*, int*, void**, unsigned, int*, void**, unsigned> cuLibraryLoadData{"cuLibraryLoadData"};
  static Driver<void**, void*, const char*> cuLibraryGetKernel{"cuLibraryGetKernel"};
  static Driver<int*> cuThreadExchangeStreamCaptureMode{"cuThreadExchangeStreamCaptureMode"};
  char mangled[512];
  if (!mangle(kernel, mangled)) return kErrorNoKernel;
  int mode = kCaptureRelaxed;
  int error = cuThreadExchangeStreamCaptureMode(&mode);
  if (error) return error;
  void *loaded = nullptr, *handle = nullptr;
  if (!library) error = cuLibraryLoadData(&loaded, jitgen_binary, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (!error && loaded) library = loaded;
  if (!error) error = cuLibraryGetKernel(&handle, library, mangled);
  if (!error) __atomic_store_n(&kernel.handle, handle, __ATOMIC_RELEASE);
  cuThreadExchangeStreamCaptureMode(&mode);
  return error;
}

// The driver's handle of a kernel, with a context current. A failure is not remembered: the next call tries again.
int resolve(const void* host, void** handle) {
  Kernel* const kernel = find_kernel(host);
  if (!kernel) return kErrorNoKernel;
  int error = ensure_context();
  if (error) return error;
  *handle = __atomic_load_n(&kernel->handle, __ATOMIC_ACQUIRE);
  if (*handle) return 0;
  pthread_mutex_lock(&loading);
  if (!kernel->handle) error = load_locked(*kernel);
  pthread_mutex_unlock(&loading);
  *handle = kernel->handle;
  return error;
}

template <class... Args> const void* address_of(void (*kernel)(Args...)) { return reinterpret_cast<const void*>(kernel); }
const void* address_of(const void* kernel) { return kernel; }

// ---- kernel<<<grid, block, shared_bytes, stream>>>(args...) ----
template <class... Args> struct Configured {
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;

  cudaError_t operator()(const Args&... args) const {
    static Driver<void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**>
        cuLaunchKernel{"cuLaunchKernel"};
    void* handle = nullptr;
    const int error = resolve(kernel, &handle);
    if (error) return report(error);
    void* words[] = {const_cast<void*>(static_cast<const void*>(&args))...};
    return report(cuLaunchKernel(handle, grid.x, grid.y, grid.z, block.x, block.y, block.z, static_cast<unsigned>(shared_bytes),
                                 stream, words, nullptr));
  }
};
template <class... Args>
Configured<Args...> configure(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared_bytes = 0,
                              cudaStream_t stream = nullptr) {
  return {address_of(kernel), grid, block, shared_bytes, stream};
}

}  // namespace
}  // namespace jg_runtime

// ---- functions of the runtime ----
namespace {

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void** args) {
  struct DriverConfig {
    dim3 grid, block;
    unsigned shared_bytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attributes;
    unsigned num_attributes;
  };
  static jg_runtime::Driver<const DriverConfig*, void*, void**, void**> cuLaunchKernelEx{"cuLaunchKernelEx"};
  void* handle = nullptr;
  const int error = jg_runtime::resolve(kernel, &handle);
  if (error) return jg_runtime::report(error);
  const DriverConfig config = {c->gridDim, c->blockDim, static_cast<unsigned>(c->dynamicSmemBytes),
                               c->stream,  c->attrs,    c->numAttrs};
  return jg_runtime::report(cuLaunchKernelEx(&config, handle, args, nullptr));
}
template <class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args...),
                               const typename jg_runtime::Exactly<Args>::Type&... args) {
  void* words[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  return cudaLaunchKernelExC(config, jg_runtime::address_of(kernel), words);
}
cudaError_t cudaGetDevice(int* device) {
  const int error = jg_runtime::ensure_context();
  return jg_runtime::report(error ? error : jg_runtime::cuCtxGetDevice(device));
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  static jg_runtime::Driver<int*, int, int> cuDeviceGetAttribute{"cuDeviceGetAttribute"};
  const int error = jg_runtime::ensure_context();
  return jg_runtime::report(error ? error : cuDeviceGetAttribute(value, attribute, device));
}
template <class Host> cudaError_t cudaFuncSetAttribute(Host kernel, cudaFuncAttribute attribute, int value) {
  static jg_runtime::Driver<int, int, void*, int> cuKernelSetAttribute{"cuKernelSetAttribute"};
  void* handle = nullptr;
  int device = 0;
  int error = jg_runtime::resolve(jg_runtime::address_of(kernel), &handle);
  if (!error) error = jg_runtime::cuCtxGetDevice(&device);
  return jg_runtime::report(error ? error : cuKernelSetAttribute(attribute, value, handle, device));
}
template <class Host>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Host kernel, int threads, size_t shared_bytes) {
  static jg_runtime::Driver<int*, void*, int, size_t, unsigned> occupancy{
      "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags"};
  void* handle = nullptr;
  const int error = jg_runtime::resolve(jg_runtime::address_of(kernel), &handle);
  return jg_runtime::report(error ? error : occupancy(blocks, handle, threads, shared_bytes, 0));
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  static jg_runtime::Driver<void*, cudaStreamCaptureStatus*> cuStreamIsCapturing{"cuStreamIsCapturing"};
  const int error = jg_runtime::ensure_context();
  return jg_runtime::report(error ? error : cuStreamIsCapturing(stream, status));
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  static jg_runtime::Driver<void*, unsigned long long*> cuStreamGetId{"cuStreamGetId"};
  const int error = jg_runtime::ensure_context();
  return jg_runtime::report(error ? error : cuStreamGetId(stream, id));
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* found) {
  static jg_runtime::Driver<const char*, void**, int, unsigned long long, int*> cuGetProcAddress{"cuGetProcAddress_v2"};
  int result = 0;
  const int error = cuGetProcAddress(name, function, 12000, flags, &result);
  if (found) *found = static_cast<cudaDriverEntryPointQueryResult>(result);
  return jg_runtime::report(error);
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  static jg_runtime::Driver<void**, size_t> cuMemAlloc{"cuMemAlloc_v2"};
  const int error = jg_runtime::ensure_context();
  return jg_runtime::report(error ? error : cuMemAlloc(memory, bytes));
}
cudaError_t cudaFree(void* memory) {
  static jg_runtime::Driver<void*> cuMemFree{"cuMemFree_v2"};
  return jg_runtime::report(cuMemFree(memory));
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {   // the driver sees which way
  static jg_runtime::Driver<void*, const void*, size_t> cuMemcpy{"cuMemcpy"};
  return jg_runtime::report(cuMemcpy(to, from, bytes));
}
cudaError_t cudaGetLastError() {
  const int error = jg_runtime::last_error;
  jg_runtime::last_error = 0;
  return static_cast<cudaError_t>(error);
}
cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(jg_runtime::last_error); }
const char* cudaGetErrorString(cudaError_t code) {
  static jg_runtime::Driver<int, const char**> cuGetErrorString{"cuGetErrorString"};
  const int number = code;
  const char* text = nullptr;
  if (number == 0) return "no error";
  if (number == cudaErrorInvalidConfiguration) return "invalid launch configuration";
  if (number == jg_runtime::kErrorNoDriver) return "libcuda.so.1 is missing or older than CUDA 12.0. Update the NVIDIA driver.";
  if (number == jg_runtime::kErrorNoKernel) return "the module has no such kernel";
  return cuGetErrorString(number, &text) == 0 && text ? text : "unknown CUDA error";
}

}  // namespace
