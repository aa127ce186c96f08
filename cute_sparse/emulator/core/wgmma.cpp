// wgmma: warpgroup matrix multiply-accumulate, sm_90 (PTX ISA 9.7.15).
//
// Each of the four warps of a warpgroup computes its own 16 of the 64 rows. A wgmma.mma_async reads its operands and
// writes its accumulators when it completes, in the order of its warp's queue. From issue until a wait_group covers its
// group its accumulators are ASYNC_WRITE and its A registers ASYNC_READ.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <optional>

#include "matmul.h"
#include "spaces.h"

namespace emu {

namespace {

using namespace slot_state;

constexpr uint32_t WARP_ROWS = 16;
constexpr uint32_t GROUP_ROWS = 64;
constexpr uint32_t WARPS = 4;  // of a warpgroup
constexpr uint32_t MAX_N = 256, MAX_K = 32;

// ---------------------------------------------------------------------------------------------------------
// The instruction

struct Mma {
  uint32_t n = 0, k = 0;
  Format a = Format::bf16, b = Format::bf16;
  bool half_accumulators = false;  // .f16: two in a register
  bool a_in_registers = false;
  bool a_mn_major = false, b_mn_major = false;
  float sign = 1;                  // imm-scale-a * imm-scale-b
  std::string kind;                // "wgmma.bf16"

  uint32_t accumulators() const { return half_accumulators ? n / 4 : n / 2; }  // registers
  uint32_t shape() const { return n << 1 | half_accumulators; }               // what "the same shape" compares
};

bool eight_bits(Format format) { return format_bytes(format) == 1; }

// ".m64n128k16" -> n and k.
bool parse_shape(const std::string& text, Mma& mma) {
  int used = 0;
  if (std::sscanf(text.c_str(), "m64n%uk%u%n", &mma.n, &mma.k, &used) != 2 || size_t(used) != text.size()) return false;
  return mma.n >= 8 && mma.n <= MAX_N && mma.n % 8 == 0;
}

// The combinations of types and K of PTX ISA 9.7.15.2, without the integer and single-bit ones.
bool parse_types(const Statement& s, Mma& mma) {
  const std::string& d = s.modifiers[5];
  if (!mma_format(s.modifiers[6], mma.a) || !mma_format(s.modifiers[7], mma.b)) return false;
  if (d != "f32" && d != "f16") return false;
  mma.half_accumulators = d == "f16";
  if (mma.a != mma.b && !(eight_bits(mma.a) && eight_bits(mma.b))) return false;
  if (mma.half_accumulators && (mma.a == Format::bf16 || mma.a == Format::tf32)) return false;
  return mma.k * format_bytes(mma.a) == 32;
}

// ---------------------------------------------------------------------------------------------------------
// State of a warp and of its warpgroup

// What wgmmas in flight do with a register.
struct SlotUse {
  uint32_t written_by = 0, read_by = 0;  // last group that does so
  uint32_t shape = 0;                    // of the wgmma that wrote last
  uint64_t fence_epoch = 0;              // at that wgmma
};

struct WgmmaGroup {
  uint64_t issued = 0;               // operations of this warp up to its end
  std::vector<const Instr*> members;
};

// The sequence of wgmmas that the warps of a warpgroup execute: each must execute the same.
struct Warpgroup {
  std::deque<uint32_t> statements;  // from position `first` on
  uint64_t first = 0;
  uint64_t position[WARPS] = {0, 0, 0, 0};
};

struct WarpState {
  uint64_t queue = 0;
  ActorId actor = 0;
  uint64_t issued = 0;
  uint32_t committed = 0;            // groups; the one being formed has number committed + 1
  uint32_t retired = 0;              // groups that a wait_group has covered
  std::deque<WgmmaGroup> groups;     // committed and not retired
  WgmmaGroup open;                   // being formed
  std::vector<SlotUse> uses;         // by slot
  uint64_t* macs = nullptr;          // the warp's tally of the kind of MMA executed last
  const std::string* macs_kind = nullptr;
  std::shared_ptr<Warpgroup> warpgroup;
  // Shared memory read by the wgmmas since `footprint_clock`, not yet entered into the race detector.
  Footprint footprint;
  Clock footprint_clock;
  uint32_t footprint_pc = 0;
};

bool checks(const Warp& warp) { return warp.cluster->launch->device->checks; }

std::shared_ptr<Warpgroup> warpgroup_of(Warp& warp) {
  const uint32_t first = warp.index / WARPS * WARPS;
  for (uint32_t w = first; w < first + WARPS; ++w) {
    if (w >= warp.cta->warps.size())
      warp.fail(ErrorKind::convergence, "wgmma needs the four warps of a warpgroup; the CTA ends at warp " +
                                            std::to_string(warp.cta->warps.size() - 1));
    if (warp.cta->warps[w].wgmma)
      return static_cast<WarpState*>(warp.cta->warps[w].wgmma.get())->warpgroup;
  }
  return std::make_shared<Warpgroup>();
}

WarpState& state_of(Warp& warp) {
  if (!warp.wgmma) {
    auto state = std::make_shared<WarpState>();
    state->queue = warp.cluster->new_queue();
    state->actor = warp.cluster->race.new_actor();
    state->uses.resize(warp.program->slots);
    state->warpgroup = warpgroup_of(warp);
    warp.wgmma = state;
  }
  return *static_cast<WarpState*>(warp.wgmma.get());
}

const uint32_t* accumulator_slots(const Warp& warp, const Instr& i) {
  return warp.program->slot_lists.data() + i.list;
}
const Mma& mma_of(const Instr& i) { return *static_cast<const Mma*>(i.detail); }

// ---------------------------------------------------------------------------------------------------------
// The effect

struct MmaOp : AsyncOp {
  Warp& warp;
  const Instr& instr;
  SharedOperand a, b;
  std::optional<ChunkMap> a_map;
  ChunkMap b_map;
  bool accumulate;

  MmaOp(Warp& warp, const Instr& instr, const SharedOperand& a, const SharedOperand& b, bool accumulate)
      : warp(warp), instr(instr), a(a), b(b), b_map(b), accumulate(accumulate) {}

  void complete(Cluster&) override {
    const Mma& mma = mma_of(instr);
    const uint32_t* slots = accumulator_slots(warp, instr);
    const uint8_t* shared = warp.cta->shared.data();
    alignas(32) float a_rows[WARP_ROWS * MAX_K], a_pairs[WARP_ROWS * MAX_K * 4], b_columns[MAX_N * MAX_K];
    uint32_t* registers[MAX_N / 2 + 4];  // accumulators, then A
    for (uint32_t r = 0; r < instr.n_list; ++r) registers[r] = warp.u32(slots[r]);
    if (mma.a_in_registers)
      unpack_a_fragment(registers + mma.accumulators(), 4, mma.a, mma.k, a_rows);
    else
      unpack_rows(shared, a, *a_map, warp.index % WARPS * WARP_ROWS, WARP_ROWS, a_rows, mma.k);
    pack_row_pairs(a_rows, mma.k, mma.k, mma.sign, a_pairs);
    unpack_columns(shared, b, b_map, 0, mma.n, b_columns, mma.n, Columns::even_odd);

    float* sums[MAX_N / 2];
    if (mma.half_accumulators) return multiply_halves(a_pairs, b_columns, registers, sums);
    for (uint32_t r = 0; r < mma.n / 2; ++r) sums[r] = reinterpret_cast<float*>(registers[r]);
    multiply_fragment(mma.n, mma.k, a_pairs, b_columns, sums, accumulate);
  }

  void multiply_halves(const float* a_pairs, const float* b_columns, uint32_t* const* halves, float** sums) {
    const Mma& mma = mma_of(instr);
    alignas(32) float storage[MAX_N / 2 * LANES];
    for (uint32_t r = 0; r < mma.n / 2; ++r) sums[r] = storage + r * LANES;
    if (accumulate) load_half_accumulators(halves, mma.n / 4, storage);
    multiply_fragment(mma.n, mma.k, a_pairs, b_columns, sums, accumulate);
    store_half_accumulators(storage, mma.n / 4, halves);
  }
};

// ---------------------------------------------------------------------------------------------------------
// Issue: operands and their checks

// The value of a register that must be the same in every lane.
uint64_t uniform64(Warp& warp, uint32_t slot, const char* what) {
  const uint64_t* lanes = warp.u64(slot);
  uint64_t different = 0;
  for (uint32_t l = 1; l < LANES; ++l) different |= lanes[l] ^ lanes[0];
  if (different) warp.fail(ErrorKind::invalid_operand, std::string("the lanes of the warp hold different ") + what);
  return lanes[0];
}

std::string hex(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

SharedOperand shared_operand(Warp& warp, uint32_t slot, Format format, bool mn_major, uint32_t mn, uint32_t k,
                             const char* name) {
  const uint64_t descriptor = uniform64(warp, slot, "matrix descriptors");
  SharedOperand operand;
  operand.format = format;
  operand.mn_major = mn_major;
  operand.mn = mn;
  operand.k = k;
  const std::string wrong = decode_wgmma_descriptor(descriptor, operand);
  if (!wrong.empty())
    warp.fail(ErrorKind::invalid_operand, std::string("operand ") + name + ": " + wrong + " (" + hex(descriptor) + ")");
  return operand;
}

void check_bounds(Warp& warp, const ChunkMap& map, const char* name) {
  const uint64_t limit = std::min(SHARED_BASE + warp.cta->shared_bytes, Footprint::LIMIT);
  if (map.begin() < SHARED_BASE || map.end() > limit)
    warp.fail(ErrorKind::out_of_bounds, std::string("operand ") + name + " occupies shared memory from " +
                                            hex(map.begin()) + " to " + hex(map.end()) + "; the CTA's is from " +
                                            hex(SHARED_BASE) + " to " + hex(limit));
}

bool uniform_predicate(Warp& warp, uint32_t slot) {
  const uint32_t lanes = warp.pred(slot);
  if (lanes != 0 && lanes != ALL_LANES)
    warp.fail(ErrorKind::invalid_operand, "scale-d differs between the lanes of the warp");
  return lanes != 0;
}

// Every warp of the warpgroup must execute the same sequence of wgmmas.
void check_warpgroup(Warp& warp, Warpgroup& group, uint32_t statement) {
  uint64_t& position = group.position[warp.index % WARPS];
  const uint64_t known = group.first + group.statements.size();
  if (position == known) {
    group.statements.push_back(statement);
  } else if (group.statements[position - group.first] != statement) {
    const uint32_t other = group.statements[position - group.first];
    warp.fail(ErrorKind::convergence, "another warp of the warpgroup executes PTX line " +
                                          std::to_string(warp.program->text->statements[other].line) +
                                          " as its wgmma number " + std::to_string(position + 1));
  }
  ++position;
  while (group.first < *std::min_element(group.position, group.position + WARPS)) {
    group.statements.pop_front();
    ++group.first;
  }
}

[[noreturn]] void missing_fence(Warp& warp, const char* which) {
  warp.fail(ErrorKind::in_flight, std::string("wgmma uses ") + which +
                                      " that the warp has accessed without a wgmma.fence in between");
}

// A register was last used before the present fence and behind the one before it: this fence was needed.
void need_fence_after(Warp& warp, uint64_t epoch) {
  if (epoch + 1 == warp.fence_epoch) warp.cluster->launch->heard[warp.last_fence].store(1, std::memory_order_relaxed);
}

// PTX ISA 9.7.15.7.1 "wgmma.fence": needed before the first wgmma, and between an access to a register and a wgmma that
// uses it, except for accumulators of wgmmas of the same shape. (RETIRED: nothing but wgmma has touched the register.)
void check_accumulators(Warp& warp, WarpState& state, const Mma& mma, const uint32_t* slots, bool accumulate) {
  for (uint32_t r = 0; r < mma.accumulators(); ++r) {
    const uint64_t bits = warp.state[slots[r]];
    if (bits & ASYNC_READ)
      warp.fail(ErrorKind::in_flight, "an accumulator is the A operand of a wgmma still in flight");
    if (bits & (ASYNC_WRITE | RETIRED)) {
      const SlotUse& use = state.uses[slots[r]];
      if (use.shape != mma.shape() && use.fence_epoch == warp.fence_epoch)
        missing_fence(warp, "accumulators of a wgmma of another shape");
      if (use.shape != mma.shape()) need_fence_after(warp, use.fence_epoch);
      continue;
    }
    if (bits >> EPOCH_SHIFT == warp.fence_epoch) missing_fence(warp, "accumulator registers");
    need_fence_after(warp, bits >> EPOCH_SHIFT);
    const uint32_t missing = ~uint32_t(bits & WRITTEN);
    if (accumulate && missing)
      warp.fail(ErrorKind::uninitialised, "accumulates onto a register that nothing has written",
                __builtin_ctz(missing));
  }
}

void check_a_registers(Warp& warp, const uint32_t* slots) {
  for (uint32_t r = 0; r < 4; ++r) {
    const uint64_t bits = warp.state[slots[r]];
    if (bits & ASYNC_WRITE)
      warp.fail(ErrorKind::in_flight, "operand A is an accumulator of a wgmma still in flight");
    if (bits >> EPOCH_SHIFT == warp.fence_epoch) missing_fence(warp, "registers of operand A");
    need_fence_after(warp, bits >> EPOCH_SHIFT);
    const uint32_t missing = (bits & RETIRED) ? 0 : ~uint32_t(bits & WRITTEN);
    if (missing)
      warp.fail(ErrorKind::uninitialised, "operand A holds a register that nothing has written",
                __builtin_ctz(missing));
  }
}

void mark_in_flight(Warp& warp, WarpState& state, const Mma& mma, const uint32_t* slots) {
  const uint32_t group = state.committed + 1, accumulators = mma.accumulators();
  for (uint32_t r = 0; r < accumulators; ++r) {
    warp.state[slots[r]] = ASYNC_WRITE;
    SlotUse& use = state.uses[slots[r]];
    use.written_by = group;
    use.shape = mma.shape();
    use.fence_epoch = warp.fence_epoch;
  }
  if (!mma.a_in_registers) return;
  for (uint32_t r = accumulators; r < accumulators + 4; ++r) {
    warp.state[slots[r]] |= ASYNC_READ;
    state.uses[slots[r]].read_by = group;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Shared memory in the race detector
//
// Neighbouring wgmmas read neighbouring pieces of the same rows. Their footprints are joined, and entered as whole runs
// when the group is committed, as of the clock that the warp had when it issued them.

// While it lives, the warp looks as it did when the footprint's wgmmas were issued.
struct AtIssue {
  Warp& warp;
  WarpState& state;
  uint32_t pc;
  AtIssue(Warp& warp, WarpState& state) : warp(warp), state(state), pc(warp.group().pc) {
    std::swap(warp.clock, state.footprint_clock);
    warp.group().pc = state.footprint_pc;
  }
  void restore() {
    std::swap(warp.clock, state.footprint_clock);
    warp.group().pc = pc;
  }
};

void enter_footprint(Warp& warp, WarpState& state) {
  if (state.footprint.empty()) return;
  const Stamp stamp{state.actor, state.committed + 1, Proxy::async};
  const uint32_t rank = warp.cta->rank << SHARED_RANK_SHIFT;
  AtIssue then(warp, state);  // an error leaves the warp there, where the message belongs
  state.footprint.for_each_run(
      [&](uint32_t address, uint32_t bytes) { touch_shared_async(warp, stamp, rank | address, bytes, false); });
  then.restore();
  state.footprint.clear();
}

bool same_knowledge(const Clock& a, const Clock& b) {
  return a.seen == b.seen && a.proxied == b.proxied && a.partial.size() == b.partial.size();
}

void begin_footprint(Warp& warp, WarpState& state) {
  if (!state.footprint.empty() && !same_knowledge(state.footprint_clock, warp.clock)) enter_footprint(warp, state);
  if (state.footprint.empty()) state.footprint_clock = warp.clock;
  state.footprint_pc = warp.group().pc;
}

// ---------------------------------------------------------------------------------------------------------
// Instructions

void require_full_warp(Warp& warp) {
  if (warp.mask != ALL_LANES)
    warp.fail(ErrorKind::convergence, "wgmma needs all 32 lanes of the warp, " +
                                          std::to_string(__builtin_popcount(warp.mask)) + " execute it");
}

void count_macs(Warp& warp, WarpState& state, const Mma& mma) {
  if (state.macs_kind != &mma.kind) {
    state.macs_kind = &mma.kind;
    state.macs = &warp.tally.macs[mma.kind];
  }
  *state.macs += uint64_t(WARP_ROWS) * mma.n * mma.k;
}

Step exec_mma(Warp& warp, const Instr& i) {
  require_full_warp(warp);
  const Mma& mma = mma_of(i);
  WarpState& state = state_of(warp);
  check_warpgroup(warp, *state.warpgroup, i.statement);
  if (warp.fence_epoch == 1)
    warp.fail(ErrorKind::in_flight, "the warp's first wgmma.mma_async is not preceded by a wgmma.fence");
  const bool accumulate = uniform_predicate(warp, i.s[2]);
  const uint32_t* slots = accumulator_slots(warp, i);

  SharedOperand a;
  if (!mma.a_in_registers) a = shared_operand(warp, i.s[0], mma.a, mma.a_mn_major, GROUP_ROWS, mma.k, "A");
  const SharedOperand b = shared_operand(warp, i.s[1], mma.b, mma.b_mn_major, mma.n, mma.k, "B");
  auto op = std::make_unique<MmaOp>(warp, i, a, b, accumulate);
  if (!mma.a_in_registers) {
    op->a_map.emplace(a);
    check_bounds(warp, *op->a_map, "A");
  }
  check_bounds(warp, op->b_map, "B");

  if (checks(warp)) {
    check_accumulators(warp, state, mma, slots, accumulate);
    if (mma.a_in_registers) check_a_registers(warp, slots + mma.accumulators());
    begin_footprint(warp, state);
    if (!mma.a_in_registers)
      state.footprint.add(a, *op->a_map);  // all 64 rows: the ISA does not say which warp reads which
    state.footprint.add(b, op->b_map);
    mark_in_flight(warp, state, mma, slots);
  }
  count_macs(warp, state, mma);
  state.open.members.push_back(&i);
  ++state.issued;
  op->queue = state.queue;
  op->statement = i.statement;
  warp.cluster->issue(std::move(op));
  return Step::next;
}

Step exec_fence(Warp& warp, const Instr& i) {
  require_full_warp(warp);
  ++warp.fence_epoch;
  warp.last_fence = i.statement;
  if (warp.fence_epoch == 2)  // the first wgmma needs one, whatever it uses
    warp.cluster->launch->heard[i.statement].store(1, std::memory_order_relaxed);
  return Step::next;
}

Step exec_commit(Warp& warp, const Instr&) {
  require_full_warp(warp);
  WarpState& state = state_of(warp);
  enter_footprint(warp, state);
  state.open.issued = state.issued;
  state.groups.push_back(std::move(state.open));
  state.open = WgmmaGroup{};
  ++state.committed;
  return Step::next;
}

// The registers of a group are the warp's own again, unless a later group uses them too.
void release_registers(Warp& warp, WarpState& state, const WgmmaGroup& group) {
  for (const Instr* member : group.members) {
    const Mma& mma = mma_of(*member);
    const uint32_t* slots = accumulator_slots(warp, *member);
    const uint32_t accumulators = mma.accumulators();
    for (uint32_t r = 0; r < accumulators; ++r) {
      uint64_t& bits = warp.state[slots[r]];
      if ((bits & ASYNC_WRITE) && state.uses[slots[r]].written_by <= state.retired) bits = RETIRED;
    }
    for (uint32_t r = accumulators; mma.a_in_registers && r < accumulators + 4; ++r)
      if (state.uses[slots[r]].read_by <= state.retired) warp.state[slots[r]] &= ~ASYNC_READ;
  }
}

Step exec_wait(Warp& warp, const Instr& i) {
  require_full_warp(warp);
  WarpState& state = state_of(warp);
  while (state.groups.size() > i.imm) {
    const WgmmaGroup& group = state.groups.front();
    ++state.retired;
    warp.cluster->drain(state.queue, uint32_t(state.issued - group.issued));
    if (checks(warp)) release_registers(warp, state, group);
    state.groups.pop_front();
  }
  if (state.retired) warp.clock.know(state.actor, state.retired);
  return Step::next;
}

// ---------------------------------------------------------------------------------------------------------
// Decoding

float unit_scale(const Builder& builder, const Operand& op) {
  const int64_t value = builder.integer(op);
  if (value != 1 && value != -1) builder.fail("imm-scale must be 1 or -1");
  return float(value);
}

bool transpose_flag(const Builder& builder, const Operand& op) {
  const int64_t value = builder.integer(op);
  if (value != 0 && value != 1) builder.fail("imm-trans must be 0 or 1");
  return value == 1;
}

// wgmma.mma_async.sync.aligned.shape.dtype.atype.btype d, a, b-desc, scale-d, imm-scale-a, imm-scale-b
//                                                      [, imm-trans-a], imm-trans-b   (16-bit types only)
bool decode_mma(const Statement& s, Builder& builder) {
  Mma mma;
  if (s.modifiers.size() != 8 || s.modifiers[2] != "sync" || s.modifiers[3] != "aligned") return false;
  if (!parse_shape(s.modifiers[4], mma) || !parse_types(s, mma)) return false;
  if (s.operands.size() < 6) builder.fail("wgmma.mma_async has too few operands");
  mma.a_in_registers = s.operands[1].kind == Operand::Kind::vector;
  const bool sixteen = format_bytes(mma.a) == 2;
  const size_t flags = !sixteen ? 0 : mma.a_in_registers ? 1 : 2;
  if (s.operands.size() != 6 + flags) builder.fail("wgmma.mma_async needs " + std::to_string(6 + flags) + " operands");
  if (s.operands[0].kind != Operand::Kind::vector || s.operands[0].parts.size() != mma.accumulators())
    builder.fail("operand D must be a vector of " + std::to_string(mma.accumulators()) + " registers");
  if (mma.a_in_registers && s.operands[1].parts.size() != 4) builder.fail("operand A must be a vector of 4 registers");

  builder.list(s.operands[0]);
  if (mma.a_in_registers) builder.list(s.operands[1]);
  else builder.out.s[0] = builder.read(s.operands[1], RegClass::b64);
  builder.out.s[1] = builder.read(s.operands[2], RegClass::b64);
  builder.out.s[2] = builder.read(s.operands[3], RegClass::pred);
  mma.sign = unit_scale(builder, s.operands[4]) * unit_scale(builder, s.operands[5]);
  if (flags == 2) mma.a_mn_major = transpose_flag(builder, s.operands[6]);
  if (flags >= 1) mma.b_mn_major = transpose_flag(builder, s.operands[5 + flags]);
  mma.kind = std::string("wgmma.") + format_name(mma.a);
  if (mma.b != mma.a) mma.kind += std::string(".") + format_name(mma.b);
  builder.out.detail = builder.keep(std::move(mma));
  builder.out.exec = exec_mma;
  return true;
}

}  // namespace

bool decode_wgmma(const Statement& s, Builder& builder) {
  if (s.mnemonic() != "wgmma" || s.modifiers.size() < 4) return false;
  if (s.modifiers[1] != "mma_async" && (s.modifiers.size() != 4 || !s.has("sync") || !s.has("aligned"))) return false;
  builder.out.aligned = true;
  if (s.modifiers[1] == "mma_async") return decode_mma(s, builder);
  if (s.modifiers[1] == "fence") builder.out.exec = exec_fence;
  else if (s.modifiers[1] == "commit_group") builder.out.exec = exec_commit;
  else if (s.modifiers[1] == "wait_group") {
    if (s.operands.size() != 1) builder.fail("wgmma.wait_group needs the number of groups");
    builder.out.imm = uint64_t(builder.integer(s.operands[0]));
    builder.out.exec = exec_wait;
  } else {
    return false;
  }
  return true;
}

}  // namespace emu
