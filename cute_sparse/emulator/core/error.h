// What goes wrong in a kernel, and where. One exception type; `kind` names the Python class it becomes.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace emu {

enum class ErrorKind {
  parse,             // PTX text that this parser does not understand
  unknown_opcode,    // PTX statements that no family decodes (the message lists all of them)
  bad_launch,        // grid, cluster, shared memory or parameters that the device refuses
  out_of_bounds,     // global, shared or tensor memory access outside what exists
  misaligned,        // access, descriptor or tensor map that is not aligned as its instruction demands
  uninitialised,     // read of a register, shared or tensor memory that nothing has written
  in_flight,         // read or write of data that an asynchronous operation still owns
  race,              // two conflicting accesses that nothing orders
  missing_proxy_fence,  // generic write, then an access by the async proxy, without fence.proxy.async
  barrier,           // mbarrier or barrier misuse: before init, over-arrival, wrong counts
  tensor_memory,     // tcgen05 alloc/dealloc misuse, leaked or foreign columns
  convergence,       // a .sync/.aligned instruction whose lanes can never meet
  deadlock,          // every warp blocked; the message lists each
  timeout,           // more instructions than the launch is allowed
  trap,              // the kernel executed trap
  invalid_operand,   // a run-time operand outside what the PTX ISA allows
};

// Everything known about the place of an error; empty or negative where it does not apply.
struct Site {
  std::string kernel;
  int64_t cta = -1;      // linear CTA index in the grid
  int32_t warp = -1;     // warp index in the CTA
  int32_t lane = -1;
  uint32_t ptx_line = 0;  // 1-based line in the PTX text
  std::string ptx_text;
  std::string source;  // file:line where the PTX carries .loc
  std::string tensor;  // name of the registered memory range
};

struct EmulatorError : std::runtime_error {
  ErrorKind kind;
  Site site;
  EmulatorError(ErrorKind kind, const std::string& message, Site site = {})
      : std::runtime_error(message), kind(kind), site(std::move(site)) {}
};

const char* error_kind_name(ErrorKind kind);  // "out_of_bounds", ...

}  // namespace emu
