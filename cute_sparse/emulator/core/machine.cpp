// The interpreter loop and what a warp may ask of it.
#include "machine.h"

#include <algorithm>

#include "bulk.h"
#include "interpreter.h"
#include "tensor_memory.h"

namespace emu {

Site Warp::site(int lane) const {
  Site s;
  s.kernel = program->text->name;
  s.cta = int64_t(cta->linear);
  s.warp = int32_t(index);
  s.lane = lane;
  const Instr& i = program->code[groups[current].pc];
  if (i.statement < program->text->statements.size()) {
    const Statement& statement = program->text->statements[i.statement];
    s.ptx_line = statement.line;
    s.ptx_text = statement.text;
    s.source = statement.source;
  }
  return s;
}

void Warp::fail(ErrorKind kind, const std::string& message, int lane) const {
  throw EmulatorError(kind, message, site(lane));
}

Step Warp::block(Wait wait) {
  group().wait = wait;
  group().blocked = true;
  return Step::blocked;
}

void Warp::unblock() {
  Group& g = group();
  g.blocked = g.arrived = g.timed_out = false;
  g.token = 0;
  g.wait = Wait{};
}

namespace {

using namespace slot_state;

// The first use of a wgmma's result.
void take_retired(Warp& w, uint32_t slot) {
  w.state[slot] = (w.state[slot] & ASYNC_READ) | WRITTEN | w.fence_epoch << EPOCH_SHIFT;
}

// A source register that is not simply readable: a pending tcgen05.ld completes at its first use, and so does the
// result of a finished wgmma; everything else is an error.
void resolve_unready(Warp& w, uint32_t slot) {
  if (w.state[slot] & LOAD_PENDING) complete_pending_load(w, slot);
  if (w.state[slot] & RETIRED) take_retired(w, slot);
  const uint64_t state = w.state[slot];
  if (state & ASYNC_WRITE)
    w.fail(ErrorKind::in_flight, "reads a register that an asynchronous wgmma still writes (wgmma.wait_group first)");
  const uint32_t missing = w.mask & ~uint32_t(state & WRITTEN);
  if (missing) w.fail(ErrorKind::uninitialised, "reads a register that nothing has written", __builtin_ctz(missing));
}

void check_reads(Warp& w, const Instr& i, uint32_t mask) {
  const uint32_t* slots = w.program->slot_lists.data() + i.reads;
  for (uint32_t k = 0; k < i.n_reads; ++k)
    if ((w.state[slots[k]] & (mask | ASYNC_WRITE | LOAD_PENDING)) != mask) resolve_unready(w, slots[k]);
}

void mark_writes(Warp& w, const Instr& i, uint32_t mask) {
  const uint32_t* slots = w.program->slot_lists.data() + i.writes;
  const uint64_t stamp = w.fence_epoch << EPOCH_SHIFT;
  for (uint32_t k = 0; k < i.n_writes; ++k) {
    uint64_t& state = w.state[slots[k]];
    if (state & IN_FLIGHT) {
      if (state & LOAD_PENDING) complete_pending_load(w, slots[k]);
      if (state & RETIRED) take_retired(w, slots[k]);
      if (state & (ASYNC_WRITE | ASYNC_READ))
        w.fail(ErrorKind::in_flight, "overwrites a register that an asynchronous operation still uses");
    }
    state = stamp | (state & WRITTEN) | mask;
  }
}

// mov hands on what it is given: lanes that were never written stay so, and so does what tcgen05.ld still loads where
// the kernel waits for its loads.
void move_state(Warp& w, const Instr& i, uint32_t mask) {
  const uint32_t* reads = w.program->slot_lists.data() + i.reads;
  // A pair packed of a written and an unwritten register counts as written: compilers pack such pairs and look at the
  // one half only.
  uint32_t written = i.n_reads ? 0 : mask;
  uint64_t epoch = i.n_reads ? 0 : w.fence_epoch;
  bool loading = false;
  for (uint32_t k = 0; k < i.n_reads; ++k) {
    const uint64_t source = w.state[reads[k]];
    const bool renames = (source & LOAD_PENDING) && w.program->waits_for_tensor_loads;
    loading |= renames;
    if (!renames && (source & (ASYNC_WRITE | LOAD_PENDING | RETIRED))) resolve_unready(w, reads[k]);
    written |= mask & uint32_t(w.state[reads[k]] & WRITTEN);
    epoch = std::max(epoch, w.state[reads[k]] >> EPOCH_SHIFT);
  }
  mark_writes(w, i, mask);
  const uint32_t* writes = w.program->slot_lists.data() + i.writes;
  for (uint32_t k = 0; k < i.n_writes; ++k) {
    uint64_t& state = w.state[writes[k]];
    state = (epoch << EPOCH_SHIFT) | (state & WRITTEN & ~uint64_t(mask & ~written));
    if (loading) rename_pending_load(w, writes[k]);
  }
}

// Diverged warp: groups that meet merge; the runnable group with the lowest pc goes on. False: none is runnable.
bool select_group(Warp& w) {
  auto& groups = w.groups;
  for (size_t a = 0; a < groups.size(); ++a)
    for (size_t b = groups.size(); b-- > a + 1;)
      if (groups[a].pc == groups[b].pc && !groups[a].arrived && !groups[b].arrived) {
        groups[a].mask |= groups[b].mask;
        groups[a].blocked = false;
        groups.erase(groups.begin() + long(b));
      }
  w.current = 0;
  bool found = false;
  for (uint32_t g = 0; g < groups.size(); ++g)
    if (!groups[g].blocked && (!found || groups[g].pc < groups[w.current].pc)) {
      w.current = g;
      found = true;
    }
  return found;
}

void leave(Warp& w, uint32_t lanes) {
  check_bulk_at_exit(w, lanes);
  w.live &= ~lanes;
  Group& g = w.group();
  g.mask &= ~lanes;
  if (g.mask) {
    ++g.pc;
  } else {
    w.groups.erase(w.groups.begin() + w.current);
    w.current = 0;
  }
  w.cluster->notify();
  if (w.live == 0) {
    --w.cta->live_warps;
    if (w.cta->live_warps == 0) check_tensor_memory_at_exit(*w.cta);
  }
}

}  // namespace

uint32_t run_warp(Warp& w, uint32_t quantum, bool checks) {
  const Program& program = *w.program;
  uint32_t done = 0;
  while (done < quantum) {
    if (w.live == 0) break;
    if (w.groups.size() > 1) {
      if (!select_group(w)) break;
    } else if (w.groups[0].blocked) {
      break;
    }
    Group* g = &w.group();
    const uint32_t pc = g->pc;
    const Instr& i = program.code[pc];
    if (i.aligned && g->mask != w.live) {
      Wait wait{Wait::Kind::convergence};
      w.mask = g->mask;
      w.block(wait);
      continue;
    }
    uint32_t mask = g->mask;
    if (i.guard != NO_GUARD) {
      if (checks && (w.state[i.guard] & mask) != mask) {
        w.mask = mask;
        resolve_unready(w, i.guard);
      }
      mask &= i.guard_negated ? ~w.pred(i.guard) : w.pred(i.guard);
      if (mask == 0) {
        ++w.issued[pc];
        ++done;
        ++g->pc;
        if (w.trace) w.trace->step(pc, true);
        continue;
      }
    }
    w.mask = mask;
    if (checks && !i.moves) check_reads(w, i, mask);
    if (w.trace) w.cluster->trace->running = w.trace;
    const Step step = i.exec(w, i);
    if (step == Step::blocked) continue;
    if (w.trace) {
      if (i.acts) w.trace->count(w.tally);
      w.trace->step(pc, false);
    }
    ++done;
    ++w.issued[pc];
    ++w.executed[pc];
    if (i.acts && !w.unused_waits.empty()) {
      for (const uint32_t wait : w.unused_waits) w.cluster->launch->heard[wait].store(1, std::memory_order_relaxed);
      w.unused_waits.clear();
    }
    if (step == Step::next) {
      if (checks) {
        if (i.moves) move_state(w, i, mask); else mark_writes(w, i, mask);
      }
      ++w.group().pc;
    } else if (step == Step::exited) {
      leave(w, mask);
    }
  }
  return done;
}

}  // namespace emu
