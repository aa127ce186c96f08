#include "trace.h"

#include "machine.h"

namespace emu {

void WarpTrace::step(uint32_t code, bool skipped) {
  steps.push_back({code, begin_, skipped});
  begin_ = uint32_t(notes.size());
}

void WarpTrace::count(const Tally& t) {
  const uint64_t now[] = {t.tma_bytes_loaded, t.tma_bytes_stored + t.tma_bytes_reduced, t.shared_bytes_read,
                          t.shared_bytes_written, t.global_bytes_read, t.global_bytes_written};
  for (int k = 0; k < 6; ++k) {
    if (now[k] == bytes_[k]) continue;
    notes.push_back({Note::Kind(int(Note::Kind::loaded) + k), 0, 0, now[k] - bytes_[k]});
    bytes_[k] = now[k];
  }
}

uint64_t SectorsSeen::ask(uint64_t address, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  uint64_t fresh = 0;
  const uint64_t end = (address + bytes + SECTOR_BYTES - 1) / SECTOR_BYTES;
  for (uint64_t sector = address / SECTOR_BYTES; sector < end; ++sector) {
    auto& page = pages_[sector / PAGE_SECTORS];
    if (page.empty()) page.resize(PAGE_SECTORS);
    auto seen = page[sector % PAGE_SECTORS];
    fresh += seen ? 0 : SECTOR_BYTES;
    seen = true;
  }
  return fresh;
}

}  // namespace emu
