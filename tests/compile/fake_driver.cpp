// A libcuda.so.1 for machines without a GPU: does nothing, and prints each call that matters. See test_driver_runtime.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>

static bool initialised = false;
static void* current = nullptr;
static int context, library, kernel;

static int refuse(const char* name) {  // FAIL names a function that fails
  const char* failing = getenv("FAIL");
  return failing && !strcmp(failing, name) ? 2 : 0;
}

extern "C" {
int cuInit(unsigned) { puts("cuInit"); initialised = true; return 0; }
int cuCtxGetCurrent(void** c) { *c = current; return initialised ? 0 : 3; }
int cuCtxSetCurrent(void* c) { puts("cuCtxSetCurrent"); current = c; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return current ? 0 : 201; }
int cuDevicePrimaryCtxRetain(void** c, int device) { printf("cuDevicePrimaryCtxRetain %d\n", device); *c = &context; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = attribute == 16 ? 132 : 1; return 0; }
int cuThreadExchangeStreamCaptureMode(int* mode) { printf("mode %d\n", *mode); *mode = 0; return 0; }
int cuLibraryLoadData(void** handle, const void* data, int*, void**, unsigned, int*, void**, unsigned) {
  printf("cuLibraryLoadData %08x\n", *static_cast<const unsigned*>(data));
  *handle = &library;
  return refuse("cuLibraryLoadData");
}
int cuLibraryGetKernel(void** handle, void* from, const char* name) {
  printf("cuLibraryGetKernel %d %s\n", from == &library, name);
  *handle = &kernel;
  return 0;
}
int cuKernelSetAttribute(int attribute, int value, void* handle, int device) {
  printf("cuKernelSetAttribute %d %d %d %d\n", attribute, value, handle == &kernel, device);
  return 0;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned bytes,
                   void* stream, void** args, void**) {
  // the first parameter of the sm80 kernel is struct Args, whose 9th field is the batch size
  printf("cuLaunchKernel %d %u,%u,%u %u,%u,%u %u %p %lld\n", f == &kernel, gx, gy, gz, bx, by, bz, bytes, stream,
         static_cast<long long*>(args[0])[8]);
  return refuse("cuLaunchKernel");
}
int cuStreamIsCapturing(void*, int* status) { *status = 0; return 0; }
int cuStreamGetId(void*, unsigned long long* id) { *id = 7; return 0; }
int cuGetErrorString(int code, const char** text) { *text = code == 2 ? "out of memory" : nullptr; return *text ? 0 : 1; }
int encode(void*, int, unsigned, void*, const void*, const void*, const void*, const void*, int, int, int, int) { puts("encode"); return 0; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long, int* result) {
  printf("cuGetProcAddress %s %d\n", name, version);
  *function = reinterpret_cast<void*>(encode);
  *result = 0;
  return 0;
}
}
