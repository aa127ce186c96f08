// Loads, stores and atomics of single threads in every state space (PTX ISA 9.7.9.8 to 9.7.9.19, 9.7.13.5, .6), and
// the hints that move no data (prefetch, createpolicy, discard).
#include <algorithm>
#include <cmath>
#include <map>

#include "formats.h"
#include "lanes.h"
#include "spaces.h"

namespace emu {
namespace {

enum class Space : uint8_t { generic, global, shared, local, param };

struct AccessDetail {
  Space space = Space::generic;
  uint32_t element_bytes = 4;
  uint32_t elements = 1;
  bool wide_address = true;  // its register has 64 bits
  bool sign_extend = false;
  bool strong = false;       // volatile, relaxed, acquire, release, mmio: does not race with other strong accesses
  bool acquires = false, releases = false;  // otherwise a strong access does so only together with a fence
  bool wide = true;          // of a strong access: its scope reaches other clusters, .gpu or .sys
  uint32_t bytes() const { return element_bytes * elements; }
};

struct Place {  // where a lane's access goes
  Space space;
  uint64_t address;
};

Place place_of(Warp& w, const Instr& i, const AccessDetail& detail, uint32_t lane) {
  const uint64_t address =
      detail.wide_address ? w.address64(i, i.s[0], lane) : uint64_t(w.address32(i, i.s[0], lane));
  switch (detail.space) {
    case Space::shared: return {Space::shared, address & 0xffffffffu};
    case Space::local: return {Space::local, address & 0xffffffffu};
    case Space::generic:
      if (in_shared_window(address)) return {Space::shared, address & 0xffffffffu};
      if (in_local_window(address)) return {Space::local, address & 0xffffffffu};
      return {Space::global, address};
    default: return {Space::global, address};
  }
}

uint8_t* local_at(Warp& w, uint64_t offset, uint32_t bytes, uint32_t lane) {
  const auto& variables = w.program->text->local;
  const uint64_t size = variables.empty() ? 0 : variables.back().offset + variables.back().bytes;
  if (offset + bytes > size) w.fail(ErrorKind::out_of_bounds, "local memory access outside its variables", int(lane));
  w.local.resize(size * LANES);
  return w.local.data() + size * lane + offset;
}

uint8_t* host_address(Warp& w, const Place& place, const AccessDetail& detail, bool write, uint32_t lane) {
  if (place.space == Space::shared)
    return shared_at(w, uint32_t(place.address), detail.bytes(), detail.bytes(), int(lane));
  if (place.space == Space::local) return local_at(w, place.address, detail.bytes(), lane);
  return global_at(w, place.address, detail.bytes(), detail.bytes(), write, int(lane));
}

// Consecutive lanes mostly touch consecutive (or the same) addresses: one entry in the race detector for a run. Reads of
// a run in which a place repeats count as all lanes'.
class Touches {
 public:
  Touches(Warp& w, bool write, bool atomic) : w_(w), write_(write), atomic_(atomic) {}
  ~Touches() noexcept(false) { if (!std::uncaught_exceptions()) flush(); }
  void add(const Place& place, uint32_t bytes, uint32_t lane) {
    if (place.space == Space::local || place.space == Space::param) return;
    if (bytes_ && place.space == space_ && place.address == begin_ + bytes_ &&
        (repeats_ || lane == lane_ + bytes_ / bytes_each_)) {
      bytes_ += bytes;
      return;
    }
    if (bytes_ && !write_ && place.space == space_ && place.address >= begin_ &&
        place.address + bytes <= begin_ + bytes_) {
      repeats_ = true;
      return;
    }
    flush();
    space_ = place.space;
    begin_ = place.address;
    bytes_ = bytes_each_ = bytes;
    lane_ = lane;
  }
  void flush() {
    if (!bytes_) return;
    const uint64_t n = bytes_;
    bytes_ = 0;
    const bool repeats = repeats_;
    repeats_ = false;
    const int lane = int(lane_);
    if (space_ == Space::shared) {
      if (repeats) touch_shared(w_, uint32_t(begin_), uint32_t(n), write_, atomic_);
      else touch_shared_lanes(w_, uint32_t(begin_), uint32_t(n), bytes_each_, write_, atomic_, lane);
    } else {
      if (repeats) touch_global(w_, begin_, n, write_, atomic_);
      else touch_global_lanes(w_, begin_, n, bytes_each_, write_, atomic_, lane);
    }
  }

 private:
  Warp& w_;
  bool write_, atomic_;
  Space space_ = Space::global;
  uint64_t begin_ = 0, bytes_ = 0;
  uint32_t bytes_each_ = 0, lane_ = 0;
  bool repeats_ = false;
};

void count(Warp& w, Space space, bool write, uint64_t bytes) {
  if (space == Space::shared) (write ? w.tally.shared_bytes_written : w.tally.shared_bytes_read) += bytes;
  if (space == Space::global) (write ? w.tally.global_bytes_written : w.tally.global_bytes_read) += bytes;
}

uint64_t load_element(const uint8_t* at, const AccessDetail& detail) {
  uint64_t value = 0;
  std::memcpy(&value, at, std::min(8u, detail.element_bytes));
  if (detail.sign_extend && detail.element_bytes < 8) {
    const uint32_t shift = 64 - 8 * detail.element_bytes;
    value = uint64_t(int64_t(value << shift) >> shift);
  }
  return value;
}

uint64_t location(const Place& place) {
  return place.space == Space::shared ? SHARED_WINDOW | place.address : place.address;
}

void release_before(Warp& w, const AccessDetail& detail, const Place& place) {
  if (detail.strong && place.space <= Space::shared) release_at(w, location(place), !detail.releases, detail.wide);
}

void acquire_after(Warp& w, const AccessDetail& detail, const Place& place) {
  if (detail.strong && place.space <= Space::shared) acquire_at(w, location(place), !detail.acquires, detail.wide);
}

Step exec_ld(Warp& w, const Instr& i) {
  const auto& detail = *static_cast<const AccessDetail*>(i.detail);
  const uint32_t* slots = w.program->slot_lists.data() + i.list;
  Touches touches(w, false, detail.strong);
  uint64_t counted = 0;  // neighbouring lanes that read the same of global memory are one request
  for_lanes(w, [&](uint32_t l) {
    const Place place = place_of(w, i, detail, l);
    const uint8_t* at = host_address(w, place, detail, false, l);
    touches.add(place, detail.bytes(), l);
    if (place.space != Space::global || place.address != counted) count(w, place.space, false, detail.bytes());
    counted = place.address;
    for (uint32_t e = 0; e < detail.elements; ++e) {
      const uint8_t* element = at + e * detail.element_bytes;
      // the list holds pairs: slot, width of the register in bytes (list_values)
      const uint32_t slot = slots[2 * e], width = slots[2 * e + 1];
      const uint64_t value = load_element(element, detail);
      if (width >= 8) w.u64(slot)[l] = value;
      else w.u32(slot)[l] = width == 2 ? uint32_t(value & 0xffff) : uint32_t(value);
      if (width == 16) std::memcpy(&w.u64(slot + 2)[l], element + 8, 8);
    }
    acquire_after(w, detail, place);
  });
  return Step::next;
}

Step exec_st(Warp& w, const Instr& i) {
  const auto& detail = *static_cast<const AccessDetail*>(i.detail);
  const uint32_t* slots = w.program->slot_lists.data() + i.list;
  Touches touches(w, true, detail.strong);
  for_lanes(w, [&](uint32_t l) {
    const Place place = place_of(w, i, detail, l);
    uint8_t* at = host_address(w, place, detail, true, l);
    touches.add(place, detail.bytes(), l);
    release_before(w, detail, place);
    count(w, place.space, true, detail.bytes());
    for (uint32_t e = 0; e < detail.elements; ++e) {
      const uint32_t slot = slots[2 * e], width = slots[2 * e + 1];
      const uint64_t value = width >= 8 ? w.u64(slot)[l] : w.u32(slot)[l];
      std::memcpy(at + e * detail.element_bytes, &value, std::min(8u, detail.element_bytes));
      if (width == 16) std::memcpy(at + e * detail.element_bytes + 8, &w.u64(slot + 2)[l], 8);
    }
  });
  return Step::next;
}

Step exec_ld_param(Warp& w, const Instr& i) {  // [parameter + offset]: the same for every lane
  const auto& detail = *static_cast<const AccessDetail*>(i.detail);
  const uint32_t* slots = w.program->slot_lists.data() + i.list;
  const uint8_t* at = w.cluster->launch->parameters + i.imm;
  for (uint32_t e = 0; e < detail.elements; ++e) {
    const uint64_t value = load_element(at + e * detail.element_bytes, detail);
    const uint32_t slot = slots[2 * e], width = slots[2 * e + 1];
    for_lanes(w, [&](uint32_t l) {
      if (width >= 8) w.u64(slot)[l] = value; else w.u32(slot)[l] = width == 2 ? uint32_t(value & 0xffff) : uint32_t(value);
    });
  }
  return Step::next;
}

bool space_of(const Statement& s, Space& space) {
  space = Space::generic;
  for (size_t k = 1; k < s.modifiers.size(); ++k) {
    const std::string& m = s.modifiers[k];
    if (m == "global") space = Space::global;
    else if (m == "shared" || m == "shared::cta" || m == "shared::cluster") space = Space::shared;
    else if (m == "local") space = Space::local;
    else if (m == "param" || m == "param::entry") space = Space::param;
    else if (m == "const") space = Space::global;
  }
  return true;
}

bool is_strong(const Statement& s) {
  return s.has("volatile") || s.has("relaxed") || s.has("acquire") || s.has("release") || s.has("acq_rel") ||
         s.has("mmio");
}

uint32_t element_bytes(const std::string& type) {
  const size_t digits = type.find_first_of("0123456789");
  return digits == std::string::npos ? 0 : uint32_t(std::stoul(type.substr(digits))) / 8;
}

uint32_t register_bytes(const Operand& op) {
  if (op.kind != Operand::Kind::reg) return 0;
  return op.reg.cls == RegClass::b16 ? 2 : op.reg.cls == RegClass::b32 ? 4 : op.reg.cls == RegClass::b64 ? 8 : 16;
}

// Puts (slot, register width in bytes) pairs into the instruction's list.
void list_values(Builder& b, const Operand& values, uint32_t bytes, bool load) {
  const std::vector<Operand> single = {values};
  for (const Operand& v : values.kind == Operand::Kind::vector ? values.parts : single) {
    uint32_t slot, width = std::max(register_bytes(v), std::min(bytes, 16u) <= 2 ? 2u : 4u);
    if (load) {
      slot = b.write(v);
      if (v.kind == Operand::Kind::sink) width = std::max(width, bytes);
    } else {
      slot = b.read(v, bytes == 16 ? RegClass::b128 : bytes == 8 ? RegClass::b64 : bytes <= 2 ? RegClass::b16 : RegClass::b32);
      if (v.kind != Operand::Kind::reg) width = bytes == 8 ? 8 : 4;
    }
    b.pending_list.push_back(slot);
    b.pending_list.push_back(width);
  }
}

uint32_t parameter_offset(const Builder& b, const Operand& address) {
  for (const Parameter& p : b.program.text->parameters)
    if (p.name == address.parts[0].name) return p.offset + uint32_t(address.offset);
  b.fail("unknown parameter");
}

bool decode_ld_st(const Statement& s, Builder& b, bool load) {
  if (s.operands.size() < 2) return false;
  AccessDetail detail;
  space_of(s, detail.space);
  const std::string& type = s.type();
  detail.element_bytes = element_bytes(type);
  detail.sign_extend = type[0] == 's';
  detail.strong = is_strong(s);
  detail.acquires = s.has("acquire");
  detail.releases = s.has("release");
  detail.wide = is_wide(s);
  const Operand& values = s.operands[load ? 0 : 1];
  const Operand& address = s.operands[load ? 1 : 0];
  detail.elements = values.kind == Operand::Kind::vector ? uint32_t(values.parts.size()) : 1;
  if (!detail.element_bytes || address.kind != Operand::Kind::address) return false;
  list_values(b, values, detail.element_bytes, load);
  if (detail.space == Space::param && load && address.parts[0].kind == Operand::Kind::symbol) {
    b.out.imm = parameter_offset(b, address);
    b.out.exec = exec_ld_param;
  } else {
    detail.wide_address = b.wide(address);
    b.out.s[0] = b.address(address);
    b.out.exec = load ? exec_ld : exec_st;
  }
  b.out.detail = b.keep(detail);
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// Atomics: each lane in turn, under one lock for global memory (other clusters run on other host threads)

enum class Atomic : uint8_t { add, min, max, and_, or_, xor_, exch, cas, inc, dec };

struct AtomicDetail : AccessDetail {
  Atomic op = Atomic::add;
  char type = 'u';  // u, s, f, b; 'h' f16, 'g' bf16 (packed where element_bytes is 4)
  bool returns = false;
};

float combine_float(Atomic op, float a, float b) {
  switch (op) {
    case Atomic::min: return a != a ? b : b != b ? a : std::min(a, b);
    case Atomic::max: return a != a ? b : b != b ? a : std::max(a, b);
    default: return a + b;
  }
}

uint64_t combine_packed(const AtomicDetail& d, uint64_t old, uint64_t value) {
  uint64_t r = 0;
  for (uint32_t e = 0; e < d.element_bytes / 2; ++e) {
    const uint16_t a = uint16_t(old >> (16 * e)), b = uint16_t(value >> (16 * e));
    const uint16_t sum = d.type == 'g' ? float_to_bf16(combine_float(d.op, bf16_to_float(a), bf16_to_float(b)))
                                       : float_to_f16(combine_float(d.op, f16_to_float(a), f16_to_float(b)));
    r |= uint64_t(sum) << (16 * e);
  }
  return r;
}

uint64_t combine(const AtomicDetail& d, uint64_t old, uint64_t value, uint64_t other) {
  const uint64_t mask = d.element_bytes >= 8 ? ~0ull : (1ull << (8 * d.element_bytes)) - 1;
  if (d.op == Atomic::exch) return value;
  if (d.op == Atomic::cas) return old == (value & mask) ? other : old;
  if (d.type == 'f' && d.element_bytes == 4)
    return bits_of_float(combine_float(d.op, float_of_bits(uint32_t(old)), float_of_bits(uint32_t(value))));
  if (d.type == 'f') {
    double a, b;
    std::memcpy(&a, &old, 8);
    std::memcpy(&b, &value, 8);
    a += b;
    std::memcpy(&old, &a, 8);
    return old;
  }
  if (d.type == 'h' || d.type == 'g') return combine_packed(d, old, value);
  const uint32_t shift = 64 - 8 * d.element_bytes;
  const int64_t sa = int64_t(old << shift) >> shift, sb = int64_t(value << shift) >> shift;
  const uint64_t ua = old & mask, ub = value & mask;
  switch (d.op) {
    case Atomic::add: return ua + ub;
    case Atomic::min: return d.type == 's' ? uint64_t(std::min(sa, sb)) : std::min(ua, ub);
    case Atomic::max: return d.type == 's' ? uint64_t(std::max(sa, sb)) : std::max(ua, ub);
    case Atomic::and_: return ua & ub;
    case Atomic::or_: return ua | ub;
    case Atomic::xor_: return ua ^ ub;
    case Atomic::inc: return ua >= ub ? 0 : ua + 1;
    default: return ua == 0 || ua > ub ? ub : ua - 1;
  }
}

std::mutex& atomic_lock(uint64_t address) {
  static std::array<std::mutex, 64> locks;
  return locks[address / 64 % locks.size()];
}

Step exec_atomic(Warp& w, const Instr& i) {
  const auto& detail = *static_cast<const AtomicDetail*>(i.detail);
  const uint32_t* slots = w.program->slot_lists.data() + i.list;  // per element: result, value, compare's other
  for_lanes(w, [&](uint32_t l) {
    const Place place = place_of(w, i, detail, l);
    uint8_t* at = host_address(w, place, detail, true, l);
    Touches(w, true, true).add(place, detail.bytes(), l);
    release_before(w, detail, place);
    count(w, place.space, true, detail.bytes());
    std::lock_guard<std::mutex> lock(atomic_lock(uint64_t(at)));
    for (uint32_t e = 0; e < detail.elements; ++e) {
      const bool wide = detail.element_bytes == 8;
      auto value = [&](uint32_t slot) { return wide ? w.u64(slot)[l] : uint64_t(w.u32(slot)[l]); };
      uint64_t old = 0;
      std::memcpy(&old, at + e * detail.element_bytes, detail.element_bytes);
      const uint64_t other = detail.op == Atomic::cas ? value(slots[3 * e + 2]) : 0;
      const uint64_t result = combine(detail, old, value(slots[3 * e + 1]), other);
      std::memcpy(at + e * detail.element_bytes, &result, detail.element_bytes);
      if (detail.returns) {
        if (wide) w.u64(slots[3 * e])[l] = old; else w.u32(slots[3 * e])[l] = uint32_t(old);
      }
    }
    if (detail.returns) acquire_after(w, detail, place);
  });
  w.cluster->notify();
  return Step::next;
}

bool decode_atomic(const Statement& s, Builder& b, bool returns) {
  static const std::map<std::string, Atomic> ops = {
      {"add", Atomic::add}, {"min", Atomic::min}, {"max", Atomic::max},   {"and", Atomic::and_}, {"or", Atomic::or_},
      {"xor", Atomic::xor_}, {"exch", Atomic::exch}, {"cas", Atomic::cas}, {"inc", Atomic::inc}, {"dec", Atomic::dec}};
  if (s.has("async")) return false;  // red.async: an asynchronous operation on shared::cluster
  AtomicDetail detail;
  space_of(s, detail.space);
  bool found = false;
  for (size_t k = 1; k < s.modifiers.size(); ++k)
    if (ops.count(s.modifiers[k])) {
      detail.op = ops.at(s.modifiers[k]);
      found = true;
    }
  const std::string& type = s.type();
  detail.element_bytes = element_bytes(type);
  if (type == "f16x2" || type == "bf16x2") detail.element_bytes = 4;
  detail.type = type.rfind("bf16", 0) == 0 ? 'g' : type.rfind("f16", 0) == 0 ? 'h' : type[0];
  detail.returns = returns;
  detail.strong = true;  // .relaxed unless it says more
  detail.acquires = s.has("acquire") || s.has("acq_rel");
  detail.releases = s.has("release") || s.has("acq_rel");
  detail.wide = is_wide(s);
  const size_t base = returns ? 1 : 0;
  if (!found || !detail.element_bytes || detail.element_bytes > 8 || s.operands.size() < base + 2) return false;
  const Operand& address = s.operands[base];
  const Operand& values = s.operands[base + 1];
  const bool vector = values.kind == Operand::Kind::vector;
  detail.elements = vector ? uint32_t(values.parts.size()) : 1;
  const RegClass cls = detail.element_bytes == 8 ? RegClass::b64 : detail.element_bytes == 2 ? RegClass::b16 : RegClass::b32;
  for (uint32_t e = 0; e < detail.elements; ++e) {
    const uint32_t result = returns ? b.write(vector ? s.operands[0].parts[e] : s.operands[0]) : 0;
    const uint32_t value = b.read(vector ? values.parts[e] : values, cls);
    const uint32_t other = detail.op == Atomic::cas ? b.read(s.operands[base + 2], cls) : 0;
    for (uint32_t slot : {result, value, other}) b.pending_list.push_back(slot);
  }
  detail.wide_address = b.wide(address);
  b.out.s[0] = b.address(address);
  b.out.detail = b.keep(detail);
  b.out.exec = exec_atomic;
  return true;
}

// ---------------------------------------------------------------------------------------------------------

Step exec_hint(Warp&, const Instr&) { return Step::next; }

Step exec_createpolicy(Warp& w, const Instr& i) {  // the policy's bits are opaque: only other hints read them
  uint64_t* d = w.u64(i.d[0]);
  for_lanes(w, [&](uint32_t l) { d[l] = 0x12f0000000000000ull; });
  return Step::next;
}

Step exec_isspacep(Warp& w, const Instr& i) {
  uint32_t r = 0;
  for_lanes(w, [&](uint32_t l) {
    const uint64_t a = w.u64(i.s[0])[l];
    const Space space = in_shared_window(a) ? Space::shared : in_local_window(a) ? Space::local : Space::global;
    r |= uint32_t(space == Space(i.imm)) << l;
  });
  uint32_t& d = w.pred(i.d[0]);
  d = (d & ~w.mask) | (r & w.mask);
  return Step::next;
}

}  // namespace

bool decode_memory(const Statement& s, Builder& b) {
  const std::string& m = s.mnemonic();
  if (m == "ld" || m == "ldu") return decode_ld_st(s, b, true);
  if (m == "st" && !s.has("async") && !s.has("bulk")) return decode_ld_st(s, b, false);
  if (m == "atom") return decode_atomic(s, b, true);
  if (m == "red") return decode_atomic(s, b, false);
  if ((m == "prefetch" && !s.has("tensormap")) || m == "prefetchu" || m == "applypriority" || m == "discard") {
    b.address(s.operands[0]);
    b.out.exec = exec_hint;
    return true;
  }
  if (m == "createpolicy") {
    for (size_t k = 1; k < s.operands.size(); ++k) b.also_reads(s.operands[k]);
    b.out.d[0] = b.write(s.operands[0]);
    b.out.exec = exec_createpolicy;
    return true;
  }
  if (m == "isspacep" && s.operands.size() == 2) {
    Space space;
    space_of(s, space);
    b.out.imm = uint64_t(space);
    b.out.s[0] = b.read(s.operands[1], RegClass::b64);
    b.out.d[0] = b.write(s.operands[0]);
    b.out.exec = exec_isspacep;
    return true;
  }
  return false;
}

}  // namespace emu
