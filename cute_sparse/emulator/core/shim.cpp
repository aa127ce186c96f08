// The CUDA runtime as CuTe-DSL's host code sees it. That code calls _cudaLaunchKernelEx and so on; before it is
// linked, host_code.py renames those that are defined here ("cuda" to "emul", "cu" to "em"), so that it does not
// matter which library the process has loaded first. The rest is libcute_dsl_runtime.so's.
// Signatures are those of the CUDA functions of the same name without the underscore.
#include <cstring>

#include "session.h"

using emu::Session;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int _emulGetDevice(int* device) { *device = 0; return emu::CUDA_SUCCESS_CODE; }
EXPORT int _emulGetDeviceCount(int* count) { *count = 1; return emu::CUDA_SUCCESS_CODE; }

EXPORT int _emulSetDevice(int device) {
  return Session::get().guarded([&] {
    if (device != 0)
      throw emu::EmulatorError(emu::ErrorKind::bad_launch,
                               "device " + std::to_string(device) + ": the emulator has one device, 0");
  });
}

EXPORT int _emulDeviceGetAttribute(int* value, int attribute, int) {
  return Session::get().guarded([&] { *value = Session::get().device_attribute(attribute); });
}

EXPORT int _emulLibraryLoadData(void** library, const void* image, void*, void*, unsigned, void*, void*, unsigned) {
  return Session::get().guarded([&] { *library = Session::get().load_library(image); });
}

EXPORT int _emulLibraryGetKernel(void** kernel, void* library, const char* name) {
  return Session::get().guarded(
      [&] { *kernel = Session::get().find_kernel(static_cast<emu::Library*>(library), name); });
}

EXPORT int _emulLibraryUnload(void* library) {
  return Session::get().guarded([&] { Session::get().unload_library(static_cast<emu::Library*>(library)); });
}

EXPORT int _emKernelGetAttribute(int* value, int attribute, void* kernel, int) {
  constexpr int SHARED_SIZE_BYTES = 1, MAX_THREADS_PER_BLOCK = 0;  // CUfunction_attribute
  return Session::get().guarded([&] {
    auto& k = *static_cast<emu::Kernel*>(kernel);
    if (attribute == SHARED_SIZE_BYTES) *value = int(Session::get().static_shared_bytes(k));
    else if (attribute == MAX_THREADS_PER_BLOCK) *value = 1024;
    else throw emu::EmulatorError(emu::ErrorKind::bad_launch, "reading kernel attribute " + std::to_string(attribute) +
                                                                  " is not modelled (0 and 1 are)");
  });
}

static int set_kernel_attribute(void* kernel, int attribute, int value) {
  // cudaFuncAttribute: 8 is the limit of dynamic shared memory, 9 the carve-out (speed only), 14 clusters above 8.
  constexpr int MAX_DYNAMIC_SHARED = 8, CARVEOUT = 9, NON_PORTABLE_CLUSTER = 14;
  return Session::get().guarded([&] {
    auto& k = *static_cast<emu::Kernel*>(kernel);
    if (attribute == MAX_DYNAMIC_SHARED) k.max_dynamic_shared_bytes = uint32_t(value);
    else if (attribute == NON_PORTABLE_CLUSTER) k.non_portable_cluster = value != 0;
    else if (attribute != CARVEOUT)
      throw emu::EmulatorError(emu::ErrorKind::bad_launch,
                               "kernel attribute " + std::to_string(attribute) + " is not modelled (8, 9 and 14 are)");
  });
}
EXPORT int _emulFuncSetAttribute(void* kernel, int attribute, int value) {
  return set_kernel_attribute(kernel, attribute, value);
}
EXPORT int _emulKernelSetAttributeForDevice(void* kernel, int attribute, int value, int) {
  return set_kernel_attribute(kernel, attribute, value);
}

// A launch runs to its end before the call returns: every stream is then in order, and nothing is left to wait for.
EXPORT int _emulLaunchKernelEx(const emu::CudaLaunchConfig* config, void* kernel, void** arguments) {
  return Session::get().guarded(
      [&] { Session::get().launch(*config, *static_cast<emu::Kernel*>(kernel), arguments); });
}
EXPORT int _emulStreamSynchronize(void*) { return emu::CUDA_SUCCESS_CODE; }
EXPORT int _emulDeviceSynchronize() { return emu::CUDA_SUCCESS_CODE; }

EXPORT int _emulMemsetAsync(void* address, int value, size_t bytes, void*) {
  return Session::get().guarded([&] {
    auto& memory = Session::get().device.memory;
    if (bytes && !memory.find(uint64_t(address), bytes))
      throw emu::EmulatorError(emu::ErrorKind::out_of_bounds,
                               "cudaMemsetAsync: " + memory.describe(uint64_t(address), bytes));
    std::memset(address, value, bytes);
  });
}

// TVM-FFI functions load their library on the first call: `init` loads it, `load_to_device` resolves its kernels,
// `report(kind, message)` raises in the caller.
EXPORT int emul_dialect_init_library_once(void** slot, int (*init)(void**), int (*load_to_device)(void**, int),
                                          void (*report)(char*, char*)) {
  static std::recursive_mutex once;
  std::lock_guard<std::recursive_mutex> lock(once);
  if (*slot) return 0;
  void* library = nullptr;
  int status = init(&library);
  if (!status && load_to_device) status = load_to_device(&library, 0);
  if (status) {
    char kind[] = "RuntimeError", message[] = "the emulated device could not load a kernel";
    report(kind, message);
    return -1;
  }
  *slot = library;
  return 0;
}

EXPORT void emul_dialect_unload_library_once(void** slot) {
  void* library = nullptr;
  std::swap(library, *slot);
  if (library) _emulLibraryUnload(library);
}
