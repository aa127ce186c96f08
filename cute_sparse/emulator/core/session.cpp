#include "session.h"

#include <algorithm>
#include <cstring>

namespace emu {

namespace {

// Images that cudaLibraryLoadData receives.
constexpr uint32_t FATBIN_MAGIC = 0xBA55ED50;          // header: magic, u16 version, u16 header bytes, u64 bytes
constexpr uint32_t FATBIN_WRAPPER_MAGIC = 0x466243B1;  // magic, version, pointer to the fatbin
constexpr uint32_t ELF_MAGIC = 0x464C457F;

template <class T>
T read_at(const void* base, size_t offset) {
  T value;
  std::memcpy(&value, static_cast<const char*>(base) + offset, sizeof(T));
  return value;
}

uint64_t elf_bytes(const void* image) {  // an ELF64 file ends with its section or program headers, or before
  auto table_end = [&](size_t offset_at, size_t entry_bytes_at, size_t entries_at) {
    return read_at<uint64_t>(image, offset_at) +
           uint64_t(read_at<uint16_t>(image, entry_bytes_at)) * read_at<uint16_t>(image, entries_at);
  };
  return std::max(table_end(32, 54, 56), table_end(40, 58, 60));
}

std::pair<const char*, uint64_t> image_extent(const void* image) {
  uint32_t magic = read_at<uint32_t>(image, 0);
  if (magic == FATBIN_WRAPPER_MAGIC) return image_extent(read_at<const void*>(image, 8));
  auto* bytes = static_cast<const char*>(image);
  if (magic == FATBIN_MAGIC) return {bytes, read_at<uint16_t>(image, 6) + read_at<uint64_t>(image, 8)};
  if (magic == ELF_MAGIC) return {bytes, elf_bytes(image)};
  throw EmulatorError(ErrorKind::bad_launch, "a loaded library is neither a fatbin nor a cubin");
}

std::string dims(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

[[noreturn]] void refuse(const std::string& kernel, const std::string& why) {
  Site site;
  site.kernel = kernel;
  throw EmulatorError(ErrorKind::bad_launch, why, site);
}

// cudaLaunchAttributeID: what each one means to a device that runs one launch after another.
enum Attribute : int {
  IGNORE = 0, COOPERATIVE = 2, SYNCHRONIZATION_POLICY = 3, CLUSTER_DIMENSION = 4, CLUSTER_SCHEDULING = 5,
  PROGRAMMATIC_STREAM_SERIALIZATION = 6, PRIORITY = 8, MEM_SYNC_DOMAIN_MAP = 9, MEM_SYNC_DOMAIN = 10,
  PREFERRED_SHARED_MEMORY_CARVEOUT = 14,
};

Dim3 cluster_of(const CudaLaunchConfig& config, const std::string& kernel) {
  Dim3 cluster;
  for (uint32_t i = 0; i < config.attribute_count; ++i) {
    const LaunchAttribute& attribute = config.attributes[i];
    switch (attribute.id) {
      case CLUSTER_DIMENSION:
        cluster = {attribute.value.dim[0], attribute.value.dim[1], attribute.value.dim[2]};
        break;
      // These change when or where CTAs run, which is the emulator's own choice, not what they compute.
      case IGNORE: case COOPERATIVE: case SYNCHRONIZATION_POLICY: case CLUSTER_SCHEDULING:
      case PROGRAMMATIC_STREAM_SERIALIZATION: case PRIORITY: case MEM_SYNC_DOMAIN_MAP: case MEM_SYNC_DOMAIN:
      case PREFERRED_SHARED_MEMORY_CARVEOUT:
        break;
      default:
        refuse(kernel, "launch attribute " + std::to_string(attribute.id) +
                           " is not modelled (0, 2 to 6, 8 to 10 and 14 are)");
    }
  }
  return cluster;
}

// CUDA C programming guide, "Technical Specifications per Compute Capability" (9.0 and 10.0).
void check_dimensions(const LaunchConfig& config, const Kernel& kernel) {
  const Dim3 &grid = config.grid, &block = config.block, &cluster = config.cluster;
  if (!grid.count() || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    refuse(kernel.name, "grid " + dims(grid) + " is empty or above (2147483647, 65535, 65535)");
  if (!block.count() || block.count() > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64)
    refuse(kernel.name, "block " + dims(block) + " is empty or above 1024 threads or (1024, 1024, 64)");
  uint32_t most = kernel.non_portable_cluster ? MAX_CLUSTER_CTAS : MAX_PORTABLE_CLUSTER_CTAS;
  if (!cluster.count() || cluster.count() > most)
    refuse(kernel.name, "cluster " + dims(cluster) + " is impossible: 1 to " + std::to_string(most) + " CTAs");
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    refuse(kernel.name, "grid " + dims(grid) + " is not a multiple of cluster " + dims(cluster));
}

void check_shared_memory(uint64_t dynamic_bytes, uint32_t static_bytes, const Kernel& kernel) {
  if (dynamic_bytes + static_bytes > MAX_SHARED_BYTES)
    refuse(kernel.name, "too much shared memory: " + std::to_string(static_bytes) + " static and " +
                            std::to_string(dynamic_bytes) + " dynamic bytes; a CTA has " +
                            std::to_string(MAX_SHARED_BYTES));
  if (dynamic_bytes > kernel.max_dynamic_shared_bytes)
    refuse(kernel.name, std::to_string(dynamic_bytes) + " bytes of dynamic shared memory, but the kernel's attribute "
                            "MAX_DYNAMIC_SHARED_SIZE_BYTES allows " + std::to_string(kernel.max_dynamic_shared_bytes));
}

thread_local std::optional<EmulatorError> pending_error;

}  // namespace

Session& Session::get() {
  static Session* session = new Session;  // never destroyed: JIT-ed code may call in while the process ends
  return *session;
}

void Session::set_error(const EmulatorError& error) { pending_error.emplace(error); }

std::optional<EmulatorError> Session::take_error() {
  std::optional<EmulatorError> taken;
  taken.swap(pending_error);
  return taken;
}

void Session::require_entered() const {
  if (!entered)
    throw EmulatorError(ErrorKind::bad_launch,
                        "no emulated device is entered: call this inside `with emulator.device(...)`");
}

void Session::add_program(std::string cubin, std::string ptx) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  auto& known = programs_[cubin];
  if (!known) known = std::make_shared<KnownProgram>();
  if (known->ptx != ptx) forget_module(*known);
  known->cubin = std::move(cubin);
  known->ptx = std::move(ptx);
}

// A module's .global variables stay registered as memory, so their storage outlives the module.
void Session::forget_module(KnownProgram& program) {
  if (program.module && !program.module->globals.empty()) retired_.push_back(program.module);
  program.module = nullptr;
}

std::shared_ptr<Module> Session::module_of(KnownProgram& program) {
  if (program.parsed_for != device.arch) forget_module(program);
  if (!program.module) {
    program.module = load_module(program.ptx, device.arch, device.memory);
    program.parsed_for = device.arch;
  }
  return program.module;
}

Library* Session::load_library(const void* image) {
  require_entered();
  auto [begin, bytes] = image_extent(image);
  for (auto& entry : programs_) {
    const std::string& cubin = entry.first;
    if (bytes < cubin.size() || !memmem(begin, bytes, cubin.data(), cubin.size())) continue;
    auto library = std::make_unique<Library>();
    library->program = entry.second;
    module_of(*entry.second);  // unknown opcodes are told here, before anything runs
    Library* handle = library.get();
    libraries_[handle] = std::move(library);
    return handle;
  }
  throw EmulatorError(ErrorKind::bad_launch,
                      "the PTX of a loaded kernel is not known: it was compiled outside `with emulator.device(...)`, "
                      "or comes from a cache that did not call emulator.register(cubin, ptx)");
}

void Session::unload_library(Library* library) { libraries_.erase(library); }

Kernel* Session::find_kernel(Library* library, const std::string& name) {
  require_entered();
  auto module = module_of(*library->program);
  if (!module->programs.count(name)) refuse(name, "the library's PTX has no kernel of this name");
  auto& kernel = library->kernels[name];
  if (!kernel) {
    kernel = std::make_unique<Kernel>();
    kernel->library = library;
    kernel->name = name;
  }
  return kernel.get();
}

uint32_t Session::static_shared_bytes(const Kernel& kernel) {
  return module_of(*kernel.library->program)->programs.at(kernel.name)->text->static_shared_bytes;
}

void Session::launch(const CudaLaunchConfig& cuda, Kernel& kernel, void** arguments) {
  require_entered();
  LaunchConfig config;
  config.grid = {cuda.grid[0], cuda.grid[1], cuda.grid[2]};
  config.block = {cuda.block[0], cuda.block[1], cuda.block[2]};
  config.cluster = cluster_of(cuda, kernel.name);
  check_dimensions(config, kernel);
  auto module = module_of(*kernel.library->program);
  check_shared_memory(cuda.dynamic_shared_bytes, static_shared_bytes(kernel), kernel);
  config.dynamic_shared_bytes = uint32_t(cuda.dynamic_shared_bytes);
  if (records)
    recording.capture_before(device.memory, kernel.library->program->ptx, *module->programs.at(kernel.name), config,
                             arguments);
  LaunchRecord record = run_launch(device, module, kernel.name, config, arguments);
  if (records) recording.capture_after(record.warp_instructions);
  launches.push_back(launch_as_json(record));
}

int Session::device_attribute(int attribute) const {  // cudaDeviceAttr
  switch (attribute) {
    case 1: return 1024;                                     // threads per block
    case 2: case 3: return 1024;                             // block dimensions x, y
    case 4: return 64;                                       // block dimension z
    case 5: return 0x7fffffff;                               // grid dimension x
    case 6: case 7: return 65535;                            // grid dimensions y, z
    case 8: return int(DEFAULT_SHARED_BYTES);
    case 10: return int(LANES);                              // warp size
    case 12: case 82: return 65536;                          // registers per block, per multiprocessor
    case 16: return int(device.sms);
    case 39: return 2048;                                    // threads per multiprocessor
    case 75: return device.arch == "sm_90a" ? 9 : 10;        // compute capability
    case 76: return device.arch == "sm_103a" ? 3 : 0;
    case 81: return int(MAX_SHARED_BYTES) + 1024;            // shared memory per multiprocessor
    case 95: return 1;                                       // cooperative launch
    case 97: return int(MAX_SHARED_BYTES);
    case 106: return 32;                                     // blocks per multiprocessor
    case 111: return 1024;                                   // shared memory reserved by the system
  }
  throw EmulatorError(ErrorKind::bad_launch,
                      "device attribute " + std::to_string(attribute) +
                          " is not modelled (session.cpp lists those that are)");
}

}  // namespace emu
