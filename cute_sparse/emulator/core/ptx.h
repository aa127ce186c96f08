// PTX text -> statements with resolved operands. Knows PTX syntax, nothing of what an opcode does.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "error.h"

namespace emu {

// The class of a virtual register decides how a lane's value is stored (see machine.h, "Register file").
enum class RegClass : uint8_t { pred, b16, b32, b64, b128 };

struct Reg {
  RegClass cls;
  uint32_t slot;  // first 32-word slot in the register file
};

// One operand as written. Compound forms nest: `[%rd1, {%r2, %r3}]` is an address whose parts are the base
// register and a vector; `%r1|%p2` is a pair.
struct Operand {
  enum class Kind : uint8_t { reg, immediate, address, vector, label, symbol, sink, pair } kind;
  Reg reg{};                   // reg
  bool negated = false;        // !%p
  uint64_t bits = 0;           // immediate: the bit pattern (0f3F800000 and 1.0 alike: see is_float)
  bool is_float = false;       // immediate written as a floating-point literal; bits holds a double's pattern
                               // for decimal and 0d literals, a float's for 0f literals (is_float32)
  bool is_float32 = false;
  std::string name;            // label, symbol, special register such as %tid.x (kind symbol)
  int64_t offset = 0;          // address: [base + offset]
  std::vector<Operand> parts;  // address: base, then further bracketed operands; vector; pair
};

struct Statement {
  uint32_t line = 0;                 // 1-based
  std::string text;                  // as written, white space folded
  std::string opcode;                // "mbarrier.try_wait.parity.shared::cta.b64"
  std::vector<std::string> modifiers;  // the opcode split at '.', first is the mnemonic
  std::vector<Operand> operands;
  bool guarded = false;
  Reg guard{};
  bool guard_negated = false;
  std::string source;  // file:line from .loc, if any

  const std::string& mnemonic() const { return modifiers[0]; }
  bool has(const char* modifier) const;            // anywhere after the mnemonic
  const std::string& type() const { return modifiers.back(); }  // last modifier
};

struct Parameter {
  std::string name;
  uint32_t offset = 0, bytes = 0, align = 1;
};

// A .shared or .local variable of a kernel, or a .global/.const one of the module.
struct Variable {
  std::string name;
  uint64_t offset = 0;  // in its space
  uint64_t bytes = 0;   // 0: extern, sized by the launch
  uint32_t align = 1;
  std::vector<uint8_t> init;
};

struct KernelText {
  std::string name;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  std::vector<Variable> shared, local;
  uint32_t static_shared_bytes = 0;
  uint32_t reqntid[3] = {0, 0, 0};      // 0: not stated
  uint32_t reqnctapercluster[3] = {0, 0, 0};
  std::vector<Statement> statements;
  std::map<std::string, uint32_t> labels;  // scoped name -> statement index
  uint32_t register_slots = 0;             // 32-word slots used by the declared registers
};

struct ModuleText {
  std::string target;  // "sm_90a"
  std::vector<Variable> globals;
  std::vector<KernelText> kernels;
};

// Throws EmulatorError(parse) naming the line.
ModuleText parse_ptx(const std::string& ptx);

}  // namespace emu
