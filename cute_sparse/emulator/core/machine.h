// The machine: warps that interpret a decoded program, CTAs and clusters that hold their shared state, the
// asynchronous engines, and the schedule. One cluster runs on one host thread; clusters are independent.
//
// Register file. Every register owns slots of 32 words (128 bytes), lane l's value in word l:
//   b32, f32     one slot
//   b16          one slot, value zero-extended to 32 bits
//   b64          two slots, viewed as 32 uint64_t
//   pred         one slot, word 0 is a mask with a bit for each lane
// Immediates and fixed special registers are constant slots, so an instruction reads slots only.
// Beside each slot stands a 64-bit state word: which lanes have been written, and what is in flight
// (see SlotState). A register's state is that of its first slot.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "error.h"
#include "memory.h"
#include "ptx.h"
#include "race.h"
#include "trace.h"

namespace emu {

constexpr uint32_t LANES = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

struct Warp;
struct Cta;
struct Cluster;
struct Launch;
struct Instr;
struct Program;
struct Device;
struct GlobalHistory;  // spaces.cpp
class GridOrder;       // grid_order.h
std::shared_ptr<GridOrder> make_grid_order();

// ---------------------------------------------------------------------------------------------------------
// Decoded program

enum class Step : uint8_t {
  next,     // go on behind this instruction
  jumped,   // the instruction set the warp's pc itself
  blocked,  // cannot complete now: warp.block() was called; the instruction is executed again later
  exited,   // the executing lanes are gone
};

using Exec = Step (*)(Warp&, const Instr&);

constexpr uint32_t NO_GUARD = 0xffffffffu;

struct Instr {
  Exec exec = nullptr;
  uint32_t guard = NO_GUARD;  // slot of the guard predicate
  bool guard_negated = false;
  bool aligned = false;  // .sync/.aligned: every live lane of the warp must execute it together
  bool acts = false;     // touches memory or synchronises, but for mbarriers and bulk groups: what a wait before it may
                         // have been for
  bool moves = false;    // a plain copy: hands on whether its sources were written, instead of demanding it
  uint32_t d[2] = {0, 0};              // destination slots
  uint32_t s[5] = {0, 0, 0, 0, 0};     // source slots
  int64_t offset = 0;                  // of an address operand
  uint64_t imm = 0;                    // free use by the family
  uint32_t reads = 0, n_reads = 0;     // range in Program::slot_lists: registers checked before exec
  uint32_t writes = 0, n_writes = 0;   // registers marked as written after exec
  uint32_t list = 0, n_list = 0;       // a family's own slots (vectors), see Builder::list
  uint32_t statement = 0;              // index in Program::text->statements
  const void* detail = nullptr;        // a family's own immutable description (Builder::keep)
};

struct Program {
  std::shared_ptr<const ModuleText> module;
  const KernelText* text = nullptr;
  std::vector<Instr> code;
  std::vector<uint32_t> slot_lists;
  uint32_t slots = 0;  // registers, constants, special registers
  struct Constant { uint32_t slot; uint64_t bits; bool wide; };
  std::vector<Constant> constants;   // filled once per warp
  struct Special { uint32_t slot; std::string name; };
  std::vector<Special> specials;     // %tid.x, %ctaid.x, %laneid, ...: filled once per warp
  std::vector<std::shared_ptr<void>> details;
  uint8_t tensor_fences = 0;  // tcgen05.cpp: which tcgen05.fence instructions the kernel contains
  bool waits_for_tensor_loads = false;  // it contains tcgen05.wait::ld
};

// Handed to the decoders: turns operands into slots.
struct Builder {
  Program& program;
  const Statement& statement;
  Instr& out;
  std::vector<uint32_t> pending_writes, pending_list;  // appended to Program::slot_lists by finish()
  struct LowWord { uint32_t wide, low; };
  std::vector<LowWord> pending_narrow;                 // 64-bit registers of which an instruction reads the low word

  // Source operand -> slot. A register is added to the checked reads; an immediate or a fixed special register
  // becomes a constant slot. `wide`: the instruction reads it as 64 bits. f32/f64 literals follow `type`.
  uint32_t read(const Operand& op, RegClass cls);
  uint32_t narrowed(const Operand& op);
  uint32_t write(const Operand& op);           // destination register; sink `_` -> a scratch slot
  // Address operand [base + offset]: sets out.offset, returns the slot of the base as 64-bit value
  // (`wide`) or 32-bit; a symbol becomes its address. Which of the two: `wide(op)`.
  uint32_t address(const Operand& op);
  bool wide(const Operand& address) const;     // the base register is 64 bits
  // Appends registers (of a vector operand) as the instruction's own list; they are NOT checked or marked
  // by the interpreter: asynchronous families do that themselves.
  void list(const Operand& vector);
  // The same registers checked before / marked after execution.
  void also_reads(const Operand& vector);
  void also_writes(const Operand& vector);
  template <class T> const T* keep(T value) {
    auto p = std::make_shared<T>(std::move(value));
    program.details.push_back(p);
    return p.get();
  }
  // Immediate integer operand, or throws parse.
  int64_t integer(const Operand& op) const;
  // Label -> code index (labels are resolved to statement indexes, which are code indexes).
  uint32_t target(const Operand& op) const;
  [[noreturn]] void fail(const std::string& why) const;
  void finish();  // called once the family has decoded the statement
};

// Returns false if the opcode is not this family's (it is then unknown unless another family takes it).
using Decoder = bool (*)(const Statement&, Builder&);
extern const std::vector<Decoder> FAMILIES;  // families.cpp: one line per family
bool words_known(const Statement&);          // words.cpp: no word of the opcode would be dropped in silence

std::shared_ptr<Program> build_program(std::shared_ptr<const ModuleText>, const KernelText&,
                                       std::vector<std::string>& unknown);

// ---------------------------------------------------------------------------------------------------------
// Registers in flight

namespace slot_state {
constexpr uint64_t WRITTEN = 0xffffffffull;       // bit l: lane l holds a value
constexpr uint64_t ASYNC_WRITE = 1ull << 32;      // a wgmma accumulator in flight: no reads, no writes
constexpr uint64_t ASYNC_READ = 1ull << 33;       // a wgmma or tcgen05.st operand in flight: no writes
constexpr uint64_t LOAD_PENDING = 1ull << 34;     // tcgen05.ld result before wait::ld; first use completes it
constexpr uint64_t RETIRED = 1ull << 35;          // result of a finished wgmma, not touched since; its first use is
                                                  // what wgmma.fence must separate from the next wgmma
constexpr uint64_t IN_FLIGHT = ASYNC_WRITE | ASYNC_READ | LOAD_PENDING | RETIRED;
constexpr int EPOCH_SHIFT = 36;                   // wgmma.fence epoch of the last ordinary write
}  // namespace slot_state

// ---------------------------------------------------------------------------------------------------------
// Warps

// Why a group of lanes cannot go on; text is made only for a deadlock report.
struct Wait {
  enum class Kind : uint8_t { none, mbarrier, named_barrier, cluster_barrier, convergence, tensor_memory, grid, registers } kind;
  uint64_t address = 0;   // shared address of the mbarrier, or the barrier's number
  uint32_t phase = 0;     // parity waited for
  bool may_time_out = false;  // try_wait: may be told to return false when nothing else moves
};

// Lanes of a warp that share a pc. A warp has one group unless it diverged.
struct Group {
  uint32_t pc = 0;
  uint32_t mask = 0;
  bool blocked = false;
  bool arrived = false;    // the blocked instruction has already had its side effect (bar.sync's arrival)
  bool timed_out = false;  // try_wait must now return
  uint64_t token = 0;      // free use by the blocked instruction (the generation it waits for)
  Wait wait{};
};

struct Tally {  // per warp; instruction counts come from issued/executed
  uint64_t tma_bytes_loaded = 0, tma_bytes_stored = 0, tma_bytes_reduced = 0;
  uint64_t shared_bytes_read = 0, shared_bytes_written = 0;
  uint64_t global_bytes_read = 0, global_bytes_written = 0;
  std::unordered_map<std::string, uint64_t> macs;  // by kind: "wgmma.bf16", "tcgen05.f16", ...

  Tally& operator+=(const Tally& other) {
    tma_bytes_loaded += other.tma_bytes_loaded;
    tma_bytes_stored += other.tma_bytes_stored;
    tma_bytes_reduced += other.tma_bytes_reduced;
    shared_bytes_read += other.shared_bytes_read;
    shared_bytes_written += other.shared_bytes_written;
    global_bytes_read += other.global_bytes_read;
    global_bytes_written += other.global_bytes_written;
    for (const auto& [kind, count] : other.macs) macs[kind] += count;
    return *this;
  }
};

struct Warp {
  Cluster* cluster = nullptr;
  Cta* cta = nullptr;
  const Program* program = nullptr;
  uint32_t index = 0;          // in the CTA
  uint32_t live = 0;           // lanes that have not exited
  uint32_t* regs = nullptr;    // program->slots * 32 words
  uint64_t* state = nullptr;   // program->slots

  uint64_t seen_event = UINT64_MAX;  // blocked since this event of the cluster; UINT64_MAX: may run
  std::vector<Group> groups;
  uint32_t current = 0;        // index of the running group
  uint32_t mask = 0;           // lanes executing the present instruction (group's mask and the guard)

  ActorId actor = 0;           // this warp in the race detector
  Clock clock;                 // what it knows to have happened
  WarpOrder order;             // fences and lanes
  uint64_t fence_epoch = 1;    // counts wgmma.fence
  uint32_t last_fence = 0;     // statement of the last one
  // Statements of mbarrier and bulk-group waits since the warp last acted, and of the commits that the latter count.
  std::vector<uint32_t> unused_waits;
  Tally tally;
  uint64_t* issued = nullptr;    // per code index: executed or predicated off
  uint64_t* executed = nullptr;  // per code index: with at least one lane
  std::vector<uint8_t> local;    // .local variables of the 32 lanes, one lane after the other
  std::shared_ptr<void> wgmma, bulk, cp_async, tcgen05;  // a family's own per-warp state
  WarpTrace* trace = nullptr;  // if the cluster is traced

  Group& group() { return groups[current]; }
  uint32_t* u32(uint32_t slot) { return regs + size_t(slot) * LANES; }
  float* f32(uint32_t slot) { return reinterpret_cast<float*>(u32(slot)); }
  uint64_t* u64(uint32_t slot) { return reinterpret_cast<uint64_t*>(u32(slot)); }
  uint32_t& pred(uint32_t slot) { return *u32(slot); }
  uint32_t first_lane() const { return __builtin_ctz(mask); }
  // Address operand of lane l: base register plus the instruction's offset (family keeps `wide` in imm or
  // calls these).
  uint64_t address64(const Instr& i, uint32_t slot, uint32_t lane) { return u64(slot)[lane] + i.offset; }
  uint32_t address32(const Instr& i, uint32_t slot, uint32_t lane) { return u32(slot)[lane] + uint32_t(i.offset); }

  // The present instruction cannot complete; returns Step::blocked for `return warp.block(...)`.
  Step block(Wait wait);
  // The present group's blocked instruction completes: clears arrived/token.
  void unblock();
  [[noreturn]] void fail(ErrorKind kind, const std::string& message, int lane = -1) const;
  Site site(int lane = -1) const;
};

// ---------------------------------------------------------------------------------------------------------
// Asynchronous work

// An operation that a warp has issued and that happens later. `queue` 0: unordered; otherwise operations of one
// queue complete in the order in which they were issued (wgmma groups of a warp, a CTA's tensor core, bulk
// stores of a thread).
struct AsyncOp {
  uint64_t queue = 0;
  uint32_t statement = 0;  // for messages
  virtual ~AsyncOp() = default;
  virtual void complete(Cluster&) = 0;  // the effect: data moves, barriers arrive
};

enum class Order : uint8_t { eager, late, random };

// ---------------------------------------------------------------------------------------------------------
// Barriers

// A wait on an mbarrier that has passed: who waited, and how far it was.
struct PassedWait {
  ActorId actor = 0;
  uint32_t epoch = 0;
  uint32_t warp = 0, cta_rank = 0, statement = 0;  // for messages
};

struct MBarrier {
  bool initialised = false;
  uint32_t expected = 0;       // arrival count of each phase
  int64_t pending = 0;         // arrivals still due in this phase
  int64_t tx_bytes = 0;        // transaction count still due (may be negative before expect_tx)
  uint64_t phase = 0;          // completed phases; parity is phase & 1
  ActorId actor = 0;           // asynchronous copies that signal this barrier are this actor; epoch = phase + 1
  ActorId init_actor = 0;      // whoever uses the barrier must know this actor's epoch: see WarpOrder::inits
  uint32_t init_epoch = 0, init_warp = 0, init_statement = 0;
  Clock arrivals;              // joined from every arrival
  Clock completed;             // what a successful wait learns
  std::vector<PassedWait> passed;  // of the phase that completed last; the last of each warp
  std::vector<uint32_t> contributors, heard;  // statements that arrived in this phase, and in the completed ones
};

struct NamedBarrier {  // bar / barrier.cta
  uint32_t expected_threads = 0, arrived_threads = 0;
  uint64_t generation = 0;
  uint32_t reduction_and = 1, reduction_or = 0, reduction_count = 0;  // of the generation being formed
  uint32_t result_and = 0, result_or = 0, result_count = 0;           // of the last complete generation
  ActorId actor = 0;     // its epoch: generations that are complete
  Clock arrivals, completed;
};

// ---------------------------------------------------------------------------------------------------------
// CTA and cluster

// Shared addresses are 32 bits: (CTA rank in the cluster << 24) | offset; the first 1024 bytes are the system's.
constexpr uint32_t SHARED_BASE = 1024;
constexpr uint32_t SHARED_RANK_SHIFT = 24;
constexpr uint32_t SHARED_OFFSET_MASK = (1u << SHARED_RANK_SHIFT) - 1;

struct Cta {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;             // in the cluster
  uint32_t ctaid[3] = {0, 0, 0};
  uint64_t linear = 0;           // in the grid
  uint32_t shared_bytes = 0;     // static + dynamic, from SHARED_BASE on
  std::vector<uint8_t> shared;   // indexed by offset (SHARED_BASE included)
  std::vector<Warp> warps;
  std::unordered_map<uint32_t, MBarrier> mbarriers;  // by offset
  std::array<NamedBarrier, 16> barriers;
  std::shared_ptr<void> tensor_memory;  // tcgen05.cpp's, if the kernel allocates any
  std::unique_ptr<Shadow> shared_shadow, tensor_shadow;  // race.h
  uint32_t live_warps = 0;
  std::shared_ptr<void> register_pool;  // setmaxnreg, barrier.cpp
};

struct Cluster {
  Launch* launch = nullptr;
  uint64_t index = 0;
  std::vector<std::unique_ptr<Cta>> ctas;
  RaceDetector race;
  std::shared_ptr<GlobalHistory> global_history;  // global accesses of this cluster, made on first use
  std::mt19937_64 random;
  uint64_t events = 0;           // bumped by everything that can unblock a warp
  std::vector<std::unique_ptr<AsyncOp>> pending;
  std::unordered_map<uint64_t, uint32_t> queue_length;
  NamedBarrier cluster_barrier;  // barrier.cluster: expected = all threads of the cluster
  uint64_t next_queue = 1;
  uint32_t completing = 0;       // statement of the asynchronous operation that is completing now
  std::shared_ptr<ClusterTrace> trace;  // if the device traces this cluster

  // Issues an asynchronous operation: completes at once (eager and its queue empty), or joins `pending`.
  void issue(std::unique_ptr<AsyncOp> op);
  uint64_t new_queue() { return next_queue++; }
  // Completes operations of a queue, oldest first, until at most `remaining` are left (wait_group).
  void drain(uint64_t queue, uint32_t remaining = 0);
  void notify() { ++events; }
  // The CTA that a shared address belongs to; fails through `warp` (may be null) if the cluster has none.
  Cta& cta_of(uint32_t shared_address, const Warp* warp);

  // mbarrier.cpp. Arrivals and transactions on the barrier at a shared address, from a warp (may be null: an
  // asynchronous engine) that releases `clock`.
  MBarrier& mbarrier(uint32_t shared_address, const Warp* warp);
  void arrive(uint32_t shared_address, uint32_t count, const Clock& clock, const Warp* warp);
  void expect_tx(uint32_t shared_address, int64_t bytes, const Warp* warp);
  void complete_tx(uint32_t shared_address, int64_t bytes, const Clock& clock, const Warp* warp);
};

// ---------------------------------------------------------------------------------------------------------
// Device and launch

struct Dim3 { uint32_t x = 1, y = 1, z = 1; uint64_t count() const { return uint64_t(x) * y * z; } };

struct LaunchConfig {
  Dim3 grid, block, cluster;
  uint32_t dynamic_shared_bytes = 0;
};

class Module {  // parsed and decoded once per loaded library
 public:
  std::shared_ptr<ModuleText> text;
  std::unordered_map<std::string, std::shared_ptr<Program>> programs;
  std::vector<std::unique_ptr<uint8_t[]>> globals;  // storage of .global variables
};

// Parses and decodes; throws parse, unknown_opcode (with the complete list), bad_launch (target is not arch).
std::shared_ptr<Module> load_module(const std::string& ptx, const std::string& arch, Memory& memory);

struct LaunchRecord {
  std::string kernel;
  LaunchConfig config;
  uint32_t shared_bytes = 0;  // static + dynamic
  uint64_t warp_instructions = 0;
  double seconds = 0;
  // per warp index in the CTA, summed over CTAs
  struct Role {
    std::vector<uint64_t> issued, executed;  // by code index
    Tally tally;
  };
  std::vector<Role> roles;
  std::vector<uint32_t> unheard;  // statements of waits, arrivals and fences that made no difference (Launch::heard)
  std::shared_ptr<Program> program;
};

struct Device {
  std::string arch;  // "sm_90a"
  uint32_t sms = 1;
  Order order = Order::eager;
  uint64_t seed = 0;
  uint32_t threads = 1;          // host threads
  bool checks = true;            // races, uninitialised reads, in-flight registers
  uint64_t max_warp_instructions = 0;  // per launch; 0: no limit
  std::shared_ptr<Tracer> tracer;      // null: nothing is traced
  Memory memory;
};

struct Launch {
  Device* device = nullptr;
  std::shared_ptr<Program> program;
  LaunchConfig config;
  uint8_t* parameters = nullptr;       // aligned for tensor maps; registered in device.memory while the launch runs
  std::vector<uint8_t> parameter_storage;
  std::atomic<uint64_t> next_cluster{0};  // next cluster to start: by the schedule or by cluster launch control
  uint64_t clusters = 0;
  std::shared_ptr<GridOrder> grid_order = make_grid_order();
  std::atomic<uint64_t> instructions{0};
  std::atomic<bool> failed{false};
  std::mutex traces_mutex;
  std::vector<std::shared_ptr<ClusterTrace>> traces;
  SectorsSeen sectors_seen;
  // By statement: 1 once it has made a difference. A wait: it has taught the warp what it did not know, and the warp
  // has acted since, or arrived where somebody waited; waits for bulk groups that threads need in order to exit have,
  // too. A commit of a bulk group: such a wait counted it. An arrival: a wait has learned of it. A bar.warp.sync: lanes
  // had done or learnt something since the last. A wgmma.fence: no other stood between two uses of a register.
  std::vector<std::atomic<uint8_t>> heard;
};

// Runs to completion; throws EmulatorError.
LaunchRecord run_launch(Device&, const std::shared_ptr<Module>&, const std::string& kernel, const LaunchConfig&,
                        void** arguments);

}  // namespace emu
