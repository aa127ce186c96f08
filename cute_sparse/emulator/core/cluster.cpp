// Cluster launch control (PTX ISA, "clusterlaunchcontrol.try_cancel" and "clusterlaunchcontrol.query_cancel") and
// programmatic dependent launch (PTX ISA, "griddepcontrol").
#include "bulk.h"
#include "machine.h"

namespace emu {

namespace {

// ---------------------------------------------------------------------------------------------------------
// clusterlaunchcontrol.try_cancel

// The 16 bytes of a response. PTX leaves them opaque; here: ctaid of the cancelled cluster's first CTA, and whether
// there is one.
struct Response {
  uint32_t ctaid[3] = {0, 0, 0};
  uint32_t canceled = 0;
};

// Takes the next cluster of the launch that has not started, from the schedule's own counter.
Response cancel_next(Launch& launch) {
  Response response;
  const uint64_t index = launch.next_cluster.fetch_add(1);
  if (index >= launch.clusters) return response;
  const LaunchConfig& c = launch.config;
  const uint64_t clusters_x = c.grid.x / c.cluster.x, clusters_y = c.grid.y / c.cluster.y;
  response.ctaid[0] = uint32_t(index % clusters_x) * c.cluster.x;
  response.ctaid[1] = uint32_t(index / clusters_x % clusters_y) * c.cluster.y;
  response.ctaid[2] = uint32_t(index / clusters_x / clusters_y) * c.cluster.z;
  response.canceled = 1;
  return response;
}

struct TryCancel {
  AddressSlot response, barrier;
  bool multicast;  // to the same offsets in every CTA of the cluster
};

struct TryCancelOp : AsyncOp {
  std::vector<SharedTarget> targets;

  void complete(Cluster& cluster) override {
    const Response response = cancel_next(*cluster.launch);
    for (const SharedTarget& target : targets) std::memcpy(target.data, &response, sizeof response);
    complete_targets(cluster, targets, sizeof response);
  }
};

void issue_try_cancel(Warp& warp, const Instr& i, uint32_t response, uint32_t barrier, bool multicast, uint32_t lane) {
  auto op = std::make_unique<TryCancelOp>();
  op->statement = i.statement;
  const Multicast all{multicast, false, uint32_t((1ull << warp.cluster->ctas.size()) - 1)};
  op->targets = shared_targets(warp, response, sizeof(Response), 16, barrier, all, int(lane));
  for (const SharedTarget& target : op->targets)
    touch_shared_async(warp, target.stamp, target.address, sizeof(Response), true);
  warp.cluster->issue(std::move(op));
}

Step exec_try_cancel(Warp& warp, const Instr& i) {
  const TryCancel& t = *static_cast<const TryCancel*>(i.detail);
  once_per_operands(
      warp, [&](uint32_t lane) { return std::pair(t.response.shared(warp, lane), t.barrier.shared(warp, lane)); },
      [&](const auto& operands, uint32_t lane) {
        issue_try_cancel(warp, i, operands.first, operands.second, t.multicast, lane);
      });
  return Step::next;
}

// clusterlaunchcontrol.try_cancel.async{.shared::cta}.mbarrier::complete_tx::bytes{.multicast::cluster::all}.b128
//   [response], [mbar];
bool decode_try_cancel(const Statement& s, Builder& b) {
  if (!only_modifiers(s, "clusterlaunchcontrol try_cancel async shared::cta mbarrier::complete_tx::bytes "
                         "multicast::cluster::all b128") ||
      !s.has("async") || !s.has("mbarrier::complete_tx::bytes") || !s.has("b128"))
    return false;
  if (s.operands.size() != 2) b.fail("expected the address of the response and of the mbarrier");
  TryCancel t;
  t.response = address_slot(b, s.operands[0]);
  t.barrier = address_slot(b, s.operands[1]);
  t.multicast = s.has("multicast::cluster::all");
  b.out.detail = b.keep(t);
  b.out.exec = exec_try_cancel;
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// clusterlaunchcontrol.query_cancel

// The response that lane l holds in a .b128 register: two 64-bit halves.
Response response_of(Warp& warp, uint32_t slot, uint32_t lane) {
  const uint64_t halves[2] = {warp.u64(slot)[lane], warp.u64(slot + 2)[lane]};
  Response response;
  static_assert(sizeof response == sizeof halves);
  std::memcpy(&response, halves, sizeof response);
  return response;
}

Step exec_is_canceled(Warp& warp, const Instr& i) {
  uint32_t canceled = 0;
  for (uint32_t lane = 0; lane < LANES; ++lane)
    if (warp.mask >> lane & 1) canceled |= uint32_t(response_of(warp, i.s[0], lane).canceled != 0) << lane;
  uint32_t& p = warp.pred(i.d[0]);
  p = (p & ~warp.mask) | canceled;
  return Step::next;
}

// Registers of the list get coordinates from i.imm on; a fourth one (of .v4) gets 0.
Step exec_first_ctaid(Warp& warp, const Instr& i) {
  const uint32_t* slots = warp.program->slot_lists.data() + i.list;
  for (uint32_t lane = 0; lane < LANES; ++lane) {
    if (!(warp.mask >> lane & 1)) continue;
    const Response response = response_of(warp, i.s[0], lane);
    for (uint32_t k = 0; k < i.n_list; ++k) {
      const uint64_t axis = i.imm + k;
      warp.u32(slots[k])[lane] = axis < 3 ? response.ctaid[axis] : 0;
    }
  }
  return Step::next;
}

// query_cancel.is_canceled.pred.b128 p, response;
// query_cancel.get_first_ctaid.v4.b32.b128 {x, y, z, _}, response;  query_cancel.get_first_ctaid::x.b32.b128 x, ...
bool decode_query_cancel(const Statement& s, Builder& b) {
  static const std::string QUERY = "clusterlaunchcontrol.query_cancel.";
  const std::string what = s.opcode.substr(std::min(QUERY.size(), s.opcode.size()));
  const bool vector = what == "get_first_ctaid.v4.b32.b128";
  const bool one = what == "get_first_ctaid::x.b32.b128" || what == "get_first_ctaid::y.b32.b128" ||
                   what == "get_first_ctaid::z.b32.b128";
  if (what != "is_canceled.pred.b128" && !vector && !one) return false;
  if (s.operands.size() != 2) b.fail("expected a destination and the response");
  b.out.s[0] = b.read(s.operands[1], RegClass::b128);
  if (!vector && !one) {
    b.out.d[0] = b.write(s.operands[0]);
    b.out.exec = exec_is_canceled;
    return true;
  }
  if (vector && (s.operands[0].kind != Operand::Kind::vector || s.operands[0].parts.size() != 4))
    b.fail("expected a vector of four registers");
  b.list(s.operands[0]);
  b.also_writes(s.operands[0]);
  b.out.imm = one ? uint64_t(what[sizeof "get_first_ctaid::" - 1] - 'x') : 0;
  b.out.exec = exec_first_ctaid;
  return true;
}

// ---------------------------------------------------------------------------------------------------------
// griddepcontrol: launches run one after the other here, so that a grid's prerequisites have always completed

Step exec_griddepcontrol(Warp&, const Instr&) { return Step::next; }

}  // namespace

bool decode_cluster(const Statement& s, Builder& b) {
  if (s.opcode == "griddepcontrol.wait" || s.opcode == "griddepcontrol.launch_dependents") {
    b.out.exec = exec_griddepcontrol;
    return true;
  }
  if (s.mnemonic() != "clusterlaunchcontrol" || s.modifiers.size() < 2) return false;
  if (s.modifiers[1] == "try_cancel") return decode_try_cancel(s, b);
  if (s.modifiers[1] == "query_cancel") return decode_query_cancel(s, b);
  return false;
}

}  // namespace emu
