// Kernels given as PTX text: launched without a compiler or a cubin (tests of single instructions), or in the place
// of a recorded launch's own text (the mutation survey).
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
    if (session.records)
      session.recording.capture_before(session.device.memory, ptx, *module->programs.at(kernel), config, arguments);
    const emu::LaunchRecord record = emu::run_launch(session.device, module, kernel, config, arguments);
    if (session.records) session.recording.capture_after(record.warp_instructions);
    session.launches.push_back(emu::launch_as_json(record));
  });
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_record(int records) { Session::get().records = records != 0; }

// The recorded launch's PTX, for emulator_free; empty if nothing was recorded.
EXPORT char* emulator_recorded_ptx() { return emu::owned_by_caller(Session::get().recording.ptx); }

// Runs the recorded launch again with `ptx` in another order: 0 the same memory afterwards, 1 another, or a CUDA status
// (above 1) with a pending error.
EXPORT int emulator_replay(const char* ptx, int order, uint64_t seed) {
  Session& session = Session::get();
  bool different = false;
  const int status = session.guarded([&] {
    if (session.recording.empty())
      throw emu::EmulatorError(emu::ErrorKind::bad_launch, "no launch has been recorded");
    const auto old_order = session.device.order;
    const auto old_seed = session.device.seed;
    session.device.order = static_cast<emu::Order>(order);
    session.device.seed = seed;
    try {
      different = emu::replay(session.device, session.recording, ptx) == emu::Replayed::different;
    } catch (...) {
      session.device.order = old_order;
      session.device.seed = old_seed;
      throw;
    }
    session.device.order = old_order;
    session.device.seed = old_seed;
  });
  return status != 0 ? status : different ? 1 : 0;
}
