// A record of what the warps of a cluster executed, in order, and of what every wait waited for: the input of the
// timing model (timing.h). Taken only on request, in the eager order, in which an asynchronous operation signals its
// barriers while the instruction that issues it executes.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace emu {

struct Program;
struct Tally;

// What an instruction did that its text does not tell.
struct Note {
  enum class Kind : uint8_t {
    arrive,   // a contribution to `phase` of a barrier: an arrival, or bytes that came
    wait,     // went on because `phase` of the barrier was complete
    sync,     // bar.sync, barrier.cluster.wait: both
    loaded, stored, shared_read, shared_written, global_read, global_written,  // bytes, in `amount`
    received, // bytes of a load, in `amount`, that reached the shared memory of the CTA `phase`
    mma,      // tcgen05.mma: multiply-accumulates in `amount`, bytes of shared memory that it reads in `phase`
    fresh,    // bytes of global memory, in `amount`, that a TMA load is the first of the launch to ask for
  } kind;
  uint64_t barrier = 0;  // see barrier_key
  uint64_t phase = 0;    // number of the phase, from 0 on
  uint64_t amount = 0;
};

struct TraceStep {
  uint32_t code;   // index in Program::code
  uint32_t notes;  // of this step: from here to the next step's
  bool skipped;    // the guard was false in every lane
};

struct WarpTrace {
  uint32_t cta_rank = 0, warp = 0;
  std::vector<TraceStep> steps;
  std::vector<Note> notes;
  void step(uint32_t code, bool skipped);
  // The bytes that the tally has grown by since the last call.
  void count(const Tally& tally);

 private:
  uint32_t begin_ = 0;  // of the notes of the step under way
  uint64_t bytes_[6] = {0, 0, 0, 0, 0, 0};
};

// Which sectors of global memory the TMA loads of a launch have asked for: those of clusters that are traced.
class SectorsSeen {
 public:
  // The bytes of the sectors of [address, address + bytes) that nobody has asked for before.
  uint64_t ask(uint64_t address, uint64_t bytes);

 private:
  static constexpr uint64_t SECTOR_BYTES = 32, PAGE_SECTORS = 1 << 15;
  std::mutex mutex_;
  std::unordered_map<uint64_t, std::vector<bool>> pages_;
};

enum class BarrierSpace : uint8_t { mbarrier, named, cluster };
inline uint64_t barrier_key(BarrierSpace space, uint64_t address) { return uint64_t(space) << 32 | address; }

struct ClusterTrace {
  uint64_t cluster = 0;  // index in the launch
  std::shared_ptr<const Program> program;
  std::vector<std::unique_ptr<WarpTrace>> warps;  // of the first CTA, then of the next
  WarpTrace* running = nullptr;                   // whose instruction executes now

  void note(Note::Kind kind, BarrierSpace space, uint64_t address, uint64_t phase) {
    if (running) running->notes.push_back({kind, barrier_key(space, address), phase, 0});
  }
  void amount(Note::Kind kind, uint64_t amount, uint64_t second = 0) {
    if (running) running->notes.push_back({kind, 0, second, amount});
  }
};

// Of a device that traces: what has been traced.
struct Tracer {
  int64_t cluster = -1;  // which one of each launch; -1: all
  std::vector<std::vector<std::shared_ptr<ClusterTrace>>> launches;  // in the order in which they ended

  bool wants(uint64_t index) const { return cluster < 0 || uint64_t(cluster) == index; }
};

}  // namespace emu
