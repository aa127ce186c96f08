#include "grid_order.h"

#include <algorithm>

#include "machine.h"

namespace emu {

std::shared_ptr<GridOrder> make_grid_order() { return std::make_shared<GridOrder>(); }

void GridClock::join(const GridClock& other) {
  for (const auto& [actor, epoch] : other.seen) {
    uint32_t& known = seen[actor];
    known = std::max(known, epoch);
  }
  for (const Lanes& lanes : other.partial) {
    auto same = [&](const Lanes& o) { return o.actor == lanes.actor && o.lanes == lanes.lanes; };
    const auto found = std::find_if(partial.begin(), partial.end(), same);
    if (found == partial.end()) partial.push_back(lanes);
    else found->seen = std::max(found->seen, lanes.seen);
  }
}

// ---------------------------------------------------------------------------------------------------------
// The grid's side: shared by host threads

std::shared_ptr<GridOrder::Page> GridOrder::page(uint64_t number) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<Page>& page = pages_[number];
  if (!page) page = std::make_shared<Page>();
  return page;
}

uint32_t GridOrder::add(const GridAccess& access) {
  std::lock_guard<std::mutex> lock(mutex_);
  accesses_.push_back(access);
  return uint32_t(accesses_.size() - 1);
}

GridAccess GridOrder::access(uint32_t number) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return accesses_[number];
}

void GridOrder::publish(uint64_t address, const GridClock& clock) {
  std::lock_guard<std::mutex> lock(mutex_);
  locations_[address].join(clock);
}

GridClock GridOrder::published(uint64_t address) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = locations_.find(address);
  return found == locations_.end() ? GridClock{} : found->second;
}

// ---------------------------------------------------------------------------------------------------------
// A cluster's side

constexpr uint32_t LANE_BITS = 5;

GridOrder::Page& ClusterOrder::page_of(uint64_t number) {
  if (last_page_ != number) {
    last_ = grid_.page(number);
    last_page_ = number;
  }
  return *last_;
}

uint32_t ClusterOrder::number_of(const Access& access) {
  Recent& recent = recent_[(access.actor * 61 + access.statement) % recent_.size()];
  const Access& a = recent.access;
  if (recent.number && a.actor == access.actor && a.epoch == access.epoch && a.statement == access.statement &&
      a.atomic == access.atomic && a.write == access.write && a.lanes == access.lanes &&
      (a.lane < 0) == (access.lane < 0))
    return recent.number;
  if (access.actor >= accesses_global_.size()) accesses_global_.resize(access.actor + 1, false);
  accesses_global_[access.actor] = true;
  recent = {access, grid_.add({{cluster_, access.actor}, access})};
  return recent.number;
}

ActorId ClusterOrder::local_name(const GridActor& actor) {
  auto [entry, is_new] = local_names_.try_emplace(actor, 0);
  if (is_new) {
    entry->second = detector_.new_actor();
    foreign_[entry->second] = actor;
  }
  return entry->second;
}

bool ClusterOrder::grid_name(ActorId actor, GridActor& name) const {
  const auto foreign = foreign_.find(actor);
  if (foreign != foreign_.end()) {
    name = foreign->second;
    return true;
  }
  name = {cluster_, actor};
  return actor < accesses_global_.size() && accesses_global_[actor];
}

ClusterOrder::Looked ClusterOrder::look_up(GridAccessId id, const Access& access, const Clock& clock) const {
  const GridAccess earlier = grid_.access(id >> LANE_BITS);
  if (earlier.by.cluster == cluster_) return {id, true, true};
  if (earlier.access.atomic && access.atomic) return {id, false, true};
  const auto local = local_names_.find(earlier.by);
  if (local == local_names_.end()) return {id, false, false};
  const uint32_t lane = id % LANES, lanes = earlier.access.lane < 0 ? earlier.access.lanes : 1u << lane;
  const uint32_t epoch = earlier.access.epoch;
  return {id, false, clock.at(local->second) >= epoch || (lanes && clock.lanes_seen(local->second, lanes, epoch))};
}

Conflict ClusterOrder::conflict_with(GridAccessId id, uint64_t address) const {
  const GridAccess earlier = grid_.access(id >> LANE_BITS);
  Conflict conflict;
  conflict.found = true;
  conflict.address = address;
  conflict.earlier = earlier.access;
  if (earlier.access.lane >= 0) conflict.earlier.lane = int32_t(id % LANES);
  conflict.other_cluster = int64_t(earlier.by.cluster);
  return conflict;
}

Conflict ClusterOrder::access(uint64_t address, uint64_t bytes, uint32_t bytes_each, const Access& access,
                              const Clock& clock) {
  GridOrder::Page& page = page_of(address >> GridOrder::PAGE_SHIFT);
  const uint64_t base = address >> GridOrder::PAGE_SHIFT << GridOrder::PAGE_SHIFT;
  const uint64_t first = (address - base) / 4, end = (address - base + bytes + 3) / 4;
  const bool partial_words = address % 4 != 0 || bytes % 4 != 0;  // bytes of one word may belong to several clusters
  Access entered = access;
  const bool by_lane = access.lane >= 0 && (bytes_each == 0 || bytes_each % 4 == 0);
  if (!by_lane) entered.lane = -1;
  const GridAccessId own = number_of(entered) << LANE_BITS;
  std::array<Looked, 3> looked;  // the last of each kind
  auto look = [&](Looked& last, GridAccessId id) -> const Looked& {
    if (last.id != id) last = look_up(id, access, clock);
    return last;
  };
  std::lock_guard<std::mutex> lock(page.mutex);
  for (uint64_t g = first; g < end; ++g) {
    GridOrder::Granule& granule = page.granules[g];
    const uint32_t lane = !by_lane ? 0 : uint32_t(access.lane) + (bytes_each ? uint32_t(4 * (g - first)) / bytes_each : 0);
    const GridAccessId id = own + lane;
    if (granule.write && !look(looked[0], granule.write).ordered) return conflict_with(granule.write, base + 4 * g);
    if (access.write) {
      if (granule.read && !look(looked[1], granule.read).ordered) return conflict_with(granule.read, base + 4 * g);
      if (granule.read_by_another && !look(looked[2], granule.read_by_another).ordered)
        return conflict_with(granule.read_by_another, base + 4 * g);
      if (!partial_words) granule = {id, 0, 0};
    } else if (granule.read != id && !partial_words) {
      if (granule.read && !look(looked[1], granule.read).own) granule.read_by_another = granule.read;
      granule.read = id;
    }
  }
  return {};
}

void ClusterOrder::publish(uint64_t address, const Clock& clock) {
  GridClock published;
  GridActor name;
  for (ActorId a = 1; a < clock.seen.size(); ++a)
    if (clock.seen[a] && grid_name(a, name)) published.seen[name] = clock.seen[a];
  for (const LaneKnowledge& k : clock.partial)
    if (grid_name(k.actor, name)) published.partial.push_back({name, k.lanes, k.seen});
  grid_.publish(address, published);
}

void ClusterOrder::learn(uint64_t address, Clock& clock) {
  const GridClock published = grid_.published(address);
  for (const auto& [actor, epoch] : published.seen)
    if (actor.cluster != cluster_) clock.know(local_name(actor), epoch);
  Clock lanes;
  for (const GridClock::Lanes& k : published.partial)
    if (k.actor.cluster != cluster_) lanes.partial.push_back({local_name(k.actor), k.lanes, k.seen, 0});
  clock.join(lanes);
}

}  // namespace emu
