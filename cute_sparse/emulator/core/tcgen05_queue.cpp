// The rest of the tensor core's in-order queue (PTX ISA, "tcgen05.commit" and "tcgen05.cp").
#include "machine.h"
#include "matmul.h"
#include "tensor_memory.h"

namespace emu {

namespace {

// ---------------------------------------------------------------------------------------------------------
// tcgen05.commit: an mbarrier arrival behind everything that the warp has issued to its tensor queue

struct Commit {
  uint32_t cta_group;
  bool wide, multicast;
};

struct CommitOp : AsyncOp {
  std::vector<uint32_t> barriers;
  Clock clock;

  void complete(Cluster& cluster) override {
    for (uint32_t barrier : barriers) cluster.arrive(barrier, 1, clock, nullptr);
  }
};

// The barrier at the address, or those at the same offset in every CTA of the mask.
std::vector<uint32_t> target_barriers(Warp& warp, uint32_t address, const Commit& commit, uint32_t cta_mask) {
  if (!commit.multicast) return {address};
  const size_t ctas = warp.cluster->ctas.size();
  if (cta_mask == 0 || (ctas < 32 && cta_mask >> ctas))
    warp.fail(ErrorKind::invalid_operand, "multicast mask " + std::to_string(cta_mask) + " for a cluster of " +
                                              std::to_string(ctas) + " CTAs");
  std::vector<uint32_t> barriers;
  for (uint32_t rank = 0; rank < ctas; ++rank)
    if (cta_mask >> rank & 1) barriers.push_back(rank << SHARED_RANK_SHIFT | (address & SHARED_OFFSET_MASK));
  return barriers;
}

// Arrives once, however many lanes execute it, as tcgen05.mma multiplies once.
Step exec_commit(Warp& warp, const Instr& i) {
  const Commit& commit = *static_cast<const Commit*>(i.detail);
  const CtaGroup group = cta_group(warp, commit.cta_group);
  const uint32_t lane = warp.first_lane();
  const uint32_t address = shared_address(warp, i, i.s[0], commit.wide, lane);
  const uint32_t cta_mask = commit.multicast ? warp.u32(i.s[1])[lane] : 0;
  auto op = std::make_unique<CommitOp>();
  op->queue = tensor_queue(group);
  op->statement = i.statement;
  op->barriers = target_barriers(warp, address, commit, cta_mask);
  for (uint32_t barrier : op->barriers) signal_stamp(warp, barrier);
  TensorWarp& state = tensor_warp(warp);
  op->clock = release(warp);
  op->clock.know(state.tensor_actor, state.tensor_epoch);
  ++state.tensor_epoch;
  warp.cluster->issue(std::move(op));
  return Step::next;
}

// tcgen05.commit.cta_group.mbarrier::arrive::one{.shared::cluster}{.multicast::cluster}.b64 [mbar]{, cta-mask};
bool decode_commit(const Statement& s, Builder& b) {
  Commit commit{};
  bool arrives = false;
  for (size_t k = 2; k < s.modifiers.size(); ++k) {
    const std::string& m = s.modifiers[k];
    if (m == "cta_group::1") commit.cta_group = 1;
    else if (m == "cta_group::2") commit.cta_group = 2;
    else if (m == "mbarrier::arrive::one") arrives = true;
    else if (m == "multicast::cluster") commit.multicast = true;
    else if (m != "shared::cluster" && m != "b64") return false;
  }
  if (commit.cta_group == 0 || !arrives) return false;
  if (s.operands.size() != (commit.multicast ? 2u : 1u)) b.fail("wrong number of operands");
  b.out.s[0] = b.address(s.operands[0]);
  commit.wide = b.wide(s.operands[0]);
  if (commit.multicast) b.out.s[1] = b.read(s.operands[1], RegClass::b16);
  b.out.detail = b.keep(commit);
  b.out.exec = exec_commit;
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// tcgen05.cp: a matrix of `rows` x `chunks` 16-byte chunks, described like a K-major operand, into tensor memory

// Row r goes to lanes of[k] + r - first[k] of each part that covers it (PTX ISA, the figures of "tcgen05.cp";
// CUTLASS's copy traits say the same).
struct Part {
  uint32_t row, rows, lane, lane_step;
};

struct CopyShape {
  const char* name;       // shape, and the multicast qualifier if there is one
  uint32_t rows, chunks;
  std::vector<Part> parts;
};

const std::vector<CopyShape>& copy_shapes() {
  static const std::vector<CopyShape> shapes = {
      {"128x256b", 128, 2, {{0, 128, 0, 1}}},
      {"128x128b", 128, 1, {{0, 128, 0, 1}}},
      {"4x256b", 4, 2, {{0, 4, 0, 32}}},  // a row for each warp's lanes
      {"64x128b.warpx2::02_13", 64, 1, {{0, 64, 0, 1}, {0, 64, 64, 1}}},
      {"64x128b.warpx2::01_23", 64, 1, {{0, 32, 0, 1}, {0, 32, 32, 1}, {32, 32, 64, 1}, {32, 32, 96, 1}}},
      {"32x128b.warpx4", 32, 1, {{0, 32, 0, 1}, {0, 32, 32, 1}, {0, 32, 64, 1}, {0, 32, 96, 1}}},
  };
  return shapes;
}

struct Copy {
  uint32_t cta_group;
  const CopyShape* shape;
};

struct CopyOp : AsyncOp {
  CtaGroup group;
  const CopyShape* shape = nullptr;
  SharedOperand source;
  TensorAddress destination{0};

  void complete(Cluster&) override {
    const ChunkMap map(source);
    for (uint32_t c = 0; c < group.size; ++c) {
      TensorMemory& memory = tensor_memory(*group.ctas[c]);
      const uint8_t* shared = group.ctas[c]->shared.data();
      for (const Part& part : shape->parts)
        for (uint32_t r = 0; r < part.rows; ++r)
          for (uint32_t chunk = 0; chunk < shape->chunks; ++chunk)
            copy_chunk(memory, part.lane + r * part.lane_step, chunk, shared + map.offset(part.row + r, chunk));
    }
  }

  void copy_chunk(TensorMemory& memory, uint32_t lane, uint32_t chunk, const uint8_t* from) const {
    for (uint32_t word = 0; word < 4; ++word)
      std::memcpy(memory.at(destination.lane + lane, destination.column + 4 * chunk + word), from + 4 * word, 4);
  }
};

void touch_copy(Warp& warp, const CopyOp& op, const ChunkMap& map) {
  const TensorWarp& state = tensor_warp(warp);
  const Stamp reads{state.tensor_actor, state.tensor_epoch, Proxy::async};
  const Stamp writes{state.tensor_actor, state.tensor_epoch, Proxy::tensor};
  for (uint32_t c = 0; c < op.group.size; ++c) {
    Cta& cta = *op.group.ctas[c];
    const uint32_t window = cta.rank << SHARED_RANK_SHIFT;
    for (uint32_t row = 0; row < op.shape->rows; ++row)
      for (uint32_t chunk = 0; chunk < op.shape->chunks; ++chunk)
        touch_shared_async(warp, reads, window | map.offset(row, chunk), 16, false);
    for (const Part& part : op.shape->parts) {
      const uint32_t pieces = part.lane_step == 1 ? 1 : part.rows;
      for (uint32_t k = 0; k < pieces; ++k) {
        const TensorRegion region{op.destination.lane + part.lane + k * part.lane_step, part.rows / pieces,
                                  op.destination.column, op.shape->chunks * 4};
        check_allocated(warp, cta, region);
        touch_tensor(warp, cta, writes, region, Touch::write);
      }
    }
  }
}

Step exec_copy(Warp& warp, const Instr& i) {
  const Copy& copy = *static_cast<const Copy*>(i.detail);
  auto op = std::make_unique<CopyOp>();
  op->group = cta_group(warp, copy.cta_group);
  op->shape = copy.shape;
  op->destination = TensorAddress(uniform(warp, i.s[0], "the tensor memory address") + uint32_t(i.offset));
  const std::string wrong = decode_tcgen05_descriptor(warp.u64(i.s[1])[warp.first_lane()], op->source);
  if (!wrong.empty()) warp.fail(ErrorKind::invalid_operand, wrong);
  op->source.format = Format::bf16;  // 16 bits wide, so that a chunk has 8 elements
  op->source.mn = copy.shape->rows;
  op->source.k = copy.shape->chunks * 8;
  const ChunkMap map(op->source);
  if (map.begin() < SHARED_BASE || map.end() > warp.cta->shared.size())
    warp.fail(ErrorKind::out_of_bounds, "the source at shared memory offsets " + std::to_string(map.begin()) + ".." +
                                            std::to_string(map.end()) + " leaves the CTA's shared memory");
  touch_copy(warp, *op, map);
  op->queue = tensor_queue(op->group);
  op->statement = i.statement;
  warp.cluster->issue(std::move(op));
  return Step::next;
}

// tcgen05.cp.cta_group.shape{.multicast} [taddr], s-desc; the forms that decompress 4- or 6-bit elements are unknown.
bool decode_copy(const Statement& s, Builder& b) {
  const auto& modifiers = s.modifiers;
  if (modifiers.size() < 4 || modifiers.size() > 5) return false;
  if (modifiers[2] != "cta_group::1" && modifiers[2] != "cta_group::2") return false;
  const std::string name = modifiers.size() == 5 ? modifiers[3] + "." + modifiers[4] : modifiers[3];
  const CopyShape* shape = nullptr;
  for (const CopyShape& known : copy_shapes())
    if (name == known.name) shape = &known;
  if (!shape) return false;
  if (s.operands.size() != 2) b.fail("expected an address and a descriptor");
  b.out.s[0] = b.address(s.operands[0]);
  b.out.s[1] = b.read(s.operands[1], RegClass::b64);
  b.out.detail = b.keep(Copy{modifiers[2] == "cta_group::2" ? 2u : 1u, shape});
  b.out.exec = exec_copy;
  return true;
}

}  // namespace

bool decode_tcgen05_queue(const Statement& s, Builder& b) {
  if (s.modifiers[1] == "commit") return decode_commit(s, b);
  if (s.modifiers[1] == "cp") return decode_copy(s, b);
  return false;
}

}  // namespace emu
