// Happens-before: vector clocks over warps and asynchronous engines, and the shadow of each memory that holds
// who last wrote and who has read since.
//
// Actors. A warp is an actor. So is every mbarrier (the asynchronous copies that signal it, epoch = the phase
// they complete), every in-order asynchronous queue (wgmma groups of a warp, the tensor core of a CTA, bulk
// stores of a thread, tcgen05.ld/st of a warp; epoch = position in the queue). Accesses of one actor are ordered among
// themselves, except those of an mbarrier. An access is stamped with
// (actor, epoch); a later access by somebody whose clock has not reached that epoch conflicts with it.
//
// Clock.seen[a]: epochs of actor a known to have happened. Clock.proxied[a]: of those, which generic-proxy
// accesses a fence.proxy.async has made visible to the async proxy. A release (mbarrier arrive, barrier arrive)
// copies both into the barrier, an acquire (successful wait) joins both. After each release the warp's own
// epoch advances, so that what it does later is not covered.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace emu {

struct Warp;
struct Cta;

using ActorId = uint32_t;

// What a release by some lanes of a warp made known of that warp beyond Clock::seen: the accesses of those lanes.
struct LaneKnowledge {
  ActorId actor = 0;
  uint32_t lanes = 0;
  uint32_t seen = 0, proxied = 0;
};

struct Clock {
  std::vector<uint32_t> seen, proxied;
  std::vector<LaneKnowledge> partial;  // nearly always empty
  void join(const Clock& other);
  void know(ActorId actor, uint32_t epoch);  // seen[actor] = max(seen[actor], epoch)
  void know_proxied(ActorId actor, uint32_t epoch);
  uint32_t at(ActorId actor) const { return actor < seen.size() ? seen[actor] : 0; }
  uint32_t proxied_at(ActorId actor) const { return actor < proxied.size() ? proxied[actor] : 0; }
  // Whether all of `lanes` (not 0) of a warp have published what they did up to `epoch`.
  bool lanes_seen(ActorId actor, uint32_t lanes, uint32_t epoch) const;
  bool lanes_proxied(ActorId actor, uint32_t lanes, uint32_t epoch) const;
  void fence_proxy_async();  // proxied = seen
  void clear() { seen.clear(); proxied.clear(); partial.clear(); }
};

// Of an engine's accesses, each of `lanes` has waited for its own: the warp's clock knows them up to the present
// epoch, another lane only up to `converged`, until bar.warp.sync.
struct LanesWaited {
  ActorId actor = 0;
  uint32_t converged = 0;
  uint32_t lanes = 0;
};

// An asynchronous operation that a warp issued at its epoch `issued`, and that signals an mbarrier: who knows the
// mbarrier's `epoch` knows that the warp had come so far.
struct Signal {
  uint32_t issued = 0;
  ActorId actor = 0;
  uint32_t epoch = 0;
};

// What a warp keeps beside its clock (spaces.cpp, barrier.cpp).
struct WarpOrder {
  Clock fenced;                // published by a later .relaxed arrival: what a fence has released
  Clock unfenced;              // learnt by .relaxed waits; a later fence turns it into knowledge
  Clock fenced_widely, unfenced_widely;  // the same for other clusters, by fences whose scope reaches them
  ActorId inits = 0;           // mbarrier.init by this warp is an actor of its own: fence.mbarrier_init covers it alone
  std::vector<LanesWaited> waited;  // since the last convergence; nearly always empty
  uint32_t cluster_arrived = 0;   // lanes that have arrived in the forming generation of the cluster barrier
  uint32_t cluster_unwaited = 0;  // lanes that have arrived and not yet waited
  uint64_t cluster_generation = 0;  // the generation that their arrival belongs to
  std::array<uint32_t, 16> barrier_arrivals{};  // by named barrier: the use, from 1 on, of the warp's last bar.arrive
  uint32_t converged = 0;      // the warp's epoch up to which bar.warp.sync or a CTA barrier has joined its lanes
  bool lanes_differ = false;   // since then, lanes have done or learnt what others may not know
  std::vector<Signal> signals;  // the latest
};

// The proxy of an access. `async`: shared or global memory read or written by TMA, bulk copies, wgmma or tcgen05
// operands; such an access behind a generic write needs fence.proxy.async. `tensor`: tensor memory.
enum class Proxy : uint8_t { generic, async, tensor };

// One access (of possibly many granules) as stored in the shadow.
struct Access {
  ActorId actor = 0;
  uint32_t epoch = 0;
  Proxy proxy = Proxy::generic;
  bool write = false;
  bool unordered = false;   // the actor's own accesses are not ordered: copies that signal one mbarrier
  bool atomic = false;      // atomics and reductions do not conflict with each other
  uint32_t warp = 0;        // for messages: issuing warp, CTA rank and statement
  uint32_t cta_rank = 0;
  uint32_t statement = 0;
  int32_t lane = -1;        // of a warp's own access, or by its cp.async: which lane; -1 several (or another engine)
  uint32_t lanes = 0;       // the lanes that executed such an access
};

// A race, as text for the error: "... written by warp 3 (PTX line 812: ...), not ordered before ...".
struct Conflict {
  bool found = false;
  bool missing_proxy_fence = false;
  bool uninitialised = false;
  uint64_t address = 0;  // first offending granule
  int64_t other_cluster = -1;  // of `earlier`, if not the same
  Access earlier{};
};

class RaceDetector;

// An access's number in the detector: index * 32 + lane.
using AccessId = uint32_t;
// Who has read since the last write: 0 nobody; one AccessId with the top bit set; or the number of an interned set
// of AccessIds, one for each actor.
using Readers = uint32_t;

// Access history of one memory: granules of a fixed size. Each granule holds the id of its last write and the set
// of the reads since, so that a bulk access costs little where neighbours agree. A granule whose bytes have
// different histories (narrow accesses by several warps) is split into bytes until they agree again.
class Shadow {
 public:
  Shadow(RaceDetector& detector, uint64_t granules);
  ~Shadow();
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;
  // Checks granules [first, first + count) against `clock` (the knowledge of whoever performs the access, or of
  // the warp that issued it for an asynchronous one) and records it. `must_be_written`: a read of a granule that
  // nothing has written is reported as uninitialised.
  Conflict access(uint64_t first, uint64_t count, const Access& access, const Clock& clock, bool must_be_written);
  // The same for bytes [first, first + count) of a memory with 4-byte granules; Conflict::address is a byte.
  Conflict access_bytes(uint64_t first, uint64_t count, const Access& access, const Clock& clock,
                        bool must_be_written);
  // Consecutive lanes, from access.lane on, access `count` consecutive bytes, `bytes_each` (a multiple of 4) by each.
  Conflict access_lanes(uint64_t first, uint64_t count, uint32_t bytes_each, const Access& access, const Clock& clock,
                        bool must_be_written);
  void forget(uint64_t first, uint64_t count);  // memory becomes uninitialised (freed, or a new owner)
  void assume_written(uint64_t first, uint64_t count);

 private:
  friend class RaceDetector;
  struct Check;  // one access being checked against the histories it meets
  using History = uint64_t;  // low word: last write (0: never), or a split; high word: Readers
  struct Split { History bytes[4]; };
  static constexpr uint32_t SPLIT = 1u << 31;  // low word of a History: the rest is an index into splits_
  bool visit(History& history, Check& check);
  bool after_access(AccessId id, Check& check) const;
  bool after_readers(Readers readers, Check& check) const;
  bool visit_range(uint64_t first, uint64_t end, Check& check);
  bool visit_bytes(uint64_t granule, uint32_t begin, uint32_t end, Check& check);
  uint32_t new_split(History history);
  uint64_t run_end(uint64_t first, uint64_t end) const;

  RaceDetector& detector_;
  std::shared_ptr<std::vector<Shadow*>> registry_;  // of all shadows of the detector
  std::vector<History> history_;
  std::vector<Split> splits_;
  std::vector<uint32_t> free_splits_;
};

class RaceDetector {
 public:
  bool enabled = true;
  RaceDetector();
  ActorId new_actor() { return next_actor_++; }

  // Interning, used by Shadow.
  AccessId intern(const Access& access);
  Readers with_read(Readers readers, AccessId id);

 private:
  friend class Shadow;
  AccessId by_several_lanes(AccessId id) const;
  uint32_t lanes_of(AccessId id) const;  // see Access::lanes; 0 if another engine's access
  Readers interned_set(Readers readers, AccessId id);
  void collect();  // drops accesses and sets that no granule refers to any more

  ActorId next_actor_ = 1;
  // 0: none; 1: "written before the launch". One with a lane is followed by its twin, by several lanes.
  std::vector<Access> accesses_;
  std::vector<std::vector<AccessId>> sets_;
  std::unordered_map<uint64_t, Readers> transitions_;  // (readers, further read) -> set
  std::vector<uint32_t> recent_;  // index of a recent access, by a hash of actor and statement
  size_t limit_;                  // accesses or sets beyond which to collect
  std::shared_ptr<std::vector<Shadow*>> shadows_;
};

}  // namespace emu
