// Happens-before: vector clocks over warps and asynchronous engines, and the shadow of each memory that holds
// who last wrote and who has read since.
//
// Actors. A warp is an actor. So is every mbarrier (the asynchronous copies that signal it, epoch = the phase
// they complete), every in-order asynchronous queue (wgmma groups of a warp, the tensor core of a CTA, bulk
// stores of a thread, tcgen05.ld/st of a warp; epoch = position in the queue). An access is stamped with
// (actor, epoch); a later access by somebody whose clock has not reached that epoch conflicts with it.
//
// Clock.seen[a]: epochs of actor a known to have happened. Clock.proxied[a]: of those, which generic-proxy
// accesses a fence.proxy.async has made visible to the async proxy. A release (mbarrier arrive, barrier arrive)
// copies both into the barrier, an acquire (successful wait) joins both. After each release the warp's own
// epoch advances, so that what it does later is not covered.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace emu {

struct Warp;
struct Cta;

using ActorId = uint32_t;

struct Clock {
  std::vector<uint32_t> seen, proxied;
  void join(const Clock& other);
  void know(ActorId actor, uint32_t epoch);  // seen[actor] = max(seen[actor], epoch)
  uint32_t at(ActorId actor) const { return actor < seen.size() ? seen[actor] : 0; }
  uint32_t proxied_at(ActorId actor) const { return actor < proxied.size() ? proxied[actor] : 0; }
  void fence_proxy_async();  // proxied = seen
  void clear() { seen.clear(); proxied.clear(); }
};

enum class Proxy : uint8_t { generic, async, tensor };

// One access (of possibly many granules) as stored in the shadow.
struct Access {
  ActorId actor = 0;
  uint32_t epoch = 0;
  Proxy proxy = Proxy::generic;
  bool write = false;
  bool atomic = false;      // atomics and reductions do not conflict with each other
  uint32_t warp = 0;        // for messages: issuing warp, CTA rank and statement
  uint32_t cta_rank = 0;
  uint32_t statement = 0;
};

// A race, as text for the error: "... written by warp 3 (PTX line 812: ...), not ordered before ...".
struct Conflict {
  bool found = false;
  bool missing_proxy_fence = false;
  bool uninitialised = false;
  uint64_t address = 0;  // first offending granule
  Access earlier{};
};

class RaceDetector;

// Access history of one memory: granules of a fixed size. Each granule holds an interned id of its last write
// and an interned set of the reads since, so that a bulk access costs little where neighbours agree.
class Shadow {
 public:
  Shadow(RaceDetector& detector, uint64_t granules);
  // Checks granules [first, first + count) against `clock` (the knowledge of whoever performs the access, or of
  // the warp that issued it for an asynchronous one) and records it. `must_be_written`: a read of a granule that
  // nothing has written is reported as uninitialised.
  Conflict access(uint64_t first, uint64_t count, const Access& access, const Clock& clock, bool must_be_written);
  void forget(uint64_t first, uint64_t count);  // memory becomes uninitialised (freed, or a new owner)
  void assume_written(uint64_t first, uint64_t count);

 private:
  RaceDetector& detector_;
  std::vector<uint32_t> last_write_;  // 0: never written
  std::vector<uint32_t> reads_;       // 0: none since
};

class RaceDetector {
 public:
  bool enabled = true;
  ActorId new_actor() { return next_actor_++; }

  // Interning, used by Shadow.
  uint32_t intern(const Access& access);
  const Access& at(uint32_t id) const { return accesses_[id]; }
  uint32_t with_read(uint32_t set, uint32_t access_id);
  const std::vector<uint32_t>& members(uint32_t set) const { return sets_[set]; }

 private:
  ActorId next_actor_ = 1;
  std::deque<Access> accesses_{1};
  std::vector<std::vector<uint32_t>> sets_{1};
  std::unordered_map<uint64_t, uint32_t> transitions_;
};

}  // namespace emu
