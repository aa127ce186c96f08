// cp.async.bulk and cp.reduce.async.bulk (PTX ISA 9.7.9.25.4), bulk async-groups (9.7.9.25.6).
//
// Counts: tma_bytes_loaded is bytes brought into shared memory, from global or another CTA's shared memory, once per
// instruction however many CTAs a multicast reaches; tma_bytes_stored and tma_bytes_reduced are bytes written to or
// reduced into global memory (or another CTA's shared memory, for reductions).
#include "bulk.h"

#include <algorithm>
#include <limits>

#include "formats.h"

namespace emu {

AddressSlot address_slot(Builder& builder, const Operand& operand) {
  AddressSlot a;
  a.wide = operand.kind == Operand::Kind::address && builder.wide(operand);
  a.slot = builder.address(operand);
  a.offset = builder.out.offset;
  return a;
}

bool only_modifiers(const Statement& statement, const char* known) {
  const std::string list = std::string(" ") + known + " ";
  return std::all_of(statement.modifiers.begin(), statement.modifiers.end(), [&](const std::string& modifier) {
    return list.find(" " + modifier + " ") != std::string::npos;
  });
}

// ---------------------------------------------------------------------------------------------------------
// Completion by mbarrier

namespace {

uint32_t rank_of(uint32_t shared_address) { return shared_address >> SHARED_RANK_SHIFT; }
uint32_t at_rank(uint32_t rank, uint32_t shared_address) {
  return rank << SHARED_RANK_SHIFT | (shared_address & SHARED_OFFSET_MASK);
}

SharedTarget shared_target(Warp& warp, uint32_t address, uint32_t bytes, uint32_t align, uint32_t barrier, int lane) {
  SharedTarget target;
  target.address = address;
  target.data = shared_at(warp, address, bytes, align, lane);
  target.barrier = barrier;
  target.stamp = signal_stamp(warp, barrier);
  return target;
}

}  // namespace

std::vector<SharedTarget> shared_targets(Warp& warp, uint32_t address, uint32_t bytes, uint32_t align,
                                         uint32_t barrier, const Multicast& multicast, int lane) {
  const uint32_t to = rank_of(address), signals = rank_of(barrier);
  if (!multicast.on) {
    const bool same = multicast.pair ? to / 2 == signals / 2 : to == signals;
    if (!same)
      warp.fail(ErrorKind::invalid_operand,
                "copies to CTA " + std::to_string(to) + " but signals an mbarrier of CTA " + std::to_string(signals) +
                    (multicast.pair ? ", which is not in its pair" : "; without .cta_group::2 they must be the same"),
                lane);
    return {shared_target(warp, address, bytes, align, barrier, lane)};
  }
  const uint32_t ctas = uint32_t(warp.cluster->ctas.size());
  if (multicast.cta_mask == 0 || (ctas < 16 && multicast.cta_mask >> ctas))
    warp.fail(ErrorKind::invalid_operand, "multicast mask " + std::to_string(multicast.cta_mask) +
                                              " in a cluster of " + std::to_string(ctas) + " CTAs", lane);
  std::vector<SharedTarget> targets;
  for (uint32_t rank = 0; rank < ctas; ++rank) {
    if (!(multicast.cta_mask >> rank & 1)) continue;
    const uint32_t signalled = multicast.pair ? (rank & ~1u) | (signals & 1) : rank;
    targets.push_back(shared_target(warp, at_rank(rank, address), bytes, align, at_rank(signalled, barrier), lane));
  }
  return targets;
}

void require_own_cta(Warp& warp, uint32_t address, const char* what, int lane) {
  if (rank_of(address) != warp.cta->rank)
    warp.fail(ErrorKind::invalid_operand,
              std::string("the .shared::cta ") + what + " is in CTA " + std::to_string(rank_of(address)) +
                  ", the executing thread in CTA " + std::to_string(warp.cta->rank), lane);
}

void complete_targets(Cluster& cluster, const std::vector<SharedTarget>& targets, uint32_t bytes) {
  for (const SharedTarget& target : targets) {
    if (cluster.trace) cluster.trace->amount(Note::Kind::received, bytes, rank_of(target.address));
    Clock clock;
    clock.know(target.stamp.actor, target.stamp.epoch);
    cluster.complete_tx(target.barrier, bytes, clock, nullptr);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Bulk async-groups

BulkState& bulk_state(Warp& warp) {
  if (!warp.bulk) warp.bulk = std::make_shared<BulkState>();
  return *static_cast<BulkState*>(warp.bulk.get());
}

BulkStamps next_bulk_operation(Warp& warp, uint32_t lane, uint32_t statement) {
  BulkState& state = bulk_state(warp);
  std::unique_ptr<BulkThread>& thread = state.threads[lane];
  if (!thread) {
    thread = std::make_unique<BulkThread>();
    thread->queue = warp.cluster->new_queue();
    thread->reads = warp.cluster->race.new_actor();
    thread->writes = warp.cluster->race.new_actor();
    state.used |= 1u << lane;
  }
  thread->last_statement = statement;
  const uint32_t epoch = ++thread->issued;
  return {thread->queue, {thread->reads, epoch, Proxy::async}, {thread->writes, epoch, Proxy::async}};
}

void check_bulk_at_exit(Warp& warp, uint32_t lanes) {
  if (!warp.bulk || !warp.cluster->race.enabled) return;
  const BulkState& state = bulk_state(warp);
  for (uint32_t rest = lanes & state.used; rest; rest &= rest - 1) {
    const uint32_t lane = uint32_t(__builtin_ctz(rest));
    const BulkThread& thread = *state.threads[lane];
    if (thread.waited >= thread.issued) {
      for (const uint32_t statement : thread.covering)
        warp.cluster->launch->heard[statement].store(1, std::memory_order_relaxed);
      continue;
    }
    const Statement& last = warp.program->text->statements[thread.last_statement];
    warp.fail(ErrorKind::in_flight,
              "the thread exits while " + std::to_string(thread.issued - thread.waited) +
                  " of its bulk copies may still read shared memory (the last: PTX line " +
                  std::to_string(last.line) + "): no cp.async.bulk.wait_group covers them",
              int(lane));
  }
}

namespace {

Step exec_commit_group(Warp& warp, const Instr& i) {
  if (!warp.bulk) return Step::next;  // an empty group is trivially complete
  BulkState& state = bulk_state(warp);
  for (uint32_t rest = warp.mask & state.used; rest; rest &= rest - 1) {
    BulkThread& thread = *state.threads[__builtin_ctz(rest)];
    thread.group_ends.push_back(thread.issued);
    thread.commits.push_back(i.statement);
  }
  return Step::next;
}

// A wait teaches something: of the operations up to the group that `first_commit` closed. It stands for what the last
// wait taught, if nothing has been made of that yet.
void note_wait(Warp& warp, BulkThread& thread, uint32_t wait, size_t first_commit, bool sources_only) {
  auto& unused = warp.unused_waits;
  if (!sources_only || thread.covers_sources_only)
    for (const uint32_t statement : thread.covering)
      unused.erase(std::remove(unused.begin(), unused.end(), statement), unused.end());
  thread.covering = {wait};
  thread.covering.insert(thread.covering.end(), thread.commits.begin() + long(first_commit), thread.commits.end());
  thread.covers_sources_only = sources_only;
  for (const uint32_t statement : thread.covering)
    if (std::find(unused.begin(), unused.end(), statement) == unused.end()) unused.push_back(statement);
}

// Waits until at most `pending` groups of a thread are incomplete.
void wait_for_groups(Warp& warp, BulkThread& thread, uint64_t pending, bool sources_only, uint32_t statement) {
  const size_t groups = thread.group_ends.size();
  if (pending >= groups) return;
  const uint32_t done = thread.group_ends[groups - 1 - pending];
  warp.cluster->drain(thread.queue, thread.issued - done);
  if (warp.clock.at(thread.reads) < done || (!sources_only && warp.clock.at(thread.writes) < done))
    note_wait(warp, thread, statement, groups - 1 - pending, sources_only);
  warp.clock.know(thread.reads, done);
  if (!sources_only) warp.clock.know(thread.writes, done);
  thread.waited = std::max(thread.waited, done);
  warp.order.lanes_differ = true;
}

template <bool sources_only>
Step exec_wait_group(Warp& warp, const Instr& i) {
  if (!warp.bulk) return Step::next;
  BulkState& state = bulk_state(warp);
  for (uint32_t rest = warp.mask & state.used; rest; rest &= rest - 1)
    wait_for_groups(warp, *state.threads[__builtin_ctz(rest)], i.imm, sources_only, i.statement);
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// Reductions (PTX ISA 9.7.9.25.4.2)

template <class T> T plus(T memory, T operand) { return T(memory + operand); }
template <class T> T smaller(T memory, T operand) { return std::min(memory, operand); }
template <class T> T larger(T memory, T operand) { return std::max(memory, operand); }
template <class T> T both(T memory, T operand) { return memory & operand; }
template <class T> T either(T memory, T operand) { return memory | operand; }
template <class T> T differ(T memory, T operand) { return memory ^ operand; }
// .inc and .dec count within [0, operand].
uint32_t count_up(uint32_t memory, uint32_t operand) { return memory >= operand ? 0 : memory + 1; }
uint32_t count_down(uint32_t memory, uint32_t operand) {
  return memory == 0 || memory > operand ? operand : memory - 1;
}

float flush(float value) {  // subnormals become zero of the same sign
  const uint32_t b = bits_of_float(value);
  return (b & 0x7f800000u) ? value : float_of_bits(b & 0x80000000u);
}
// .add.f32 flushes subnormal inputs and results. A NaN result is the canonical one.
uint32_t plus_f32(uint32_t memory, uint32_t operand) {
  const float sum = flush(flush(float_of_bits(memory)) + flush(float_of_bits(operand)));
  return sum == sum ? bits_of_float(sum) : CANONICAL_NAN_F32;
}
uint64_t plus_f64(uint64_t memory, uint64_t operand) {
  double a, b;
  std::memcpy(&a, &memory, 8);
  std::memcpy(&b, &operand, 8);
  a += b;
  uint64_t sum;
  std::memcpy(&sum, &a, 8);
  return a == a ? sum : 0x7fffffffffffffffull;
}
// The float sum of two 16-bit values has so many more bits that rounding it again is rounding once.
uint16_t plus_f16(uint16_t memory, uint16_t operand) {
  return float_to_f16(f16_to_float(memory) + f16_to_float(operand));
}
uint16_t plus_bf16(uint16_t memory, uint16_t operand) {
  return float_to_bf16(bf16_to_float(memory) + bf16_to_float(operand));
}

// min and max of 16-bit floats: a NaN loses to a number, -0 is below +0 (PTX ISA "min", "max").
template <float (*to_float)(uint16_t), bool greatest>
uint16_t extreme(uint16_t memory, uint16_t operand) {
  const float a = to_float(memory), b = to_float(operand);
  if (a != a && b != b) return CANONICAL_NAN_16;
  if (a != a) return operand;
  if (b != b) return memory;
  if (a == b) return (memory >> 15) == uint16_t(greatest) ? operand : memory;
  return (a > b) == greatest ? memory : operand;
}

template <class T, T (*combine)(T, T)>
void reduce_elements(uint8_t* memory, const uint8_t* operand, uint64_t bytes, bool shared_with_others) {
  T* target = reinterpret_cast<T*>(memory);
  for (uint64_t k = 0; k < bytes / sizeof(T); ++k) {
    T value;
    std::memcpy(&value, operand + k * sizeof(T), sizeof(T));
    if (!shared_with_others) {
      target[k] = combine(target[k], value);
      continue;
    }
    T seen = __atomic_load_n(target + k, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(target + k, &seen, combine(seen, value), true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
  }
}

template <class T>
Reducer integer_reducer(ReduceOp op) {
  switch (op) {
    case ReduceOp::add: return reduce_elements<T, plus<T>>;
    case ReduceOp::min: return reduce_elements<T, smaller<T>>;
    case ReduceOp::max: return reduce_elements<T, larger<T>>;
    case ReduceOp::bit_and: return reduce_elements<T, both<T>>;
    case ReduceOp::bit_or: return reduce_elements<T, either<T>>;
    case ReduceOp::bit_xor: return reduce_elements<T, differ<T>>;
    default: return nullptr;
  }
}

}  // namespace

Reducer find_reducer(ReduceOp op, ElementType type) {
  const bool add = op == ReduceOp::add, min = op == ReduceOp::min, max = op == ReduceOp::max;
  switch (type) {
    case ElementType::u32:
      if (op == ReduceOp::inc) return reduce_elements<uint32_t, count_up>;
      if (op == ReduceOp::dec) return reduce_elements<uint32_t, count_down>;
      return integer_reducer<uint32_t>(op);
    case ElementType::s32: return integer_reducer<int32_t>(op);
    case ElementType::u64: return integer_reducer<uint64_t>(op);
    case ElementType::s64: return add ? nullptr : integer_reducer<int64_t>(op);
    case ElementType::f32: return add ? reduce_elements<uint32_t, plus_f32> : nullptr;
    case ElementType::f64: return add ? reduce_elements<uint64_t, plus_f64> : nullptr;
    case ElementType::f16:
      return add   ? reduce_elements<uint16_t, plus_f16>
             : min ? reduce_elements<uint16_t, extreme<f16_to_float, false>>
             : max ? reduce_elements<uint16_t, extreme<f16_to_float, true>>
                   : nullptr;
    case ElementType::bf16:
      return add   ? reduce_elements<uint16_t, plus_bf16>
             : min ? reduce_elements<uint16_t, extreme<bf16_to_float, false>>
             : max ? reduce_elements<uint16_t, extreme<bf16_to_float, true>>
                   : nullptr;
    default: return nullptr;
  }
}

bool find_reduce_op(const Statement& statement, ReduceOp& op) {
  static const std::pair<const char*, ReduceOp> names[] = {
      {"add", ReduceOp::add},     {"min", ReduceOp::min},    {"max", ReduceOp::max},    {"inc", ReduceOp::inc},
      {"dec", ReduceOp::dec},     {"and", ReduceOp::bit_and}, {"or", ReduceOp::bit_or}, {"xor", ReduceOp::bit_xor}};
  for (const auto& [name, value] : names)
    if (statement.has(name)) {
      op = value;
      return true;
    }
  return false;
}

bool host_threads_share_memory(const Warp& warp) { return warp.cluster->launch->device->threads != 1; }

// ---------------------------------------------------------------------------------------------------------
// cp.async.bulk, cp.reduce.async.bulk

namespace {

struct BulkCopy {
  enum class Way : uint8_t { global_to_shared, shared_to_shared, shared_to_global } way;
  bool own_cta = false;            // .shared::cta destination
  AddressSlot to, from, barrier;
  uint32_t size = 0;               // slot
  bool multicast = false;
  uint32_t cta_mask = 0;           // slot
  bool masked = false;             // .cp_mask
  uint32_t byte_mask = 0;          // slot
  Reducer reducer = nullptr;       // cp.reduce
};

struct BulkOperands {
  uint64_t to = 0, from = 0;
  uint32_t barrier = 0, size = 0, cta_mask = 0, byte_mask = 0xffff;
  bool operator==(const BulkOperands& o) const {
    return to == o.to && from == o.from && barrier == o.barrier && size == o.size && cta_mask == o.cta_mask &&
           byte_mask == o.byte_mask;
  }
};

BulkOperands operands_of(Warp& warp, const BulkCopy& copy, uint32_t lane) {
  BulkOperands o;
  const bool to_global = copy.way == BulkCopy::Way::shared_to_global;
  const bool from_global = copy.way == BulkCopy::Way::global_to_shared;
  o.to = to_global ? copy.to.global(warp, lane) : copy.to.shared(warp, lane);
  o.from = from_global ? copy.from.global(warp, lane) : copy.from.shared(warp, lane);
  o.size = warp.u32(copy.size)[lane];
  if (!to_global) o.barrier = copy.barrier.shared(warp, lane);
  if (copy.multicast) o.cta_mask = warp.u32(copy.cta_mask)[lane] & 0xffff;
  if (copy.masked) o.byte_mask = warp.u32(copy.byte_mask)[lane] & 0xffff;
  return o;
}

// A copy or reduction of contiguous bytes; `targets` is empty if it completes by bulk group.
struct BulkOp : AsyncOp {
  const uint8_t* from = nullptr;
  uint8_t* to = nullptr;
  uint32_t size = 0, byte_mask = 0xffff;
  Reducer reducer = nullptr;
  bool atomic = false;
  std::vector<SharedTarget> targets;

  void move(uint8_t* destination) const {
    if (reducer) {
      reducer(destination, from, size, atomic);
    } else if (byte_mask == 0xffff) {
      std::memcpy(destination, from, size);
    } else {
      for (uint32_t k = 0; k < size; ++k)
        if (byte_mask >> (k % 16) & 1) destination[k] = from[k];
    }
  }
  void complete(Cluster& cluster) override {
    if (to) move(to);
    for (const SharedTarget& target : targets) move(target.data);
    complete_targets(cluster, targets, size);
  }
};

constexpr uint32_t BULK_ALIGNMENT = 16;

void check_size(Warp& warp, uint32_t size, int lane) {
  if (size % BULK_ALIGNMENT)
    warp.fail(ErrorKind::invalid_operand,
              "a bulk copy of " + std::to_string(size) + " bytes: the size must be a multiple of 16", lane);
}

void issue_load(Warp& warp, const Instr& i, const BulkCopy& copy, const BulkOperands& o, int lane) {
  const uint32_t to = uint32_t(o.to);
  if (copy.own_cta) require_own_cta(warp, to, "destination", lane);
  auto op = std::make_unique<BulkOp>();
  op->statement = i.statement;
  op->size = o.size;
  op->targets = shared_targets(warp, to, o.size, BULK_ALIGNMENT, o.barrier, {copy.multicast, false, o.cta_mask}, lane);
  op->from = global_at(warp, o.from, o.size, BULK_ALIGNMENT, false, lane);
  touch_global_async(warp, op->targets[0].stamp, o.from, o.size, false);
  for (const SharedTarget& target : op->targets)
    touch_shared_async(warp, target.stamp, target.address, o.size, true);
  if (warp.cluster->trace)
    warp.cluster->trace->amount(Note::Kind::fresh, warp.cluster->launch->sectors_seen.ask(o.from, o.size));
  warp.tally.tma_bytes_loaded += o.size;
  warp.cluster->issue(std::move(op));
}

void issue_shared_to_shared(Warp& warp, const Instr& i, const BulkCopy& copy, const BulkOperands& o, int lane) {
  const uint32_t to = uint32_t(o.to), from = uint32_t(o.from);
  require_own_cta(warp, from, "source", lane);
  if (rank_of(to) == warp.cta->rank)
    warp.fail(ErrorKind::invalid_operand, "the .shared::cluster destination must be in another CTA", lane);
  auto op = std::make_unique<BulkOp>();
  op->statement = i.statement;
  op->size = o.size;
  op->reducer = copy.reducer;
  op->targets = shared_targets(warp, to, o.size, BULK_ALIGNMENT, o.barrier, {}, lane);
  op->from = shared_at(warp, from, o.size, BULK_ALIGNMENT, lane);
  const Stamp& stamp = op->targets[0].stamp;
  touch_shared_async(warp, stamp, from, o.size, false);
  touch_shared_async(warp, stamp, to, o.size, true);
  (copy.reducer ? warp.tally.tma_bytes_reduced : warp.tally.tma_bytes_loaded) += o.size;
  warp.cluster->issue(std::move(op));
}

void issue_store(Warp& warp, const Instr& i, const BulkCopy& copy, const BulkOperands& o, int lane) {
  const uint32_t from = uint32_t(o.from);
  require_own_cta(warp, from, "source", lane);
  auto op = std::make_unique<BulkOp>();
  op->statement = i.statement;
  op->size = o.size;
  op->byte_mask = o.byte_mask;
  op->reducer = copy.reducer;
  op->atomic = host_threads_share_memory(warp);
  op->from = shared_at(warp, from, o.size, BULK_ALIGNMENT, lane);
  op->to = global_at(warp, o.to, o.size, BULK_ALIGNMENT, true, lane);
  const BulkStamps stamps = next_bulk_operation(warp, uint32_t(lane), i.statement);
  op->queue = stamps.queue;
  touch_shared_async(warp, stamps.read, from, o.size, false);
  touch_global_async(warp, stamps.write, o.to, o.size, true, copy.reducer != nullptr);
  (copy.reducer ? warp.tally.tma_bytes_reduced : warp.tally.tma_bytes_stored) += o.size;
  warp.cluster->issue(std::move(op));
}

Step exec_bulk_copy(Warp& warp, const Instr& i) {
  const BulkCopy& copy = *static_cast<const BulkCopy*>(i.detail);
  once_per_operands(
      warp, [&](uint32_t lane) { return operands_of(warp, copy, lane); },
      [&](const BulkOperands& o, uint32_t lane) {
        check_size(warp, o.size, int(lane));
        if (o.size == 0) return;
        switch (copy.way) {
          case BulkCopy::Way::global_to_shared: issue_load(warp, i, copy, o, int(lane)); break;
          case BulkCopy::Way::shared_to_shared: issue_shared_to_shared(warp, i, copy, o, int(lane)); break;
          case BulkCopy::Way::shared_to_global: issue_store(warp, i, copy, o, int(lane)); break;
        }
      });
  return Step::next;
}

// cp.async.bulk.prefetch.L2.global [source], size: a hint; its operands are checked.
Step exec_bulk_prefetch(Warp& warp, const Instr& i) {
  const BulkCopy& copy = *static_cast<const BulkCopy*>(i.detail);
  const uint32_t lane = warp.first_lane();
  const uint32_t size = warp.u32(copy.size)[lane];
  check_size(warp, size, int(lane));
  if (size) global_at(warp, copy.from.global(warp, lane), size, BULK_ALIGNMENT, false, int(lane));
  return Step::next;
}

// The element type of a cp.reduce.async.bulk. b32 and b64 are for .and, .or and .xor, which see no sign.
bool find_element_type(const std::string& name, ElementType& type) {
  static const std::pair<const char*, ElementType> names[] = {
      {"u32", ElementType::u32}, {"s32", ElementType::s32},   {"u64", ElementType::u64}, {"s64", ElementType::s64},
      {"b32", ElementType::u32}, {"b64", ElementType::u64},   {"f16", ElementType::f16}, {"bf16", ElementType::bf16},
      {"f32", ElementType::f32}, {"f64", ElementType::f64}};
  for (const auto& [text, value] : names)
    if (name == text) {
      type = value;
      return true;
    }
  return false;
}

// The .shared::cluster rows of the table have 32-bit types and add.u64 only; .noftz goes with 16-bit floats.
Reducer reduction_of(const Statement& s, bool to_global) {
  ReduceOp op;
  ElementType type;
  if (!find_reduce_op(s, op) || !find_element_type(s.type(), type)) return nullptr;
  const bool bits = op == ReduceOp::bit_and || op == ReduceOp::bit_or || op == ReduceOp::bit_xor;
  const bool half = type == ElementType::f16 || type == ElementType::bf16;
  if (!bits && s.type()[0] == 'b' && !half) return nullptr;
  if (s.has("noftz") != (half && op == ReduceOp::add)) return nullptr;
  if (!to_global) {
    const bool narrow = type == ElementType::u32 || type == ElementType::s32;
    if (!narrow && !(type == ElementType::u64 && op == ReduceOp::add)) return nullptr;
  }
  return find_reducer(op, type);
}

bool decode_bulk_copy(const Statement& s, Builder& b) {
  const bool reduces = s.modifiers[1] == "reduce";
  BulkCopy copy;
  const bool by_group = s.has("bulk_group");
  const bool from_global = s.modifiers.size() > 4 && s.modifiers[reduces ? 5 : 4] == "global";
  copy.own_cta = s.modifiers[reduces ? 4 : 3] == "shared::cta";
  copy.way = by_group      ? BulkCopy::Way::shared_to_global
             : from_global ? BulkCopy::Way::global_to_shared
                           : BulkCopy::Way::shared_to_shared;
  if (reduces) {
    if (from_global) return false;
    copy.reducer = reduction_of(s, by_group);
    if (!copy.reducer) return false;
  }
  copy.multicast = s.has("multicast::cluster");
  copy.masked = s.has("cp_mask");
  const size_t expected = 3 + size_t(!by_group) + size_t(copy.multicast) + size_t(s.has("L2::cache_hint")) +
                          size_t(copy.masked);
  if (s.operands.size() != expected) b.fail("expected " + std::to_string(expected) + " operands");
  copy.to = address_slot(b, s.operands[0]);
  copy.from = address_slot(b, s.operands[1]);
  copy.size = b.read(s.operands[2], RegClass::b32);
  if (!by_group) copy.barrier = address_slot(b, s.operands[3]);
  if (copy.multicast) copy.cta_mask = b.read(s.operands[4], RegClass::b16);
  if (copy.masked) copy.byte_mask = b.read(s.operands.back(), RegClass::b16);
  b.out.exec = exec_bulk_copy;
  b.out.detail = b.keep(copy);
  return true;
}

bool decode_bulk_prefetch(const Statement& s, Builder& b) {
  if (!only_modifiers(s, "cp async bulk prefetch L2 global L2::cache_hint")) return false;
  BulkCopy copy;
  copy.from = address_slot(b, s.operands[0]);
  copy.size = b.read(s.operands[1], RegClass::b32);
  b.out.exec = exec_bulk_prefetch;
  b.out.detail = b.keep(copy);
  return true;
}

}  // namespace

bool decode_bulk(const Statement& s, Builder& b) {
  if (s.opcode == "cp.async.bulk.commit_group") {
    b.out.exec = exec_commit_group;
    return true;
  }
  if (s.opcode == "cp.async.bulk.wait_group" || s.opcode == "cp.async.bulk.wait_group.read") {
    b.out.imm = uint64_t(b.integer(s.operands[0]));
    b.out.exec = s.has("read") ? exec_wait_group<true> : exec_wait_group<false>;
    return true;
  }
  const std::string& op = s.opcode;
  if (op.rfind("cp.async.bulk.prefetch.L2", 0) == 0) return decode_bulk_prefetch(s, b);
  const bool copies = op.rfind("cp.async.bulk.", 0) == 0 &&
                      only_modifiers(s, "cp async bulk shared::cluster shared::cta global bulk_group cp_mask "
                                        "mbarrier::complete_tx::bytes multicast::cluster L2::cache_hint");
  const bool reduces = op.rfind("cp.reduce.async.bulk.", 0) == 0 &&
                       only_modifiers(s, "cp reduce async bulk shared::cluster shared::cta global bulk_group "
                                         "mbarrier::complete_tx::bytes L2::cache_hint add min max inc dec and or xor "
                                         "noftz f16 bf16 b32 u32 s32 b64 u64 s64 f32 f64");
  return (copies || reduces) && decode_bulk_copy(s, b);
}

}  // namespace emu
