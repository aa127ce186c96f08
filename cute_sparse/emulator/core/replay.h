// The last launch, kept so that it can be run again from the same memory: with another PTX (one statement removed),
// in another order. For the mutation survey (mutate.py).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "machine.h"

namespace emu {

struct Recording {
  std::string ptx, kernel;
  LaunchConfig config;
  std::vector<std::vector<uint8_t>> arguments;  // the parameters' bytes
  uint64_t warp_instructions = 0;
  struct Bytes {
    uint64_t address;
    std::vector<uint8_t> before, after;
  };
  std::vector<Bytes> memory;  // every registered, writable range

  bool empty() const { return kernel.empty(); }
  void capture_before(const Memory& memory, const std::string& ptx, const Program& program, const LaunchConfig& config,
                      void** arguments);
  void capture_after(uint64_t instructions);
};

enum class Replayed { same, different };

// Runs the recorded launch with `ptx` from the memory as it was before, compares all memory with what the recorded
// launch left, and puts that back. Throws what the launch throws. A launch that takes far more instructions than the
// recorded one ends in ErrorKind::timeout.
Replayed replay(Device& device, const Recording& recording, const std::string& ptx);

}  // namespace emu
