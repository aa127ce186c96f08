// Branches, exits, and what the lanes of one warp tell each other: votes, shuffles, elections, reductions
// (PTX ISA 9.7.12 and 9.7.9.6 to 9.7.9.8, 9.7.13.5 to 9.7.13.9, 9.7.13.15).
#include <algorithm>
#include <map>

#include "lanes.h"

namespace emu {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Control flow

Step exec_bra(Warp& w, const Instr& i) {
  const uint32_t target = uint32_t(i.imm);
  Group& g = w.group();
  if (w.mask == g.mask) {
    g.pc = target;
    return Step::jumped;
  }
  Group taken;  // the warp diverges: the lanes that jump form a group of their own
  taken.pc = target;
  taken.mask = w.mask;
  g.mask &= ~w.mask;
  ++g.pc;
  w.groups.push_back(taken);
  return Step::jumped;
}

Step exec_exit(Warp&, const Instr&) { return Step::exited; }
Step exec_nothing(Warp&, const Instr&) { return Step::next; }
Step exec_trap(Warp& w, const Instr&) { w.fail(ErrorKind::trap, "the kernel executed trap", int(w.first_lane())); }

// ---------------------------------------------------------------------------------------------------------
// Lanes that must meet

// The lanes of `members` (a lane mask operand) have all arrived at this instruction.
bool converged(const Warp& w, uint32_t members) { return (members & w.live & ~w.mask) == 0; }

uint32_t member_mask(Warp& w, uint32_t slot) {
  const uint32_t members = w.u32(slot)[w.first_lane()];
  if (!(members >> w.first_lane() & 1))
    w.fail(ErrorKind::convergence, "the executing lane is not in the instruction's member mask", int(w.first_lane()));
  return members;
}

Step wait_for_members(Warp& w) { return w.block(Wait{Wait::Kind::convergence}); }

enum class Vote : uint8_t { all, any, uniform, ballot };

template <Vote VOTE> Step exec_vote(Warp& w, const Instr& i) {
  const uint32_t members = member_mask(w, i.s[1]);
  if (!converged(w, members)) return wait_for_members(w);
  const uint32_t p = i.imm ? ~w.pred(i.s[0]) : w.pred(i.s[0]);
  const uint32_t votes = p & w.mask & members;
  const uint32_t voters = w.mask & members;
  if constexpr (VOTE == Vote::ballot) {
    uint32_t* d = w.u32(i.d[0]);
    for_lanes(w, [&](uint32_t l) { d[l] = votes; });
  } else {
    const bool result = VOTE == Vote::all ? votes == voters : VOTE == Vote::any ? votes != 0
                                                                               : votes == 0 || votes == voters;
    uint32_t& d = w.pred(i.d[0]);
    d = result ? d | w.mask : d & ~w.mask;
  }
  w.unblock();
  return Step::next;
}

// vote.sync.mode.{pred,b32} d, {!}a, membermask
bool decode_vote(const Statement& s, Builder& b) {
  static const std::map<std::string, Exec> modes = {{"all", exec_vote<Vote::all>}, {"any", exec_vote<Vote::any>},
                                                    {"uni", exec_vote<Vote::uniform>},
                                                    {"ballot", exec_vote<Vote::ballot>}};
  if (s.modifiers.size() != 4 || s.modifiers[1] != "sync" || !modes.count(s.modifiers[2])) return false;
  Operand p = s.operands[1];
  b.out.imm = p.negated;
  p.negated = false;
  b.out.s[0] = b.read(p, RegClass::pred);
  b.out.s[1] = b.read(s.operands[2], RegClass::b32);
  b.out.d[0] = b.write(s.operands[0]);
  b.out.exec = modes.at(s.modifiers[2]);
  return true;
}

Step exec_activemask(Warp& w, const Instr& i) {
  uint32_t* d = w.u32(i.d[0]);
  for_lanes(w, [&](uint32_t l) { d[l] = w.mask; });
  return Step::next;
}

enum class Shuffle : uint8_t { up, down, butterfly, index };
constexpr uint32_t NO_PREDICATE = ~0u;

// shfl.sync.mode.b32 d|p, a, b, c, membermask. c holds the segment mask in bits 8..12 and the clamp in bits 0..4
// (PTX ISA 9.7.9.6).
template <Shuffle MODE> Step exec_shfl(Warp& w, const Instr& i) {
  const uint32_t members = member_mask(w, i.s[3]);
  if (!converged(w, members)) return wait_for_members(w);
  uint32_t source[LANES];
  std::memcpy(source, w.u32(i.s[0]), sizeof source);
  const uint32_t *bs = w.u32(i.s[1]), *cs = w.u32(i.s[2]);
  uint32_t* d = w.u32(i.d[0]);
  uint32_t in_range = 0;
  for_lanes(w, [&](uint32_t l) {
    const int32_t b = int32_t(bs[l] & 31), clamp = int32_t(cs[l] & 31), segment = int32_t(cs[l] >> 8 & 31);
    const int32_t lane = int32_t(l), lowest = lane & segment, highest = lowest | (clamp & ~segment);
    int32_t from;
    bool valid;
    switch (MODE) {
      case Shuffle::up: from = lane - b; valid = from >= highest; break;
      case Shuffle::down: from = lane + b; valid = from <= highest; break;
      case Shuffle::butterfly: from = lane ^ b; valid = from <= highest; break;
      default: from = lowest | (b & ~segment); valid = from <= highest; break;
    }
    if (!valid) from = lane;
    if (!(w.mask >> from & 1))
      w.fail(ErrorKind::uninitialised, "shfl reads from lane " + std::to_string(from) + ", which does not take part",
             int(l));
    d[l] = source[from];
    in_range |= uint32_t(valid) << l;
  });
  if (i.d[1] != NO_PREDICATE) {
    uint32_t& p = w.pred(i.d[1]);
    p = (p & ~w.mask) | (in_range & w.mask);
  }
  w.unblock();
  return Step::next;
}

bool decode_shfl(const Statement& s, Builder& b) {
  static const std::map<std::string, Exec> modes = {{"up", exec_shfl<Shuffle::up>}, {"down", exec_shfl<Shuffle::down>},
                                                    {"bfly", exec_shfl<Shuffle::butterfly>},
                                                    {"idx", exec_shfl<Shuffle::index>}};
  if (s.modifiers.size() != 4 || s.modifiers[1] != "sync" || !modes.count(s.modifiers[2]) || s.operands.size() != 5)
    return false;
  for (size_t k = 0; k < 4; ++k) b.out.s[k] = b.read(s.operands[k + 1], RegClass::b32);
  const Operand& d = s.operands[0];
  b.out.d[1] = NO_PREDICATE;
  if (d.kind == Operand::Kind::pair) {
    b.out.d[0] = b.write(d.parts[0]);
    b.out.d[1] = b.write(d.parts[1]);
  } else {
    b.out.d[0] = b.write(d);
  }
  b.out.exec = modes.at(s.modifiers[2]);
  return true;
}

// elect.sync d|p, membermask: one leader among the members, here (as on hardware) the lowest lane.
Step exec_elect(Warp& w, const Instr& i) {
  const uint32_t members = member_mask(w, i.s[0]);
  if (!converged(w, members)) return wait_for_members(w);
  const uint32_t leader = uint32_t(__builtin_ctz(members & w.mask));
  uint32_t* d = w.u32(i.d[0]);
  for_lanes(w, [&](uint32_t l) { d[l] = leader; });
  uint32_t& p = w.pred(i.d[1]);
  p = (p & ~w.mask) | (1u << leader & w.mask);
  w.unblock();
  return Step::next;
}

bool decode_elect(const Statement& s, Builder& b) {
  if (s.opcode != "elect.sync" || s.operands.size() != 2 || s.operands[0].kind != Operand::Kind::pair) return false;
  b.out.s[0] = b.read(s.operands[1], RegClass::b32);
  b.out.d[0] = b.write(s.operands[0].parts[0]);
  b.out.d[1] = b.write(s.operands[0].parts[1]);
  b.out.exec = exec_elect;
  return true;
}

enum class Reduce : uint8_t { add, min, max, and_, or_, xor_ };

template <class T> T reduce_pair(Reduce op, T a, T b) {
  switch (op) {
    case Reduce::add: return T(uint32_t(a) + uint32_t(b));
    case Reduce::min: return std::min(a, b);
    case Reduce::max: return std::max(a, b);
    case Reduce::and_: return T(uint32_t(a) & uint32_t(b));
    case Reduce::or_: return T(uint32_t(a) | uint32_t(b));
    default: return T(uint32_t(a) ^ uint32_t(b));
  }
}

template <class T> Step exec_redux(Warp& w, const Instr& i) {
  const uint32_t members = member_mask(w, i.s[1]);
  if (!converged(w, members)) return wait_for_members(w);
  const uint32_t* a = w.u32(i.s[0]);
  T r{};
  bool first = true;
  for_lanes(w, [&](uint32_t l) {
    const T x = from_word<T>(a[l]);
    r = first ? x : reduce_pair<T>(Reduce(i.imm), r, x);
    first = false;
  });
  uint32_t* d = w.u32(i.d[0]);
  for_lanes(w, [&](uint32_t l) { d[l] = to_word<T>(r); });
  w.unblock();
  return Step::next;
}

bool decode_redux(const Statement& s, Builder& b) {  // redux.sync.op.type d, a, membermask
  static const std::map<std::string, Reduce> ops = {{"add", Reduce::add}, {"min", Reduce::min}, {"max", Reduce::max},
                                                    {"and", Reduce::and_}, {"or", Reduce::or_}, {"xor", Reduce::xor_}};
  if (s.modifiers.size() != 4 || s.modifiers[1] != "sync" || !ops.count(s.modifiers[2])) return false;
  const std::string& type = s.type();
  if (type != "u32" && type != "s32" && type != "b32") return false;
  b.out.s[0] = b.read(s.operands[1], RegClass::b32);
  b.out.s[1] = b.read(s.operands[2], RegClass::b32);
  b.out.d[0] = b.write(s.operands[0]);
  b.out.imm = uint64_t(ops.at(s.modifiers[2]));
  b.out.exec = type == "s32" ? exec_redux<int32_t> : exec_redux<uint32_t>;
  return true;
}

}  // namespace

bool decode_control(const Statement& s, Builder& b) {
  const std::string& m = s.mnemonic();
  if (m == "bra" && s.operands.size() == 1) {
    b.out.imm = b.target(s.operands[0]);
    b.out.exec = exec_bra;
    return true;
  }
  if (m == "ret" || m == "exit") {
    b.out.exec = exec_exit;
    return true;
  }
  if (m == "trap") {
    b.out.exec = exec_trap;
    return true;
  }
  if (m == "nanosleep" || m == "pmevent" || m == "brkpt") {
    if (m == "nanosleep") b.also_reads(s.operands[0]);
    b.out.exec = exec_nothing;
    return true;
  }
  if (m == "vote") return decode_vote(s, b);
  if (m == "shfl") return decode_shfl(s, b);
  if (m == "elect") return decode_elect(s, b);
  if (m == "redux") return decode_redux(s, b);
  if (m == "activemask") {
    b.out.d[0] = b.write(s.operands[0]);
    b.out.exec = exec_activemask;
    return true;
  }
  return false;
}

}  // namespace emu
