// mbarrier.*: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
//
// A phase completes when no arrivals are pending and the transaction count is zero; the next one then begins with
// the expected arrivals. Our opaque state holds the phase and the pending count before the arrival (token_of).
#include <algorithm>
#include <cstdio>
#include <set>

#include "spaces.h"

namespace emu {

namespace {

constexpr uint32_t MBARRIER_BYTES = 8;
constexpr uint64_t MAX_COUNT = (1u << 20) - 1;  // "Phase of the mbarrier object", ranges of the counts
constexpr int64_t MAX_TX = (1 << 20) - 1;

enum class Space : uint8_t { generic, cta, cluster };

struct Spec {
  Space space = Space::generic;
  bool wide = false;         // the address register has 64 bits
  bool relaxed = false;
  bool has_count = false;    // arrivals: the count is an operand, otherwise 1
  bool expect_tx = false;    // arrivals: .expect_tx
  bool no_complete = false;
  bool drop = false;
  bool may_block = false;    // try_wait
  bool parity = false;
};

const Spec& spec_of(const Instr& i) { return *static_cast<const Spec*>(i.detail); }

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

[[noreturn]] void fail(const Warp* warp, ErrorKind kind, const std::string& message) {
  if (warp) warp->fail(kind, message);
  throw EmulatorError(kind, message);
}

std::string name_of(uint32_t address) { return "the mbarrier at " + hex(address); }

uint64_t token_of(const MBarrier& b) { return b.phase << 20 | uint64_t(b.pending); }
uint64_t token_phase(uint64_t token) { return token >> 20; }
uint64_t token_pending(uint64_t token) { return token & MAX_COUNT; }

// ---------------------------------------------------------------------------------------------------------
// The barrier itself

// Whether the wait is known to have passed: from the warp, from some of its lanes, or from what it issued behind it.
bool knows(const Cluster& cluster, const Clock& clock, const PassedWait& wait) {
  if (clock.at(wait.actor) >= wait.epoch) return true;
  const auto by_lanes = [&](const LaneKnowledge& k) { return k.actor == wait.actor && k.seen >= wait.epoch; };
  const auto by_signal = [&](const Signal& s) { return s.issued >= wait.epoch && clock.at(s.actor) >= s.epoch; };
  const auto& signals = cluster.ctas[wait.cta_rank]->warps[wait.warp].order.signals;
  return std::any_of(clock.partial.begin(), clock.partial.end(), by_lanes) ||
         std::any_of(signals.begin(), signals.end(), by_signal);
}

// Who waits for a phase by its parity must do so before the next one completes: later, the parity says that it has not,
// and the wait may be for ever. What completes the next phase must therefore know of each wait, however early it came
// this time.
void check_passed_waits(Cluster& cluster, MBarrier& b, uint32_t address, const Warp* warp) {
  for (const PassedWait& wait : b.passed) {
    if (knows(cluster, b.arrivals, wait)) continue;
    const Statement& statement = cluster.ctas[0]->warps[0].program->text->statements[wait.statement];
    fail(warp, ErrorKind::barrier,
         "phase " + std::to_string(b.phase) + " of " + name_of(address) + " completes, not ordered after the wait by "
         "warp " + std::to_string(wait.warp) + " of CTA rank " + std::to_string(wait.cta_rank) + " for the phase "
         "before (PTX line " + std::to_string(statement.line) + ": " + statement.text +
         "): had that come later, it would not have seen its phase");
  }
  b.passed.clear();
}

void remember_wait(const Warp& w, MBarrier& b, uint32_t statement) {
  auto same = [&](const PassedWait& wait) { return wait.actor == w.actor; };
  auto found = std::find_if(b.passed.begin(), b.passed.end(), same);
  if (found == b.passed.end()) found = b.passed.insert(found, PassedWait{});
  *found = {w.actor, w.clock.at(w.actor), w.index, w.cta->rank, statement};
}

void complete_phase_if_due(Cluster& cluster, MBarrier& b, uint32_t address, const Warp* warp) {
  if (b.pending != 0 || b.tx_bytes != 0) return;
  if (cluster.race.enabled) check_passed_waits(cluster, b, address, warp);
  ++b.phase;
  b.pending = b.expected;
  b.heard.swap(b.contributors);
  b.contributors.clear();
  if (cluster.race.enabled) b.completed = b.arrivals;
  cluster.notify();
}

uint32_t statement_of(const Cluster& cluster, const Warp* warp) {
  return warp ? warp->program->code[warp->groups[warp->current].pc].statement : cluster.completing;
}

void add_once(std::vector<uint32_t>& statements, uint32_t statement) {
  if (std::find(statements.begin(), statements.end(), statement) == statements.end()) statements.push_back(statement);
}

// The arrival, and the waits that it may hand on, matter if somebody waits for this phase.
void contribute(const Cluster& cluster, MBarrier& b, const Warp* warp) {
  add_once(b.contributors, statement_of(cluster, warp));
  if (warp)
    for (const uint32_t wait : warp->unused_waits) add_once(b.contributors, wait);
}

bool knows_all(const std::vector<uint32_t>& known, const std::vector<uint32_t>& told) {
  for (size_t k = 0; k < told.size(); ++k)
    if (told[k] > (k < known.size() ? known[k] : 0)) return false;
  return true;
}

bool knows_lanes(const Clock& known, const LaneKnowledge& told) {
  return (told.seen <= known.at(told.actor) || known.lanes_seen(told.actor, told.lanes, told.seen)) &&
         (told.proxied <= known.proxied_at(told.actor) || known.lanes_proxied(told.actor, told.lanes, told.proxied));
}

bool knows(const Clock& known, const Clock& told) {
  return knows_all(known.seen, told.seen) && knows_all(known.proxied, told.proxied) &&
         std::all_of(told.partial.begin(), told.partial.end(),
                     [&](const LaneKnowledge& k) { return knows_lanes(known, k); });
}

// A wait is about to pass. It was needed unless the barrier is as it was initialised, or tells only what the warp
// knows; the arrivals of the phase have been waited for in any case.
void hear(Warp& w, const MBarrier& b) {
  if (b.phase == 0) return;
  auto& heard = w.cluster->launch->heard;
  const uint32_t wait = statement_of(*w.cluster, &w);
  const bool nothing_new = w.cluster->race.enabled && knows(w.clock, b.completed);
  if (!nothing_new && !heard[wait].load(std::memory_order_relaxed)) add_once(w.unused_waits, wait);
  for (const uint32_t statement : b.heard) heard[statement].store(1, std::memory_order_relaxed);
}

void count_arrivals(Cluster& cluster, MBarrier& b, uint32_t address, uint64_t count, const Warp* warp) {
  if (int64_t(count) > b.pending)
    fail(warp, ErrorKind::barrier,
         "over-arrival: " + std::to_string(count) + " arrivals on " + name_of(address) + ", phase " +
             std::to_string(b.phase) + ", which expects " + std::to_string(b.expected) + " and waits for " +
             std::to_string(b.pending) + " more (transaction bytes due: " + std::to_string(b.tx_bytes) + ")");
  contribute(cluster, b, warp);
  if (cluster.trace) cluster.trace->note(Note::Kind::arrive, BarrierSpace::mbarrier, address, b.phase);
  b.pending -= int64_t(count);
  complete_phase_if_due(cluster, b, address, warp);
}

void add_transactions(Cluster& cluster, MBarrier& b, uint32_t address, int64_t bytes, const Warp* warp) {
  if (bytes > 0) contribute(cluster, b, warp);
  if (cluster.trace) cluster.trace->note(Note::Kind::arrive, BarrierSpace::mbarrier, address, b.phase);
  b.tx_bytes += bytes;
  if (b.tx_bytes > MAX_TX || b.tx_bytes < -MAX_TX)
    fail(warp, ErrorKind::barrier, "the transaction count of " + name_of(address) + " reaches " +
                                       std::to_string(b.tx_bytes) + "; its range is +-" + std::to_string(MAX_TX));
  complete_phase_if_due(cluster, b, address, warp);
}

MBarrier& find_barrier(Cluster& cluster, uint32_t address, const Warp* warp) {
  Cta& cta = warp && address >> SHARED_RANK_SHIFT == warp->cta->rank ? *warp->cta : cluster.cta_of(address, warp);
  if (address % MBARRIER_BYTES)
    fail(warp, ErrorKind::misaligned, name_of(address) + " is not aligned to 8 bytes");
  const auto found = cta.mbarriers.find(address & SHARED_OFFSET_MASK);
  if (found == cta.mbarriers.end() || !found->second.initialised)
    fail(warp, ErrorKind::barrier, name_of(address) + " is used before mbarrier.init");
  if (warp && cta.live_warps == 0)
    fail(warp, ErrorKind::out_of_bounds, name_of(address) + " belongs to a CTA that has ended");
  return found->second;
}

}  // namespace

MBarrier& Cluster::mbarrier(uint32_t shared_address, const Warp* warp) {
  MBarrier& b = find_barrier(*this, shared_address, warp);
  if (race.enabled && warp && warp->clock.at(b.init_actor) < b.init_epoch) {
    const Statement& init = warp->program->text->statements[b.init_statement];
    warp->fail(ErrorKind::race, "uses " + name_of(shared_address) + ", not ordered after its initialisation by warp " +
                                    std::to_string(b.init_warp) + " (PTX line " + std::to_string(init.line) + ": " +
                                    init.text + ")");
  }
  return b;
}

void Cluster::arrive(uint32_t shared_address, uint32_t count, const Clock& clock, const Warp* warp) {
  MBarrier& b = mbarrier(shared_address, warp);
  if (race.enabled) b.arrivals.join(clock);
  count_arrivals(*this, b, shared_address, count, warp);
}

void Cluster::expect_tx(uint32_t shared_address, int64_t bytes, const Warp* warp) {
  add_transactions(*this, mbarrier(shared_address, warp), shared_address, bytes, warp);
}

void Cluster::complete_tx(uint32_t shared_address, int64_t bytes, const Clock& clock, const Warp* warp) {
  MBarrier& b = mbarrier(shared_address, warp);
  if (race.enabled) b.arrivals.join(clock);
  add_transactions(*this, b, shared_address, -bytes, warp);
}

namespace {

// ---------------------------------------------------------------------------------------------------------
// Operands

uint32_t address_of(Warp& w, const Instr& i, uint32_t lane) {
  const Spec& spec = spec_of(i);
  const uint64_t address = spec.wide ? w.address64(i, i.s[0], lane) : w.address32(i, i.s[0], lane);
  if (spec.space == Space::generic && !in_shared_window(address))
    w.fail(ErrorKind::out_of_bounds, "generic address " + hex(address) + " is not in shared memory", int(lane));
  const uint32_t shared = uint32_t(address);
  if (spec.space != Space::cluster && shared >> SHARED_RANK_SHIFT != w.cta->rank)
    w.fail(ErrorKind::out_of_bounds, "shared address " + hex(shared) + " belongs to CTA rank " +
                                         std::to_string(shared >> SHARED_RANK_SHIFT) +
                                         ", but only .shared::cluster reaches other CTAs", int(lane));
  return shared;
}

// Calls f(address, lanes) for every distinct address among the executing lanes.
template <class F> void for_addresses(Warp& w, const Instr& i, F f) {
  for (uint32_t left = w.mask; left;) {
    const uint32_t address = address_of(w, i, uint32_t(__builtin_ctz(left)));
    uint32_t lanes = 0;
    for (uint32_t m = left; m; m &= m - 1) {
      const uint32_t lane = uint32_t(__builtin_ctz(m));
      if (address_of(w, i, lane) == address) lanes |= 1u << lane;
    }
    f(address, lanes);
    left &= ~lanes;
  }
}

uint64_t sum_over(Warp& w, uint32_t slot, uint32_t lanes) {
  uint64_t sum = 0;
  for (uint32_t m = lanes; m; m &= m - 1) sum += w.u32(slot)[__builtin_ctz(m)];
  return sum;
}

void check_counts(Warp& w, uint32_t slot, uint32_t lanes) {
  for (uint32_t m = lanes; m; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint32_t count = w.u32(slot)[lane];
    if (count == 0 || count > MAX_COUNT)
      w.fail(ErrorKind::barrier, "an arrival count of " + std::to_string(count) + "; it must be 1 to 1048575", lane);
  }
}

// ---------------------------------------------------------------------------------------------------------
// mbarrier.init, mbarrier.inval

void initialise(Warp& w, uint32_t address, uint32_t count, int lane) {
  shared_at(w, address, MBARRIER_BYTES, MBARRIER_BYTES, lane);
  MBarrier& b = w.cta->mbarriers[address & SHARED_OFFSET_MASK];
  if (b.initialised)
    w.fail(ErrorKind::barrier, name_of(address) + " is initialised again without mbarrier.inval (phase " +
                                   std::to_string(b.phase) + ", " + std::to_string(b.pending) +
                                   " arrivals pending)", lane);
  touch_shared(w, address, MBARRIER_BYTES, true, false, lane);
  b = MBarrier{};
  b.initialised = true;
  b.expected = count;
  b.pending = count;
  b.actor = w.cluster->race.new_actor();
  if (!w.order.inits) w.order.inits = w.cluster->race.new_actor();
  b.init_actor = w.order.inits;
  b.init_epoch = w.clock.at(b.init_actor) + 1;
  b.init_warp = w.index;
  b.init_statement = w.program->code[w.group().pc].statement;
  w.clock.know(b.init_actor, b.init_epoch);
}

Step exec_init(Warp& w, const Instr& i) {
  check_counts(w, i.s[1], w.mask);
  for (uint32_t m = w.mask; m; m &= m - 1) {
    const uint32_t lane = uint32_t(__builtin_ctz(m));
    initialise(w, address_of(w, i, lane), w.u32(i.s[1])[lane], int(lane));
  }
  return Step::next;
}

Step exec_inval(Warp& w, const Instr& i) {
  for (uint32_t m = w.mask; m; m &= m - 1) {
    const uint32_t lane = uint32_t(__builtin_ctz(m)), address = address_of(w, i, lane);
    MBarrier& b = w.cluster->mbarrier(address, &w);
    touch_shared(w, address, MBARRIER_BYTES, true, false, int(lane));
    b.initialised = false;
  }
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// mbarrier.arrive, .arrive_drop, .arrive.expect_tx, .expect_tx, .complete_tx

// The executing lanes of `lanes` publish what they know.
void publish(Warp& w, MBarrier& b, uint32_t lanes, bool relaxed) {
  if (!w.cluster->race.enabled) return;
  if (relaxed) {
    b.arrivals.join(w.order.fenced);
    return;
  }
  const uint32_t mask = w.mask;
  w.mask = lanes;
  release_into(w, b.arrivals);
  w.mask = mask;
}

void write_tokens(Warp& w, const Instr& i, const MBarrier& before, uint32_t lanes) {
  MBarrier state;
  state.phase = before.phase;
  state.pending = before.pending;
  for (uint32_t m = lanes; m; m &= m - 1) {
    const uint32_t lane = uint32_t(__builtin_ctz(m));
    w.u64(i.d[0])[lane] = token_of(state);
    state.pending -= spec_of(i).has_count ? w.u32(i.s[1])[lane] : 1;
  }
}

void drop(Warp& w, MBarrier& b, uint32_t address, uint64_t count) {
  if (count > b.expected)
    w.fail(ErrorKind::barrier, "arrive_drop of " + std::to_string(count) + " on " + name_of(address) +
                                   ", which expects " + std::to_string(b.expected));
  b.expected -= uint32_t(count);
}

Step exec_arrive(Warp& w, const Instr& i) {
  const Spec& spec = spec_of(i);
  if (spec.has_count) check_counts(w, i.s[1], w.mask);
  for_addresses(w, i, [&](uint32_t address, uint32_t lanes) {
    MBarrier& b = w.cluster->mbarrier(address, &w);
    const uint64_t count = spec.has_count ? sum_over(w, i.s[1], lanes) : uint64_t(__builtin_popcount(lanes));
    if (spec.no_complete && int64_t(count) >= b.pending && b.tx_bytes == 0)
      w.fail(ErrorKind::barrier, "an arrival with .noComplete completes the phase of " + name_of(address));
    if (spec.space != Space::cluster) write_tokens(w, i, b, lanes);
    publish(w, b, lanes, spec.relaxed);
    if (spec.expect_tx) add_transactions(*w.cluster, b, address, int64_t(sum_over(w, i.s[2], lanes)), &w);
    if (spec.drop) drop(w, b, address, count);
    count_arrivals(*w.cluster, b, address, count, &w);
  });
  return Step::next;
}

Step exec_expect_tx(Warp& w, const Instr& i) {
  for_addresses(w, i, [&](uint32_t address, uint32_t lanes) {
    w.cluster->expect_tx(address, int64_t(sum_over(w, i.s[2], lanes)), &w);
  });
  return Step::next;
}

Step exec_complete_tx(Warp& w, const Instr& i) {
  for_addresses(w, i, [&](uint32_t address, uint32_t lanes) {
    w.cluster->complete_tx(address, int64_t(sum_over(w, i.s[2], lanes)), Clock{}, &w);
  });
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// mbarrier.test_wait, mbarrier.try_wait, mbarrier.pending_count

// .parity: the phase of that parity has completed, that is, the current one has the other parity. Otherwise the
// phase of the state has completed.
bool is_complete(Warp& w, const Instr& i, const MBarrier& b, uint32_t lane) {
  if (spec_of(i).parity) return (b.phase & 1) != (w.u32(i.s[1])[lane] & 1);
  return b.phase != token_phase(w.u64(i.s[1])[lane]);
}

void check_parity(Warp& w, const Instr& i) {
  if (!spec_of(i).parity) return;
  for (uint32_t m = w.mask; m; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint32_t parity = w.u32(i.s[1])[lane];
    if (parity > 1)
      w.fail(ErrorKind::invalid_operand, "a phase parity of " + std::to_string(parity) + "; it must be 0 or 1", lane);
  }
}

Step exec_wait(Warp& w, const Instr& i) {
  const Spec& spec = spec_of(i);
  check_parity(w, i);
  uint32_t ready = 0;
  Wait wait{Wait::Kind::mbarrier};
  wait.may_time_out = true;
  for_addresses(w, i, [&](uint32_t address, uint32_t lanes) {
    const MBarrier& b = w.cluster->mbarrier(address, &w);
    for (uint32_t m = lanes; m; m &= m - 1) {
      const uint32_t lane = uint32_t(__builtin_ctz(m));
      if (is_complete(w, i, b, lane)) {
        ready |= 1u << lane;
      } else {
        wait.address = address;
        wait.phase = uint32_t(spec.parity ? w.u32(i.s[1])[lane] : token_phase(w.u64(i.s[1])[lane]) & 1);
      }
    }
  });
  if (ready != w.mask && spec.may_block && !w.group().timed_out) return w.block(wait);
  for_addresses(w, i, [&](uint32_t address, uint32_t lanes) {
    if (!(lanes & ready)) return;
    const MBarrier& b = w.cluster->mbarrier(address, &w);
    hear(w, b);
    if (w.trace && b.phase) w.cluster->trace->note(Note::Kind::wait, BarrierSpace::mbarrier, address, b.phase - 1);
  });
  if (ready && w.cluster->race.enabled)
    for_addresses(w, i, [&](uint32_t address, uint32_t lanes) {
      if (!(lanes & ready)) return;
      MBarrier& b = w.cluster->mbarrier(address, &w);
      remember_wait(w, b, i.statement);
      const Clock& completed = b.completed;
      if (spec.relaxed) w.order.unfenced.join(completed); else acquire(w, completed);
    });
  uint32_t& result = w.pred(i.d[0]);
  result = (result & ~w.mask) | ready;
  if (spec.may_block) w.unblock();
  return Step::next;
}

Step exec_pending_count(Warp& w, const Instr& i) {
  for (uint32_t m = w.mask; m; m &= m - 1) {
    const uint32_t lane = uint32_t(__builtin_ctz(m));
    w.u32(i.d[0])[lane] = uint32_t(token_pending(w.u64(i.s[0])[lane]));
  }
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// Decoding

bool only(const Statement& s, const std::set<std::string>& allowed) {
  return std::all_of(s.modifiers.begin() + 2, s.modifiers.end(),
                     [&](const std::string& m) { return allowed.count(m) != 0; });
}

const std::set<std::string> SPACES = {"shared", "shared::cta", "b64"};

std::set<std::string> with(std::set<std::string> allowed, const std::set<std::string>& more) {
  allowed.insert(more.begin(), more.end());
  return allowed;
}

void decode_address(const Operand& operand, Spec& spec, const Statement& s, Builder& b) {
  spec.space = s.has("shared::cluster")                     ? Space::cluster
               : s.has("shared") || s.has("shared::cta") ? Space::cta
                                                            : Space::generic;
  b.out.s[0] = b.address(operand);
  spec.wide = b.wide(operand);
  if (!spec.wide && spec.space == Space::generic) b.fail("a generic address must have 64 bits");
}

bool finish(Builder& b, const Spec& spec, Exec exec) {
  b.out.detail = b.keep(spec);
  b.out.exec = exec;
  return true;
}

bool decode_init(const Statement& s, Builder& b) {
  const bool init = s.modifiers[1] == "init";
  if (!only(s, SPACES) || s.operands.size() != (init ? 2u : 1u)) return false;
  Spec spec;
  decode_address(s.operands[0], spec, s, b);
  if (init) b.out.s[1] = b.read(s.operands[1], RegClass::b32);
  return finish(b, spec, init ? exec_init : exec_inval);
}

bool decode_transactions(const Statement& s, Builder& b) {
  if (!only(s, with(SPACES, {"shared::cluster", "relaxed", "cta", "cluster"})) || s.operands.size() != 2) return false;
  Spec spec;
  decode_address(s.operands[0], spec, s, b);
  b.out.s[2] = b.read(s.operands[1], RegClass::b32);
  return finish(b, spec, s.modifiers[1] == "expect_tx" ? exec_expect_tx : exec_complete_tx);
}

bool decode_arrive(const Statement& s, Builder& b) {
  if (!only(s, with(SPACES, {"shared::cluster", "release", "relaxed", "cta", "cluster", "expect_tx", "noComplete"})))
    return false;
  if (s.operands.size() < 2 || s.operands.size() > 3) return false;
  Spec spec;
  spec.drop = s.modifiers[1] == "arrive_drop";
  spec.expect_tx = s.has("expect_tx");
  spec.no_complete = s.has("noComplete");
  spec.relaxed = s.has("relaxed");
  const bool third = s.operands.size() == 3;
  if ((spec.expect_tx || spec.no_complete) && !third) return false;
  if (s.has("shared::cluster") && s.operands[0].kind != Operand::Kind::sink)
    b.fail("an arrival on .shared::cluster returns no state: the destination must be _");
  decode_address(s.operands[1], spec, s, b);
  spec.has_count = third && !spec.expect_tx;
  if (spec.has_count) b.out.s[1] = b.read(s.operands[2], RegClass::b32);
  if (spec.expect_tx) b.out.s[2] = b.read(s.operands[2], RegClass::b32);
  b.out.d[0] = b.write(s.operands[0]);
  return finish(b, spec, exec_arrive);
}

bool decode_wait(const Statement& s, Builder& b) {
  if (!only(s, with(SPACES, {"parity", "acquire", "relaxed", "cta", "cluster"}))) return false;
  Spec spec;
  spec.may_block = s.modifiers[1] == "try_wait";
  if (s.operands.size() != 3 && !(spec.may_block && s.operands.size() == 4)) return false;
  spec.parity = s.has("parity");
  spec.relaxed = s.has("relaxed");
  decode_address(s.operands[1], spec, s, b);
  b.out.s[1] = b.read(s.operands[2], spec.parity ? RegClass::b32 : RegClass::b64);
  if (s.operands.size() == 4) b.out.s[2] = b.read(s.operands[3], RegClass::b32);  // suspendTimeHint
  b.out.d[0] = b.write(s.operands[0]);
  return finish(b, spec, exec_wait);
}

bool decode_pending_count(const Statement& s, Builder& b) {
  if (!only(s, {"b64"}) || s.operands.size() != 2) return false;
  b.out.s[0] = b.read(s.operands[1], RegClass::b64);
  b.out.d[0] = b.write(s.operands[0]);
  b.out.exec = exec_pending_count;
  return true;
}

}  // namespace

bool decode_mbarrier(const Statement& s, Builder& b) {
  if (s.mnemonic() != "mbarrier" || s.modifiers.size() < 3 || s.type() != "b64") return false;
  const std::string& operation = s.modifiers[1];
  if (operation == "init" || operation == "inval") return decode_init(s, b);
  if (operation == "expect_tx" || operation == "complete_tx") return decode_transactions(s, b);
  if (operation == "arrive" || operation == "arrive_drop") return decode_arrive(s, b);
  if (operation == "test_wait" || operation == "try_wait") return decode_wait(s, b);
  if (operation == "pending_count") return decode_pending_count(s, b);
  return false;
}

}  // namespace emu
