// cp.async.bulk.tensor, cp.reduce.async.bulk.tensor, their prefetches and prefetch.tensormap (PTX ISA 9.7.9.25.5).
//
// A box is moved row by row: a row is the box's extent along dimension 0, rows lie one behind the other in shared
// memory, and swizzling permutes chunks within a row. Elements of the box outside the tensor are filled on loads and
// left out on stores.
//
// Counts: a load counts the whole box, filled elements included (what it announces to its mbarrier), once however
// many CTAs a multicast reaches; a store or reduction counts the bytes inside the tensor.
#include <immintrin.h>

#include <algorithm>

#include "bulk.h"
#include "formats.h"

namespace emu {

namespace {

struct TensorCopy {
  enum class Kind : uint8_t { load, store, prefetch } kind;
  uint32_t rank = 0;
  bool own_cta = false;      // .shared::cta destination
  AddressSlot map, shared, barrier;
  std::array<uint32_t, MAX_TENSOR_RANK> coordinates{};  // slots
  bool multicast = false, pair = false;
  uint32_t cta_mask = 0;     // slot
  bool reduces = false;
  ReduceOp reduce_op = ReduceOp::add;
};

struct TensorOperands {
  uint64_t map = 0;
  uint32_t shared = 0, barrier = 0, cta_mask = 0;
  std::array<int32_t, MAX_TENSOR_RANK> start{};
  bool operator==(const TensorOperands& o) const {
    return map == o.map && shared == o.shared && barrier == o.barrier && cta_mask == o.cta_mask && start == o.start;
  }
};

TensorOperands operands_of(Warp& warp, const TensorCopy& copy, uint32_t lane) {
  TensorOperands o;
  o.map = copy.map.global(warp, lane);
  for (uint32_t d = 0; d < copy.rank; ++d) o.start[d] = int32_t(warp.u32(copy.coordinates[d])[lane]);
  if (copy.kind != TensorCopy::Kind::prefetch) o.shared = copy.shared.shared(warp, lane);
  if (copy.kind == TensorCopy::Kind::load) o.barrier = copy.barrier.shared(warp, lane);
  if (copy.multicast) o.cta_mask = warp.u32(copy.cta_mask)[lane] & 0xffff;
  return o;
}

// ---------------------------------------------------------------------------------------------------------
// The tensor map and the box

// The decoded map at an address; decoded once per warp unless its bytes have changed.
std::shared_ptr<const TensorMap> tensor_map_at(Warp& warp, uint64_t address, uint32_t rank, int lane) {
  const uint8_t* bytes = global_at(warp, address, TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT, false, lane);
  auto& maps = bulk_state(warp).maps;
  for (auto& map : maps)
    if (map->location == address && map->rank == rank &&
        std::memcmp(map->raw.data(), bytes, TENSOR_MAP_LIVE_BYTES) == 0)
      return map;
  auto map = std::make_shared<TensorMap>();
  try {
    *map = decode_tensor_map(bytes);
  } catch (const EmulatorError& error) {
    warp.fail(error.kind, error.what(), lane);
  }
  if (map->rank != rank)
    warp.fail(ErrorKind::invalid_operand, "the tensor map has rank " + std::to_string(map->rank) +
                                              ", the instruction " + std::to_string(rank), lane);
  map->location = address;
  maps.erase(std::remove_if(maps.begin(), maps.end(), [&](const auto& m) { return m->location == address; }),
             maps.end());
  maps.push_back(map);
  return map;
}

// A box at a place in the tensor.
struct Box {
  std::shared_ptr<const TensorMap> map;
  std::array<int32_t, MAX_TENSOR_RANK> start{};
};

// Indices of dimension `d` of the box, [first, last), that lie inside the tensor.
struct Inside { uint32_t first, last; };
Inside inside(const Box& box, uint32_t d) {
  const int64_t start = box.start[d], step = box.map->steps[d], count = box.map->counts[d];
  const int64_t dim = int64_t(box.map->dims[d]);
  const int64_t first = start >= 0 ? 0 : (-start + step - 1) / step;
  const int64_t last = start >= dim ? 0 : (dim - start + step - 1) / step;
  return {uint32_t(std::min(first, count)), uint32_t(std::max(std::min(last, count), std::min(first, count)))};
}

// visit(row, address, columns): every row of the box in the order of shared memory. `address` is the global address
// of the row's column 0 (which may lie outside); `columns` is empty if the row is outside. Addresses wrap at 64
// bits: maps of ragged tensors rely on it.
template <class Visit>
void for_each_row(const Box& box, Visit visit) {
  const TensorMap& map = *box.map;
  Inside in[MAX_TENSOR_RANK];
  uint64_t base = map.address;
  for (uint32_t d = 0; d < MAX_TENSOR_RANK; ++d) {
    in[d] = inside(box, d);
    base += uint64_t(int64_t(box.start[d])) * map.strides[d];
  }
  auto holds = [&](uint32_t d, uint32_t index) { return index >= in[d].first && index < in[d].last; };
  uint32_t row = 0;
  for (uint32_t i4 = 0; i4 < map.counts[4]; ++i4)
    for (uint32_t i3 = 0; i3 < map.counts[3]; ++i3)
      for (uint32_t i2 = 0; i2 < map.counts[2]; ++i2) {
        const bool plane = holds(4, i4) && holds(3, i3) && holds(2, i2);
        uint64_t address = base + i4 * map.steps[4] * map.strides[4] + i3 * map.steps[3] * map.strides[3] +
                           i2 * map.steps[2] * map.strides[2];
        for (uint32_t i1 = 0; i1 < map.counts[1]; ++i1, ++row, address += map.steps[1] * map.strides[1])
          visit(row, address, plane && holds(1, i1) ? in[0] : Inside{0, 0});
      }
}

// ---------------------------------------------------------------------------------------------------------
// Footprints, at issue

// Global ranges of a box, joined where rows are adjacent: visit(address, bytes).
template <class Visit>
void for_each_global_range(const Box& box, Visit visit) {
  uint64_t begin = 0, end = 0;
  for_each_row(box, [&](uint32_t, uint64_t address, Inside columns) {
    if (columns.first >= columns.last) return;
    const uint64_t from = address + uint64_t(columns.first) * box.map->element;
    const uint64_t to = address + uint64_t(columns.last) * box.map->element;
    if (from != end) {
      if (end > begin) visit(begin, end - begin);
      begin = from;
    }
    end = to;
  });
  if (end > begin) visit(begin, end - begin);
}

[[noreturn]] void fail_outside(const Box& box, const EmulatorError& error) {
  const TensorMap& map = *box.map;
  std::string dims;
  for (uint32_t d = 0; d < map.rank; ++d) dims += (d ? ", " : "") + std::to_string(map.dims[d]);
  throw EmulatorError(error.kind, "box at " + coordinates_text(box.start.data(), map.rank) + " of a tensor map {" +
                                      dims + "} of " + element_name(map.type) + ": " + error.what(), error.site);
}

// Checks that every element of the box that lies inside the tensor lies in registered memory, and records it.
uint64_t touch_global_box(Warp& warp, const Box& box, const Stamp& stamp, bool write, bool atomic, int lane) {
  const Memory& memory = warp.cluster->launch->device->memory;
  const Range* range = nullptr;  // that held the previous row
  uint64_t total = 0;
  for_each_global_range(box, [&](uint64_t address, uint64_t bytes) {
    if (!range || address < range->begin || address + bytes > range->end || address + bytes < address) {
      try {
        global_at(warp, address, bytes, 1, write, lane);
      } catch (const EmulatorError& error) {
        fail_outside(box, error);
      }
      range = memory.find(address, bytes);
    }
    touch_global_async(warp, stamp, address, bytes, write, atomic);
    total += bytes;
  });
  return total;
}

void note_fresh(Warp& warp, const Box& box) {
  uint64_t bytes = 0;
  for_each_global_range(box, [&](uint64_t address, uint64_t count) {
    bytes += warp.cluster->launch->sectors_seen.ask(address, count);
  });
  warp.cluster->trace->amount(Note::Kind::fresh, bytes);
}

// Shared bytes that a store reads: whole rows inside the tensor; of rows that stick out, the chunks that hold
// elements inside it.
void touch_shared_source(Warp& warp, const Box& box, const Stamp& stamp, uint32_t shared) {
  const TensorMap& map = *box.map;
  uint32_t begin = shared, end = shared;
  auto flush = [&] {
    if (end > begin) touch_shared_async(warp, stamp, begin, end - begin, false);
  };
  for_each_row(box, [&](uint32_t row, uint64_t, Inside columns) {
    if (columns.first >= columns.last) return;
    const uint32_t at = shared + row * map.row_bytes;
    if (columns.first == 0 && columns.last == map.counts[0]) {
      if (at != end) {
        flush();
        begin = at;
      }
      end = at + map.row_bytes;
      return;
    }
    const uint32_t first = columns.first * map.element, last = columns.last * map.element;
    for (uint32_t chunk = first / 16 * 16; chunk < last; chunk += 16) {
      const uint32_t from = std::max(chunk, first), to = std::min(chunk + 16, last);
      touch_shared_async(warp, stamp, map.swizzle.apply(at + chunk) + from - chunk, to - from, false);
    }
  });
  flush();
}

// ---------------------------------------------------------------------------------------------------------
// Data movement, at completion

constexpr uint32_t MAX_ROW_BYTES = 256 * 8;

void copy_chunk(uint8_t* to, const uint8_t* from) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// A row lies in shared memory at `row` (host pointer) and absolute address `address`. Swizzled rows are as long as the
// swizzle's span and start at a multiple of it, so that their chunks only change places among themselves.
uint32_t chunk_permutation(const Swizzle& swizzle, uint32_t address) { return swizzle.apply(address) ^ address; }

void row_to_shared(const TensorMap& map, uint8_t* row, uint32_t address, const uint8_t* from) {
  const uint32_t permutation = chunk_permutation(map.swizzle, address);
  for (uint32_t chunk = 0; chunk < map.row_bytes; chunk += 16) copy_chunk(row + (chunk ^ permutation), from + chunk);
}

void row_from_shared(const TensorMap& map, const uint8_t* row, uint32_t address, uint8_t* to) {
  const uint32_t permutation = chunk_permutation(map.swizzle, address);
  for (uint32_t chunk = 0; chunk < map.row_bytes; chunk += 16) copy_chunk(to + chunk, row + (chunk ^ permutation));
}

// Zero, or the NaN of the element type in every element.
void fill_row(const TensorMap& map, uint8_t* row) {
  if (!map.nan_fill) {
    std::memset(row, 0, map.row_bytes);
    return;
  }
  const uint64_t nan = map.element == 2 ? CANONICAL_NAN_16 : map.element == 4 ? CANONICAL_NAN_F32 : ~0ull >> 1;
  for (uint32_t k = 0; k < map.row_bytes; k += map.element) std::memcpy(row + k, &nan, map.element);
}

// f32.ftz flushes subnormals; tf32 keeps the upper 19 bits. How the hardware rounds to tf32 is not documented: to
// nearest even is assumed.
void convert_row(const TensorMap& map, uint8_t* row) {
  for (uint32_t k = 0; k < map.row_bytes; k += 4) {
    uint32_t bits;
    std::memcpy(&bits, row + k, 4);
    if (map.type == ElementType::f32_ftz && !(bits & 0x7f800000u)) bits &= 0x80000000u;
    if (map.tf32) bits = encode_float(float_of_bits(bits), Format::tf32);
    std::memcpy(row + k, &bits, 4);
  }
}

void load_box(const Box& box, uint8_t* shared, uint32_t address) {
  const TensorMap& map = *box.map;
  const bool converts = map.tf32 || map.type == ElementType::f32_ftz;
  alignas(16) uint8_t filled[MAX_ROW_BYTES];
  for_each_row(box, [&](uint32_t row, uint64_t global, Inside columns) {
    uint8_t* to = shared + size_t(row) * map.row_bytes;
    const uint32_t at = address + row * map.row_bytes;
    if (columns.first == 0 && columns.last == map.counts[0] && !converts) {
      row_to_shared(map, to, at, reinterpret_cast<const uint8_t*>(global));
      return;
    }
    fill_row(map, filled);
    if (columns.first < columns.last) {
      const uint64_t skip = uint64_t(columns.first) * map.element;
      std::memcpy(filled + skip, reinterpret_cast<const uint8_t*>(global + skip),
                  size_t(columns.last - columns.first) * map.element);
      if (converts) convert_row(map, filled);
    }
    row_to_shared(map, to, at, filled);
  });
}

// Stores (reducer null) or reduces the box into global memory.
void store_box(const Box& box, const uint8_t* shared, uint32_t address, Reducer reducer, bool atomic) {
  const TensorMap& map = *box.map;
  alignas(16) uint8_t plain[MAX_ROW_BYTES];
  for_each_row(box, [&](uint32_t row, uint64_t global, Inside columns) {
    if (columns.first >= columns.last) return;
    row_from_shared(map, shared + size_t(row) * map.row_bytes, address + row * map.row_bytes, plain);
    const uint64_t skip = uint64_t(columns.first) * map.element;
    const size_t bytes = size_t(columns.last - columns.first) * map.element;
    uint8_t* to = reinterpret_cast<uint8_t*>(global + skip);
    if (reducer) reducer(to, plain + skip, bytes, atomic);
    else std::memcpy(to, plain + skip, bytes);
  });
}

struct TensorLoad : AsyncOp {
  Box box;
  std::vector<SharedTarget> targets;
  void complete(Cluster& cluster) override {
    const SharedTarget& first = targets[0];
    load_box(box, first.data, first.address & SHARED_OFFSET_MASK);
    for (size_t k = 1; k < targets.size(); ++k)  // the same offset in another CTA: the same swizzle
      std::memcpy(targets[k].data, first.data, box.map->box_bytes);
    complete_targets(cluster, targets, box.map->box_bytes);
  }
};

struct TensorStore : AsyncOp {
  Box box;
  const uint8_t* shared = nullptr;
  uint32_t address = 0;
  Reducer reducer = nullptr;
  bool atomic = false;
  void complete(Cluster&) override { store_box(box, shared, address & SHARED_OFFSET_MASK, reducer, atomic); }
};

// ---------------------------------------------------------------------------------------------------------
// Issue

constexpr uint32_t SHARED_ALIGNMENT = 128;  // of the box in shared memory, with any swizzle

void issue_load(Warp& warp, const Instr& i, const TensorCopy& copy, const TensorOperands& o, int lane) {
  if (copy.own_cta) require_own_cta(warp, o.shared, "destination", lane);
  auto op = std::make_unique<TensorLoad>();
  op->statement = i.statement;
  op->box = {tensor_map_at(warp, o.map, copy.rank, lane), o.start};
  const uint32_t bytes = op->box.map->box_bytes;
  op->targets = shared_targets(warp, o.shared, bytes, SHARED_ALIGNMENT, o.barrier,
                               {copy.multicast, copy.pair, o.cta_mask}, lane);
  touch_global_box(warp, op->box, op->targets[0].stamp, false, false, lane);
  for (const SharedTarget& target : op->targets) touch_shared_async(warp, target.stamp, target.address, bytes, true);
  if (warp.cluster->trace) note_fresh(warp, op->box);
  warp.tally.tma_bytes_loaded += bytes;
  warp.cluster->issue(std::move(op));
}

void issue_store(Warp& warp, const Instr& i, const TensorCopy& copy, const TensorOperands& o, int lane) {
  require_own_cta(warp, o.shared, "source", lane);
  auto op = std::make_unique<TensorStore>();
  op->statement = i.statement;
  op->box = {tensor_map_at(warp, o.map, copy.rank, lane), o.start};
  const TensorMap& map = *op->box.map;
  if (copy.reduces) {
    op->reducer = find_reducer(copy.reduce_op, map.type);
    if (!op->reducer || map.type == ElementType::f64)
      warp.fail(ErrorKind::invalid_operand,
                std::string("this reduction is not defined for the tensor map's elements, ") + element_name(map.type),
                lane);
    op->atomic = host_threads_share_memory(warp);
  }
  for (uint32_t d = 1; d < map.rank; ++d)
    if (map.steps[d] != 1)
      warp.fail(ErrorKind::invalid_operand, "stores through a tensor map with element strides are not supported", lane);
  op->shared = shared_at(warp, o.shared, map.box_bytes, SHARED_ALIGNMENT, lane);
  op->address = o.shared;
  const BulkStamps stamps = next_bulk_operation(warp, uint32_t(lane), i.statement);
  op->queue = stamps.queue;
  touch_shared_source(warp, op->box, stamps.read, o.shared);
  const uint64_t bytes = touch_global_box(warp, op->box, stamps.write, true, copy.reduces, lane);
  (copy.reduces ? warp.tally.tma_bytes_reduced : warp.tally.tma_bytes_stored) += bytes;
  warp.cluster->issue(std::move(op));
}

Step exec_tensor_copy(Warp& warp, const Instr& i) {
  const TensorCopy& copy = *static_cast<const TensorCopy*>(i.detail);
  once_per_operands(
      warp, [&](uint32_t lane) { return operands_of(warp, copy, lane); },
      [&](const TensorOperands& o, uint32_t lane) {
        switch (copy.kind) {
          case TensorCopy::Kind::load: issue_load(warp, i, copy, o, int(lane)); break;
          case TensorCopy::Kind::store: issue_store(warp, i, copy, o, int(lane)); break;
          case TensorCopy::Kind::prefetch: tensor_map_at(warp, o.map, copy.rank, int(lane)); break;
        }
      });
  return Step::next;
}

// A hint; the descriptor must exist.
Step exec_prefetch_tensormap(Warp& warp, const Instr& i) {
  const AddressSlot& map = *static_cast<const AddressSlot*>(i.detail);
  const uint32_t lane = warp.first_lane();
  global_at(warp, map.global(warp, lane), TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT, false, int(lane));
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// Decoding

uint32_t rank_modifier(const Statement& s) {
  static const char* const names[] = {"1d", "2d", "3d", "4d", "5d"};
  for (uint32_t d = 0; d < MAX_TENSOR_RANK; ++d)
    if (s.has(names[d])) return d + 1;
  return 0;
}

// [tensorMap, {coordinates}]
void decode_tensor(const Operand& operand, Builder& b, TensorCopy& copy) {
  if (operand.kind != Operand::Kind::address || operand.parts.size() != 2)
    b.fail("expected [tensorMap, {coordinates}]");
  const Operand& coordinates = operand.parts[1];
  if (coordinates.kind != Operand::Kind::vector || coordinates.parts.size() != copy.rank)
    b.fail("expected " + std::to_string(copy.rank) + " coordinates");
  copy.map = address_slot(b, operand);
  for (uint32_t d = 0; d < copy.rank; ++d) copy.coordinates[d] = b.read(coordinates.parts[d], RegClass::b32);
}

void expect_operands(const Statement& s, const Builder& b, size_t required, bool multicast) {
  const size_t expected = required + size_t(multicast) + size_t(s.has("L2::cache_hint"));
  if (s.operands.size() != expected) b.fail("expected " + std::to_string(expected) + " operands");
}

bool finish(Builder& b, const TensorCopy& copy) {
  b.out.exec = exec_tensor_copy;
  b.out.detail = b.keep(copy);
  return true;
}

// cp.async.bulk.tensor.Nd.{shared::cta, shared::cluster}.global...
//   [destination], [tensorMap, {coordinates}], [mbarrier] {, ctaMask} {, cache-policy}
bool decode_load(const Statement& s, Builder& b) {
  if (!only_modifiers(s, "cp async bulk tensor 1d 2d 3d 4d 5d shared::cta shared::cluster global tile "
                         "mbarrier::complete_tx::bytes multicast::cluster cta_group::1 cta_group::2 L2::cache_hint"))
    return false;
  TensorCopy copy;
  copy.kind = TensorCopy::Kind::load;
  copy.rank = rank_modifier(s);
  copy.own_cta = s.has("shared::cta");
  copy.multicast = s.has("multicast::cluster");
  copy.pair = s.has("cta_group::2");
  expect_operands(s, b, 3, copy.multicast);
  copy.shared = address_slot(b, s.operands[0]);
  decode_tensor(s.operands[1], b, copy);
  copy.barrier = address_slot(b, s.operands[2]);
  if (copy.multicast) copy.cta_mask = b.read(s.operands[3], RegClass::b16);
  return finish(b, copy);
}

// cp{.reduce}.async.bulk.tensor.Nd.global.shared::cta...  [tensorMap, {coordinates}], [source] {, cache-policy}
bool decode_store(const Statement& s, Builder& b) {
  if (!only_modifiers(s, "cp reduce async bulk tensor 1d 2d 3d 4d 5d global shared::cta tile bulk_group "
                         "L2::cache_hint add min max inc dec and or xor"))
    return false;
  TensorCopy copy;
  copy.kind = TensorCopy::Kind::store;
  copy.rank = rank_modifier(s);
  copy.reduces = find_reduce_op(s, copy.reduce_op);
  if (copy.reduces != (s.modifiers[1] == "reduce")) return false;
  expect_operands(s, b, 2, false);
  decode_tensor(s.operands[0], b, copy);
  copy.shared = address_slot(b, s.operands[1]);
  return finish(b, copy);
}

// cp.async.bulk.prefetch.tensor.Nd.L2.global...  [tensorMap, {coordinates}] {, cache-policy}
bool decode_prefetch(const Statement& s, Builder& b) {
  if (!only_modifiers(s, "cp async bulk prefetch tensor 1d 2d 3d 4d 5d L2 global tile L2::cache_hint")) return false;
  TensorCopy copy;
  copy.kind = TensorCopy::Kind::prefetch;
  copy.rank = rank_modifier(s);
  expect_operands(s, b, 1, false);
  decode_tensor(s.operands[0], b, copy);
  return finish(b, copy);
}

}  // namespace

bool decode_tma(const Statement& s, Builder& b) {
  if (s.mnemonic() == "prefetch" && s.has("tensormap")) {
    if (s.operands.size() != 1) b.fail("expected [tensorMap]");
    b.out.detail = b.keep(address_slot(b, s.operands[0]));
    b.out.exec = exec_prefetch_tensormap;
    return true;
  }
  if (s.mnemonic() != "cp" || !s.has("tensor") || rank_modifier(s) == 0) return false;
  if (s.has("prefetch")) return decode_prefetch(s, b);
  return s.has("bulk_group") ? decode_store(s, b) : decode_load(s, b);
}

}  // namespace emu
