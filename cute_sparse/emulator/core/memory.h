// Global memory is the host's, checked against the ranges that the Python side registers; and the windows by
// which a generic address names another space.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <shared_mutex>
#include <string>
#include <vector>

namespace emu {

// Generic addresses: above the canonical host range, so that no host pointer can collide.
constexpr uint64_t SHARED_WINDOW = 1ull << 56;  // | 32-bit shared address
constexpr uint64_t LOCAL_WINDOW = 2ull << 56;   // | offset in the lane's local memory
inline bool in_shared_window(uint64_t a) { return (a >> 56) == 1; }
inline bool in_local_window(uint64_t a) { return (a >> 56) == 2; }

struct Range {
  uint64_t begin = 0, end = 0;
  std::string name;
  bool writable = true;
};

// Ranges may overlap (views of one storage); one that begins where another does takes its place.
class Memory {
 public:
  Memory();
  void add(uint64_t address, uint64_t bytes, std::string name, bool writable = true);
  void remove(uint64_t address);
  // The registered range that holds [address, address + bytes), or null. The pointer stays valid until the same
  // thread has looked up another range, even if this one is removed meanwhile.
  const Range* find(uint64_t address, uint64_t bytes) const;
  // The nearest range below or around an address, for messages: "3 bytes past tensor 'k' (4096 bytes)".
  std::string describe(uint64_t address, uint64_t bytes) const;
  std::vector<Range> all() const;

 private:
  mutable std::shared_mutex mutex_;
  std::map<uint64_t, std::shared_ptr<Range>> ranges_;  // by begin
  uint64_t longest_ = 0;                // of all ranges ever registered: how far back a holder may begin
  std::atomic<uint64_t> version_;       // unique in the process; add and remove change it: last hits become void

  std::shared_ptr<Range> search(uint64_t address, uint64_t bytes) const;
};

}  // namespace emu
