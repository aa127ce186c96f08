// Happens-before between the clusters of a grid, which run on different host threads: who last wrote each granule of
// global memory and who has read it since, and what releases have left at global locations. An access by one cluster to
// what another wrote, and a write to what another read, must be ordered behind it by a release and an acquire on a
// global location.
//
// A cluster names the actors of others by ActorIds of its own race detector, so that knowledge of them travels in its
// clocks like any other. Of the clusters that have read a granule the last two are kept, and of each its last read.
#pragma once
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "race.h"

namespace emu {

// An actor anywhere in the grid.
struct GridActor {
  uint64_t cluster = 0;
  ActorId actor = 0;
  bool operator==(const GridActor& o) const { return cluster == o.cluster && actor == o.actor; }
};

struct GridActorHash {
  size_t operator()(const GridActor& a) const { return a.cluster * 0x9e3779b97f4a7c15ull + a.actor; }
};

// What a release makes known: as Clock, but of global memory, which has no use for `proxied`.
struct GridClock {
  struct Lanes {
    GridActor actor;
    uint32_t lanes = 0, seen = 0;
  };
  std::unordered_map<GridActor, uint32_t, GridActorHash> seen;  // epochs
  std::vector<Lanes> partial;
  void join(const GridClock& other);
};

struct GridAccess {
  GridActor by;
  Access access;
};
// Number of a GridAccess * 32 + the lane whose part is meant; 0: none.
using GridAccessId = uint32_t;

class GridOrder {
 public:
  static constexpr uint32_t PAGE_SHIFT = 16;
  static constexpr uint64_t GRANULES = (1ull << PAGE_SHIFT) / 4;

  struct Granule {
    GridAccessId write = 0, read = 0, read_by_another = 0;  // since the write; the two reads are of different clusters
  };
  struct Page {
    std::mutex mutex;
    std::array<Granule, GRANULES> granules{};
  };

  std::shared_ptr<Page> page(uint64_t number);
  uint32_t add(const GridAccess& access);
  GridAccess access(uint32_t number) const;

  void publish(uint64_t address, const GridClock& clock);
  GridClock published(uint64_t address) const;

 private:
  mutable std::mutex mutex_;
  std::unordered_map<uint64_t, std::shared_ptr<Page>> pages_;
  std::vector<GridAccess> accesses_{1};
  std::unordered_map<uint64_t, GridClock> locations_;
};

// One cluster's side of it.
class ClusterOrder {
 public:
  ClusterOrder(GridOrder& grid, uint64_t cluster, RaceDetector& detector)
      : grid_(grid), cluster_(cluster), detector_(detector) {}

  // Checks bytes of global memory, all in one page, against the other clusters' accesses and enters the access. If it is
  // by consecutive lanes, from access.lane on, each has `bytes_each` of the bytes (0: all are one lane's).
  Conflict access(uint64_t address, uint64_t bytes, uint32_t bytes_each, const Access& access, const Clock& clock);
  void publish(uint64_t address, const Clock& clock);
  void learn(uint64_t address, Clock& clock);

 private:
  struct Recent {
    Access access;
    uint32_t number = 0;
  };
  struct Looked {  // a GridAccess that was looked up
    GridAccessId id = 0;
    bool own = false, ordered = false;  // this cluster's; happened before the access being checked
  };

  GridOrder::Page& page_of(uint64_t number);
  uint32_t number_of(const Access& access);
  Looked look_up(GridAccessId id, const Access& access, const Clock& clock) const;
  Conflict conflict_with(GridAccessId id, uint64_t address) const;
  ActorId local_name(const GridActor& actor);
  bool grid_name(ActorId actor, GridActor& name) const;  // false: it has not accessed global memory

  GridOrder& grid_;
  uint64_t cluster_;
  RaceDetector& detector_;
  std::unordered_map<GridActor, ActorId, GridActorHash> local_names_;
  std::unordered_map<ActorId, GridActor> foreign_;  // by local name
  std::vector<bool> accesses_global_;               // own actors
  std::array<Recent, 256> recent_;                  // by a hash of actor and statement
  uint64_t last_page_ = UINT64_MAX;
  std::shared_ptr<GridOrder::Page> last_;
};

}  // namespace emu
