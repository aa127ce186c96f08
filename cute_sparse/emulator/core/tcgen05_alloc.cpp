// Tensor memory allocation (PTX ISA, "Tensor Memory Allocation and Management Instructions"): tcgen05.alloc, dealloc,
// relinquish_alloc_permit. Columns belong to a CTA; other CTAs of the same SM are not modelled.
#include "machine.h"
#include "tensor_memory.h"

namespace emu {

namespace {

struct Allocate {
  uint32_t cta_group;
  bool wide;  // the destination address is a 64-bit register
};

// PTX ISA, "Tensor Memory Allocation": a power of two, at least 32, at most all columns.
bool is_column_count(uint32_t columns) {
  return columns >= 32 && columns <= TENSOR_COLUMNS && (columns & (columns - 1)) == 0;
}

bool is_free(const TensorMemory& memory, uint32_t column, uint32_t columns) {
  for (uint32_t k = column; k < column + columns; ++k)
    if (memory.allocated[k]) return false;
  return true;
}

// The lowest suitable columns that are free in all memories, or -1.
int find_free(const std::vector<TensorMemory*>& memories, uint32_t columns) {
  for (uint32_t column = 0; column + columns <= TENSOR_COLUMNS; column += 32) {
    bool free = true;
    for (const TensorMemory* memory : memories) free = free && is_free(*memory, column, columns);
    if (free) return int(column);
  }
  return -1;
}

// Freshly allocated columns hold NaN, and nothing that counts as written.
void take(Cta& cta, uint32_t column, uint32_t columns) {
  TensorMemory& memory = tensor_memory(cta);
  if (memory.words.empty()) memory.words.resize(size_t(TENSOR_LANES) * TENSOR_COLUMNS);
  std::fill_n(memory.at(0, column), size_t(columns) * TENSOR_LANES, 0xffffffffu);
  memory.allocations.push_back({column, columns});
  for (uint32_t k = column; k < column + columns; ++k) memory.allocated.set(k);
  for (uint32_t row = 0; row < TENSOR_LANES / TENSOR_GRANULE_LANES; ++row)
    cta.tensor_shadow->forget(uint64_t(row) * TENSOR_COLUMNS + column, columns);
}

void check_request(Warp& warp, uint32_t columns) {
  if (!is_column_count(columns))
    warp.fail(ErrorKind::tensor_memory, std::to_string(columns) +
                                            " columns: must be a power of two from 32 to 512");
  if (!tensor_memory(*warp.cta).may_allocate)
    warp.fail(ErrorKind::tensor_memory, "tcgen05.alloc after tcgen05.relinquish_alloc_permit");
}

// cta_group::1: the column, or -1 while there is no room.
int allocate_alone(Warp& warp, uint32_t columns) {
  const int column = find_free({&tensor_memory(*warp.cta)}, columns);
  if (column >= 0) take(*warp.cta, uint32_t(column), columns);
  return column;
}

// cta_group::2: one warp of each CTA of the pair asks, both receive the same columns. -1: wait for the peer, or room.
int allocate_in_pair(Warp& warp, const CtaGroup& group, uint32_t columns) {
  using State = TensorMemory::PairRequest::State;
  Cta& peer = *group.ctas[group.ctas[0] == warp.cta ? 1 : 0];
  TensorMemory& mine = tensor_memory(*warp.cta);
  TensorMemory& other = tensor_memory(peer);
  if (mine.request.state != State::none && mine.request.warp != warp.index)
    warp.fail(ErrorKind::tensor_memory, "warp " + std::to_string(mine.request.warp) +
                                            " of this CTA is inside tcgen05.alloc.cta_group::2 already");
  if (mine.request.state == State::granted) {
    mine.request.state = State::none;
    return int(mine.request.column);
  }
  mine.request.state = State::waiting;
  mine.request.warp = warp.index;
  mine.request.columns = columns;
  if (other.request.state != State::waiting) return -1;
  if (other.request.columns != columns)
    warp.fail(ErrorKind::tensor_memory, "the CTAs of the pair ask for " + std::to_string(columns) + " and " +
                                            std::to_string(other.request.columns) + " columns");
  const int column = find_free({&mine, &other}, columns);
  if (column < 0) return -1;
  take(*warp.cta, uint32_t(column), columns);
  take(peer, uint32_t(column), columns);
  mine.request.state = State::none;
  other.request.state = State::granted;
  other.request.column = uint32_t(column);
  warp.cluster->notify();
  return column;
}

Step exec_alloc(Warp& warp, const Instr& i) {
  const Allocate& a = *static_cast<const Allocate*>(i.detail);
  const CtaGroup group = cta_group(warp, a.cta_group);
  const uint32_t columns = uniform(warp, i.s[1], "the number of columns");
  check_request(warp, columns);
  const int column = a.cta_group == 2 ? allocate_in_pair(warp, group, columns) : allocate_alone(warp, columns);
  if (column < 0) return warp.block(Wait{Wait::Kind::tensor_memory, columns});
  const uint32_t lane = warp.first_lane();
  const uint32_t destination = shared_address(warp, i, i.s[0], a.wide, lane);
  uint8_t* word = shared_at(warp, destination, 4, 4, int(lane));
  touch_shared(warp, destination, 4, true, false, int(lane));
  const uint32_t address = uint32_t(column);
  std::memcpy(word, &address, 4);
  warp.unblock();
  return Step::next;
}

// Freeing is a write of everything: whoever still uses the columns must be ordered before.
Step exec_dealloc(Warp& warp, const Instr& i) {
  cta_group(warp, uint32_t(i.imm));
  TensorMemory& memory = tensor_memory(*warp.cta);
  const uint32_t address = uniform(warp, i.s[0], "the tensor memory address");
  const uint32_t columns = uniform(warp, i.s[1], "the number of columns");
  auto& allocations = memory.allocations;
  size_t found = 0;
  while (found < allocations.size() &&
         (allocations[found].column != address || allocations[found].columns != columns))
    ++found;
  if (found == allocations.size())
    warp.fail(ErrorKind::tensor_memory, "no allocation of " + std::to_string(columns) + " columns at address " +
                                            std::to_string(address) + " to free");
  const Stamp stamp{warp.actor, warp.clock.at(warp.actor), Proxy::tensor};
  touch_tensor(warp, *warp.cta, stamp, {0, TENSOR_LANES, address, columns}, Touch::write);
  for (uint32_t k = address; k < address + columns; ++k) memory.allocated.reset(k);
  allocations.erase(allocations.begin() + long(found));
  warp.cluster->notify();
  return Step::next;
}

Step exec_relinquish(Warp& warp, const Instr& i) {
  cta_group(warp, uint32_t(i.imm));
  tensor_memory(*warp.cta).may_allocate = false;
  return Step::next;
}

uint32_t group_of(const Statement& s, Builder& b) {
  if (s.has("cta_group::1")) return 1;
  if (s.has("cta_group::2")) return 2;
  b.fail("no .cta_group");
}

}  // namespace

void check_tensor_memory_at_exit(Cta& cta) {
  if (!cta.tensor_memory) return;
  const TensorMemory& memory = tensor_memory(cta);
  if (memory.allocations.empty()) return;
  uint32_t columns = 0;
  for (const auto& allocation : memory.allocations) columns += allocation.columns;
  Site site;
  site.kernel = cta.warps[0].program->text->name;
  site.cta = int64_t(cta.linear);
  throw EmulatorError(ErrorKind::tensor_memory,
                      "the CTA ends with " + std::to_string(columns) + " tensor memory columns allocated", site);
}

bool decode_tcgen05_alloc(const Statement& s, Builder& b) {
  const std::string& name = s.modifiers[1];
  if (name != "alloc" && name != "dealloc" && name != "relinquish_alloc_permit") return false;
  const uint32_t group = group_of(s, b);
  b.out.aligned = true;
  if (name == "relinquish_alloc_permit") {
    if (s.operands.size() != 0) b.fail("expected no operand");
    b.out.imm = group;
    b.out.exec = exec_relinquish;
    return true;
  }
  if (s.operands.size() != 2) b.fail("expected an address and a number of columns");
  if (name == "alloc") {
    b.out.s[0] = b.address(s.operands[0]);
    b.out.detail = b.keep(Allocate{group, b.wide(s.operands[0])});
    b.out.exec = exec_alloc;
  } else {
    b.out.s[0] = b.read(s.operands[0], RegClass::b32);
    b.out.imm = group;
    b.out.exec = exec_dealloc;
  }
  b.out.s[1] = b.read(s.operands[1], RegClass::b32);
  return true;
}

}  // namespace emu
