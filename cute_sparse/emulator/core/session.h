// What stands between the CUDA symbols (shim.cpp), the Python side (c_api.cpp) and the machine: the programs that
// are known, the libraries and kernels that the DSL has loaded, the launches, and the last error of each thread.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "error.h"
#include "machine.h"
#include "replay.h"

namespace emu {

// CUDA's numbers that this device answers with.
constexpr int CUDA_SUCCESS_CODE = 0;
constexpr int CUDA_INVALID_VALUE = 1;       // cudaErrorInvalidValue
constexpr int CUDA_LAUNCH_FAILURE = 719;    // cudaErrorLaunchFailure

constexpr uint32_t MAX_SHARED_BYTES = 232448;        // per CTA with opt-in: 227 KB on sm_90 and sm_100
constexpr uint32_t DEFAULT_SHARED_BYTES = 49152;     // per CTA without opt-in
constexpr uint32_t MAX_CLUSTER_CTAS = 16;            // with the non-portable attribute
constexpr uint32_t MAX_PORTABLE_CLUSTER_CTAS = 8;

// A cubin that the DSL has made, and the PTX it was made from.
struct KnownProgram {
  std::string cubin;
  std::string ptx;
  std::shared_ptr<Module> module;  // parsed when a library with this cubin is loaded
  std::string parsed_for;          // the arch it was parsed for
};

struct Library;

struct Kernel {
  Library* library = nullptr;
  std::string name;
  uint32_t max_dynamic_shared_bytes = DEFAULT_SHARED_BYTES;
  bool non_portable_cluster = false;
};

struct Library {
  std::shared_ptr<KnownProgram> program;
  std::unordered_map<std::string, std::unique_ptr<Kernel>> kernels;
};

// As cudaLaunchKernelEx receives it.
struct LaunchAttribute {
  int32_t id;
  int32_t padding;
  union {
    uint8_t bytes[64];
    uint32_t dim[3];
  } value;
};
static_assert(sizeof(LaunchAttribute) == 72, "cudaLaunchAttribute");

struct CudaLaunchConfig {
  uint32_t grid[3], block[3];
  uint64_t dynamic_shared_bytes;
  void* stream;
  const LaunchAttribute* attributes;
  uint32_t attribute_count;
};

class Session {
 public:
  static Session& get();

  Device device;
  bool entered = false;  // inside `with emulator.device(...)`

  // Adds a program; the same cubin again replaces the PTX, also for libraries that are already loaded.
  void add_program(std::string cubin, std::string ptx);

  Library* load_library(const void* image);
  void unload_library(Library* library);
  Kernel* find_kernel(Library* library, const std::string& name);
  uint32_t static_shared_bytes(const Kernel& kernel);
  void launch(const CudaLaunchConfig& config, Kernel& kernel, void** arguments);
  int device_attribute(int attribute) const;

  bool records = false;  // keep the last launch for replay
  Recording recording;
  std::vector<std::string> launches;  // of this device, each as JSON (see c_api.h)

  // Runs `work`; an EmulatorError becomes this thread's pending error and a CUDA status.
  template <class Work>
  int guarded(Work work) {
    try {
      std::lock_guard<std::recursive_mutex> lock(mutex_);
      work();
      return CUDA_SUCCESS_CODE;
    } catch (const EmulatorError& error) {
      set_error(error);
    } catch (const std::exception& error) {
      set_error(EmulatorError(ErrorKind::trap, std::string("the emulator itself failed: ") + error.what()));
    }
    return CUDA_LAUNCH_FAILURE;
  }
  void set_error(const EmulatorError& error);
  std::optional<EmulatorError> take_error();  // this thread's, which is then forgotten

 private:
  std::recursive_mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<KnownProgram>> programs_;  // by cubin
  std::unordered_map<Library*, std::unique_ptr<Library>> libraries_;

  std::vector<std::shared_ptr<Module>> retired_;

  void require_entered() const;
  void forget_module(KnownProgram& program);
  std::shared_ptr<Module> module_of(KnownProgram& program);
};

std::string launch_as_json(const LaunchRecord& record);
char* owned_by_caller(const std::string& text);  // c_api.cpp: a copy that emulator_free frees
std::string error_as_json(const EmulatorError& error);

}  // namespace emu
