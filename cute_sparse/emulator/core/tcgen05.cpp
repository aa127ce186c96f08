// tcgen05 (PTX ISA, "TensorCore 5th Generation Family Instructions"): what its parts share, the waits and the fences.
#include <algorithm>

#include "machine.h"
#include "tensor_memory.h"

namespace emu {

TensorMemory& tensor_memory(Cta& cta) {
  if (!cta.tensor_memory) {
    auto memory = std::make_shared<TensorMemory>();
    memory->queue = cta.cluster->new_queue();
    cta.tensor_memory = memory;
  }
  return *static_cast<TensorMemory*>(cta.tensor_memory.get());
}

TensorWarp& tensor_warp(Warp& warp) {
  if (!warp.tcgen05) {
    auto state = std::make_shared<TensorWarp>();
    RaceDetector& race = warp.cluster->race;
    state->load_actor = race.new_actor();
    state->store_actor = race.new_actor();
    state->tensor_actor = race.new_actor();
    state->fenced_loads = race.new_actor();
    state->fenced_stores = race.new_actor();
    auto& queues = tensor_memory(*warp.cluster->ctas[0]).fenced_queues;
    queues.push_back({state->load_actor, state->fenced_loads});
    queues.push_back({state->store_actor, state->fenced_stores});
    state->store_queue = warp.cluster->new_queue();
    warp.tcgen05 = state;
  }
  return *static_cast<TensorWarp*>(warp.tcgen05.get());
}

CtaGroup cta_group(Warp& warp, uint32_t size) {
  Cluster& cluster = *warp.cluster;
  CtaGroup group;
  group.size = size;
  const uint32_t first = size == 2 ? warp.cta->rank & ~1u : warp.cta->rank;
  if (first + size > cluster.ctas.size())
    warp.fail(ErrorKind::invalid_operand, ".cta_group::2 needs a CTA pair, and CTA rank " +
                                              std::to_string(warp.cta->rank) + " has no peer in its cluster of " +
                                              std::to_string(cluster.ctas.size()));
  uint32_t& named = tensor_memory(*warp.cta).cta_group;
  if (named == 0) named = size;
  if (named != size)
    warp.fail(ErrorKind::invalid_operand, "every tcgen05 instruction of a kernel must name the same .cta_group");
  for (uint32_t k = 0; k < size; ++k) group.ctas[k] = cluster.ctas[first + k].get();
  return group;
}

uint64_t tensor_queue(const CtaGroup& group) { return tensor_memory(*group.ctas[0]).queue; }

// ---------------------------------------------------------------------------------------------------------
// Fences (PTX ISA, "tcgen05.fence"): see tensor_memory.h

namespace {

constexpr uint8_t BEFORE = 1, AFTER = 2;

bool held_to_fences(const Warp& warp) { return warp.program->tensor_fences == (BEFORE | AFTER); }

// What the warp has waited for of its own queues may be published.
Step exec_fence_before(Warp& warp, const Instr&) {
  if (!held_to_fences(warp)) return Step::next;
  const TensorWarp& state = tensor_warp(warp);
  warp.clock.know(state.fenced_loads, warp.clock.at(state.load_actor));
  warp.clock.know(state.fenced_stores, warp.clock.at(state.store_actor));
  return Step::next;
}

// What the warp has learnt orders its next accesses; of others' loads and stores only what they have fenced.
Step exec_fence_after(Warp& warp, const Instr&) {
  if (!held_to_fences(warp)) return Step::next;
  TensorWarp& state = tensor_warp(warp);
  Clock learnt = warp.clock;
  for (const auto& pair : tensor_memory(*warp.cluster->ctas[0]).fenced_queues)
    if (pair.queue < learnt.seen.size() && pair.queue != state.load_actor && pair.queue != state.store_actor)
      learnt.seen[pair.queue] = std::min(learnt.seen[pair.queue], warp.clock.at(pair.fenced));
  state.ordered.join(learnt);
  return Step::next;
}

bool decode_fence(const Statement& s, Builder& b) {
  const bool before = s.opcode == "tcgen05.fence::before_thread_sync";
  if (!before && s.opcode != "tcgen05.fence::after_thread_sync") return false;
  b.program.tensor_fences |= before ? BEFORE : AFTER;
  b.out.exec = before ? exec_fence_before : exec_fence_after;
  return true;
}

}  // namespace

void know_own(Warp& warp, ActorId queue, uint32_t epoch) {
  know_by_lanes(warp, queue, epoch);
  if (held_to_fences(warp)) tensor_warp(warp).ordered.know(queue, epoch);
}

// ---------------------------------------------------------------------------------------------------------
// Checked access

namespace {

std::string describe(const TensorRegion& region) {
  return "lanes " + std::to_string(region.lane) + ".." + std::to_string(region.lane + region.lanes - 1) +
         ", columns " + std::to_string(region.column) + ".." + std::to_string(region.column + region.columns - 1);
}

[[noreturn]] void report_missing_fence(Warp& warp, const Access& earlier) {
  const Statement& statement = warp.program->text->statements[earlier.statement];
  warp.fail(ErrorKind::race, "touches tensor memory after the " + std::string(earlier.write ? "write" : "read") +
                                 " by warp " + std::to_string(earlier.warp) + " (PTX line " +
                                 std::to_string(statement.line) + ": " + statement.text + "); a barrier lies between, "
                                 "but not both tcgen05.fence::before_thread_sync and after_thread_sync, which this "
                                 "kernel uses elsewhere");
}

bool all_allocated(const TensorMemory& memory, const TensorRegion& region) {
  for (uint32_t column = region.column; column < region.column + region.columns; ++column)
    if (!memory.allocated[column]) return false;
  return true;
}

}  // namespace

void check_allocated(Warp& warp, Cta& cta, const TensorRegion& region) {
  if (region.lane + region.lanes > TENSOR_LANES || region.column + region.columns > TENSOR_COLUMNS)
    warp.fail(ErrorKind::out_of_bounds, "tensor memory has 128 lanes and 512 columns, the access goes to " +
                                            describe(region));
  if (!all_allocated(tensor_memory(cta), region))
    warp.fail(ErrorKind::tensor_memory, "tensor memory that CTA rank " + std::to_string(cta.rank) +
                                            " has not allocated: " + describe(region));
}

void touch_tensor(Warp& warp, Cta& cta, const Stamp& stamp, const TensorRegion& region, Touch touch) {
  if (!warp.cluster->race.enabled) return;
  Access access;
  access.actor = stamp.actor;
  access.epoch = stamp.epoch;
  access.proxy = Proxy::tensor;
  access.write = touch != Touch::read;
  access.warp = warp.index;
  access.cta_rank = warp.cta->rank;
  access.statement = warp.program->code[warp.group().pc].statement;
  // Freeing columns (by the warp itself, not by a queue) is not among the instructions that the fences order.
  const bool fenced = held_to_fences(warp) && stamp.actor != warp.actor;
  const Clock& clock = fenced ? tensor_warp(warp).ordered : warp.clock;
  const uint32_t last = (region.lane + region.lanes - 1) / TENSOR_GRANULE_LANES;
  for (uint32_t row = region.lane / TENSOR_GRANULE_LANES; row <= last; ++row) {
    Conflict conflict = cta.tensor_shadow->access(uint64_t(row) * TENSOR_COLUMNS + region.column, region.columns,
                                                  access, clock, touch != Touch::write);
    if (!conflict.found && !conflict.uninitialised) continue;
    if (conflict.found && warp.clock.at(conflict.earlier.actor) >= conflict.earlier.epoch)
      report_missing_fence(warp, conflict.earlier);
    const uint64_t granule = conflict.address;  // named by its tensor memory address
    conflict.address = (granule / TENSOR_COLUMNS * TENSOR_GRANULE_LANES) << 16 | granule % TENSOR_COLUMNS;
    report(warp, conflict, "tensor memory", -1);
  }
}

uint32_t uniform(Warp& warp, uint32_t slot, const char* what) {
  const uint32_t* values = warp.u32(slot);
  const uint32_t first = values[warp.first_lane()];
  uint32_t different = 0;
  for (uint32_t lane = 0; lane < LANES; ++lane) different |= uint32_t(values[lane] != first) << lane;
  different &= warp.mask;
  if (different)
    warp.fail(ErrorKind::invalid_operand, std::string(what) + " must be the same in every lane",
              __builtin_ctz(different));
  return first;
}

uint32_t shared_address(Warp& warp, const Instr& instr, uint32_t slot, bool wide, uint32_t lane) {
  if (!wide) return warp.address32(instr, slot, lane);
  const uint64_t address = warp.address64(instr, slot, lane);
  if (address >> 32 && !in_shared_window(address))
    warp.fail(ErrorKind::out_of_bounds, "the address is not in shared memory", int(lane));
  return uint32_t(address);
}

bool decode_tcgen05(const Statement& s, Builder& b) {
  if (s.mnemonic() != "tcgen05" || s.modifiers.size() < 2) return false;
  return decode_tcgen05_alloc(s, b) || decode_tcgen05_ldst(s, b) || decode_tcgen05_mma(s, b) ||
         decode_tcgen05_queue(s, b) || decode_fence(s, b);
}

}  // namespace emu
