// cp.async and its two ways of completion: async-groups and mbarriers (PTX ISA 9.7.9.25.3, 9.7.13.15.15).
//
// A warp's copies form one in-order queue; copy n (from 1) is epoch n of the warp's cp.async actor. Groups are per
// thread: a commit remembers which lanes it was for and how many copies the warp had issued by then.
// The copies are generic-proxy accesses: before wgmma, tcgen05 or TMA may read what they wrote, a
// fence.proxy.async is due.
#include <algorithm>

#include "bulk.h"

namespace emu {

namespace {

struct CpAsyncState {
  uint64_t queue = 0;
  ActorId actor = 0;
  uint32_t issued = 0;
  struct Commit { uint32_t lanes, issued; };
  std::vector<Commit> commits;
};

CpAsyncState& cp_async_state(Warp& warp) {
  if (!warp.cp_async) {
    auto state = std::make_shared<CpAsyncState>();
    state->queue = warp.cluster->new_queue();
    state->actor = warp.cluster->race.new_actor();
    warp.cp_async = state;
  }
  return *static_cast<CpAsyncState*>(warp.cp_async.get());
}

// ---------------------------------------------------------------------------------------------------------
// cp.async.{ca,cg}.shared.global [destination], [source], size {, src-size | ignore-src} {, cache-policy}

struct Copy {
  enum class Extent : uint8_t { whole, source_size, ignore_source } extent = Extent::whole;
  AddressSlot to, from;
  uint32_t size = 0;           // 4, 8 or 16
  uint32_t operand = 0;        // slot of src-size or ignore-src
};

// Bytes that a lane reads; the rest of `size` is filled with zeros.
uint32_t source_bytes(Warp& warp, const Copy& copy, uint32_t lane) {
  switch (copy.extent) {
    case Copy::Extent::whole: return copy.size;
    case Copy::Extent::ignore_source: return warp.pred(copy.operand) >> lane & 1 ? 0 : copy.size;
    case Copy::Extent::source_size: break;
  }
  const uint32_t bytes = warp.u32(copy.operand)[lane];
  if (bytes > copy.size)
    warp.fail(ErrorKind::invalid_operand, "src-size " + std::to_string(bytes) + " exceeds the copy's " +
                                              std::to_string(copy.size) + " bytes", int(lane));
  return bytes;
}

struct CpAsyncOp : AsyncOp {
  uint32_t lanes = 0, size = 0;
  std::array<uint8_t*, LANES> to{};
  std::array<const uint8_t*, LANES> from{};
  std::array<uint8_t, LANES> bytes{};
  void complete(Cluster&) override {
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      const uint32_t lane = uint32_t(__builtin_ctz(rest));
      if (bytes[lane]) std::memcpy(to[lane], from[lane], bytes[lane]);
      std::memset(to[lane] + bytes[lane], 0, size - bytes[lane]);
    }
  }
};

// Joins accesses of consecutive lanes that touch adjacent memory, as much each.
template <class Touch>
struct Joined {
  Touch touch;  // (address, bytes, bytes of each lane, first lane)
  uint64_t begin = 0, end = 0;
  uint32_t each = 0, first = 0, next = 0;  // lanes [first, next)
  void add(uint64_t address, uint32_t bytes, uint32_t lane) {
    if (bytes == 0) return;
    if (address != end || lane != next || bytes != each) flush();
    if (end == begin) {
      begin = address;
      first = lane;
      each = bytes;
    }
    end = address + bytes;
    next = lane + 1;
  }
  void flush() {
    if (end > begin) touch(begin, end - begin, each, int(first));
    begin = end = 0;
  }
};
template <class Touch> Joined(Touch) -> Joined<Touch>;

Step exec_copy(Warp& warp, const Instr& i) {
  const Copy& copy = *static_cast<const Copy*>(i.detail);
  CpAsyncState& state = cp_async_state(warp);
  const Stamp stamp{state.actor, ++state.issued, Proxy::generic};
  auto op = std::make_unique<CpAsyncOp>();
  op->queue = state.queue;
  op->statement = i.statement;
  op->lanes = warp.mask;
  op->size = copy.size;
  Joined reads{[&](uint64_t address, uint64_t bytes, uint32_t each, int lane) {
    touch_global_async_lanes(warp, stamp, address, bytes, each, false, lane);
  }};
  Joined writes{[&](uint64_t address, uint64_t bytes, uint32_t each, int lane) {
    touch_shared_async_lanes(warp, stamp, uint32_t(address), uint32_t(bytes), each, true, lane);
  }};
  for (uint32_t rest = warp.mask; rest; rest &= rest - 1) {
    const uint32_t lane = uint32_t(__builtin_ctz(rest));
    const uint32_t to = copy.to.shared(warp, lane);
    const uint64_t from = copy.from.global(warp, lane);
    require_own_cta(warp, to, "destination", int(lane));
    op->bytes[lane] = uint8_t(source_bytes(warp, copy, lane));
    op->to[lane] = shared_at(warp, to, copy.size, copy.size, int(lane));
    if (op->bytes[lane]) {
      if (from % copy.size)
        warp.fail(ErrorKind::misaligned, "the source of a " + std::to_string(copy.size) +
                                             "-byte cp.async is not aligned to its size", int(lane));
      op->from[lane] = global_at(warp, from, op->bytes[lane], 1, false, int(lane));
      warp.tally.global_bytes_read += op->bytes[lane];
    }
    reads.add(from, op->bytes[lane], lane);
    writes.add(to, copy.size, lane);
    warp.tally.shared_bytes_written += copy.size;
  }
  reads.flush();
  writes.flush();
  warp.cluster->issue(std::move(op));
  return Step::next;
}

bool decode_copy(const Statement& s, Builder& b) {
  if (!only_modifiers(s, "cp async ca cg shared shared::cta global L2::cache_hint L2::64B L2::128B L2::256B"))
    return false;
  if (s.operands.size() < 3) b.fail("expected [destination], [source], size");
  Copy copy;
  copy.to = address_slot(b, s.operands[0]);
  copy.from = address_slot(b, s.operands[1]);
  copy.size = uint32_t(b.integer(s.operands[2]));
  const bool allowed = copy.size == 16 || (s.has("ca") && (copy.size == 4 || copy.size == 8));
  if (!allowed) b.fail("the size of a cp.async must be 16, or 4 or 8 with .ca");
  const size_t sized = s.operands.size() - size_t(s.has("L2::cache_hint"));
  if (sized != 3 && sized != 4) b.fail("wrong number of operands");
  if (sized == 4) {
    const Operand& operand = s.operands[3];
    const bool predicate = operand.kind == Operand::Kind::reg && operand.reg.cls == RegClass::pred;
    copy.extent = predicate ? Copy::Extent::ignore_source : Copy::Extent::source_size;
    copy.operand = b.read(operand, predicate ? RegClass::pred : RegClass::b32);
  }
  b.out.detail = b.keep(copy);
  b.out.exec = exec_copy;
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// Groups

Step exec_commit_group(Warp& warp, const Instr&) {
  CpAsyncState& state = cp_async_state(warp);
  state.commits.push_back({warp.mask, state.issued});
  return Step::next;
}

// Copies that must be complete before at most `pending` groups of a lane are left.
uint32_t copies_before(const CpAsyncState& state, uint32_t lane, uint64_t pending) {
  for (size_t c = state.commits.size(); c-- > 0;) {
    if (!(state.commits[c].lanes >> lane & 1)) continue;
    if (pending-- == 0) return state.commits[c].issued;
  }
  return 0;
}

void wait_for_groups(Warp& warp, uint64_t pending) {
  CpAsyncState& state = cp_async_state(warp);
  uint32_t done = 0;
  for (uint32_t rest = warp.mask; rest; rest &= rest - 1)
    done = std::max(done, copies_before(state, uint32_t(__builtin_ctz(rest)), pending));
  if (done == 0) return;
  warp.cluster->drain(state.queue, state.issued - done);
  know_by_lanes(warp, state.actor, done);
}

Step exec_wait_group(Warp& warp, const Instr& i) {
  wait_for_groups(warp, i.imm);
  return Step::next;
}

Step exec_wait_all(Warp& warp, const Instr& i) {
  exec_commit_group(warp, i);
  wait_for_groups(warp, 0);
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// cp.async.mbarrier.arrive{.noinc}.shared.b64 [mbarrier]

struct Arrival : AsyncOp {
  uint32_t barrier = 0, count = 0;
  Clock clock;
  void complete(Cluster& cluster) override { cluster.arrive(barrier, count, clock, nullptr); }
};

// The arrive-on happens once the warp's earlier copies are complete, and publishes them. It also releases what the
// threads did before, as mbarrier.arrive does.
template <bool counted>
Step exec_arrive(Warp& warp, const Instr& i) {
  const AddressSlot& address = *static_cast<const AddressSlot*>(i.detail);
  CpAsyncState& state = cp_async_state(warp);
  Clock clock = release(warp);
  if ((warp.mask & warp.live) == warp.live) clock.know(state.actor, state.issued);
  else clock.partial.push_back({state.actor, warp.mask, state.issued, 0});
  for (uint32_t rest = warp.mask; rest;) {
    const uint32_t barrier = address.shared(warp, uint32_t(__builtin_ctz(rest)));
    uint32_t same = 0;
    for (uint32_t lanes = rest; lanes; lanes &= lanes - 1)
      if (address.shared(warp, uint32_t(__builtin_ctz(lanes))) == barrier) same |= lanes & (~lanes + 1);
    rest &= ~same;
    auto op = std::make_unique<Arrival>();
    op->queue = state.queue;
    op->statement = i.statement;
    op->barrier = barrier;
    op->count = uint32_t(__builtin_popcount(same));
    op->clock = clock;
    MBarrier& b = warp.cluster->mbarrier(barrier, &warp);
    if (counted) b.pending += op->count;  // without .noinc the arrival is expected besides the barrier's own
    ++state.issued;
    warp.cluster->issue(std::move(op));
  }
  return Step::next;
}

}  // namespace

bool decode_cp_async(const Statement& s, Builder& b) {
  if (s.opcode == "cp.async.commit_group") {
    b.out.exec = exec_commit_group;
  } else if (s.opcode == "cp.async.wait_group") {
    b.out.imm = uint64_t(b.integer(s.operands[0]));
    b.out.exec = exec_wait_group;
  } else if (s.opcode == "cp.async.wait_all") {
    b.out.exec = exec_wait_all;
  } else if (s.opcode.rfind("cp.async.mbarrier.arrive", 0) == 0) {
    if (!only_modifiers(s, "cp async mbarrier arrive noinc shared shared::cta b64")) return false;
    b.out.detail = b.keep(address_slot(b, s.operands[0]));
    b.out.exec = s.has("noinc") ? exec_arrive<false> : exec_arrive<true>;
  } else {
    return s.mnemonic() == "cp" && s.modifiers.size() > 2 && s.modifiers[1] == "async" && decode_copy(s, b);
  }
  return true;
}

}  // namespace emu
