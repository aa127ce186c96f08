// Launches a kernel given as PTX text, without a compiler or a cubin: for tests of single instructions.
#include "c_api.h"
#include "session.h"

using emu::Session;

// dimensions: grid, block, cluster (x, y, z each). arguments[i] points at parameter i. Returns 0, or a CUDA status
// with a pending error.
extern "C" __attribute__((visibility("default"))) int emulator_launch_ptx(const char* ptx, const char* kernel,
                                                                          const uint32_t* dimensions,
                                                                          uint32_t dynamic_shared_bytes,
                                                                          void** arguments) {
  Session& session = Session::get();
  return session.guarded([&] {
    if (!session.entered) throw emu::EmulatorError(emu::ErrorKind::bad_launch, "no device is entered");
    const auto module = emu::load_module(ptx, session.device.arch, session.device.memory);
    emu::LaunchConfig config;
    config.grid = {dimensions[0], dimensions[1], dimensions[2]};
    config.block = {dimensions[3], dimensions[4], dimensions[5]};
    config.cluster = {dimensions[6], dimensions[7], dimensions[8]};
    config.dynamic_shared_bytes = dynamic_shared_bytes;
    const emu::LaunchRecord record = emu::run_launch(session.device, module, kernel, config, arguments);
    session.launches.push_back(emu::launch_as_json(record));
  });
}
