// Vector clocks and access histories: see race.h.
#include "race.h"

#include <immintrin.h>

#include <algorithm>

#include "error.h"

namespace emu {

// ---------------------------------------------------------------------------------------------------------
// Clocks

static void join_maximum(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  uint32_t* a = into.data();
  const uint32_t* b = from.data();
  size_t n = from.size(), i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i));
    __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(a + i), _mm256_max_epu32(x, y));
  }
  for (; i < n; ++i) a[i] = std::max(a[i], b[i]);
}

static void raise(std::vector<uint32_t>& epochs, ActorId actor, uint32_t epoch) {
  if (actor >= epochs.size()) epochs.resize(actor + 1, 0);
  epochs[actor] = std::max(epochs[actor], epoch);
}

static void join_partial(Clock& into, const std::vector<LaneKnowledge>& from) {
  for (const LaneKnowledge& k : from) {
    auto same = [&](const LaneKnowledge& o) { return o.actor == k.actor && o.lanes == k.lanes; };
    auto found = std::find_if(into.partial.begin(), into.partial.end(), same);
    if (found == into.partial.end()) {
      into.partial.push_back(k);
    } else {
      found->seen = std::max(found->seen, k.seen);
      found->proxied = std::max(found->proxied, k.proxied);
    }
  }
  auto known = [&](const LaneKnowledge& k) {
    return k.seen <= into.at(k.actor) && k.proxied <= into.proxied_at(k.actor);
  };
  into.partial.erase(std::remove_if(into.partial.begin(), into.partial.end(), known), into.partial.end());
}

void Clock::join(const Clock& other) {
  join_maximum(seen, other.seen);
  join_maximum(proxied, other.proxied);
  if (!other.partial.empty()) join_partial(*this, other.partial);
}

void Clock::know(ActorId actor, uint32_t epoch) { raise(seen, actor, epoch); }

void Clock::know_proxied(ActorId actor, uint32_t epoch) { raise(proxied, actor, epoch); }

bool Clock::lanes_seen(ActorId actor, uint32_t lanes, uint32_t epoch) const {
  for (const LaneKnowledge& k : partial)
    if (k.actor == actor && k.seen >= epoch) lanes &= ~k.lanes;
  return lanes == 0;
}

bool Clock::lanes_proxied(ActorId actor, uint32_t lanes, uint32_t epoch) const {
  for (const LaneKnowledge& k : partial)
    if (k.actor == actor && k.proxied >= epoch) lanes &= ~k.lanes;
  return lanes == 0;
}

void Clock::fence_proxy_async() {
  proxied = seen;
  for (LaneKnowledge& k : partial) k.proxied = std::max(k.proxied, k.seen);
}

// ---------------------------------------------------------------------------------------------------------
// Interning

constexpr uint32_t LANE_BITS = 5;
constexpr uint32_t LANES_PER_WARP = 1u << LANE_BITS;
constexpr AccessId BEFORE_LAUNCH = 1u << LANE_BITS;  // accesses_[1]
constexpr Readers ONE_READER = 1u << 31;
constexpr size_t MIN_LIMIT = 1u << 17;
constexpr size_t MAX_ACCESSES = 1u << (31 - LANE_BITS);  // Shadow::SPLIT takes the top bit
constexpr uint32_t RECENT = 1024;

static uint32_t index_of(AccessId id) { return id >> LANE_BITS; }

static bool same_but_lane(const Access& a, const Access& b) {
  return a.actor == b.actor && a.epoch == b.epoch && a.statement == b.statement && a.proxy == b.proxy &&
         a.write == b.write && a.atomic == b.atomic && a.unordered == b.unordered && (a.lane < 0) == (b.lane < 0) &&
         a.lanes == b.lanes && a.warp == b.warp && a.cta_rank == b.cta_rank;
}

RaceDetector::RaceDetector()
    : accesses_(2), sets_(1), recent_(RECENT, 0), limit_(MIN_LIMIT),
      shadows_(std::make_shared<std::vector<Shadow*>>()) {}

AccessId RaceDetector::intern(const Access& access) {
  const uint32_t lane = access.lane < 0 ? 0 : uint32_t(access.lane);
  uint32_t& recent = recent_[(access.actor * 61 + access.statement) % RECENT];
  if (recent == 0 || !same_but_lane(accesses_[recent], access)) {
    if (accesses_.size() >= limit_ || sets_.size() >= limit_) collect();
    recent = uint32_t(accesses_.size());
    accesses_.push_back(access);
    if (access.lane >= 0) {
      accesses_.push_back(access);
      accesses_.back().lane = -1;
    }
  }
  return recent << LANE_BITS | lane;
}

AccessId RaceDetector::by_several_lanes(AccessId id) const {
  return accesses_[index_of(id)].lane < 0 ? id : (index_of(id) + 1) << LANE_BITS;
}

uint32_t RaceDetector::lanes_of(AccessId id) const {
  const Access& access = accesses_[index_of(id)];
  return access.lane < 0 ? access.lanes : 1u << id % LANES_PER_WARP;
}

// A later read by the same actor stands for its earlier ones; single lanes are kept only while there is one reader.
Readers RaceDetector::with_read(Readers readers, AccessId id) {
  if (readers == 0) return ONE_READER | id;
  if (readers & ONE_READER) {
    const AccessId earlier = readers & ~ONE_READER;
    if (earlier == id) return readers;
    if (index_of(earlier) == index_of(id)) return ONE_READER | by_several_lanes(id);  // of the same instruction
    if (accesses_[index_of(earlier)].actor == accesses_[index_of(id)].actor) return ONE_READER | id;
    readers = ONE_READER | by_several_lanes(earlier);
  }
  return interned_set(readers, by_several_lanes(id));
}

Readers RaceDetector::interned_set(Readers readers, AccessId id) {
  auto [entry, is_new] = transitions_.try_emplace(uint64_t(readers) << 32 | id, 0);
  if (!is_new) return entry->second;
  std::vector<AccessId> members;
  if (readers & ONE_READER) members.push_back(readers & ~ONE_READER);
  else members = sets_[readers];
  const ActorId actor = accesses_[index_of(id)].actor;
  auto same_actor = [&](AccessId o) { return accesses_[index_of(o)].actor == actor; };
  auto earlier = std::find_if(members.begin(), members.end(), same_actor);
  if (earlier == members.end()) members.push_back(id);
  else if (*earlier == id) return entry->second = readers;
  else *earlier = id;
  sets_.push_back(std::move(members));
  return entry->second = uint32_t(sets_.size() - 1);
}

// Keeps what the shadows' granules still refer to and renumbers it.
void RaceDetector::collect() {
  std::vector<uint32_t> access_at(accesses_.size(), 0), set_at(sets_.size(), 0);
  std::vector<Access> accesses{accesses_[0], accesses_[1]};
  std::vector<std::vector<AccessId>> sets(1);
  access_at[1] = 1;
  auto keep_access = [&](AccessId id) -> AccessId {
    uint32_t& to = access_at[index_of(id)];
    if (to == 0 && id != 0) {
      to = uint32_t(accesses.size());
      accesses.push_back(accesses_[index_of(id)]);
      if (accesses.back().lane >= 0) accesses.push_back(accesses_[index_of(id) + 1]);
    }
    return to << LANE_BITS | (id & (LANES_PER_WARP - 1));
  };
  auto keep_readers = [&](Readers readers) -> Readers {
    if (readers & ONE_READER) return ONE_READER | keep_access(readers & ~ONE_READER);
    if (readers == 0 || set_at[readers] != 0) return set_at[readers];
    std::vector<AccessId> members;
    for (AccessId id : sets_[readers]) members.push_back(keep_access(id));
    sets.push_back(std::move(members));
    return set_at[readers] = uint32_t(sets.size() - 1);
  };
  auto keep = [&](Shadow::History& history) {
    if (history == 0 || (uint32_t(history) & Shadow::SPLIT)) return;
    history = keep_access(uint32_t(history)) | uint64_t(keep_readers(uint32_t(history >> 32))) << 32;
  };
  for (Shadow* shadow : *shadows_) {
    for (auto& history : shadow->history_) keep(history);
    for (auto& split : shadow->splits_)
      for (auto& history : split.bytes) keep(history);
  }
  accesses_ = std::move(accesses);
  sets_ = std::move(sets);
  transitions_.clear();
  std::fill(recent_.begin(), recent_.end(), 0);
  limit_ = std::max({MIN_LIMIT, 2 * accesses_.size(), 2 * sets_.size()});
  if (limit_ > MAX_ACCESSES) throw EmulatorError(ErrorKind::timeout, "the race detector ran out of access numbers");
}

// ---------------------------------------------------------------------------------------------------------
// Histories

struct Shadow::Check {
  const Access& access;
  const Clock& clock;
  AccessId id;
  const bool must_be_written;
  Conflict conflict;
  AccessId ordered_write = 0;  // the last write found to be ordered before this access
  Readers met = 0, becomes = 0;  // the last readers met, and what this read makes of them
  bool met_any = false;
};

Shadow::Shadow(RaceDetector& detector, uint64_t granules)
    : detector_(detector), registry_(detector.shadows_), history_(granules, 0) {
  registry_->push_back(this);
}

Shadow::~Shadow() {
  registry_->erase(std::find(registry_->begin(), registry_->end(), this));
}

// Whether `earlier` (by `lanes` of its warp, if it is a warp's own) happened before the access; fills in the conflict
// otherwise.
static bool ordered(const Access& earlier, uint32_t lanes, const Access& access, const Clock& clock,
                    Conflict& conflict) {
  if (earlier.atomic && access.atomic) return true;
  if (earlier.actor == access.actor && !access.unordered) return true;
  auto conflicts = [&] {
    conflict.found = true;
    conflict.earlier = earlier;
    if (earlier.lane >= 0) conflict.earlier.lane = __builtin_ctz(lanes);
    return false;
  };
  if (clock.at(earlier.actor) < earlier.epoch && !(lanes && clock.lanes_seen(earlier.actor, lanes, earlier.epoch)))
    return conflicts();
  const bool crosses_proxies = access.proxy == Proxy::async && earlier.proxy == Proxy::generic && earlier.write &&
                               earlier.epoch != 0;
  if (crosses_proxies && clock.proxied_at(earlier.actor) < earlier.epoch &&
      !(lanes && clock.lanes_proxied(earlier.actor, lanes, earlier.epoch))) {
    conflict.missing_proxy_fence = true;
    return conflicts();
  }
  return true;
}

bool Shadow::after_access(AccessId id, Check& check) const {
  return ordered(detector_.accesses_[index_of(id)], detector_.lanes_of(id), check.access, check.clock, check.conflict);
}

bool Shadow::after_readers(Readers readers, Check& check) const {
  auto after = [&](AccessId id) { return after_access(id, check); };
  if (readers & ONE_READER) return after(readers & ~ONE_READER);
  const std::vector<AccessId>& members = detector_.sets_[readers];
  return std::all_of(members.begin(), members.end(), after);
}

// Checks the access against one history and enters it there.
bool Shadow::visit(History& history, Check& check) {
  const AccessId write = uint32_t(history);
  const Readers readers = uint32_t(history >> 32);
  if (write == 0) {
    if (check.must_be_written) {
      check.conflict.uninitialised = true;
      return false;
    }
  } else if (write != check.ordered_write) {
    if (!after_access(write, check)) return false;
    check.ordered_write = write;
  }
  if (!check.access.write) {
    if (!check.met_any || check.met != readers) {
      check.becomes = detector_.with_read(readers, check.id);
      check.met = readers;
      check.met_any = true;
    }
    history = write | uint64_t(check.becomes) << 32;
    return true;
  }
  if (readers != 0 && !(check.met_any && check.met == readers)) {
    if (!after_readers(readers, check)) return false;
    check.met = readers;
    check.met_any = true;
  }
  const bool other_lane = write != check.id && index_of(write) == index_of(check.id);
  history = other_lane ? detector_.by_several_lanes(check.id) : check.id;
  return true;
}

// End of the granules from `first` on that share its history.
uint64_t Shadow::run_end(uint64_t first, uint64_t end) const {
  const History* h = history_.data();
  const History value = h[first];
  uint64_t g = first + 1;
  const __m256i pattern = _mm256_set1_epi64x(int64_t(value));
  for (; g + 4 <= end; g += 4) {
    __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(h + g));
    const int equal = _mm256_movemask_epi8(_mm256_cmpeq_epi64(next, pattern));
    if (equal != -1) return g + uint64_t(__builtin_ctz(~uint32_t(equal))) / 8;
  }
  while (g < end && h[g] == value) ++g;
  return g;
}

bool Shadow::visit_range(uint64_t first, uint64_t end, Check& check) {
  for (uint64_t g = first; g < end;) {
    if (uint32_t(history_[g]) & SPLIT) {
      if (!visit_bytes(g, 0, 4, check)) {
        check.conflict.address = g;
        return false;
      }
      ++g;
      continue;
    }
    const uint64_t stop = run_end(g, end);
    History history = history_[g];
    if (!visit(history, check)) {
      check.conflict.address = g;
      return false;
    }
    std::fill(history_.begin() + g, history_.begin() + stop, history);
    g = stop;
  }
  return true;
}

uint32_t Shadow::new_split(History history) {
  uint32_t index;
  if (free_splits_.empty()) {
    index = uint32_t(splits_.size());
    splits_.emplace_back();
  } else {
    index = free_splits_.back();
    free_splits_.pop_back();
  }
  for (History& byte : splits_[index].bytes) byte = history;
  return index;
}

// Bytes [begin, end) of one granule, which becomes one again as soon as its bytes agree.
bool Shadow::visit_bytes(uint64_t granule, uint32_t begin, uint32_t end, Check& check) {
  History& history = history_[granule];
  const bool was_split = uint32_t(history) & SPLIT;
  const uint32_t index = was_split ? uint32_t(history) & ~SPLIT : new_split(history);
  Split& split = splits_[index];
  history = SPLIT | index;
  for (uint32_t byte = begin; byte < end; ++byte) {
    if (!visit(split.bytes[byte], check)) {
      check.conflict.address = granule * 4 + byte;
      return false;
    }
  }
  const History* b = split.bytes;
  if (b[0] == b[1] && b[1] == b[2] && b[2] == b[3]) {
    history = b[0];
    split = Split{};
    free_splits_.push_back(index);
  }
  return true;
}

Conflict Shadow::access(uint64_t first, uint64_t count, const Access& access, const Clock& clock,
                        bool must_be_written) {
  Check check{access, clock, detector_.intern(access), must_be_written, {}};
  visit_range(first, first + count, check);
  return check.conflict;
}

Conflict Shadow::access_lanes(uint64_t first, uint64_t count, uint32_t bytes_each, const Access& access,
                              const Clock& clock, bool must_be_written) {
  Check check{access, clock, detector_.intern(access), must_be_written, {}};
  const uint64_t end = (first + count) / 4, step = bytes_each / 4;
  for (uint64_t g = first / 4; g < end; g += step, ++check.id) {
    check.met_any = false;  // what a read makes of its predecessors depends on the lane
    if (!visit_range(g, std::min(g + step, end), check)) {
      check.conflict.address *= 4;
      break;
    }
  }
  return check.conflict;
}

Conflict Shadow::access_bytes(uint64_t first, uint64_t count, const Access& access, const Clock& clock,
                              bool must_be_written) {
  const uint64_t end = first + count;
  Access narrow = access;
  const bool whole = first % 4 == 0 && end % 4 == 0;
  if (!whole) narrow.lane = -1;  // the bytes of a granule agree sooner
  Check check{narrow, clock, detector_.intern(narrow), must_be_written, {}};
  uint64_t at = first;
  if (at % 4 != 0 || end - at < 4) {
    const uint64_t stop = std::min(end, at / 4 * 4 + 4);
    if (!visit_bytes(at / 4, uint32_t(at % 4), uint32_t(at % 4 + (stop - at)), check)) return check.conflict;
    at = stop;
  }
  if (end - at >= 4) {
    if (!visit_range(at / 4, end / 4, check)) {
      check.conflict.address *= 4;
      return check.conflict;
    }
    at = end / 4 * 4;
  }
  if (at < end) visit_bytes(at / 4, 0, uint32_t(end - at), check);
  return check.conflict;
}

void Shadow::forget(uint64_t first, uint64_t count) {
  for (uint64_t g = first; g < first + count; ++g) {
    if (uint32_t(history_[g]) & SPLIT) {
      splits_[uint32_t(history_[g]) & ~SPLIT] = Split{};
      free_splits_.push_back(uint32_t(history_[g]) & ~SPLIT);
    }
    history_[g] = 0;
  }
}

void Shadow::assume_written(uint64_t first, uint64_t count) {
  forget(first, count);
  std::fill(history_.begin() + first, history_.begin() + first + count, BEFORE_LAUNCH);
}

}  // namespace emu
