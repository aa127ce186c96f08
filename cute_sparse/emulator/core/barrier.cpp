// bar, barrier, barrier.cluster, bar.warp.sync, fence, membar and setmaxnreg: PTX ISA, "Parallel Synchronization and
// Communication Instructions" and "Miscellaneous Instructions: setmaxnreg".
#include <algorithm>
#include <cstdio>
#include <set>

#include "spaces.h"

namespace emu {

namespace {

constexpr uint32_t WHOLE_CTA = UINT32_MAX;  // NamedBarrier::expected_threads: every warp that has not exited

enum class Action : uint8_t { sync, arrive, red_popc, red_and, red_or };

struct BarrierSpec {
  Action action = Action::sync;
  bool aligned = true;
  bool has_count = false;
  bool negated = false;  // .red: the source predicate
};

std::string number(uint64_t value) { return std::to_string(value); }

uint32_t cta_threads(const Cta& cta) { return uint32_t(cta.warps.size()) * LANES; }

// ---------------------------------------------------------------------------------------------------------
// bar.{sync,arrive,red}, barrier.{sync,arrive,red}

uint32_t uniform(Warp& w, uint32_t slot, const char* what) {
  const uint32_t value = w.u32(slot)[w.first_lane()];
  for (uint32_t m = w.mask; m; m &= m - 1)
    if (w.u32(slot)[__builtin_ctz(m)] != value)
      w.fail(ErrorKind::barrier, std::string("the lanes of a warp name different ") + what, __builtin_ctz(m));
  return value;
}

uint32_t barrier_number(Warp& w, const Instr& i) {
  const uint32_t id = uniform(w, i.s[0], "barriers");
  if (id >= w.cta->barriers.size()) w.fail(ErrorKind::barrier, "barrier " + number(id) + "; there are 0 to 15");
  return id;
}

uint32_t thread_count(Warp& w, const Instr& i, const BarrierSpec& spec) {
  if (!spec.has_count) return WHOLE_CTA;
  const uint32_t count = uniform(w, i.s[1], "thread counts");
  if (count == 0 || count % LANES)
    w.fail(ErrorKind::barrier, "a thread count of " + number(count) + "; it must be a multiple of 32");
  if (count > cta_threads(*w.cta))
    w.fail(ErrorKind::barrier, "a thread count of " + number(count) + " in a CTA of " + number(cta_threads(*w.cta)) +
                                   " threads");
  return count;
}

uint32_t due(const Cta& cta, const NamedBarrier& b) {
  return b.expected_threads == WHOLE_CTA ? cta.live_warps * LANES : b.expected_threads;
}

void complete_if_due(Cta& cta, NamedBarrier& b) {
  if (b.arrived_threads == 0 || b.arrived_threads < due(cta, b)) return;
  ++b.generation;
  b.arrived_threads = 0;
  b.result_and = b.reduction_and;
  b.result_or = b.reduction_or;
  b.result_count = b.reduction_count;
  b.reduction_and = 1;
  b.reduction_or = b.reduction_count = 0;
  b.completed.join(b.arrivals);
  if (b.actor) b.completed.know(b.actor, uint32_t(b.generation));
  b.arrivals.clear();
  cta.cluster->notify();
}

bool same_count(const Cta& cta, uint32_t a, uint32_t b) {
  auto threads = [&](uint32_t count) { return count == WHOLE_CTA ? cta_threads(cta) : count; };
  return threads(a) == threads(b);
}

// bar.arrive does not wait. Who arrives again must know from elsewhere that the barrier has completed since: both
// arrivals would otherwise count in one use of it, in the place of other threads'.
void arrive_anew(Warp& w, const NamedBarrier& b, uint32_t id) {
  uint32_t& arrived_for = w.order.barrier_arrivals[id];
  if (arrived_for && w.clock.at(b.actor) < arrived_for)
    w.fail(ErrorKind::barrier, "arrives at barrier " + number(id) + " again, and nothing tells the warp that the other "
                                   "threads have come to where it arrived before");
  arrived_for = uint32_t(b.generation + 1);
}

// A warp counts as 32 threads, however many it has; lanes of a diverged warp (not .aligned) count singly.
void arrive(Warp& w, const Instr& i, const BarrierSpec& spec, uint32_t id) {
  NamedBarrier& b = w.cta->barriers[id];
  const uint32_t count = thread_count(w, i, spec);
  if (spec.aligned && w.mask != w.live)
    w.fail(ErrorKind::convergence, "an aligned barrier that not all threads of the warp execute");
  if (b.arrived_threads == 0) {
    b.expected_threads = count;
  } else if (!same_count(*w.cta, b.expected_threads, count)) {
    auto threads = [&](uint32_t c) { return number(c == WHOLE_CTA ? cta_threads(*w.cta) : c); };
    w.fail(ErrorKind::barrier, "barrier " + number(id) + " is used with " + threads(count) + " threads while " +
                                   number(b.arrived_threads) + " have arrived that expect " +
                                   threads(b.expected_threads));
  }
  const uint32_t threads = w.mask == w.live ? LANES : uint32_t(__builtin_popcount(w.mask));
  if (b.arrived_threads + threads > due(*w.cta, b))
    w.fail(ErrorKind::barrier, "over-arrival: barrier " + number(id) + " expects " + number(due(*w.cta, b)) +
                                   " threads, " + number(b.arrived_threads) + " have arrived, and " +
                                   number(threads) + " more do");
  b.arrived_threads += threads;
  if (!w.cluster->race.enabled) return;
  if (b.actor == 0) b.actor = w.cluster->race.new_actor();
  if (spec.action == Action::arrive && w.mask == w.live) arrive_anew(w, b, id);
  release_into(w, b.arrivals);
}

void reduce(Warp& w, const Instr& i, const BarrierSpec& spec, NamedBarrier& b) {
  const uint32_t bits = (spec.negated ? ~w.pred(i.s[2]) : w.pred(i.s[2])) & w.mask;
  b.reduction_and &= bits == w.mask;
  b.reduction_or |= bits != 0;
  b.reduction_count += uint32_t(__builtin_popcount(bits));
}

void write_result(Warp& w, const Instr& i, Action action, const NamedBarrier& b) {
  if (action == Action::red_popc) {
    for (uint32_t m = w.mask; m; m &= m - 1) w.u32(i.d[0])[__builtin_ctz(m)] = b.result_count;
  } else {
    const bool result = action == Action::red_and ? b.result_and : b.result_or;
    uint32_t& p = w.pred(i.d[0]);
    p = (p & ~w.mask) | (result ? w.mask : 0);
  }
}

// The generation that the warp's arrival formed.
void trace_barrier(Warp& w, Note::Kind kind, uint32_t id) {
  if (w.trace) w.cluster->trace->note(kind, BarrierSpace::named, w.cta->rank << 8 | id, w.group().token);
}

Step exec_barrier(Warp& w, const Instr& i) {
  const BarrierSpec& spec = *static_cast<const BarrierSpec*>(i.detail);
  const uint32_t id = barrier_number(w, i);
  NamedBarrier& b = w.cta->barriers[id];
  if (!w.group().arrived) {
    arrive(w, i, spec, id);
    if (spec.action >= Action::red_popc) reduce(w, i, spec, b);
    w.group().token = b.generation;
    w.group().arrived = spec.action != Action::arrive;
  }
  complete_if_due(*w.cta, b);
  if (spec.action == Action::arrive) {
    trace_barrier(w, Note::Kind::arrive, id);
    return Step::next;
  }
  if (b.generation == w.group().token) return w.block({Wait::Kind::named_barrier, id});
  if (w.cluster->race.enabled) {
    acquire(w, b.completed);
    if (w.mask == w.live) converge(w);
  }
  if (spec.action != Action::sync) write_result(w, i, spec.action, b);
  trace_barrier(w, Note::Kind::sync, id);
  w.unblock();
  return Step::next;
}

bool decode_cta_barrier(const Statement& s, Builder& b) {
  std::vector<std::string> m(s.modifiers.begin() + 1, s.modifiers.end());
  if (!m.empty() && m[0] == "cta") m.erase(m.begin());
  if (m.empty()) return false;
  BarrierSpec spec;
  const std::string action = m[0];
  m.erase(m.begin());
  if (action == "red") {
    if (m.empty()) return false;
    if (m[0] == "popc") spec.action = Action::red_popc;
    else if (m[0] == "and") spec.action = Action::red_and;
    else if (m[0] == "or") spec.action = Action::red_or;
    else return false;
    m.erase(m.begin());
    const std::string type = spec.action == Action::red_popc ? "u32" : "pred";
    if (m.empty() || m.back() != type) return false;
    m.pop_back();
  } else if (action == "sync" || action == "arrive") {
    spec.action = action == "sync" ? Action::sync : Action::arrive;
  } else {
    return false;
  }
  spec.aligned = s.mnemonic() == "bar" || (!m.empty() && m[0] == "aligned");
  if (!m.empty() && m[0] == "aligned" && s.mnemonic() == "barrier") m.erase(m.begin());
  if (!m.empty()) return false;

  const bool red = spec.action >= Action::red_popc;
  const size_t first = red ? 1 : 0, last = s.operands.size() - (red ? 1 : 0);  // of a, b
  if (s.operands.size() < first + 1 || last <= first || last - first > 2) return false;
  spec.has_count = last - first == 2;
  if (spec.action == Action::arrive && !spec.has_count) b.fail("arrive needs a thread count");
  b.out.s[0] = b.read(s.operands[first], RegClass::b32);
  if (spec.has_count) b.out.s[1] = b.read(s.operands[first + 1], RegClass::b32);
  if (red) {
    Operand source = s.operands.back();
    spec.negated = source.negated;
    source.negated = false;
    b.out.s[2] = b.read(source, RegClass::pred);
    b.out.d[0] = b.write(s.operands[0]);
  }
  b.out.aligned = spec.aligned;
  b.out.detail = b.keep(spec);
  b.out.exec = exec_barrier;
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// bar.warp.sync

Step exec_warp_sync(Warp& w, const Instr& i) {
  const uint32_t members = w.u32(i.s[0])[w.first_lane()];
  if (w.mask & ~members)
    w.fail(ErrorKind::convergence, "a lane executes bar.warp.sync that is not in its mask",
           __builtin_ctz(w.mask & ~members));
  const uint32_t needed = members & w.live;
  const bool waits = (w.mask & needed) != needed;
  if (waits || !w.cluster->race.enabled || w.order.lanes_differ || needed != w.live)
    w.cluster->launch->heard[i.statement].store(1, std::memory_order_relaxed);
  if (waits) return w.block({Wait::Kind::convergence});
  if (w.cluster->race.enabled && needed == w.live) converge(w);
  w.unblock();
  return Step::next;
}

bool decode_warp_sync(const Statement& s, Builder& b) {
  if (s.opcode != "bar.warp.sync" || s.operands.size() != 1) return false;
  b.out.s[0] = b.read(s.operands[0], RegClass::b32);
  b.out.aligned = s.operands[0].kind == Operand::Kind::immediate && uint32_t(s.operands[0].bits) == ALL_LANES;
  b.out.exec = exec_warp_sync;
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// barrier.cluster

// Complete when every thread of the cluster that has not exited has arrived.
void complete_cluster_if_due(Cluster& cluster) {
  for (const auto& cta : cluster.ctas)
    for (const Warp& w : cta->warps)
      if (w.live & ~w.order.cluster_arrived) return;
  NamedBarrier& b = cluster.cluster_barrier;
  ++b.generation;
  b.completed.join(b.arrivals);
  b.arrivals.clear();
  for (const auto& cta : cluster.ctas)
    for (Warp& w : cta->warps) w.order.cluster_arrived = 0;
  cluster.notify();
}

template <bool RELAXED> Step exec_cluster_arrive(Warp& w, const Instr&) {
  WarpOrder& order = w.order;
  NamedBarrier& b = w.cluster->cluster_barrier;
  if (order.cluster_unwaited & w.mask)
    w.fail(ErrorKind::barrier, "a thread arrives at the cluster barrier again without barrier.cluster.wait between",
           __builtin_ctz(order.cluster_unwaited & w.mask));
  order.cluster_arrived |= w.mask;
  order.cluster_unwaited |= w.mask;
  order.cluster_generation = b.generation;
  if (w.trace) w.cluster->trace->note(Note::Kind::arrive, BarrierSpace::cluster, 0, b.generation);
  if (w.cluster->race.enabled) {
    if (RELAXED) b.arrivals.join(order.fenced); else release_into(w, b.arrivals);
  }
  complete_cluster_if_due(*w.cluster);
  return Step::next;
}

Step exec_cluster_wait(Warp& w, const Instr&) {
  WarpOrder& order = w.order;
  NamedBarrier& b = w.cluster->cluster_barrier;
  if (w.mask & ~order.cluster_unwaited)
    w.fail(ErrorKind::barrier, "a thread waits at the cluster barrier without having arrived",
           __builtin_ctz(w.mask & ~order.cluster_unwaited));
  if (b.generation == order.cluster_generation) complete_cluster_if_due(*w.cluster);  // others may have exited
  if (b.generation == order.cluster_generation) return w.block({Wait::Kind::cluster_barrier});
  order.cluster_unwaited &= ~w.mask;
  if (w.trace) w.cluster->trace->note(Note::Kind::wait, BarrierSpace::cluster, 0, order.cluster_generation);
  if (w.cluster->race.enabled) acquire(w, b.completed);
  w.unblock();
  return Step::next;
}

bool decode_cluster_barrier(const Statement& s, Builder& b) {
  if (s.mnemonic() != "barrier" || s.modifiers.size() < 3 || s.modifiers[1] != "cluster" || !s.operands.empty())
    return false;
  const bool arrives = s.modifiers[2] == "arrive";
  if (!arrives && s.modifiers[2] != "wait") return false;
  const std::set<std::string> allowed =
      arrives ? std::set<std::string>{"release", "relaxed", "aligned"} : std::set<std::string>{"acquire", "aligned"};
  for (size_t k = 3; k < s.modifiers.size(); ++k)
    if (!allowed.count(s.modifiers[k])) return false;
  b.out.aligned = s.has("aligned");
  b.out.exec = !arrives ? exec_cluster_wait
                        : s.has("relaxed") ? exec_cluster_arrive<true> : exec_cluster_arrive<false>;
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// fence, membar

// Orders memory for later relaxed synchronisation: what has been learnt by relaxed reads becomes known, and what is
// known is published by later relaxed writes. WIDE: with other clusters, too, which the scope reaches.
template <bool WIDE> Step exec_fence(Warp& w, const Instr&) {
  if (!w.cluster->race.enabled) return Step::next;
  acquire(w, w.order.unfenced);
  if (WIDE) acquire(w, w.order.unfenced_widely);
  release_into(w, w.order.fenced);
  if (WIDE) w.order.fenced_widely.join(w.order.fenced);
  return Step::next;
}

// fence.mbarrier_init.release.cluster: covers this warp's earlier mbarrier.init operations, and them alone.
Step exec_mbarrier_init_fence(Warp& w, const Instr&) {
  const ActorId inits = w.order.inits;
  if (!inits) return Step::next;
  const uint32_t epoch = w.clock.at(inits);
  w.clock.know_proxied(inits, epoch);
  w.order.fenced.know(inits, epoch);
  w.order.fenced.know_proxied(inits, epoch);
  return Step::next;
}

// fence.proxy.async: generic accesses that are ordered before it are visible to the async proxy behind it.
Step exec_proxy_fence(Warp& w, const Instr&) {
  if (!w.cluster->race.enabled) return Step::next;
  fence_proxy(w);
  return Step::next;
}

Step exec_nothing(Warp&, const Instr&) { return Step::next; }

bool one_of(const std::string& opcode, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(), [&](const char* n) { return opcode == n; });
}

bool decode_fence(const Statement& s, Builder& b) {
  if (s.mnemonic() != "fence" && s.mnemonic() != "membar") return false;
  const std::string& o = s.opcode;
  if (o == "fence.mbarrier_init.release.cluster") {
    b.out.exec = exec_mbarrier_init_fence;
  } else if (one_of(o, {"fence.proxy.async", "fence.proxy.async.global", "fence.proxy.async.shared::cta",
                        "fence.proxy.async.shared::cluster", "membar.proxy.async", "membar.proxy.async.global",
                        "membar.proxy.async.shared::cta", "membar.proxy.async.shared::cluster"})) {
    b.out.exec = exec_proxy_fence;
  } else if (one_of(o, {"fence.proxy.alias", "membar.proxy.alias"})) {
    b.out.exec = exec_nothing;  // virtual aliases do not exist here
  } else if (s.modifiers.size() >= 2 && s.modifiers[1] == "proxy") {
    // fence.proxy.tensormap::generic.{release,acquire}.scope: tensor maps are read when an instruction executes, so
    // only the ordering of memory is left to do.
    if (s.mnemonic() != "fence" || s.modifiers.size() != 5 || s.modifiers[2] != "tensormap::generic") return false;
    if (s.modifiers[3] == "acquire" && s.operands.size() == 2) {
      b.address(s.operands[0]);
    } else if (s.modifiers[3] != "release" || !s.operands.empty()) {
      return false;
    }
    b.out.exec = is_wide(s) ? exec_fence<true> : exec_fence<false>;
    return true;
  } else {
    const std::set<std::string> levels = {"membar.cta", "membar.gl", "membar.sys"};
    std::set<std::string> known = levels;
    for (const char* sem : {"", ".sc", ".acq_rel", ".acquire", ".release"})
      for (const char* scope : {".cta", ".cluster", ".gpu", ".sys"}) known.insert(std::string("fence") + sem + scope);
    known.insert({"fence.acquire.sync_restrict::shared::cluster.cluster",
                  "fence.release.sync_restrict::shared::cta.cluster"});
    if (!known.count(o)) return false;
    b.out.exec = is_wide(s) ? exec_fence<true> : exec_fence<false>;
  }
  return s.operands.empty();
}

// ---------------------------------------------------------------------------------------------------------
// setmaxnreg

constexpr uint32_t SM_REGISTERS = 65536;
constexpr uint32_t WARPS_PER_GROUP = 4;

// Registers of a CTA. What a kernel starts with is ptxas's choice; the most it can choose is assumed.
struct RegisterPool {
  std::vector<uint32_t> per_thread;            // of each warp
  std::vector<std::vector<uint32_t>> history;  // values set by each warp
  int64_t free = 0;

  explicit RegisterPool(uint32_t warps) : history(warps) {
    const uint32_t most = SM_REGISTERS / (warps * LANES) / 8 * 8;
    per_thread.assign(warps, std::min(most, 256u));
  }
};

RegisterPool& register_pool(Cta& cta) {
  if (!cta.register_pool) cta.register_pool = std::make_shared<RegisterPool>(uint32_t(cta.warps.size()));
  return *static_cast<RegisterPool*>(cta.register_pool.get());
}

// "All warps in a warpgroup must execute the same setmaxnreg."
void check_warpgroup(Warp& w, const RegisterPool& pool, uint32_t value) {
  const size_t nth = pool.history[w.index].size();
  const uint32_t first = w.index / WARPS_PER_GROUP * WARPS_PER_GROUP;
  for (uint32_t other = first; other < first + WARPS_PER_GROUP && other < pool.history.size(); ++other)
    if (pool.history[other].size() > nth && pool.history[other][nth] != value)
      w.fail(ErrorKind::convergence, "setmaxnreg " + number(value) + ", but warp " + number(other) +
                                         " of the same warpgroup executed setmaxnreg " +
                                         number(pool.history[other][nth]));
}

Step exec_setmaxnreg(Warp& w, const Instr& i) {
  const uint32_t value = uint32_t(i.imm);
  const bool decrease = i.offset != 0;
  if (value < 24 || value > 256 || value % 8)
    w.fail(ErrorKind::invalid_operand, "setmaxnreg " + number(value) + "; it must be a multiple of 8 from 24 to 256");
  RegisterPool& pool = register_pool(*w.cta);
  check_warpgroup(w, pool, value);
  uint32_t& own = pool.per_thread[w.index];
  if (decrease && value > own)
    w.fail(ErrorKind::invalid_operand, "setmaxnreg.dec to " + number(value) + ", but the warp has at most " +
                                           number(own) + " registers per thread");
  const int64_t more = (int64_t(value) - int64_t(own)) * LANES;
  if (more > pool.free) return w.block({Wait::Kind::registers, value});
  pool.free -= more;
  own = value;
  pool.history[w.index].push_back(value);
  w.unblock();
  w.cluster->notify();
  return Step::next;
}

bool decode_setmaxnreg(const Statement& s, Builder& b) {
  if (!one_of(s.opcode, {"setmaxnreg.inc.sync.aligned.u32", "setmaxnreg.dec.sync.aligned.u32"}) ||
      s.operands.size() != 1)
    return false;
  b.out.imm = uint64_t(b.integer(s.operands[0]));
  b.out.offset = s.modifiers[1] == "dec";
  b.out.aligned = true;
  b.out.exec = exec_setmaxnreg;
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// Deadlock reports

std::string describe_mbarrier(const Cta& cta, const Wait& wait) {
  char place[16];
  std::snprintf(place, sizeof place, "0x%x", uint32_t(wait.address));
  std::string text = std::string("mbarrier at ") + place + ", phase parity " + number(wait.phase);
  const uint32_t rank = uint32_t(wait.address) >> SHARED_RANK_SHIFT;
  if (rank >= cta.cluster->ctas.size()) return text;
  const auto& barriers = cta.cluster->ctas[rank]->mbarriers;
  const auto found = barriers.find(uint32_t(wait.address) & SHARED_OFFSET_MASK);
  if (found == barriers.end() || !found->second.initialised) return text + ", not initialised";
  const MBarrier& b = found->second;
  return text + ": it forms phase " + number(b.phase) + " (parity " + number(b.phase & 1) + "), " +
         std::to_string(b.pending) + " of " + number(b.expected) + " arrivals pending, " +
         std::to_string(b.tx_bytes) + " transaction bytes due";
}

std::string describe_cluster_barrier(const Cluster& cluster) {
  std::string text = "the cluster barrier; not arrived:";
  for (const auto& cta : cluster.ctas)
    for (const Warp& w : cta->warps)
      if (w.live & ~w.order.cluster_arrived) text += " CTA rank " + number(cta->rank) + " warp " + number(w.index) + ",";
  text.pop_back();
  return text;
}

}  // namespace

std::string describe_wait(const Cta& cta, const Wait& wait) {
  switch (wait.kind) {
    case Wait::Kind::none: return "nothing";
    case Wait::Kind::mbarrier: return describe_mbarrier(cta, wait);
    case Wait::Kind::named_barrier: {
      const NamedBarrier& b = cta.barriers[wait.address];
      return "barrier " + number(wait.address) + ": " + number(b.arrived_threads) + " of " + number(due(cta, b)) +
             " threads have arrived";
    }
    case Wait::Kind::cluster_barrier: return describe_cluster_barrier(*cta.cluster);
    case Wait::Kind::convergence: return "the other lanes of its warp";
    case Wait::Kind::tensor_memory: return "tensor memory to allocate";
    case Wait::Kind::grid: return "the grid that this one depends on";
    case Wait::Kind::registers: {
      const auto* pool = static_cast<const RegisterPool*>(cta.register_pool.get());
      return "registers (setmaxnreg.inc to " + number(wait.address) + " per thread); free in the CTA: " +
             std::to_string(pool ? pool->free : 0);
    }
  }
  return "";
}

bool decode_barrier(const Statement& s, Builder& b) {
  const std::string& m = s.mnemonic();
  if (m == "setmaxnreg") return decode_setmaxnreg(s, b);
  if (m == "fence" || m == "membar") return decode_fence(s, b);
  if (m != "bar" && m != "barrier") return false;
  if (s.modifiers.size() < 2) return false;
  if (s.modifiers[1] == "warp") return decode_warp_sync(s, b);
  if (s.modifiers[1] == "cluster") return decode_cluster_barrier(s, b);
  return decode_cta_barrier(s, b);
}

}  // namespace emu
