// Shared and global memory as a warp meets them: bounds, alignment, access histories, and what releases and acquires
// carry from warp to warp.
#include "spaces.h"

#include <algorithm>
#include <cstdio>

#include "grid_order.h"

namespace emu {

// Global accesses of one cluster, and the clocks left at global locations by releases.
struct GlobalHistory {
  static constexpr uint32_t PAGE_SHIFT = 16;
  static constexpr uint64_t PAGE_BYTES = 1ull << PAGE_SHIFT;
  std::unordered_map<uint64_t, std::unique_ptr<Shadow>> pages;
  std::unordered_map<uint64_t, Clock> locations;
  std::unique_ptr<ClusterOrder> others;  // null if the grid is one cluster
  uint64_t last_page = UINT64_MAX;
  Shadow* last_shadow = nullptr;

  Shadow& page(RaceDetector& detector, uint64_t number) {
    if (number != last_page) {
      std::unique_ptr<Shadow>& shadow = pages[number];
      if (!shadow) shadow = std::make_unique<Shadow>(detector, PAGE_BYTES / 4);
      last_page = number;
      last_shadow = shadow.get();
    }
    return *last_shadow;
  }
};

namespace {

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

[[noreturn]] void fail_shared(Warp& warp, uint32_t address, uint32_t bytes, const std::string& why, int lane) {
  warp.fail(ErrorKind::out_of_bounds,
            std::to_string(bytes) + " bytes at shared address " + hex(address) + ": " + why, lane);
}

[[noreturn]] void fail_alignment(Warp& warp, uint64_t address, uint32_t align, const char* space, int lane) {
  warp.fail(ErrorKind::misaligned, std::string(space) + " address " + hex(address) + " is not a multiple of " +
                                       std::to_string(align) + " bytes", lane);
}

Cta& cta_at(Warp& warp, uint32_t address) {
  if (address >> SHARED_RANK_SHIFT == warp.cta->rank) return *warp.cta;
  return warp.cluster->cta_of(address, &warp);
}

Access access_by(Warp& warp, ActorId actor, uint32_t epoch, Proxy proxy, bool write, bool atomic, int lane) {
  Access access;
  access.actor = actor;
  access.epoch = epoch;
  access.proxy = proxy;
  access.write = write;
  access.atomic = atomic;
  access.warp = warp.index;
  access.cta_rank = warp.cta->rank;
  access.statement = warp.program->code[warp.group().pc].statement;
  access.lane = lane;
  return access;
}

// While it lives, the warp's clock holds only what its executing lanes may publish, or rely on: of the warp's own
// accesses, those before its last convergence and those of these lanes.
class PublishedView {
 public:
  explicit PublishedView(Warp& warp) : clock_(warp.clock), actor_(warp.actor) {
    if ((warp.mask & warp.live) == warp.live) return;
    partial_ = true;
    seen_ = clock_.at(actor_);
    proxied_ = clock_.proxied_at(actor_);
    clock_.seen[actor_] = std::min(seen_, warp.order.converged);
    if (proxied_) clock_.proxied[actor_] = std::min(proxied_, warp.order.converged);
    clock_.partial.push_back({actor_, warp.mask, seen_, proxied_});
    waited_ = warp.order.waited;
    for (LanesWaited& w : waited_) {
      clock_.partial.push_back({w.actor, w.lanes & warp.mask, clock_.at(w.actor), clock_.proxied_at(w.actor)});
      std::swap(w.converged, clock_.seen[w.actor]);
    }
  }
  ~PublishedView() {
    if (!partial_) return;
    clock_.partial.resize(clock_.partial.size() - 1 - waited_.size());
    clock_.seen[actor_] = seen_;
    for (LanesWaited& w : waited_) std::swap(w.converged, clock_.seen[w.actor]);
    if (proxied_) clock_.proxied[actor_] = proxied_;
  }

 private:
  Clock& clock_;
  ActorId actor_;
  bool partial_ = false;
  uint32_t seen_ = 0, proxied_ = 0;
  std::vector<LanesWaited> waited_;
};

Access async_access(Warp& warp, const Stamp& stamp, bool write, bool atomic) {
  Access access = access_by(warp, stamp.actor, stamp.epoch, stamp.proxy, write, atomic, -1);
  access.unordered = stamp.unordered;
  return access;
}

Access async_access_by_lanes(Warp& warp, const Stamp& stamp, bool write, int lane) {
  Access access = async_access(warp, stamp, write, false);
  access.lane = lane;
  access.lanes = warp.mask;
  return access;
}

Access generic_access(Warp& warp, bool write, bool atomic, int lane) {
  Access access = access_by(warp, warp.actor, warp.clock.at(warp.actor), Proxy::generic, write, atomic, lane);
  access.lanes = warp.mask;
  warp.order.lanes_differ = true;
  return access;
}

// Access of a shadow's bytes, by one lane or one engine, or by adjacent lanes of `bytes_each` bytes.
Conflict enter(Shadow& shadow, uint64_t first, uint64_t bytes, uint32_t bytes_each, const Access& access,
               const Clock& clock, bool must_be_written) {
  if (bytes_each == 0 || bytes_each >= bytes)
    return shadow.access_bytes(first, bytes, access, clock, must_be_written);
  if (bytes_each % 4 == 0 && first % 4 == 0)
    return shadow.access_lanes(first, bytes, bytes_each, access, clock, must_be_written);
  Access by_warp = access;
  by_warp.lane = -1;
  return shadow.access_bytes(first, bytes, by_warp, clock, must_be_written);
}

void check_shared(Warp& warp, uint32_t address, uint32_t bytes, uint32_t bytes_each, const Access& access, int lane) {
  Cta& cta = cta_at(warp, address);
  Conflict conflict = enter(*cta.shared_shadow, address & SHARED_OFFSET_MASK, bytes, bytes_each, access, warp.clock,
                            !access.write);
  if (!conflict.found && !conflict.uninitialised) return;
  conflict.address |= uint64_t(cta.rank) << SHARED_RANK_SHIFT;
  report(warp, conflict, "shared memory", lane);
}

GlobalHistory& global_history(Cluster& cluster) {
  if (!cluster.global_history) {
    cluster.global_history = std::make_shared<GlobalHistory>();
    if (cluster.launch->clusters > 1)
      cluster.global_history->others =
          std::make_unique<ClusterOrder>(*cluster.launch->grid_order, cluster.index, cluster.race);
  }
  return *cluster.global_history;
}

void check_global(Warp& warp, uint64_t address, uint64_t bytes, uint32_t bytes_each, const Access& access, int lane) {
  GlobalHistory& history = global_history(*warp.cluster);
  for (uint64_t at = address; at < address + bytes;) {
    const uint64_t number = at >> GlobalHistory::PAGE_SHIFT, base = number << GlobalHistory::PAGE_SHIFT;
    const uint64_t stop = std::min(address + bytes, base + GlobalHistory::PAGE_BYTES);
    Shadow& shadow = history.page(warp.cluster->race, number);
    Access part = access;
    if (bytes_each) part.lane += int32_t((at - address) / bytes_each);
    Conflict conflict = enter(shadow, at - base, stop - at, bytes_each, part, warp.clock, false);
    conflict.address += base;
    if (!conflict.found && history.others)
      conflict = history.others->access(at, stop - at, bytes_each, part, warp.clock);
    if (conflict.found) report(warp, conflict, "global memory", lane);
    at = stop;
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------
// Bounds and alignment

uint8_t* shared_at(Warp& warp, uint32_t address, uint32_t bytes, uint32_t align, int lane) {
  Cta& cta = cta_at(warp, address);
  const uint32_t offset = address & SHARED_OFFSET_MASK;
  if (offset < SHARED_BASE) fail_shared(warp, address, bytes, "the first 1024 bytes are the system's", lane);
  if (uint64_t(offset) + bytes > uint64_t(SHARED_BASE) + cta.shared_bytes)
    fail_shared(warp, address, bytes, "the CTA has " + std::to_string(cta.shared_bytes) + " bytes, from " +
                                          hex((uint64_t(cta.rank) << SHARED_RANK_SHIFT) + SHARED_BASE) + " on", lane);
  if (cta.live_warps == 0) fail_shared(warp, address, bytes, "the CTA that it belongs to has ended", lane);
  if (address & (align - 1)) fail_alignment(warp, address, align, "shared", lane);
  return cta.shared.data() + offset;
}

uint8_t* global_at(Warp& warp, uint64_t address, uint64_t bytes, uint32_t align, bool write, int lane) {
  const Memory& memory = warp.cluster->launch->device->memory;
  const Range* range = memory.find(address, bytes);
  if (!range) warp.fail(ErrorKind::out_of_bounds, "global memory: " + memory.describe(address, bytes), lane);
  if (write && !range->writable) {
    Site site = warp.site(lane);
    site.tensor = range->name;
    throw EmulatorError(ErrorKind::out_of_bounds, "writes to read-only memory '" + range->name + "'", site);
  }
  if (address & (align - 1)) fail_alignment(warp, address, align, "global", lane);
  return reinterpret_cast<uint8_t*>(address);
}

// ---------------------------------------------------------------------------------------------------------
// Access histories

void touch_shared(Warp& warp, uint32_t address, uint32_t bytes, bool write, bool atomic, int lane) {
  if (!warp.cluster->race.enabled) return;
  check_shared(warp, address, bytes, 0, generic_access(warp, write, atomic, lane), lane);
}

void touch_global(Warp& warp, uint64_t address, uint64_t bytes, bool write, bool atomic, int lane) {
  if (!warp.cluster->race.enabled) return;
  check_global(warp, address, bytes, 0, generic_access(warp, write, atomic, lane), lane);
}

void touch_shared_lanes(Warp& warp, uint32_t address, uint32_t bytes, uint32_t bytes_each, bool write, bool atomic,
                        int lane) {
  if (!warp.cluster->race.enabled) return;
  check_shared(warp, address, bytes, bytes_each, generic_access(warp, write, atomic, lane), lane);
}

void touch_global_lanes(Warp& warp, uint64_t address, uint64_t bytes, uint32_t bytes_each, bool write, bool atomic,
                        int lane) {
  if (!warp.cluster->race.enabled) return;
  check_global(warp, address, bytes, bytes_each, generic_access(warp, write, atomic, lane), lane);
}

void touch_shared_async(Warp& warp, const Stamp& stamp, uint32_t address, uint32_t bytes, bool write) {
  if (!warp.cluster->race.enabled) return;
  PublishedView view(warp);
  check_shared(warp, address, bytes, 0, async_access(warp, stamp, write, false), -1);
}

void touch_global_async(Warp& warp, const Stamp& stamp, uint64_t address, uint64_t bytes, bool write, bool atomic) {
  if (!warp.cluster->race.enabled) return;
  PublishedView view(warp);
  check_global(warp, address, bytes, 0, async_access(warp, stamp, write, atomic), -1);
}

void touch_shared_async_lanes(Warp& warp, const Stamp& stamp, uint32_t address, uint32_t bytes, uint32_t bytes_each,
                              bool write, int lane) {
  if (!warp.cluster->race.enabled) return;
  PublishedView view(warp);
  check_shared(warp, address, bytes, bytes_each, async_access_by_lanes(warp, stamp, write, lane), lane);
}

void touch_global_async_lanes(Warp& warp, const Stamp& stamp, uint64_t address, uint64_t bytes, uint32_t bytes_each,
                              bool write, int lane) {
  if (!warp.cluster->race.enabled) return;
  PublishedView view(warp);
  check_global(warp, address, bytes, bytes_each, async_access_by_lanes(warp, stamp, write, lane), lane);
}

namespace {

std::string who(const Warp& warp, const Conflict& conflict) {
  const Access& access = conflict.earlier;
  const Statement& statement = warp.program->text->statements[access.statement];
  std::string text = access.proxy == Proxy::generic ? "" : access.proxy == Proxy::async ? "async-proxy " : "tensor ";
  text += access.write ? (access.atomic ? "atomic write" : "write") : "read";
  text += access.actor == 0 ? " from before the launch" : " by warp " + std::to_string(access.warp);
  if (access.lane >= 0) text += " lane " + std::to_string(access.lane);
  if (conflict.other_cluster >= 0) text += " of cluster " + std::to_string(conflict.other_cluster);
  if (warp.cluster->ctas.size() > 1) text += " of CTA rank " + std::to_string(access.cta_rank);
  text += " (PTX line " + std::to_string(statement.line) + ": " + statement.text;
  if (!statement.source.empty()) text += ", " + statement.source;
  return text + ")";
}

}  // namespace

void report(Warp& warp, const Conflict& conflict, const char* space, int lane) {
  const std::string place = std::string(space) + " at " + hex(conflict.address);
  Site site = warp.site(lane);
  if (std::string(space) == "global memory")
    if (const Range* range = warp.cluster->launch->device->memory.find(conflict.address, 1)) site.tensor = range->name;
  if (conflict.uninitialised)
    throw EmulatorError(ErrorKind::uninitialised, "reads " + place + ", which nothing has written", site);
  if (conflict.missing_proxy_fence)
    throw EmulatorError(ErrorKind::missing_proxy_fence,
                        "touches " + place + " through the async proxy after the " + who(warp, conflict) +
                            ", without fence.proxy.async between", site);
  throw EmulatorError(ErrorKind::race, "touches " + place + ", not ordered after the " + who(warp, conflict),
                      site);
}

static void remember_signal(Warp& warp, const Signal& signal) {
  constexpr size_t AT_LEAST = 64;  // more than a ring has slots
  auto& signals = warp.order.signals;
  if (signals.size() == 2 * AT_LEAST) signals.erase(signals.begin(), signals.begin() + AT_LEAST);
  signals.push_back(signal);
}

Stamp signal_stamp(Warp& warp, uint32_t address) {
  const MBarrier& barrier = warp.cluster->mbarrier(address, &warp);
  if (warp.cluster->race.enabled && warp.clock.proxied_at(barrier.init_actor) < barrier.init_epoch)
    warp.fail(ErrorKind::missing_proxy_fence,
              "signals the mbarrier at " + hex(address) + " through the async proxy, but no fence.mbarrier_init or "
              "fence.proxy.async follows its mbarrier.init by warp " + std::to_string(barrier.init_warp));
  const uint32_t epoch = uint32_t(barrier.phase + 1);
  remember_signal(warp, {warp.clock.at(warp.actor), barrier.actor, epoch});
  return {barrier.actor, epoch, Proxy::async, true};
}

// ---------------------------------------------------------------------------------------------------------
// Release and acquire

namespace {

void next_epoch(Warp& warp) { ++warp.clock.seen[warp.actor]; }

}  // namespace

void release_into(Warp& warp, Clock& target) {
  {
    PublishedView view(warp);
    target.join(warp.clock);
  }
  next_epoch(warp);
}

Clock release(Warp& warp) {
  Clock published;
  release_into(warp, published);
  return published;
}

// Where all lanes learn from a barrier to which they have arrived themselves, each learns of the others' accesses.
void acquire(Warp& warp, const Clock& clock) {
  warp.clock.join(clock);
  if ((warp.mask & warp.live) != warp.live) {
    warp.order.lanes_differ = true;
    return;
  }
  warp.order.converged = std::max(warp.order.converged, clock.at(warp.actor));
  for (LanesWaited& w : warp.order.waited) w.converged = std::max(w.converged, clock.at(w.actor));
}

void converge(Warp& warp) {
  warp.order.converged = warp.clock.at(warp.actor);
  warp.order.waited.clear();
  warp.order.lanes_differ = false;
  next_epoch(warp);
}

void know_by_lanes(Warp& warp, ActorId actor, uint32_t epoch) {
  auto& waited = warp.order.waited;
  auto found = std::find_if(waited.begin(), waited.end(), [&](const LanesWaited& w) { return w.actor == actor; });
  if (found == waited.end()) found = waited.insert(waited.end(), {actor, warp.clock.at(actor), 0});
  found->lanes |= warp.mask;
  warp.order.lanes_differ = true;
  warp.clock.know(actor, epoch);
}

void fence_proxy(Warp& warp) {
  Clock& clock = warp.clock;
  const ActorId actor = warp.actor;
  const uint32_t epoch = clock.at(actor), before = clock.proxied_at(actor);
  clock.fence_proxy_async();
  warp.order.lanes_differ = true;
  if ((warp.mask & warp.live) != warp.live) {
    clock.proxied[actor] = std::max(before, std::min(epoch, warp.order.converged));
    auto superseded = [&](const LaneKnowledge& k) { return k.actor == actor && k.lanes == warp.mask; };
    clock.partial.erase(std::remove_if(clock.partial.begin(), clock.partial.end(), superseded), clock.partial.end());
    clock.partial.push_back({actor, warp.mask, 0, epoch});
  }
  next_epoch(warp);
}

void release_at(Warp& warp, uint64_t address, bool relaxed, bool wide) {
  if (!warp.cluster->race.enabled || (relaxed && warp.order.fenced.seen.empty())) return;
  GlobalHistory& history = global_history(*warp.cluster);
  auto publish = [&](const Clock& near, const Clock& far) {
    history.locations[address].join(near);
    if (wide && history.others) history.others->publish(address, far);
  };
  if (relaxed) {
    publish(warp.order.fenced, warp.order.fenced_widely);
    return;
  }
  {
    PublishedView view(warp);
    publish(warp.clock, warp.clock);
  }
  next_epoch(warp);
}

void acquire_at(Warp& warp, uint64_t address, bool relaxed, bool wide) {
  if (!warp.cluster->race.enabled) return;
  GlobalHistory& history = global_history(*warp.cluster);
  Clock& learnt = relaxed ? warp.order.unfenced : warp.clock;
  if (wide && history.others) history.others->learn(address, relaxed ? warp.order.unfenced_widely : warp.clock);
  const auto found = history.locations.find(address);
  if (found != history.locations.end()) learnt.join(found->second);
}

}  // namespace emu
