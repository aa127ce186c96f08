#include "replay.h"

#include <cstring>

namespace emu {

void Recording::capture_before(const Memory& registered, const std::string& text, const Program& program,
                               const LaunchConfig& launch_config, void** pointers) {
  ptx = text;
  kernel = program.text->name;
  config = launch_config;
  arguments.clear();
  for (size_t k = 0; k < program.text->parameters.size(); ++k) {
    const auto* bytes = static_cast<const uint8_t*>(pointers[k]);
    arguments.emplace_back(bytes, bytes + program.text->parameters[k].bytes);
  }
  memory.clear();
  for (const Range& range : registered.all()) {
    if (!range.writable) continue;
    const auto* bytes = reinterpret_cast<const uint8_t*>(range.begin);
    memory.push_back({range.begin, {bytes, bytes + (range.end - range.begin)}, {}});
  }
}

void Recording::capture_after(uint64_t instructions) {
  warp_instructions = instructions;
  for (Bytes& range : memory) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(range.address);
    range.after.assign(bytes, bytes + range.before.size());
  }
}

namespace {

void restore(const Recording& recording, std::vector<uint8_t> Recording::Bytes::* which) {
  for (const auto& range : recording.memory)
    std::memcpy(reinterpret_cast<void*>(range.address), (range.*which).data(), (range.*which).size());
}

bool memory_matches(const Recording& recording) {
  for (const auto& range : recording.memory)
    if (std::memcmp(reinterpret_cast<const void*>(range.address), range.after.data(), range.after.size()) != 0)
      return false;
  return true;
}

// Writing to memory that has gone back to the allocator would corrupt the process.
void check_alive(const Device& device, const Recording& recording) {
  for (const auto& range : recording.memory)
    if (!device.memory.find(range.address, range.before.size()))
      throw EmulatorError(ErrorKind::bad_launch,
                          "a tensor of the recorded launch has been freed: keep all of them until the replay is done");
}

struct Restored {  // the memory as the recorded launch left it, and the device's limit, whatever happens
  Device& device;
  const Recording& recording;
  uint64_t limit;
  ~Restored() {
    restore(recording, &Recording::Bytes::after);
    device.max_warp_instructions = limit;
  }
};

}  // namespace

Replayed replay(Device& device, const Recording& recording, const std::string& ptx) {
  check_alive(device, recording);
  const auto module = load_module(ptx, device.arch, device.memory);
  std::vector<std::vector<uint8_t>> arguments = recording.arguments;
  std::vector<void*> pointers;
  for (auto& argument : arguments) pointers.push_back(argument.data());
  Restored restored{device, recording, device.max_warp_instructions};
  device.max_warp_instructions = 4 * recording.warp_instructions + 100000;
  restore(recording, &Recording::Bytes::before);
  run_launch(device, module, recording.kernel, recording.config, pointers.data());
  return memory_matches(recording) ? Replayed::same : Replayed::different;
}

}  // namespace emu
