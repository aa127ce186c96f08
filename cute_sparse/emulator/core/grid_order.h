// Happens-before between the clusters of a grid, which run on different host threads: who last wrote each granule of
// global memory, and what releases have left at global locations. An access by one cluster to what another wrote must
// be ordered behind it by a release and an acquire on a global location.
//
// A cluster names the actors of others by ActorIds of its own race detector, so that knowledge of them travels in its
// clocks like any other. (A read that another cluster's later write should have waited for is not recorded.)
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

using GridClock = std::unordered_map<GridActor, uint32_t, GridActorHash>;  // epochs

struct GridWrite {
  GridActor by;
  Access access;
};

class GridOrder {
 public:
  static constexpr uint32_t PAGE_SHIFT = 16;
  static constexpr uint64_t GRANULES = (1ull << PAGE_SHIFT) / 4;

  struct Page {
    std::mutex mutex;
    std::array<uint32_t, GRANULES> last_write{};  // number of a GridWrite; 0: none
  };

  // The page, or null where nothing has been written yet and `create` is false.
  std::shared_ptr<Page> page(uint64_t number, bool create);
  uint64_t pages_made() const { return pages_made_.load(std::memory_order_acquire); }
  uint32_t add_write(const GridWrite& write);
  GridWrite write(uint32_t number) const;

  void publish(uint64_t address, const GridClock& clock);
  GridClock published(uint64_t address) const;

 private:
  mutable std::mutex mutex_;
  std::unordered_map<uint64_t, std::shared_ptr<Page>> pages_;
  std::atomic<uint64_t> pages_made_{0};
  std::vector<GridWrite> writes_{1};
  std::unordered_map<uint64_t, GridClock> locations_;
};

// One cluster's side of it.
class ClusterOrder {
 public:
  ClusterOrder(GridOrder& grid, uint64_t cluster, RaceDetector& detector)
      : grid_(grid), cluster_(cluster), detector_(detector) {}

  // Checks bytes of global memory, all in one page, against the other clusters' writes; enters a write.
  Conflict access(uint64_t address, uint64_t bytes, const Access& access, const Clock& clock);
  void publish(uint64_t address, const Clock& clock);
  void learn(uint64_t address, Clock& clock);

 private:
  GridOrder::Page* page_of(uint64_t number, bool create);
  uint32_t write_number(const Access& access);
  ActorId local_name(const GridActor& actor);
  bool knows(const GridWrite& write, const Clock& clock) const;

  GridOrder& grid_;
  uint64_t cluster_;
  RaceDetector& detector_;
  std::unordered_map<GridActor, ActorId, GridActorHash> local_names_;
  std::unordered_map<ActorId, GridActor> foreign_;  // by local name
  std::vector<bool> writes_global_;                 // own actors that have written global memory
  Access last_access_;
  uint32_t last_number_ = 0;
  uint64_t last_page_ = UINT64_MAX, last_made_ = UINT64_MAX;
  std::shared_ptr<GridOrder::Page> last_;
};

}  // namespace emu
