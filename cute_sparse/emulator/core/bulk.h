// What tma.cpp and bulk.cpp share: operands of asynchronous copies, bulk async-groups, and element-wise reductions.
#pragma once
#include <array>
#include <memory>
#include <vector>

#include "spaces.h"
#include "tensor_map.h"

namespace emu {

// ---------------------------------------------------------------------------------------------------------
// Operands

// An address operand [base + offset]; an instruction may have several, Instr holds the offset of one only.
struct AddressSlot {
  uint32_t slot = 0;
  int64_t offset = 0;
  bool wide = false;  // the base is 64 bits
  uint64_t global(Warp& warp, uint32_t lane) const {
    return (wide ? warp.u64(slot)[lane] : uint64_t(warp.u32(slot)[lane])) + uint64_t(offset);
  }
  uint32_t shared(Warp& warp, uint32_t lane) const { return uint32_t(global(warp, lane)); }
};
AddressSlot address_slot(Builder& builder, const Operand& operand);

// Whether every modifier of the statement is one of `known` (space-separated), so that a spelling that the family
// does not model becomes an unknown opcode. The mnemonic counts as well.
bool only_modifiers(const Statement& statement, const char* known);

// Asynchronous bulk instructions are issued by the warp, not by its lanes: SASS has uniform operands. Lanes that
// execute one with the same operands therefore issue it once; lanes with different operands issue one each.
// `gather(lane)` returns comparable operands, `issue(operands, lane)` issues for the lowest lane that has them.
template <class Gather, class Issue>
void once_per_operands(const Warp& warp, Gather gather, Issue issue) {
  uint32_t rest = warp.mask;
  while (rest) {
    const uint32_t leader = uint32_t(__builtin_ctz(rest));
    const auto operands = gather(leader);
    uint32_t same = 1u << leader;
    for (uint32_t others = rest & ~same; others; others &= others - 1)
      if (gather(uint32_t(__builtin_ctz(others))) == operands) same |= others & (~others + 1);
    issue(operands, leader);
    rest &= ~same;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Completion by mbarrier

// The CTAs that a copy into shared memory writes, and the mbarrier that it signals for each.
struct SharedTarget {
  uint32_t address = 0;
  uint8_t* data = nullptr;
  uint32_t barrier = 0;
  Stamp stamp;  // actor and epoch of that mbarrier's present phase
};

struct Multicast {
  bool on = false;       // .multicast::cluster
  bool pair = false;     // .cta_group::2
  uint32_t cta_mask = 0;
};

// Destinations of a copy of `bytes` to shared memory that signals `barrier`: one, or one in each CTA of the mask at
// the same offset (PTX ISA 9.7.9.25.5.2). Checks bounds, alignment and that the mbarriers exist and belong there.
std::vector<SharedTarget> shared_targets(Warp& warp, uint32_t address, uint32_t bytes, uint32_t align,
                                         uint32_t barrier, const Multicast& multicast, int lane);
// Fails unless a .shared::cta operand (`what`: "source", "destination") lies in the executing CTA.
void require_own_cta(Warp& warp, uint32_t address, const char* what, int lane);
// The complete-tx of every target; its release hands on what the stamp says.
void complete_targets(Cluster& cluster, const std::vector<SharedTarget>& targets, uint32_t bytes);

// ---------------------------------------------------------------------------------------------------------
// Completion by bulk async-group (PTX ISA 9.7.9.25.1.1)

// Bulk copies of one thread, in the order of issue; operation n (from 1) is epoch n of the two actors. Reading the
// source and writing the destination are two actors, because wait_group.read teaches of the first only.
struct BulkThread {
  uint64_t queue = 0;
  ActorId reads = 0, writes = 0;
  uint32_t issued = 0;                // operations so far
  std::vector<uint32_t> group_ends;   // `issued` at each commit_group
  std::vector<uint32_t> commits;      // and the statement that it was
  std::vector<uint32_t> covering;     // the last wait that taught something, and the commits that it counted
  bool covers_sources_only = false;   // that wait was wait_group.read
  uint32_t waited = 0;                // operations whose source some wait has covered
  uint32_t last_statement = 0;
};

struct BulkState {
  std::array<std::unique_ptr<BulkThread>, LANES> threads;
  uint32_t used = 0;                                       // lanes that have issued any
  std::vector<std::shared_ptr<const TensorMap>> maps;      // decoded by this warp
};
BulkState& bulk_state(Warp& warp);

// Stamps for the next operation of a thread.
struct BulkStamps { uint64_t queue; Stamp read, write; };
BulkStamps next_bulk_operation(Warp& warp, uint32_t lane, uint32_t statement);

// A thread must not exit while bulk copies may still read its CTA's shared memory: called for exiting lanes.
void check_bulk_at_exit(Warp& warp, uint32_t lanes);

// ---------------------------------------------------------------------------------------------------------
// Reductions

enum class ReduceOp : uint8_t { add, min, max, inc, dec, bit_and, bit_or, bit_xor };

// memory[i] = op(memory[i], operand[i]) for `bytes` bytes. `shared_with_others`: other host threads may touch the same
// memory, each element must be updated atomically.
using Reducer = void (*)(uint8_t* memory, const uint8_t* operand, uint64_t bytes, bool shared_with_others);
// Null where the PTX ISA's table (9.7.9.25.4.2) has no such combination.
Reducer find_reducer(ReduceOp op, ElementType type);
// The reduction among a statement's modifiers; false if none is.
bool find_reduce_op(const Statement& statement, ReduceOp& op);
// Whether reductions to global memory must be atomic on the host.
bool host_threads_share_memory(const Warp& warp);

}  // namespace emu
