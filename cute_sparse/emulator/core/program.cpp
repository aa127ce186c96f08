// Statements -> decoded instructions: operands become slots, every opcode finds its family.
#include <algorithm>
#include <map>
#include <set>

#include "machine.h"

namespace emu {

namespace {

// Special registers whose value never changes while a warp runs (PTX ISA, "Special Registers"). The others
// (%clock, %globaltimer, ...) are read by mov itself.
bool is_fixed_special(const std::string& name) {
  static const std::set<std::string> names = {
      "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z",
      "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid",
      "%lanemask_eq", "%lanemask_le", "%lanemask_lt", "%lanemask_ge", "%lanemask_gt",
      "%clusterid.x", "%clusterid.y", "%clusterid.z", "%nclusterid.x", "%nclusterid.y", "%nclusterid.z",
      "%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z", "%cluster_nctaid.x", "%cluster_nctaid.y",
      "%cluster_nctaid.z", "%cluster_ctarank", "%cluster_nctarank", "%is_explicit_cluster",
      "%dynamic_smem_size", "%total_smem_size", "%aggr_smem_size"};
  return names.count(name) != 0;
}

bool acts(const Statement& s) {
  static const std::set<std::string> mnemonics = {"ld", "st", "atom", "red", "cp", "bar", "barrier", "wgmma", "tcgen05",
                                                  "ldmatrix", "stmatrix", "clusterlaunchcontrol", "griddepcontrol"};
  const bool groups = s.opcode.rfind("cp.async.bulk.commit_group", 0) == 0 ||
                      s.opcode.rfind("cp.async.bulk.wait_group", 0) == 0;
  return mnemonics.count(s.mnemonic()) != 0 && !groups;
}

uint32_t slots_of(RegClass cls) { return cls == RegClass::b128 ? 4 : cls == RegClass::b64 ? 2 : 1; }

uint32_t add_slots(Program& program, uint32_t n) {
  const uint32_t slot = program.slots;
  program.slots += n;
  return slot;
}

uint32_t constant_slot(Program& program, uint64_t bits, bool wide) {
  for (const auto& c : program.constants)
    if (c.bits == bits && c.wide == wide) return c.slot;
  const uint32_t slot = add_slots(program, wide ? 2 : 1);
  program.constants.push_back({slot, bits, wide});
  return slot;
}

// Always 64 bits wide, so that 32-bit readers of the low word must use `narrow`.
uint32_t special_slot(Program& program, const std::string& name) {
  for (const auto& s : program.specials)
    if (s.name == name) return s.slot;
  const uint32_t slot = add_slots(program, 2);
  program.specials.push_back({slot, name});
  return slot;
}

// Name under which run time fills the address of a variable or parameter: "@shared:1024", or empty.
std::string variable_address(const KernelText& text, const std::string& name) {
  for (const auto& p : text.parameters)
    if (p.name == name) return "@param:" + std::to_string(p.offset);
  for (const auto& v : text.shared)
    if (v.name == name) return "@shared:" + std::to_string(v.bytes ? v.offset : UINT32_MAX);
  for (const auto& v : text.local)
    if (v.name == name) return "@local:" + std::to_string(v.offset);
  return "";
}

uint64_t literal_bits(const Operand& op, RegClass cls) {
  if (!op.is_float) {
    switch (cls) {
      case RegClass::pred: return op.bits ? ALL_LANES : 0;
      case RegClass::b16: return op.bits & 0xffff;
      case RegClass::b32: return op.bits & 0xffffffff;
      default: return op.bits;
    }
  }
  if (op.is_float32) return op.bits;
  if (cls == RegClass::b64) return op.bits;
  double d;
  std::memcpy(&d, &op.bits, 8);
  const float f = float(d);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

}  // namespace

void Builder::fail(const std::string& why) const {
  Site site;
  site.kernel = program.text->name;
  site.ptx_line = statement.line;
  site.ptx_text = statement.text;
  throw EmulatorError(ErrorKind::parse, "PTX line " + std::to_string(statement.line) + ": " + why + ": " +
                                            statement.text, site);
}

uint32_t Builder::read(const Operand& op, RegClass cls) {
  switch (op.kind) {
    case Operand::Kind::reg:
      if (op.negated) fail("a negated predicate is not supported here");
      if (slots_of(op.reg.cls) < slots_of(cls)) fail("a register is narrower than the instruction reads");
      program.slot_lists.push_back(op.reg.slot);
      ++out.n_reads;
      return slots_of(op.reg.cls) > slots_of(cls) ? narrowed(op) : op.reg.slot;
    case Operand::Kind::immediate:
      return constant_slot(program, literal_bits(op, cls), cls == RegClass::b64);
    case Operand::Kind::symbol: {
      std::string name = op.name;
      if (name[0] != '%') name = variable_address(*program.text, name);
      if (name.empty())
        for (const auto& v : program.module->globals)
          if (v.name == op.name) return constant_slot(program, v.offset + uint64_t(op.offset), cls == RegClass::b64);
      if (name.empty()) fail("unknown name '" + op.name + "'");
      if (name[0] == '%' && !is_fixed_special(name)) fail("special register " + name + " cannot be read here");
      if (name[0] == '@' && op.offset) name += "+" + std::to_string(op.offset);
      return special_slot(program, name + (cls == RegClass::b64 ? "" : "/narrow"));
    }
    default: fail("unexpected kind of source operand");
  }
}

// A source register may be wider than the instruction's type, whose bits are then its low ones (PTX ISA 9.4.1, "Operand
// Size Exceeding Instruction-Type Size"): they are copied to a slot of their own before each execution.
uint32_t Builder::narrowed(const Operand& op) {
  if (op.reg.cls != RegClass::b64) fail("a register of 128 bits is wider than the instruction reads");
  pending_narrow.push_back({op.reg.slot, add_slots(program, 1)});
  return pending_narrow.back().low;
}

uint32_t Builder::write(const Operand& op) {
  if (op.kind == Operand::Kind::sink) return add_slots(program, 4);
  if (op.kind != Operand::Kind::reg) fail("the destination must be a register");
  // The list of writes follows the list of reads; a decoder may interleave the two, so writes are gathered last.
  pending_writes.push_back(op.reg.slot);
  return op.reg.slot;
}

uint32_t Builder::address(const Operand& op) {
  if (op.kind != Operand::Kind::address) fail("expected an address in brackets");
  out.offset = op.offset;
  return read(op.parts[0], wide(op) ? RegClass::b64 : RegClass::b32);
}

bool Builder::wide(const Operand& op) const {
  const Operand& base = op.parts[0];
  if (base.kind == Operand::Kind::reg) return base.reg.cls == RegClass::b64;
  if (base.kind == Operand::Kind::symbol) {
    const std::string name = variable_address(*program.text, base.name);
    return name.rfind("@shared", 0) != 0;  // a shared variable's address is 32 bits here
  }
  return true;
}

void Builder::list(const Operand& op) {
  if (op.kind == Operand::Kind::vector) {
    for (const Operand& part : op.parts) list(part);
    return;
  }
  if (op.kind == Operand::Kind::sink) { pending_list.push_back(add_slots(program, 4)); return; }
  if (op.kind == Operand::Kind::immediate) {
    pending_list.push_back(constant_slot(program, literal_bits(op, RegClass::b32), false));
    return;
  }
  if (op.kind != Operand::Kind::reg) fail("expected a register in the vector");
  pending_list.push_back(op.reg.slot);
}

void Builder::also_reads(const Operand& op) {
  if (op.kind == Operand::Kind::vector) {
    for (const Operand& part : op.parts) also_reads(part);
  } else if (op.kind == Operand::Kind::reg) {
    program.slot_lists.push_back(op.reg.slot);
    ++out.n_reads;
  }
}

void Builder::also_writes(const Operand& op) {
  if (op.kind == Operand::Kind::vector) {
    for (const Operand& part : op.parts) also_writes(part);
  } else if (op.kind == Operand::Kind::reg) {
    pending_writes.push_back(op.reg.slot);
  }
}

int64_t Builder::integer(const Operand& op) const {
  if (op.kind != Operand::Kind::immediate || op.is_float) fail("expected an integer constant");
  return int64_t(op.bits);
}

uint32_t Builder::target(const Operand& op) const {
  const auto it = program.text->labels.find(op.name);
  if (op.kind != Operand::Kind::label || it == program.text->labels.end()) fail("expected a label");
  return it->second;
}

namespace {

struct Narrowing {
  std::vector<Builder::LowWord> words;
  Instr rest;
};

Step exec_narrowing(Warp& w, const Instr& i) {
  const auto& narrowing = *static_cast<const Narrowing*>(i.detail);
  for (const auto& word : narrowing.words)
    for (uint32_t l = 0; l < 32; ++l) w.u32(word.low)[l] = uint32_t(w.u64(word.wide)[l]);
  return narrowing.rest.exec(w, narrowing.rest);
}

}  // namespace

void Builder::finish() {
  auto append = [&](const std::vector<uint32_t>& from, uint32_t& begin, uint32_t& count) {
    begin = uint32_t(program.slot_lists.size());
    count = uint32_t(from.size());
    program.slot_lists.insert(program.slot_lists.end(), from.begin(), from.end());
  };
  append(pending_writes, out.writes, out.n_writes);
  append(pending_list, out.list, out.n_list);
  if (pending_narrow.empty()) return;
  out.detail = keep(Narrowing{pending_narrow, out});
  out.exec = exec_narrowing;
}

std::shared_ptr<Program> build_program(std::shared_ptr<const ModuleText> module, const KernelText& text,
                                       std::vector<std::string>& unknown) {
  auto program = std::make_shared<Program>();
  program->module = std::move(module);
  program->text = &text;
  program->slots = text.register_slots;
  program->code.resize(text.statements.size() + 1);
  for (uint32_t index = 0; index < text.statements.size(); ++index) {
    const Statement& statement = text.statements[index];
    Instr& out = program->code[index];
    out.statement = index;
    if (statement.guarded) {
      out.guard = statement.guard.slot;
      out.guard_negated = statement.guard_negated;
    }
    out.acts = acts(statement);
    out.reads = uint32_t(program->slot_lists.size());
    Builder builder{*program, statement, out, {}, {}, {}};
    const bool known = words_known(statement) &&
                       std::any_of(FAMILIES.begin(), FAMILIES.end(),
                                   [&](Decoder decode) { return decode(statement, builder); });
    if (!known) {
      unknown.push_back("line " + std::to_string(statement.line) + ": " + statement.text);
      continue;
    }
    builder.finish();
  }
  // Falling off the end of the body is a return.
  program->code.back().exec = [](Warp&, const Instr&) { return Step::exited; };
  program->code.back().statement = text.statements.empty() ? 0 : uint32_t(text.statements.size() - 1);
  return program;
}

std::shared_ptr<Module> load_module(const std::string& ptx, const std::string& arch, Memory& memory) {
  auto module = std::make_shared<Module>();
  module->text = std::make_shared<ModuleText>(parse_ptx(ptx));
  if (module->text->target != arch)
    throw EmulatorError(ErrorKind::bad_launch, "the kernel was compiled for " + module->text->target +
                                                   ", the emulated device is " + arch);
  for (Variable& v : module->text->globals) {
    auto storage = std::make_unique<uint8_t[]>(v.bytes + 1024);
    const uint64_t address = (uint64_t(storage.get()) + 1023) / 1024 * 1024;
    std::memcpy(reinterpret_cast<void*>(address), v.init.data(), v.init.size());
    v.offset = address;
    memory.add(address, v.bytes, v.name);
    module->globals.push_back(std::move(storage));
  }
  std::vector<std::string> unknown;
  for (const KernelText& kernel : module->text->kernels)
    module->programs[kernel.name] = build_program(module->text, kernel, unknown);
  if (!unknown.empty()) {
    std::string message = std::to_string(unknown.size()) + " PTX statements that the emulator does not know:";
    for (const std::string& line : unknown) message += "\n  " + line;
    throw EmulatorError(ErrorKind::unknown_opcode, message);
  }
  return module;
}

}  // namespace emu
