#include "grid_order.h"

#include <algorithm>

#include "machine.h"

namespace emu {

std::shared_ptr<GridOrder> make_grid_order() { return std::make_shared<GridOrder>(); }

// ---------------------------------------------------------------------------------------------------------
// The grid's side: shared by host threads

std::shared_ptr<GridOrder::Page> GridOrder::page(uint64_t number, bool create) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = pages_.find(number);
  if (found != pages_.end()) return found->second;
  if (!create) return nullptr;
  ++pages_made_;
  return pages_[number] = std::make_shared<Page>();
}

uint32_t GridOrder::add_write(const GridWrite& write) {
  std::lock_guard<std::mutex> lock(mutex_);
  writes_.push_back(write);
  return uint32_t(writes_.size() - 1);
}

GridWrite GridOrder::write(uint32_t number) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return writes_[number];
}

void GridOrder::publish(uint64_t address, const GridClock& clock) {
  std::lock_guard<std::mutex> lock(mutex_);
  GridClock& location = locations_[address];
  for (const auto& [actor, epoch] : clock) {
    uint32_t& known = location[actor];
    known = std::max(known, epoch);
  }
}

GridClock GridOrder::published(uint64_t address) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = locations_.find(address);
  return found == locations_.end() ? GridClock{} : found->second;
}

// ---------------------------------------------------------------------------------------------------------
// A cluster's side

GridOrder::Page* ClusterOrder::page_of(uint64_t number, bool create) {
  const uint64_t made = grid_.pages_made();
  const bool valid = last_page_ == number && (last_ || (!create && made == last_made_));
  if (!valid) {
    last_ = grid_.page(number, create);
    last_page_ = number;
    last_made_ = made;
  }
  return last_.get();
}

uint32_t ClusterOrder::write_number(const Access& access) {
  const Access& l = last_access_;
  if (last_number_ && l.actor == access.actor && l.epoch == access.epoch && l.statement == access.statement &&
      l.atomic == access.atomic)
    return last_number_;
  if (access.actor >= writes_global_.size()) writes_global_.resize(access.actor + 1, false);
  writes_global_[access.actor] = true;
  last_access_ = access;
  return last_number_ = grid_.add_write({{cluster_, access.actor}, access});
}

ActorId ClusterOrder::local_name(const GridActor& actor) {
  auto [entry, is_new] = local_names_.try_emplace(actor, 0);
  if (is_new) {
    entry->second = detector_.new_actor();
    foreign_[entry->second] = actor;
  }
  return entry->second;
}

bool ClusterOrder::knows(const GridWrite& write, const Clock& clock) const {
  const auto local = local_names_.find(write.by);
  return local != local_names_.end() && clock.at(local->second) >= write.access.epoch;
}

Conflict ClusterOrder::access(uint64_t address, uint64_t bytes, const Access& access, const Clock& clock) {
  Conflict conflict;
  GridOrder::Page* page = page_of(address >> GridOrder::PAGE_SHIFT, access.write);
  if (!page) return conflict;
  const uint32_t own = access.write ? write_number(access) : 0;
  const uint64_t base = address >> GridOrder::PAGE_SHIFT << GridOrder::PAGE_SHIFT;
  const uint64_t first = (address - base) / 4, end = (address - base + bytes + 3) / 4;
  const bool partial_words = address % 4 != 0 || bytes % 4 != 0;  // bytes of one word may belong to several clusters
  uint32_t checked = 0;
  std::lock_guard<std::mutex> lock(page->mutex);
  for (uint64_t g = first; g < end; ++g) {
    uint32_t& last = page->last_write[g];
    if (last != 0 && last != own && last != checked) {
      const GridWrite write = grid_.write(last);
      const bool ordered = write.by.cluster == cluster_ || (write.access.atomic && access.atomic) ||
                           knows(write, clock);
      if (!ordered) {
        conflict.found = true;
        conflict.address = base + 4 * g;
        conflict.earlier = write.access;
        conflict.other_cluster = int64_t(write.by.cluster);
        return conflict;
      }
      checked = last;
    }
    if (own && !partial_words) last = own;
  }
  return conflict;
}

void ClusterOrder::publish(uint64_t address, const Clock& clock) {
  GridClock published;
  for (ActorId a = 1; a < clock.seen.size(); ++a) {
    if (clock.seen[a] == 0) continue;
    const auto foreign = foreign_.find(a);
    if (foreign != foreign_.end()) published[foreign->second] = clock.seen[a];
    else if (a < writes_global_.size() && writes_global_[a]) published[{cluster_, a}] = clock.seen[a];
  }
  if (!published.empty()) grid_.publish(address, published);
}

void ClusterOrder::learn(uint64_t address, Clock& clock) {
  for (const auto& [actor, epoch] : grid_.published(address))
    if (actor.cluster != cluster_) clock.know(local_name(actor), epoch);
}

}  // namespace emu
