#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <mutex>

namespace emu {

namespace {

// Accesses come in streams: each thread remembers the ranges of a few of them.
struct LastHits {
  static constexpr size_t WAYS = 4;
  const Memory* memory = nullptr;
  uint64_t version = 0;
  std::shared_ptr<Range> ranges[WAYS];
  size_t next = 0;
};

thread_local LastHits last_hits;

uint64_t new_version() {
  static std::atomic<uint64_t> versions{0};
  return ++versions;
}

bool holds(const Range& range, uint64_t address, uint64_t bytes) {
  return address >= range.begin && address <= range.end && bytes <= range.end - address;
}

std::string quoted(const Range& range) {
  return "'" + range.name + "' (" + std::to_string(range.end - range.begin) + " bytes)";
}

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

Memory::Memory() : version_(new_version()) {}

void Memory::add(uint64_t address, uint64_t bytes, std::string name, bool writable) {
  auto range = std::make_shared<Range>(Range{address, address + bytes, std::move(name), writable});
  std::unique_lock<std::shared_mutex> lock(mutex_);
  ranges_[address] = std::move(range);
  longest_ = std::max(longest_, bytes);
  version_ = new_version();
}

void Memory::remove(uint64_t address) {
  std::unique_lock<std::shared_mutex> lock(mutex_);
  ranges_.erase(address);
  version_ = new_version();
}

std::shared_ptr<Range> Memory::search(uint64_t address, uint64_t bytes) const {
  for (auto it = ranges_.upper_bound(address); it != ranges_.begin();) {
    --it;
    if (holds(*it->second, address, bytes)) return it->second;
    if (it->first + longest_ < address) break;
  }
  return nullptr;
}

const Range* Memory::find(uint64_t address, uint64_t bytes) const {
  LastHits& hits = last_hits;
  const uint64_t version = version_.load(std::memory_order_acquire);
  if (hits.memory == this && hits.version == version) {
    for (const auto& range : hits.ranges)
      if (range && holds(*range, address, bytes)) return range.get();
  } else {
    for (auto& range : hits.ranges) range.reset();
    hits.memory = this;
    hits.version = version;
  }
  std::shared_lock<std::shared_mutex> lock(mutex_);
  std::shared_ptr<Range> found = search(address, bytes);
  if (!found) return nullptr;
  auto& way = hits.ranges[hits.next++ % LastHits::WAYS];
  way = std::move(found);
  return way.get();
}

std::string Memory::describe(uint64_t address, uint64_t bytes) const {
  const std::string what = std::to_string(bytes) + " bytes at " + hex(address);
  std::shared_lock<std::shared_mutex> lock(mutex_);
  const Range* below = nullptr;  // the one that ends last among those that begin at or before the address
  for (auto it = ranges_.upper_bound(address); it != ranges_.begin();) {
    --it;
    if (!below || it->second->end > below->end) below = it->second.get();
    if (it->first + longest_ < address) break;
  }
  const auto above = ranges_.upper_bound(address);
  const uint64_t past = below && address >= below->end ? address - below->end : 0;
  const uint64_t before = above == ranges_.end() ? UINT64_MAX : above->first - address;
  if (below && address < below->end) {
    if (bytes <= below->end - address)
      return what + ": " + std::to_string(address - below->begin) + " bytes into " + quoted(*below);
    return what + ": " + std::to_string(bytes - (below->end - address)) + " of them past the end of " + quoted(*below);
  }
  if (below && past <= before) return what + ": " + std::to_string(past) + " bytes past the end of " + quoted(*below);
  if (above != ranges_.end())
    return what + ": " + std::to_string(before) + " bytes before the begin of " + quoted(*above->second);
  return what + ": no memory is registered";
}

std::vector<Range> Memory::all() const {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  std::vector<Range> result;
  for (const auto& [begin, range] : ranges_) result.push_back(*range);
  return result;
}

}  // namespace emu
