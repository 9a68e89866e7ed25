// The part of the CUDA runtime that generated modules use, on the driver's API: 15 kB in place of the 700 kB of
// libcudart_static, and nothing that must agree with the runtime which torch has loaded. Compiled once per module, as a
// translation unit of its own, with hidden visibility, so that no module and no libcudart sees another's functions.
//
// What nvcc's host code and the templates call is here under the runtime's names; a function that is not here fails at
// link time, and the module is then linked with libcudart_static instead. Numbers of errors, attributes and flags are the
// same in both APIs. No CUDA header is included: types are as the driver's ABI has them.
#pragma once
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>

// glibc 2.34 gave these two a new version and kept the old: with the old one a module loads on older systems too.
#if defined(__x86_64__) && defined(__GLIBC__)
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
#endif

#pragma GCC visibility push(hidden)
namespace jg_runtime {

struct Dim3 { unsigned x, y, z; };

constexpr int kErrorInvalidConfiguration = 9, kErrorNoDriver = 35, kErrorNoKernel = 98;
constexpr int kCaptureRelaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED: loading is no part of a captured graph

// ---- the driver ----
// Functions are found by name on first use; all of them exist since driver 525 (CUDA 12.0).
inline void* driver() {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  return library;
}

inline thread_local int last_error = 0;
inline int report(int error) { return error ? last_error = error : 0; }

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

inline Driver<unsigned> cuInit{"cuInit"};
inline Driver<void**> cuCtxGetCurrent{"cuCtxGetCurrent"};
inline Driver<void*> cuCtxSetCurrent{"cuCtxSetCurrent"};
inline Driver<int*> cuCtxGetDevice{"cuCtxGetDevice"};
inline Driver<void**, int> cuDevicePrimaryCtxRetain{"cuDevicePrimaryCtxRetain"};

// Makes a context current as the runtime does: the thread's own, else the first device's primary one.
inline int ensure_context() {
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
// Registered by constructors, loaded on first use: importing a module must not touch a device.
struct Binary { const void* data; void* library; };
struct Kernel { Binary* binary; const void* host; const char* name; void* handle; };

constexpr int kMaxBinaries = 8, kMaxKernels = 256;
inline Binary binaries[kMaxBinaries];
inline Kernel kernels[kMaxKernels];
inline int num_binaries = 0, num_kernels = 0;
inline pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;

inline Kernel* find_kernel(const void* host) {
  for (int i = 0; i < num_kernels; ++i)
    if (kernels[i].host == host) return &kernels[i];
  return nullptr;
}

inline int load_locked(Kernel& kernel) {
  static Driver<void**, const void*, int*, void**, unsigned, int*, void**, unsigned> cuLibraryLoadData{"cuLibraryLoadData"};
  static Driver<void**, void*, const char*> cuLibraryGetKernel{"cuLibraryGetKernel"};
  static Driver<int*> cuThreadExchangeStreamCaptureMode{"cuThreadExchangeStreamCaptureMode"};
  Binary& binary = *kernel.binary;
  int mode = kCaptureRelaxed;
  int error = cuThreadExchangeStreamCaptureMode(&mode);
  if (error) return error;
  void *library = nullptr, *handle = nullptr;
  if (!binary.library) error = cuLibraryLoadData(&library, binary.data, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (!error && library) binary.library = library;
  if (!error) error = cuLibraryGetKernel(&handle, binary.library, kernel.name);
  if (!error) __atomic_store_n(&kernel.handle, handle, __ATOMIC_RELEASE);
  cuThreadExchangeStreamCaptureMode(&mode);
  return error;
}

// The driver's handle of a kernel, with a context current. A failure is not remembered: the next call tries again.
inline int resolve(Kernel* kernel, void** handle) {
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

inline int launch(Kernel* kernel, Dim3 grid, Dim3 block, void** args, size_t shared_bytes, void* stream) {
  static Driver<void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**>
      cuLaunchKernel{"cuLaunchKernel"};
  void* handle = nullptr;
  const int error = resolve(kernel, &handle);
  if (error) return report(error);
  return report(cuLaunchKernel(handle, grid.x, grid.y, grid.z, block.x, block.y, block.z, static_cast<unsigned>(shared_bytes),
                               stream, args, nullptr));
}

// cudaLaunchConfig_t and CUlaunchConfig; their attributes have one layout.
struct RuntimeConfig { Dim3 grid, block; size_t shared_bytes; void* stream; void* attributes; unsigned num_attributes; };
struct DriverConfig { Dim3 grid, block; unsigned shared_bytes; void* stream; void* attributes; unsigned num_attributes; };

struct Configuration { Dim3 grid, block; size_t shared_bytes; void* stream; };
inline thread_local Configuration pushed;

}  // namespace jg_runtime

extern "C" {
using namespace jg_runtime;

// ---- what nvcc's host code calls ----
void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper { int magic, version; const void* data; void* more; };
  if (num_binaries == kMaxBinaries) __builtin_trap();
  Binary* binary = &binaries[num_binaries++];
  binary->data = static_cast<Wrapper*>(wrapper)->data;
  return reinterpret_cast<void**>(binary);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}  // the process ends: the driver may be gone already
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}  // no host code names a device variable
void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  if (num_kernels == kMaxKernels) __builtin_trap();
  kernels[num_kernels++] = {reinterpret_cast<Binary*>(binary), host, name, nullptr};
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes, void* stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared_bytes, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared_bytes = pushed.shared_bytes;
  *static_cast<void**>(stream) = pushed.stream;
  return 0;
}
int __cudaGetKernel(void** handle, const void* host) {  // nvcc 13 keeps what this gives, even after a failure
  *handle = find_kernel(host);
  return *handle ? 0 : report(kErrorNoKernel);
}
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared_bytes, void* stream) {
  return launch(static_cast<Kernel*>(kernel), grid, block, args, shared_bytes, stream);
}

// ---- what the templates call ----
int cudaLaunchKernel(const void* host, Dim3 grid, Dim3 block, void** args, size_t shared_bytes, void* stream) {
  return launch(find_kernel(host), grid, block, args, shared_bytes, stream);
}
int cudaLaunchKernelExC(const RuntimeConfig* c, const void* host, void** args) {
  static Driver<const DriverConfig*, void*, void**, void**> cuLaunchKernelEx{"cuLaunchKernelEx"};
  void* handle = nullptr;
  const int error = resolve(find_kernel(host), &handle);
  if (error) return report(error);
  const DriverConfig config = {c->grid,   c->block,      static_cast<unsigned>(c->shared_bytes),
                               c->stream, c->attributes, c->num_attributes};
  return report(cuLaunchKernelEx(&config, handle, args, nullptr));
}
int cudaGetDevice(int* device) {
  const int error = ensure_context();
  return report(error ? error : cuCtxGetDevice(device));
}
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  static Driver<int*, int, int> cuDeviceGetAttribute{"cuDeviceGetAttribute"};
  const int error = ensure_context();
  return report(error ? error : cuDeviceGetAttribute(value, attribute, device));
}
int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  static Driver<int, int, void*, int> cuKernelSetAttribute{"cuKernelSetAttribute"};
  void* handle = nullptr;
  int device = 0;
  int error = resolve(find_kernel(host), &handle);
  if (!error) error = cuCtxGetDevice(&device);
  return report(error ? error : cuKernelSetAttribute(attribute, value, handle, device));
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads, size_t bytes, unsigned flags) {
  static Driver<int*, void*, int, size_t, unsigned> occupancy{"cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags"};
  void* handle = nullptr;
  const int error = resolve(find_kernel(host), &handle);
  return report(error ? error : occupancy(blocks, handle, threads, bytes, flags));
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int threads, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared_bytes, 0);
}
int cudaMemsetAsync(void* pointer, int value, size_t bytes, void* stream) {
  static Driver<void*, unsigned char, size_t, void*> cuMemsetD8Async{"cuMemsetD8Async"};
  const int error = ensure_context();
  return report(error ? error : cuMemsetD8Async(pointer, static_cast<unsigned char>(value), bytes, stream));
}
int cudaStreamIsCapturing(void* stream, int* status) {
  static Driver<void*, int*> cuStreamIsCapturing{"cuStreamIsCapturing"};
  const int error = ensure_context();
  return report(error ? error : cuStreamIsCapturing(stream, status));
}
int cudaStreamGetId(void* stream, unsigned long long* id) {
  static Driver<void*, unsigned long long*> cuStreamGetId{"cuStreamGetId"};
  const int error = ensure_context();
  return report(error ? error : cuStreamGetId(stream, id));
}
int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long flags, int* found) {
  static Driver<const char*, void**, int, unsigned long long, int*> cuGetProcAddress{"cuGetProcAddress_v2"};
  int result = 0;
  const int error = cuGetProcAddress(name, function, static_cast<int>(version), flags, &result);
  if (found) *found = result;
  return report(error);
}
int cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags, int* found) {
  return cudaGetDriverEntryPointByVersion(name, function, 12000, flags, found);
}
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
int cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(int code) {
  static Driver<int, const char**> cuGetErrorString{"cuGetErrorString"};
  const char* text = nullptr;
  if (code == 0) return "no error";
  if (code == kErrorInvalidConfiguration) return "invalid launch configuration";
  if (code == kErrorNoDriver) return "libcuda.so.1 is missing or older than CUDA 12.0. Update the NVIDIA driver.";
  if (code == kErrorNoKernel) return "the module has no such kernel";
  return cuGetErrorString(code, &text) == 0 && text ? text : "unknown CUDA error";
}
}
#pragma GCC visibility pop
