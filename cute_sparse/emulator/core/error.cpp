#include "error.h"

namespace emu {

const char* error_kind_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::parse: return "parse";
    case ErrorKind::unknown_opcode: return "unknown_opcode";
    case ErrorKind::bad_launch: return "bad_launch";
    case ErrorKind::out_of_bounds: return "out_of_bounds";
    case ErrorKind::misaligned: return "misaligned";
    case ErrorKind::uninitialised: return "uninitialised";
    case ErrorKind::in_flight: return "in_flight";
    case ErrorKind::race: return "race";
    case ErrorKind::missing_proxy_fence: return "missing_proxy_fence";
    case ErrorKind::barrier: return "barrier";
    case ErrorKind::tensor_memory: return "tensor_memory";
    case ErrorKind::convergence: return "convergence";
    case ErrorKind::deadlock: return "deadlock";
    case ErrorKind::timeout: return "timeout";
    case ErrorKind::trap: return "trap";
    case ErrorKind::invalid_operand: return "invalid_operand";
  }
  return "unknown";
}

}  // namespace emu
