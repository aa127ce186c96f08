// Tensor memory (PTX ISA, "Tensor Memory"), and what the tcgen05 files share: who has allocated what, the in-order
// queues, and checked access.
//
// Who performs which access, in the race detector's terms (race.h):
//   tcgen05.mma, cp   the issuing warp's tensor queue; its epoch is the interval between two of its commits, and a
//                     commit's arrival on an mbarrier is how others learn of it. What one warp issues executes in
//                     order, so that these accesses never conflict with each other.
//   tcgen05.ld        the issuing warp's load queue, one epoch each; known to the warp from wait::ld on. The PTX ISA
//                     wants that wait before a destination register is used; a mov there only renames it (compilers
//                     put some between load and wait), and its result must be waited for just as well. A kernel that
//                     has no wait::ld is not held to this: ptxas makes the first use wait for the load,
//                     FlashAttention-4's forward relies on that, and the load is known from that use on.
//   tcgen05.st        the issuing warp's store queue, one epoch each; known to the warp from wait::st on.
//
// tcgen05.fence (PTX ISA, "tcgen05 memory consistency model"): loads and stores that a thread has waited for are ordered
// before what other threads do to tensor memory only if fence::before_thread_sync precedes the barrier between them and
// fence::after_thread_sync follows it. Much code omits the fences, and runs; so a kernel is held to them if it contains
// both, and a kernel without them is not reported.
#pragma once
#include <bitset>

#include "machine.h"
#include "spaces.h"

namespace emu {

constexpr uint32_t TENSOR_LANES = 128, TENSOR_COLUMNS = 512;
constexpr uint32_t TENSOR_GRANULE_LANES = 16;  // a granule of Cta::tensor_shadow: 16 lanes of one column

// A rectangle of a CTA's tensor memory.
struct TensorRegion {
  uint32_t lane, lanes, column, columns;
};

// PTX ISA, "Tensor Memory Addressing": lane in the upper half, column in the lower half.
struct TensorAddress {
  uint32_t lane, column;
  explicit TensorAddress(uint32_t bits) : lane(bits >> 16), column(bits & 0xffff) {}
};

struct TensorMemory {
  struct Allocation {
    uint32_t column, columns;
  };
  // tcgen05.alloc.cta_group::2 waits for the same request by the other CTA of the pair.
  struct PairRequest {
    enum class State : uint8_t { none, waiting, granted } state = State::none;
    uint32_t warp = 0, columns = 0;
    uint32_t column = 0;  // if granted
  };

  std::vector<uint32_t> words;  // column-major: (lane, column) at column * TENSOR_LANES + lane
  std::vector<Allocation> allocations;
  std::bitset<TENSOR_COLUMNS> allocated;
  bool may_allocate = true;  // until tcgen05.relinquish_alloc_permit
  PairRequest request;
  uint32_t cta_group = 0;  // that every tcgen05 instruction of the CTA names; 0: none so far
  uint64_t queue = 0;      // mma, cp and commit of the CTA complete in this order
  // Of the cluster's first CTA: the load and store queues of all warps, each with the actor that stands for its part
  // behind a fence::before_thread_sync.
  struct FencedQueue {
    ActorId queue, fenced;
  };
  std::vector<FencedQueue> fenced_queues;

  uint32_t* at(uint32_t lane, uint32_t column) { return words.data() + size_t(column) * TENSOR_LANES + lane; }
};

// What a warp has under way.
struct TensorWarp {
  struct PendingLoad {
    uint32_t epoch;
    const Instr* instr;  // its list: the destination registers
  };
  ActorId load_actor = 0, store_actor = 0, tensor_actor = 0;
  ActorId fenced_loads = 0, fenced_stores = 0;
  uint32_t load_epoch = 0, store_epoch = 0, tensor_epoch = 1;
  uint64_t store_queue = 0;
  std::vector<PendingLoad> loads;         // oldest first
  std::vector<uint32_t> renamed;          // slots that movs have given what is being loaded
  std::vector<uint32_t> store_sources;    // slots that are ASYNC_READ
  Clock ordered;  // if held to fences: what the warp's tensor memory accesses are ordered behind
};

// The warp has waited for its own queue up to `epoch`.
void know_own(Warp& warp, ActorId queue, uint32_t epoch);

TensorMemory& tensor_memory(Cta& cta);
TensorWarp& tensor_warp(Warp& warp);

// The CTAs that a .cta_group::1 or ::2 instruction of `warp` works on, even rank first; fails if there is no pair, or
// if an earlier instruction of the CTA named another group (PTX ISA, "CTA Pair").
struct CtaGroup {
  Cta* ctas[2] = {nullptr, nullptr};
  uint32_t size = 0;
};
CtaGroup cta_group(Warp& warp, uint32_t size);
// The queue in which mma, cp and commit of that group complete.
uint64_t tensor_queue(const CtaGroup& group);

// Fails unless the region exists and is allocated.
void check_allocated(Warp& warp, Cta& cta, const TensorRegion& region);
// Race check and record of an access that is ordered behind what the warp knows now (and behind its own queue). Reads
// must find written words; `update` is a write that reads first.
enum class Touch : uint8_t { read, write, update };
void touch_tensor(Warp& warp, Cta& cta, const Stamp& stamp, const TensorRegion& region, Touch touch);

// The value of a 32-bit source that must be the same in every executing lane.
uint32_t uniform(Warp& warp, uint32_t slot, const char* what);

// The 32-bit shared address in `lane` of an address operand, given as a shared or a generic address.
uint32_t shared_address(Warp& warp, const Instr& instr, uint32_t slot, bool wide, uint32_t lane);

// Interpreter hook: an instruction is about to read or overwrite a register that tcgen05.ld has loaded and nothing
// has waited for. An error in a kernel with tcgen05.wait::ld; in others the load, and the older ones of the warp, are
// then known to the warp to have read tensor memory.
void complete_pending_load(Warp& warp, uint32_t slot);
// Interpreter hook: a mov has written what is being loaded into `slot`, in a kernel with tcgen05.wait::ld.
void rename_pending_load(Warp& warp, uint32_t slot);
// CTA exit: throws tensor_memory if columns are still allocated (PTX ISA, "tcgen05.alloc").
void check_tensor_memory_at_exit(Cta& cta);

// The families' parts, one file each.
bool decode_tcgen05_alloc(const Statement&, Builder&);
bool decode_tcgen05_ldst(const Statement&, Builder&);
bool decode_tcgen05_mma(const Statement&, Builder&);
bool decode_tcgen05_queue(const Statement&, Builder&);  // commit, cp

}  // namespace emu
