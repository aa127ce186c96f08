// Checked access to the memory spaces, and the stamps by which accesses enter the race detector.
#pragma once
#include "machine.h"

namespace emu {

// Who performs an asynchronous access: the actor and epoch that a later wait will learn of.
struct Stamp {
  ActorId actor = 0;
  uint32_t epoch = 0;
  Proxy proxy = Proxy::async;
  bool unordered = false;  // see Access
};

// Host pointer to `bytes` of shared memory at a 32-bit shared address (any CTA of the cluster). Fails through the
// warp on bounds and alignment. Does not enter the race detector.
uint8_t* shared_at(Warp& warp, uint32_t address, uint32_t bytes, uint32_t align, int lane = -1);
// The same for global memory: `write` needs a writable range.
uint8_t* global_at(Warp& warp, uint64_t address, uint64_t bytes, uint32_t align, bool write, int lane = -1);

constexpr uint32_t SHARED_GRANULE_BYTES = 4;

// An ordinary (generic proxy) access by the warp's executing lanes: race check, uninitialised check, recorded.
void touch_shared(Warp& warp, uint32_t address, uint32_t bytes, bool write, bool atomic = false, int lane = -1);
void touch_global(Warp& warp, uint64_t address, uint64_t bytes, bool write, bool atomic = false, int lane = -1);
// The same by consecutive lanes, from `lane` on, of `bytes_each` bytes each, that are adjacent: `bytes` together.
void touch_shared_lanes(Warp& warp, uint32_t address, uint32_t bytes, uint32_t bytes_each, bool write, bool atomic,
                        int lane);
void touch_global_lanes(Warp& warp, uint64_t address, uint64_t bytes, uint32_t bytes_each, bool write, bool atomic,
                        int lane);
// An access that an asynchronous operation issued by `warp` will perform. Called at issue, with the footprint;
// ordered behind what the warp knows, and behind fence.proxy.async for generic writes.
void touch_shared_async(Warp& warp, const Stamp& stamp, uint32_t address, uint32_t bytes, bool write);
void touch_global_async(Warp& warp, const Stamp& stamp, uint64_t address, uint64_t bytes, bool write,
                        bool atomic = false);
// The same on behalf of consecutive lanes, each of which waits for its own part: see touch_shared_lanes.
void touch_shared_async_lanes(Warp& warp, const Stamp& stamp, uint32_t address, uint32_t bytes, uint32_t bytes_each,
                              bool write, int lane);
void touch_global_async_lanes(Warp& warp, const Stamp& stamp, uint64_t address, uint64_t bytes, uint32_t bytes_each,
                              bool write, int lane);

// Raises the ErrorKind that a conflict stands for, with both sides in the message.
[[noreturn]] void report(Warp& warp, const Conflict& conflict, const char* space, int lane);

// The stamp of an asynchronous operation issued by `warp` that will signal the mbarrier at `address` (the actor is
// the barrier, the epoch the phase it now forms). Checks that the barrier is initialised and that the initialisation
// is ordered before the issue and visible to the async proxy (fence.mbarrier_init or fence.proxy.async).
Stamp signal_stamp(Warp& warp, uint32_t address);

// Release and acquire by a warp: `release` returns the clock to publish and advances the warp's epoch.
Clock release(Warp& warp);
// The same without a copy: joins what the warp's executing lanes publish into `target`.
void release_into(Warp& warp, Clock& target);
void acquire(Warp& warp, const Clock& clock);
// The executing lanes' earlier accesses and those of the rest of the warp are ordered from here on (bar.warp.sync).
void converge(Warp& warp);
// Each executing lane has waited for its own part of what `actor` did up to `epoch` (tcgen05.wait, cp.async.wait_group):
// one lane speaks for the others only after they converge.
void know_by_lanes(Warp& warp, ActorId actor, uint32_t epoch);
// fence.proxy.async by the executing lanes.
void fence_proxy(Warp& warp);

// Synchronisation through a global or shared location (generic address): what a store, red or atom with .release
// publishes there, a load or atom with .acquire learns. `relaxed`: only what an earlier fence has released, or what a
// later fence makes known.
// wide: the scope reaches other clusters. (Among the CTAs of a cluster, .cta counts as .cluster.)
inline bool is_wide(const Statement& s) { return !s.has("cta") && !s.has("cluster"); }
void release_at(Warp& warp, uint64_t address, bool relaxed, bool wide);
void acquire_at(Warp& warp, uint64_t address, bool relaxed, bool wide);

// What a blocked group waits for, for deadlock reports: the barrier's phase, arrivals and bytes due.
std::string describe_wait(const Cta& cta, const Wait& wait);

}  // namespace emu
