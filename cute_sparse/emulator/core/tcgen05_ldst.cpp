// Tensor memory <-> registers (PTX ISA, "Tensor Memory Load/Store"): tcgen05.ld, tcgen05.st, tcgen05.wait.
//
// A load's values are there at once; when it has read tensor memory becomes known later, and in a kernel that waits for
// its loads its registers may be used only then (tensor_memory.h). A store's
// data is taken at once and lands when its queue completes.
#include "machine.h"
#include "tensor_memory.h"

namespace emu {

namespace {

// PTX ISA, "Tensor Memory Data Movement Shape": lanes x bits of one repetition.
enum class Shape : uint8_t { s32x32b, s16x64b, s16x128b, s16x256b, s16x32bx2 };

struct ShapeTraits {
  const char* name;
  Shape shape;
  uint32_t registers;    // of one repetition
  uint32_t repetitions;  // at most
};

constexpr ShapeTraits SHAPES[] = {
    {"32x32b", Shape::s32x32b, 1, 128},  {"16x64b", Shape::s16x64b, 1, 128},     {"16x128b", Shape::s16x128b, 2, 64},
    {"16x256b", Shape::s16x256b, 4, 32}, {"16x32bx2", Shape::s16x32bx2, 1, 128},
};

// A 32-bit word of the fragment, relative to the address operand.
struct Word {
  uint32_t lane, column;
};

// Which word register r of thread t holds (PTX ISA, the figures of "Matrix fragments for tcgen05.ld and tcgen05.st";
// CUTLASS's copy traits say the same). The second half of 16x32bx2 starts at its own column, added by the caller.
Word word_of(Shape shape, uint32_t t, uint32_t r) {
  switch (shape) {
    case Shape::s32x32b: return {t, r};
    case Shape::s16x64b: return {t / 4 + 8 * (t % 2), 2 * r + t / 2 % 2};
    case Shape::s16x128b: return {t / 4 + 8 * (r % 2), 4 * (r / 2) + t % 4};
    case Shape::s16x256b: return {t / 4 + 8 * (r / 2 % 2), 8 * (r / 4) + 2 * (t % 4) + r % 2};
    case Shape::s16x32bx2: return {t % 16, r};
  }
  return {0, 0};
}

// Columns that n registers of every thread cover (each half's, for 16x32bx2).
uint32_t columns_of(Shape shape, uint32_t registers) {
  switch (shape) {
    case Shape::s16x64b: case Shape::s16x128b: case Shape::s16x256b: return 2 * registers;
    default: return registers;
  }
}

struct Movement {
  Shape shape;
  uint32_t registers;
  bool halves;         // .pack::16b, .unpack::16b: a register holds the low halves of two neighbouring columns
  uint32_t columns;    // that are touched from the address on
  uint32_t split = 0;  // 16x32bx2: column at which lanes 16..31 of the warp start
  std::vector<uint32_t> words;  // offset in TensorMemory::words, for each register and lane
};

void lay_out(Movement& m) {
  const uint32_t step = m.halves ? 2 : 1;
  m.columns = columns_of(m.shape, m.registers) * step;
  m.words.resize(size_t(m.registers) * LANES);
  for (uint32_t r = 0; r < m.registers; ++r)
    for (uint32_t t = 0; t < LANES; ++t) {
      const Word word = word_of(m.shape, t, r);
      const uint32_t column = word.column * step + (t >= 16 ? m.split : 0);
      m.words[r * LANES + t] = column * TENSOR_LANES + word.lane;
    }
}

// The rectangles of tensor memory that the instruction moves.
struct Regions {
  TensorRegion of[2];
  uint32_t count;
};

Regions regions_of(const Movement& m, TensorAddress address) {
  const uint32_t lanes = m.shape == Shape::s32x32b ? 32 : 16;
  const TensorRegion first{address.lane, lanes, address.column, m.columns};
  const TensorRegion second{address.lane, lanes, address.column + m.split, m.columns};
  return {{first, second}, m.shape == Shape::s16x32bx2 ? 2u : 1u};
}

// The operand's address, checked. PTX ISA, "Access restrictions": warp w of a warpgroup reaches lanes 32w .. 32w + 31.
TensorAddress checked_address(Warp& warp, const Instr& i, const Movement& m) {
  const TensorAddress address(uniform(warp, i.s[0], "the tensor memory address") + uint32_t(i.offset));
  const uint32_t first = 32 * (warp.index % 4);
  const bool half = m.shape != Shape::s32x32b;  // 16 lanes: the warp's lower or upper ones
  if (address.lane != first && !(half && address.lane == first + 16))
    warp.fail(ErrorKind::tensor_memory, "warp " + std::to_string(warp.index) + " may access lanes " +
                                            std::to_string(first) + ".." + std::to_string(first + 31) +
                                            ", the address names lane " + std::to_string(address.lane));
  const Regions regions = regions_of(m, address);
  for (uint32_t k = 0; k < regions.count; ++k) check_allocated(warp, *warp.cta, regions.of[k]);
  return address;
}

void touch_movement(Warp& warp, const Movement& m, TensorAddress address, const Stamp& stamp, Touch touch) {
  const Regions regions = regions_of(m, address);
  for (uint32_t k = 0; k < regions.count; ++k) touch_tensor(warp, *warp.cta, stamp, regions.of[k], touch);
}

bool checks(const Warp& warp) { return warp.cluster->race.enabled; }

const uint32_t* slots_of(const Warp& warp, const Instr& i) { return warp.program->slot_lists.data() + i.list; }

// ---------------------------------------------------------------------------------------------------------
// tcgen05.ld

void load_words(Warp& warp, const Movement& m, const uint32_t* base, const uint32_t* slots) {
  for (uint32_t r = 0; r < m.registers; ++r) {
    uint32_t* out = warp.u32(slots[r]);
    const uint32_t* words = m.words.data() + r * LANES;
    if (m.shape == Shape::s32x32b && !m.halves && warp.mask == ALL_LANES) {
      std::memcpy(out, base + words[0], LANES * 4);
      continue;
    }
    for (uint32_t t = 0; t < LANES; ++t) {
      if (!(warp.mask >> t & 1)) continue;
      const uint32_t* word = base + words[t];
      out[t] = m.halves ? (word[0] & 0xffff) | word[TENSOR_LANES] << 16 : word[0];
    }
  }
}

void mark_pending(Warp& warp, const Instr& i) {
  const uint32_t* slots = slots_of(warp, i);
  for (uint32_t r = 0; r < i.n_list; ++r) {
    uint64_t& state = warp.state[slots[r]];
    if (state & (slot_state::ASYNC_WRITE | slot_state::ASYNC_READ))
      warp.fail(ErrorKind::in_flight, "loads into a register that an asynchronous operation still uses");
    state = (state & slot_state::WRITTEN) | warp.mask | slot_state::LOAD_PENDING |
            warp.fence_epoch << slot_state::EPOCH_SHIFT;
  }
}

Step exec_load(Warp& warp, const Instr& i) {
  const Movement& m = *static_cast<const Movement*>(i.detail);
  const TensorAddress address = checked_address(warp, i, m);
  if (checks(warp)) {
    TensorWarp& state = tensor_warp(warp);
    ++state.load_epoch;
    touch_movement(warp, m, address, Stamp{state.load_actor, state.load_epoch, Proxy::tensor}, Touch::read);
    mark_pending(warp, i);
    state.loads.push_back({state.load_epoch, &i});
  }
  load_words(warp, m, tensor_memory(*warp.cta).at(address.lane, address.column), slots_of(warp, i));
  return Step::next;
}

void set_pending(Warp& warp, const Instr& load, bool pending) {
  const uint32_t* slots = slots_of(warp, load);
  for (uint32_t r = 0; r < load.n_list; ++r) {
    if (pending) warp.state[slots[r]] |= slot_state::LOAD_PENDING;
    else warp.state[slots[r]] &= ~slot_state::LOAD_PENDING;
  }
}

// The oldest `count` loads are known to have happened.
void complete_loads(Warp& warp, size_t count) {
  TensorWarp& state = tensor_warp(warp);
  if (count == 0) return;
  know_own(warp, state.load_actor, state.loads[count - 1].epoch);
  for (size_t k = 0; k < count; ++k) set_pending(warp, *state.loads[k].instr, false);
  state.loads.erase(state.loads.begin(), state.loads.begin() + long(count));
  for (const auto& load : state.loads) set_pending(warp, *load.instr, true);  // they may share registers
  for (const uint32_t slot : state.renamed) warp.state[slot] &= ~slot_state::LOAD_PENDING;
  state.renamed.clear();
}

bool loads_slot(const Warp& warp, const Instr& load, uint32_t slot) {
  const uint32_t* slots = slots_of(warp, load);
  for (uint32_t r = 0; r < load.n_list; ++r)
    if (slots[r] == slot) return true;
  return false;
}

// ---------------------------------------------------------------------------------------------------------
// tcgen05.st

struct Store : AsyncOp {
  uint32_t* base = nullptr;
  const Movement* movement = nullptr;
  uint32_t mask = 0;
  std::vector<uint32_t> values;  // LANES for each register

  void complete(Cluster&) override {
    const Movement& m = *movement;
    for (uint32_t r = 0; r < m.registers; ++r) {
      const uint32_t* from = values.data() + r * LANES;
      const uint32_t* words = m.words.data() + r * LANES;
      if (m.shape == Shape::s32x32b && !m.halves && mask == ALL_LANES) {
        std::memcpy(base + words[0], from, LANES * 4);
        continue;
      }
      for (uint32_t t = 0; t < LANES; ++t) {
        if (!(mask >> t & 1)) continue;
        uint32_t* word = base + words[t];
        word[0] = m.halves ? from[t] & 0xffff : from[t];
        if (m.halves) word[TENSOR_LANES] = from[t] >> 16;
      }
    }
  }
};

// Like mov, a store hands on what it is given: a word whose register nothing has written counts as unwritten in tensor
// memory, too (kernels store vectors of which they have filled a part).
void forget_unwritten(Warp& warp, const Movement& m, TensorAddress address, const uint32_t* slots) {
  for (uint32_t r = 0; r < m.registers; ++r) {
    const uint32_t missing = warp.mask & ~uint32_t(warp.state[slots[r]] & slot_state::WRITTEN);
    for (uint32_t rest = missing; rest; rest &= rest - 1) {
      const uint32_t word = m.words[r * LANES + uint32_t(__builtin_ctz(rest))];
      const uint32_t lane = address.lane + word % TENSOR_LANES, column = address.column + word / TENSOR_LANES;
      const uint64_t granule = uint64_t(lane / TENSOR_GRANULE_LANES) * TENSOR_COLUMNS + column;
      warp.cta->tensor_shadow->forget(granule, m.halves ? 2 : 1);
    }
  }
}

// Loads into the source registers must have come; other asynchronous owners are an error.
void check_sources(Warp& warp, const Instr& i) {
  const uint32_t* slots = slots_of(warp, i);
  for (uint32_t r = 0; r < i.n_list; ++r) {
    if (warp.state[slots[r]] & slot_state::LOAD_PENDING) complete_pending_load(warp, slots[r]);
    if (warp.state[slots[r]] & slot_state::ASYNC_WRITE)
      warp.fail(ErrorKind::in_flight, "stores a register that an asynchronous operation still writes");
  }
}

Step exec_store(Warp& warp, const Instr& i) {
  const Movement& m = *static_cast<const Movement*>(i.detail);
  const TensorAddress address = checked_address(warp, i, m);
  TensorWarp& state = tensor_warp(warp);
  const uint32_t* slots = slots_of(warp, i);
  if (checks(warp)) {
    check_sources(warp, i);
    ++state.store_epoch;
    touch_movement(warp, m, address, Stamp{state.store_actor, state.store_epoch, Proxy::tensor}, Touch::write);
    forget_unwritten(warp, m, address, slots);
    for (uint32_t r = 0; r < i.n_list; ++r) {
      warp.state[slots[r]] |= slot_state::ASYNC_READ;
      state.store_sources.push_back(slots[r]);
    }
  }
  auto op = std::make_unique<Store>();
  op->queue = state.store_queue;
  op->statement = i.statement;
  op->base = tensor_memory(*warp.cta).at(address.lane, address.column);
  op->movement = &m;
  op->mask = warp.mask;
  op->values.resize(size_t(m.registers) * LANES);
  for (uint32_t r = 0; r < m.registers; ++r)
    std::memcpy(op->values.data() + r * LANES, warp.u32(slots[r]), LANES * 4);
  warp.cluster->issue(std::move(op));
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// tcgen05.wait

Step exec_wait_load(Warp& warp, const Instr&) {
  if (warp.tcgen05) complete_loads(warp, tensor_warp(warp).loads.size());
  return Step::next;
}

Step exec_wait_store(Warp& warp, const Instr&) {
  if (!warp.tcgen05) return Step::next;
  TensorWarp& state = tensor_warp(warp);
  warp.cluster->drain(state.store_queue);
  know_own(warp, state.store_actor, state.store_epoch);
  for (uint32_t slot : state.store_sources) warp.state[slot] &= ~slot_state::ASYNC_READ;
  state.store_sources.clear();
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// Decoding

// ".x4" -> 4, or 0.
uint32_t repetitions_of(const std::string& modifier) {
  if (modifier.size() < 2 || modifier[0] != 'x') return 0;
  uint32_t n = 0;
  for (size_t k = 1; k < modifier.size(); ++k) {
    if (modifier[k] < '0' || modifier[k] > '9') return 0;
    n = n * 10 + uint32_t(modifier[k] - '0');
  }
  return (n & (n - 1)) == 0 ? n : 0;
}

// tcgen05.ld.sync.aligned.shape.num{.pack::16b}.b32 r, [taddr]{, split};
// tcgen05.st.sync.aligned.shape.num{.unpack::16b}.b32 [taddr]{, split}, r;
bool decode_movement(const Statement& s, Builder& b, bool load, Movement& m) {
  const char* halves = load ? "pack::16b" : "unpack::16b";
  m.halves = s.has(halves);
  const size_t expected = m.halves ? 8 : 7;
  if (s.modifiers.size() != expected || s.modifiers[2] != "sync" || s.modifiers[3] != "aligned" || s.type() != "b32")
    return false;
  const ShapeTraits* traits = nullptr;
  for (const ShapeTraits& known : SHAPES)
    if (s.modifiers[4] == known.name) traits = &known;
  const uint32_t repetitions = repetitions_of(s.modifiers[5]);
  if (!traits || repetitions == 0 || repetitions > traits->repetitions) return false;
  m.shape = traits->shape;
  m.registers = traits->registers * repetitions;
  const bool split = m.shape == Shape::s16x32bx2;
  if (s.operands.size() != (split ? 3u : 2u)) b.fail("wrong number of operands");
  if (split) m.split = uint32_t(b.integer(s.operands[load ? 2 : 1]));
  if (m.split >= TENSOR_COLUMNS) b.fail("the second half's column offset is outside tensor memory");
  lay_out(m);
  return true;
}

bool decode_transfer(const Statement& s, Builder& b, bool load) {
  Movement m{};
  if (!decode_movement(s, b, load, m)) return false;
  const Operand& registers = load ? s.operands[0] : s.operands.back();
  b.list(registers);
  if (b.pending_list.size() != m.registers)
    b.fail("expected a vector of " + std::to_string(m.registers) + " registers");
  b.out.s[0] = b.address(load ? s.operands[1] : s.operands[0]);
  b.out.detail = b.keep(std::move(m));
  b.out.aligned = true;
  b.out.exec = load ? exec_load : exec_store;
  return true;
}

}  // namespace

void complete_pending_load(Warp& warp, uint32_t slot) {
  if (warp.program->waits_for_tensor_loads)
    warp.fail(ErrorKind::in_flight, "uses a register that tcgen05.ld still loads: no tcgen05.wait::ld between, which "
                                    "this kernel has elsewhere");
  TensorWarp& state = tensor_warp(warp);
  for (size_t k = state.loads.size(); k-- > 0;)
    if (loads_slot(warp, *state.loads[k].instr, slot)) return complete_loads(warp, k + 1);
  warp.state[slot] &= ~slot_state::LOAD_PENDING;
}

void rename_pending_load(Warp& warp, uint32_t slot) {
  warp.state[slot] |= slot_state::LOAD_PENDING;
  tensor_warp(warp).renamed.push_back(slot);
}

bool decode_tcgen05_ldst(const Statement& s, Builder& b) {
  if (s.modifiers[1] == "ld") return decode_transfer(s, b, true);
  if (s.modifiers[1] == "st") return decode_transfer(s, b, false);
  const bool wait_load = s.opcode == "tcgen05.wait::ld.sync.aligned";
  if (!wait_load && s.opcode != "tcgen05.wait::st.sync.aligned") return false;
  b.out.aligned = true;
  b.out.exec = wait_load ? exec_wait_load : exec_wait_store;
  b.program.waits_for_tensor_loads |= wait_load;
  return true;
}

}  // namespace emu
