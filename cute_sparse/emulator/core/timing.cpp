#include "timing.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <deque>
#include <limits>
#include <unordered_map>

#include "json.h"
#include "machine.h"

namespace emu {

namespace {

constexpr double NEVER = std::numeric_limits<double>::infinity();
constexpr uint32_t SCHEDULERS = 4;  // sub-partitions of an SM; warp w belongs to number w % 4
constexpr uint32_t WARPGROUP_ROWS = 64;

// ---------------------------------------------------------------------------------------------------------
// What an instruction costs, by its text

enum class Unit : uint8_t { none, issue, fma, alu, mufu, shared, global };
constexpr const char* UNIT_NAMES[] = {"none", "issue", "fma", "alu", "mufu", "shared", "global"};
constexpr size_t UNITS = 7;

enum class Act : uint8_t {
  plain, skip_ahead,  // skip_ahead: costs nothing, its result is there when its sources are
  wgmma, wgmma_commit, wgmma_wait,
  tensor_mma, tensor_commit, tensor_load, tensor_store, tensor_wait_load, tensor_wait_store,
  bulk_load, bulk_store, bulk_commit, bulk_wait, bulk_wait_read, late_arrival,
};

struct Cost {
  Act act = Act::plain;
  Unit unit = Unit::issue;
  double clocks = 0;      // of the unit (of one scheduler's, for fma, alu, mufu)
  double latency = 0;     // until a dependent instruction may issue
  bool ordered = false;   // keeps its place among the ordered ones
  bool boundary = false;  // nothing passes it in either direction
  bool exponential = false;
  // wgmma, tcgen05
  double macs = 0;        // of a warp
  double operand_bytes = 0;  // of shared memory that the operation reads
  double columns = 0;
  double rate = 1;        // against 16-bit operands
  uint64_t groups = 0;    // that a wait leaves
  bool grouped = false;   // a load that a wait for groups waits for: cp.async without .bulk
};

double setting(const Settings& s, const char* name) {
  const auto found = s.find(name);
  if (found == s.end())
    throw EmulatorError(ErrorKind::invalid_operand, std::string("the chip's settings lack ") + name);
  return found->second;
}

bool starts(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

// Operand width from ".bf16", ".f8f6f4" and the like: throughput against 16-bit operands.
double operand_rate(const std::string& opcode) {
  if (opcode.find("tf32") != std::string::npos) return 0.5;
  if (opcode.find("e4m3") != std::string::npos || opcode.find("e5m2") != std::string::npos ||
      opcode.find("f8f6f4") != std::string::npos || opcode.find("i8") != std::string::npos)
    return 2;
  return 1;
}

class Costs {
 public:
  Costs(const Program& program, const Settings& s) : program_(program), s_(s) {
    count_uses();
    of.reserve(program.code.size());
    for (size_t k = 0; k < program.code.size(); ++k) of.push_back(cost(k));
  }
  std::vector<Cost> of;  // by code index

 private:
  const Program& program_;
  const Settings& s_;
  std::vector<uint32_t> reads_, writes_, reader_;  // by slot; reader_: the code index that reads last

  double get(const char* name) const { return setting(s_, name); }
  const Statement& statement(size_t code) const { return program_.text->statements[program_.code[code].statement]; }

  void count_uses() {
    reads_.assign(program_.slots, 0);
    writes_.assign(program_.slots, 0);
    reader_.assign(program_.slots, 0);
    for (size_t k = 0; k + 1 < program_.code.size(); ++k) {
      const Instr& i = program_.code[k];
      const uint32_t* lists = program_.slot_lists.data();
      for (uint32_t r = 0; r < i.n_reads; ++r) {
        ++reads_[lists[i.reads + r]];
        reader_[lists[i.reads + r]] = uint32_t(k);
      }
      for (uint32_t r = 0; r < i.n_list; ++r) reads_[lists[i.list + r]] += 2;
      for (uint32_t r = 0; r < i.n_writes; ++r) ++writes_[lists[i.writes + r]];
    }
  }

  // mul.f32 (or f32x2) without a rounding mode, used once, by an add or sub without one: one fma.
  bool contracts(size_t code) const {
    const Instr& i = program_.code[code];
    const std::string& o = statement(code).opcode;
    if ((o != "mul.f32" && o != "mul.ftz.f32" && o != "mul.f32x2") || i.n_writes != 1) return false;
    const uint32_t slot = program_.slot_lists[i.writes];
    if (reads_[slot] != 1 || writes_[slot] != 1) return false;
    const std::string& user = statement(reader_[slot]).opcode;
    return user == "add.f32" || user == "sub.f32" || user == "add.ftz.f32" || user == "sub.ftz.f32" ||
           user == "add.f32x2" || user == "sub.f32x2";
  }

  Cost on(Unit unit, double clocks, double latency) const {
    Cost c;
    c.unit = unit;
    c.clocks = clocks;
    c.latency = latency;
    return c;
  }
  Cost arithmetic(const Statement& s) const {
    const std::string& m = s.mnemonic();
    const std::string& type = s.type();
    const double latency = get("alu_latency");
    const bool floating = type[0] == 'f' || starts(type, "bf16");
    if (type == "f32x2") return on(Unit::fma, 2 * LANES / get("fma_lanes"), latency);
    if (m == "max" || m == "min") return on(Unit::alu, LANES / get("alu_lanes"), latency);
    if (m == "div" || m == "rem" || (m == "rcp" && !s.has("approx")) || (m == "sqrt" && !s.has("approx")))
      return on(Unit::alu, 16 * LANES / get("alu_lanes"), 10 * latency);
    if (floating && (m == "add" || m == "sub" || m == "mul" || m == "fma"))
      return on(Unit::fma, LANES / get("fma_lanes"), latency);
    if (m == "mul" || m == "mad" || m == "dp2a" || m == "dp4a") {
      const double parts = type == "s64" || type == "u64" ? 4 : 1;
      return on(Unit::fma, parts * 2 * LANES / get("fma_lanes"), latency);
    }
    return on(Unit::alu, LANES / get("alu_lanes"), latency);
  }

  Cost wgmma(const Statement& s) const {
    Cost c;
    c.ordered = true;
    if (s.modifiers[1] == "commit_group") c.act = Act::wgmma_commit;
    if (s.modifiers[1] == "wait_group") {
      c.act = Act::wgmma_wait;
      c.boundary = true;
    }
    if (s.modifiers[1] != "mma_async") return c;
    c.act = Act::wgmma;
    unsigned n = 0, k = 0;
    std::sscanf(s.modifiers[4].c_str(), "m64n%uk%u", &n, &k);
    c.macs = double(WARPGROUP_ROWS) / 4 * n * k;
    c.rate = operand_rate(s.modifiers[6]);
    constexpr double ROW_BYTES = 32;  // of K, whatever the type
    c.operand_bytes = ROW_BYTES * n;
    if (s.operands[1].kind != Operand::Kind::vector) c.operand_bytes += ROW_BYTES * WARPGROUP_ROWS;
    return c;
  }

  Cost tensor(const Statement& s) const {
    Cost c;
    c.ordered = true;
    const std::string& what = s.modifiers[1];
    if (what == "mma" || what == "cp") {
      c.act = Act::tensor_mma;
      c.rate = operand_rate(s.opcode);
    } else if (what == "commit") {
      c.act = Act::tensor_commit;
    } else if (what == "ld" || what == "st") {
      c.act = what == "ld" ? Act::tensor_load : Act::tensor_store;
      const Operand& registers = what == "ld" ? s.operands[0] : s.operands.back();
      c.columns = registers.kind == Operand::Kind::vector ? double(registers.parts.size()) : 1;
    } else if (starts(what, "wait")) {
      c.act = what == "wait::ld" ? Act::tensor_wait_load : Act::tensor_wait_store;
      c.boundary = true;
    } else if (starts(what, "fence")) {
      c.unit = Unit::none;
    } else {
      c.latency = get("shared_latency");
    }
    return c;
  }

  Cost bulk(const Statement& s) const {
    Cost c;
    c.ordered = true;
    const std::string& o = s.opcode;
    if (o.find("commit_group") != std::string::npos) {
      c.act = Act::bulk_commit;
    } else if (o.find("wait_group") != std::string::npos || o.find("wait_all") != std::string::npos) {
      c.act = s.has("read") ? Act::bulk_wait_read : Act::bulk_wait;
      c.boundary = true;
    } else if (o.find("prefetch") != std::string::npos) {
      c.act = Act::plain;
    } else if (s.has("bulk_group")) {
      c.act = Act::bulk_store;
    } else {
      c.act = Act::bulk_load;
      c.grouped = !s.has("bulk");
    }
    return c;
  }

  Cost cost(size_t code) const {
    if (code + 1 == program_.code.size()) return boundary();
    const Statement& s = statement(code);
    const std::string& m = s.mnemonic();
    if (m == "mov" || m == "cvta" || (m == "ld" && s.has("param")) || contracts(code)) {
      Cost c;
      c.act = Act::skip_ahead;
      return c;
    }
    if (m == "wgmma") return with_groups(wgmma(s), code);
    if (m == "tcgen05") return tensor(s);
    if (m == "cp") return with_groups(bulk(s), code);
    if (m == "ex2" || m == "lg2" || m == "tanh" || m == "sin" || m == "cos" || m == "rsqrt" ||
        ((m == "rcp" || m == "sqrt") && s.has("approx"))) {
      const double packed = starts(s.type(), "f16x2") || starts(s.type(), "bf16x2") ? 2 : 1;
      Cost c = on(Unit::mufu, packed * LANES / get("mufu_lanes"), get("mufu_latency"));
      c.exponential = m == "ex2";
      return c;
    }
    if (m == "cvt") {
      const bool integer = s.type()[0] != 'f' && s.type()[0] != 'b' && s.type()[0] != 'e';
      return on(Unit::alu, integer && s.modifiers.size() == 3 ? 1 : LANES / get("alu_lanes"), get("alu_latency"));
    }
    if (m == "shfl") return on(Unit::shared, 1, get("shuffle_latency"));
    if (m == "bra" || m == "ret" || m == "exit" || m == "call" || m == "brx") return boundary();
    if (m == "bar" || m == "barrier") {
      Cost c;
      c.ordered = true;
      c.boundary = s.has("sync") || s.has("red") || s.has("wait");
      if (s.has("warp")) c.boundary = false;
      return c;
    }
    if (m == "setmaxnreg" || m == "griddepcontrol") return boundary();
    if (m == "clusterlaunchcontrol") {
      Cost c;
      c.ordered = true;
      if (s.has("try_cancel")) c.act = Act::late_arrival;
      return c;
    }
    if (m == "fence" || m == "membar") {
      Cost c;
      c.ordered = true;
      c.unit = Unit::issue;
      return c;
    }
    if (m == "mbarrier") {
      Cost c = on(Unit::shared, 1, get("barrier_latency"));
      c.ordered = true;
      return c;
    }
    if (m == "ld" || m == "st" || m == "atom" || m == "red" || m == "ldmatrix" || m == "stmatrix" || m == "prefetch" ||
        m == "multimem") {
      const bool global = s.has("global");
      Cost c = on(global ? Unit::global : Unit::shared, 1, get(global ? "global_latency" : "shared_latency"));
      c.ordered = true;
      return c;
    }
    return arithmetic(s);
  }

  Cost boundary() const {
    Cost c;
    c.ordered = c.boundary = true;
    return c;
  }
  Cost with_groups(Cost c, size_t code) const {
    c.groups = program_.code[code].imm;
    return c;
  }
};

// ---------------------------------------------------------------------------------------------------------
// The machine under way

// An instruction that waits for a phase.
struct Waiter {
  uint32_t warp, step;
  bool holds;    // the warp, not only those who read its predicate
  double since;
  const char* kind;
};

// A phase of a barrier: complete when everything that contributed to it in the trace has happened.
struct Phase {
  uint32_t due = 0;
  double time = 0;
  std::vector<Waiter> waiters;
};

struct PhaseKey {
  uint64_t barrier, phase;
  bool operator==(const PhaseKey& o) const { return barrier == o.barrier && phase == o.phase; }
};
struct PhaseHash {
  size_t operator()(const PhaseKey& k) const {
    return size_t(k.barrier * 0x9e3779b97f4a7c15ull ^ k.phase * 0xff51afd7ed558ccdull);
  }
};

// The instructions whose results a register waits for: a few, since moves and contracted multiplications pass theirs
// on.
struct Producers {
  static constexpr uint32_t MOST = 8;
  uint32_t count = 0;
  uint32_t of[MOST];  // steps
  void add(uint32_t step) {
    for (uint32_t k = 0; k < count; ++k)
      if (of[k] == step) return;
    if (count < MOST) of[count++] = step;
    else *std::min_element(of, of + MOST) = step;
  }
};

struct Entry {  // of a warp's window
  uint32_t step;
  const Cost* cost;
  std::vector<uint32_t> producers;  // steps whose results it waits for
};

struct BulkGroup { double done = 0, read = 0; };  // when it is complete, when its sources have been read

struct WarpRun {
  const WarpTrace* trace = nullptr;
  uint32_t index = 0, scheduler = 0, cta = 0;
  size_t next = 0;                   // step to enter the window
  std::vector<double> done;          // by step: when its result is there; NEVER: not known yet
  std::vector<bool> asynchronous;    // by step: a wgmma, whose accumulators the next wgmma does not wait for
  std::vector<Producers> writers;    // by slot
  std::deque<Entry> window;
  double wake = 0;                   // nothing can issue before
  bool held = false;                 // the window's first entry has been issued and holds the warp until `resume`
  double resume = 0;
  double end = 0;
  double wgmma_open = 0;             // when the wgmmas since the last commit are done
  std::deque<double> wgmma_groups;
  double loads = 0, stores = 0;      // tcgen05.ld, .st: when all so far are done
  BulkGroup bulk_open;
  std::vector<BulkGroup> bulk_groups;
  uint64_t issued = 0;
  std::array<double, UNITS> busy{};
  std::map<std::string, double> waits;
  std::map<uint32_t, double> lines;
  double burst_begin = -1, burst_end = -1;  // of exponentials, for the timeline

  bool ended() const { return next == trace->steps.size() && window.empty(); }
};

struct Sm {  // one CTA's
  std::array<std::array<double, UNITS>, SCHEDULERS> free{};  // when a scheduler's unit is free
  std::array<double, SCHEDULERS> tensor{}, tensor_memory{};  // wgmma runs in each sub-partition
  std::array<uint32_t, SCHEDULERS> turn{};
  double umma = 0;  // tcgen05 queue
  double shared = 0, global = 0, tma_in = 0, tma_out = 0, port = 0, hbm = 0;
  double tma_busy = 0, shared_busy = 0, tensor_busy = 0, fresh_bytes = 0;
};

struct Event {
  uint32_t cta;
  std::string track, name;
  double begin, end;
};

class Run {
 public:
  Run(const ClusterTrace& trace, const Settings& settings, bool events)
      : trace_(trace), s_(settings), costs_(*trace.program, settings), keeps_events_(events) {
    window_ = uint32_t(get("window"));
    mma_macs_ = get("mma_macs");
    shared_bytes_ = get("shared_bytes");
    l2_bytes_ = get("l2_bytes");
    port_bytes_ = get("port_bytes");
    hbm_bytes_ = get("hbm_bytes");
    arrive_latency_ = get("arrive_latency");
    barrier_latency_ = get("barrier_latency");
    commit_latency_ = get("commit_latency");
    skipped_boundary_.ordered = skipped_boundary_.boundary = true;
    fill_phases();
    for (const auto& w : trace.warps) {
      WarpRun run;
      run.trace = w.get();
      run.index = w->warp;
      run.scheduler = w->warp % SCHEDULERS;
      run.cta = w->cta_rank;
      run.done.assign(w->steps.size(), NEVER);
      run.asynchronous.assign(w->steps.size(), false);
      run.writers.resize(trace.program->slots);
      warps_.push_back(std::move(run));
      ctas_ = std::max(ctas_, w->cta_rank + 1);
    }
    sms_.resize(ctas_);
    by_scheduler_.resize(size_t(ctas_) * SCHEDULERS);
    for (uint32_t w = 0; w < warps_.size(); ++w)
      by_scheduler_[warps_[w].cta * SCHEDULERS + warps_[w].scheduler].push_back(w);
  }

  std::string run() {
    double now = 0;
    for (;;) {
      bool live = false;
      double next = NEVER;
      for (uint32_t k = 0; k < by_scheduler_.size(); ++k) issue_one(k, now);
      for (WarpRun& w : warps_) {
        if (w.ended()) continue;
        live = true;
        next = std::min(next, w.wake);
      }
      if (!live) break;
      if (next == NEVER)
        throw EmulatorError(ErrorKind::deadlock, "the traced order cannot be timed: every warp waits for another");
      now = std::max(now + 1, std::ceil(next));
    }
    return result();
  }

 private:
  const ClusterTrace& trace_;
  const Settings& s_;
  Costs costs_;
  bool keeps_events_;
  uint32_t window_ = 1, ctas_ = 0;
  double mma_macs_, shared_bytes_, l2_bytes_, port_bytes_, hbm_bytes_;
  double arrive_latency_, barrier_latency_, commit_latency_;
  std::vector<WarpRun> warps_;
  std::vector<Sm> sms_;
  std::vector<std::vector<uint32_t>> by_scheduler_;
  std::unordered_map<PhaseKey, uint64_t, PhaseHash> phase_ids_;
  std::vector<Phase> phases_;
  std::vector<Event> events_;
  double last_async_ = 0;

  double get(const char* name) const { return setting(s_, name); }

  uint64_t phase_id(const Note& note) {
    const auto [at, fresh] = phase_ids_.try_emplace(PhaseKey{note.barrier, note.phase}, phases_.size());
    if (fresh) phases_.emplace_back();
    return at->second;
  }
  void fill_phases() {
    for (const auto& w : trace_.warps)
      for (const Note& note : w->notes)
        if (note.kind == Note::Kind::arrive || note.kind == Note::Kind::sync) ++phases_[phase_id(note)].due;
  }

  // [first, last) of the notes of a step.
  std::pair<const Note*, const Note*> notes_of(const WarpRun& w, uint32_t step) const {
    const auto& steps = w.trace->steps;
    const size_t end = step + 1 < steps.size() ? steps[step + 1].notes : w.trace->notes.size();
    return {w.trace->notes.data() + steps[step].notes, w.trace->notes.data() + end};
  }

  // ---------------------------------------------------------------------------------------------------------
  // The window: what a warp may issue next

  void gather(WarpRun& w, Entry& e, const uint32_t* slots, uint32_t count, double now, bool of_wgmma) {
    for (uint32_t k = 0; k < count; ++k) {
      Producers& from = w.writers[slots[k]];
      for (uint32_t p = 0; p < from.count; ++p) {
        const uint32_t step = from.of[p];
        if (w.done[step] <= now || (of_wgmma && w.asynchronous[step])) continue;
        if (std::find(e.producers.begin(), e.producers.end(), step) == e.producers.end()) e.producers.push_back(step);
      }
    }
  }

  void pass_on(WarpRun& w, const Instr& i) {
    const uint32_t* lists = trace_.program->slot_lists.data();
    Producers from;
    for (uint32_t r = 0; r < i.n_reads; ++r) {
      const Producers& source = w.writers[lists[i.reads + r]];
      for (uint32_t p = 0; p < source.count; ++p) from.add(source.of[p]);
    }
    for (uint32_t r = 0; r < i.n_writes; ++r) w.writers[lists[i.writes + r]] = from;
  }

  void fill_window(WarpRun& w, double now) {
    while (w.next < w.trace->steps.size() && w.window.size() < window_) {
      if (!w.window.empty() && w.window.back().cost->boundary) return;
      const uint32_t step = uint32_t(w.next++);
      const TraceStep& traced = w.trace->steps[step];
      const Instr& i = trace_.program->code[traced.code];
      const Cost& cost = costs_.of[traced.code];
      if (cost.act == Act::skip_ahead) {
        if (!traced.skipped) pass_on(w, i);
        w.done[step] = 0;
        continue;
      }
      if (cost.unit == Unit::none) {
        w.done[step] = 0;
        continue;
      }
      Entry e{step, !traced.skipped ? &cost : cost.boundary ? &skipped_boundary_ : &skipped_, {}};
      const uint32_t* lists = trace_.program->slot_lists.data();
      const bool of_wgmma = cost.act == Act::wgmma;
      if (i.guard != NO_GUARD) gather(w, e, &i.guard, 1, now, false);
      if (traced.skipped) {
        w.window.push_back(std::move(e));
        continue;
      }
      gather(w, e, lists + i.reads, i.n_reads, now, of_wgmma);
      const bool list_is_read = cost.act != Act::tensor_load;
      if (list_is_read) gather(w, e, lists + i.list, i.n_list, now, of_wgmma);
      Producers self;
      self.add(step);
      for (uint32_t r = 0; r < i.n_writes; ++r) w.writers[lists[i.writes + r]] = self;
      if (cost.act == Act::tensor_load || cost.act == Act::wgmma)
        for (uint32_t r = 0; r < i.n_list; ++r) w.writers[lists[i.list + r]] = self;
      w.asynchronous[step] = of_wgmma;
      w.window.push_back(std::move(e));
    }
  }

  Cost skipped_, skipped_boundary_;  // a guarded instruction whose guard is false: its issue slot

  double sources_ready(const WarpRun& w, const Entry& e) const {
    double ready = 0;
    for (const uint32_t p : e.producers) ready = std::max(ready, w.done[p]);
    return ready;
  }

  double unit_free(const WarpRun& w, const Cost& cost) const {
    const Sm& sm = sms_[w.cta];
    constexpr double queue = 32;  // clocks of work that a shared unit takes in before it stalls the scheduler
    switch (cost.unit) {
      case Unit::fma: case Unit::alu: case Unit::mufu: return sm.free[w.scheduler][size_t(cost.unit)];
      case Unit::shared: return sm.shared - queue;
      case Unit::global: return sm.global - queue;
      default: break;
    }
    if (cost.act == Act::tensor_load || cost.act == Act::tensor_store) return sm.tensor_memory[w.scheduler] - queue;
    return 0;
  }

  void issue_one(uint32_t scheduler, double now) {
    auto& members = by_scheduler_[scheduler];
    uint32_t& turn = sms_[scheduler / SCHEDULERS].turn[scheduler % SCHEDULERS];
    for (uint32_t k = 0; k < members.size(); ++k) {
      const uint32_t at = uint32_t((turn + k) % members.size());
      WarpRun& w = warps_[members[at]];
      if (w.wake > now || w.ended()) continue;
      if (try_issue(w, now)) {
        turn = at;  // goes on with this warp as long as it can
        return;
      }
    }
    turn = uint32_t((turn + 1) % std::max<size_t>(1, members.size()));
  }

  // Issues one instruction, or sets `wake`.
  bool try_issue(WarpRun& w, double now) {
    if (w.held) {
      if (w.resume > now) {
        w.wake = w.resume;
        return false;
      }
      w.held = false;
      w.window.pop_front();
    }
    fill_window(w, now);
    double earliest = NEVER;
    bool ordered_before = false;
    for (size_t k = 0; k < w.window.size(); ++k) {
      const Entry& e = w.window[k];
      const Cost& cost = *e.cost;
      if (cost.boundary && k > 0) break;
      if (cost.ordered && ordered_before) continue;
      ordered_before |= cost.ordered;
      const double ready = std::max(sources_ready(w, e), unit_free(w, cost));
      if (ready > now) {
        earliest = std::min(earliest, ready);
        continue;
      }
      w.wake = now + 1;
      execute(w, e, now);
      if (!w.held) w.window.erase(w.window.begin() + long(k));
      return true;
    }
    w.wake = earliest;
    return false;
  }

  // ---------------------------------------------------------------------------------------------------------
  // Execution

  void execute(WarpRun& w, const Entry& e, double now) {
    const Cost& cost = *e.cost;
    Sm& sm = sms_[w.cta];
    ++w.issued;
    w.end = now + 1;
    w.done[e.step] = now + std::max(1.0, cost.latency);
    if (&cost == &skipped_ || &cost == &skipped_boundary_) return;
    double arrives = now + arrive_latency_;  // at the barriers that the instruction signals
    switch (cost.act) {
      case Act::plain: use_unit(w, sm, e, now); break;
      case Act::skip_ahead: break;
      case Act::wgmma: run_wgmma(w, sm, e, now); break;
      case Act::wgmma_commit:
        w.wgmma_groups.push_back(w.wgmma_open);
        w.wgmma_open = 0;
        break;
      case Act::wgmma_wait: {
        double until = now;
        for (; w.wgmma_groups.size() > cost.groups; w.wgmma_groups.pop_front())
          until = std::max(until, w.wgmma_groups.front());
        hold(w, e, now, until, "wgmma");
        break;
      }
      case Act::tensor_mma: run_umma(w, e, now); break;
      case Act::tensor_commit: arrives = std::max(now, sm.umma) + commit_latency_; break;
      case Act::tensor_load: case Act::tensor_store: move_tensor(w, sm, e, now); break;
      case Act::tensor_wait_load: hold(w, e, now, w.loads, "tensor memory"); break;
      case Act::tensor_wait_store: hold(w, e, now, w.stores, "tensor memory"); break;
      case Act::bulk_load: arrives = load_bulk(w, sm, e, now); break;
      case Act::bulk_store: store_bulk(w, sm, e, now); break;
      case Act::bulk_commit:
        w.bulk_groups.push_back(w.bulk_open);
        w.bulk_open = {};
        break;
      case Act::bulk_wait: case Act::bulk_wait_read: {
        double until = now;
        for (size_t k = 0; k + cost.groups < w.bulk_groups.size(); ++k)
          until = std::max(until, cost.act == Act::bulk_wait ? w.bulk_groups[k].done : w.bulk_groups[k].read);
        hold(w, e, now, until, "bulk group");
        break;
      }
      case Act::late_arrival: arrives = now + get("global_latency"); break;
    }
    last_async_ = std::max(last_async_, arrives);
    follow_notes(w, e, now, arrives);
  }

  double amount(const WarpRun& w, const Entry& e, std::initializer_list<Note::Kind> kinds) const {
    const auto [first, last] = notes_of(w, e.step);
    double sum = 0;
    for (const Note* note = first; note != last; ++note)
      if (std::find(kinds.begin(), kinds.end(), note->kind) != kinds.end()) sum += double(note->amount);
    return sum;
  }

  void use_unit(WarpRun& w, Sm& sm, const Entry& e, double now) {
    const Cost& cost = *e.cost;
    double clocks = cost.clocks;
    switch (cost.unit) {
      case Unit::fma: case Unit::alu: case Unit::mufu: {
        double& free = sm.free[w.scheduler][size_t(cost.unit)];
        free = std::max(now, free) + clocks;
        break;
      }
      case Unit::shared: {
        clocks = std::max(clocks, amount(w, e, {Note::Kind::shared_read, Note::Kind::shared_written}) / shared_bytes_);
        sm.shared = std::max(now, sm.shared) + clocks;
        sm.shared_busy += clocks;
        w.done[e.step] = sm.shared + cost.latency;
        break;
      }
      case Unit::global: {
        clocks = std::max(clocks, amount(w, e, {Note::Kind::global_read, Note::Kind::global_written}) / l2_bytes_);
        sm.global = std::max(now, sm.global) + clocks;
        w.done[e.step] = sm.global + cost.latency;
        break;
      }
      default: break;
    }
    w.busy[size_t(cost.unit)] += clocks;
    if (cost.exponential && keeps_events_) exponential(w, now, now + clocks);
  }

  // Exponentials that follow one another closely are one event.
  void exponential(WarpRun& w, double begin, double end) {
    constexpr double GAP = 32;
    if (w.burst_end >= 0 && begin > w.burst_end + GAP) {
      event(w.cta, warp_track(w), "exponentials", w.burst_begin, w.burst_end);
      w.burst_end = -1;
    }
    if (w.burst_end < 0) w.burst_begin = begin;
    w.burst_end = end;
  }

  // The warp's 16 rows, in its sub-partition's tensor core; the warpgroup's operands in shared memory come at the speed
  // of shared memory, to all four at once.
  void run_wgmma(WarpRun& w, Sm& sm, const Entry& e, double now) {
    const Cost& cost = *e.cost;
    const double clocks =
        std::max(cost.macs * SCHEDULERS / (mma_macs_ * cost.rate), cost.operand_bytes / shared_bytes_);
    double& tensor = sm.tensor[w.scheduler];
    const double begin = std::max(now, tensor);
    tensor = begin + clocks;
    sm.tensor_busy += clocks / SCHEDULERS;
    w.wgmma_open = std::max(w.wgmma_open, tensor + get("wgmma_latency"));
    w.done[e.step] = w.wgmma_open;
    if (w.scheduler == 0) event(w.cta, "tensor core", "wgmma from warp " + std::to_string(w.index), begin, tensor);
  }

  void run_umma(WarpRun& w, const Entry& e, double now) {
    const auto [first, last] = notes_of(w, e.step);
    double macs = 0, bytes = 0;
    for (const Note* note = first; note != last; ++note)
      if (note->kind == Note::Kind::mma) {
        macs += double(note->amount);
        bytes += double(note->phase);
      }
    const bool pair = statement(w, e.step).has("cta_group::2");
    const uint32_t begin_cta = pair ? w.cta & ~1u : w.cta, end_cta = begin_cta + (pair ? 2 : 1);
    const double clocks = std::max(macs / (mma_macs_ * e.cost->rate * (pair ? 2 : 1)), bytes / shared_bytes_);
    double begin = now;
    for (uint32_t c = begin_cta; c < end_cta; ++c) begin = std::max(begin, sms_[c].umma);
    for (uint32_t c = begin_cta; c < end_cta; ++c) {
      sms_[c].umma = begin + clocks;
      sms_[c].tensor_busy += clocks;
      event(c, "tensor core", "tcgen05.mma", begin, begin + clocks);
    }
  }

  // tcgen05.ld and .st: each sub-partition moves its 32 lanes, some columns a clock.
  void move_tensor(WarpRun& w, Sm& sm, const Entry& e, double now) {
    const bool load = e.cost->act == Act::tensor_load;
    double& port = sm.tensor_memory[w.scheduler];
    port = std::max(now, port) + e.cost->columns / get(load ? "tensor_load_columns" : "tensor_store_columns");
    const double done = port + get("tensor_memory_latency");
    double& all = load ? w.loads : w.stores;
    all = std::max(all, done);
    if (load) w.done[e.step] = done;
  }

  // L2 serves a load once, at the pace of whoever asks; every CTA that it reaches takes all of it in. What the launch
  // has not loaded before comes from memory, in a queue of its own, if the chip is said to have one (`hbm_bytes`).
  double load_bulk(WarpRun& w, Sm& sm, const Entry& e, double now) {
    const double bytes = amount(w, e, {Note::Kind::loaded, Note::Kind::global_read});
    const double begin = std::max(now, sm.tma_in), clocks = bytes / l2_bytes_;
    sm.tma_in = begin + clocks;
    sm.tma_busy += clocks;
    double there = sm.tma_in;
    const auto [first, last] = notes_of(w, e.step);
    for (const Note* note = first; note != last; ++note) {
      if (note->kind != Note::Kind::received) continue;
      double& port = sms_[note->phase].port;
      port = std::max(now, port) + double(note->amount) / port_bytes_;
      there = std::max(there, port);
    }
    double latency = get("tma_latency");
    const double fresh = amount(w, e, {Note::Kind::fresh});
    sm.fresh_bytes += fresh;
    if (hbm_bytes_ > 0 && fresh > 0) {
      sm.hbm = std::max(now, sm.hbm) + fresh / hbm_bytes_;
      there = std::max(there, sm.hbm);
      latency += get("hbm_latency");
    }
    const double done = there + latency;
    if (e.cost->grouped) w.bulk_open.done = w.bulk_open.read = std::max(w.bulk_open.done, done);
    event(w.cta, "TMA loads", "load", now, done);
    return done;
  }

  void store_bulk(WarpRun& w, Sm& sm, const Entry& e, double now) {
    const double begin = std::max(now, sm.tma_out), clocks = amount(w, e, {Note::Kind::stored}) / l2_bytes_;
    sm.tma_out = begin + clocks;
    sm.tma_busy += clocks;
    w.bulk_open.read = std::max(w.bulk_open.read, sm.tma_out + get("shared_latency"));
    w.bulk_open.done = std::max(w.bulk_open.done, sm.tma_out + get("tma_latency"));
    last_async_ = std::max(last_async_, w.bulk_open.done);
    event(w.cta, "TMA stores", "store", now, w.bulk_open.done);
  }

  // ---------------------------------------------------------------------------------------------------------
  // Waiting

  // The barriers that the instruction signals, and those that it waits for. try_wait makes a predicate; the others hold
  // the warp.
  void follow_notes(WarpRun& w, const Entry& e, double now, double arrives) {
    const auto [first, last] = notes_of(w, e.step);
    for (const Note* note = first; note != last; ++note) {
      const bool arrival = note->kind == Note::Kind::arrive || note->kind == Note::Kind::sync;
      const bool waits = note->kind == Note::Kind::wait || note->kind == Note::Kind::sync;
      if (!arrival && !waits) continue;
      const uint64_t id = phase_id(*note);
      if (arrival) contribute(id, arrives);
      if (!waits) continue;
      const Waiter waiter{uint32_t(&w - warps_.data()), e.step, e.cost->boundary, now,
                          note->kind == Note::Kind::sync ? "bar.sync" : e.cost->boundary ? "cluster" : "mbarrier"};
      if (e.cost->boundary) {
        w.held = true;
        w.resume = w.wake = NEVER;
      } else {
        w.done[e.step] = NEVER;
      }
      if (phases_[id].due == 0) resolve(waiter, phases_[id].time); else phases_[id].waiters.push_back(waiter);
    }
  }

  void contribute(uint64_t id, double time) {
    Phase& phase = phases_[id];
    phase.time = std::max(phase.time, time);
    if (phase.due == 0 || --phase.due) return;
    for (const Waiter& waiter : phase.waiters) resolve(waiter, phase.time);
    phase.waiters.clear();
  }

  void resolve(const Waiter& waiter, double phase_time) {
    WarpRun& w = warps_[waiter.warp];
    const double soonest = waiter.since + barrier_latency_;
    const double time = std::max(soonest, phase_time);
    if (waiter.holds) {
      w.resume = w.wake = time;
    } else {
      w.done[waiter.step] = time;
      w.wake = std::min(w.wake, time);
    }
    account_wait(w, waiter.step, waiter.kind, waiter.since, time, soonest);
  }

  void hold(WarpRun& w, const Entry& e, double now, double until, const char* kind) {
    w.held = true;
    w.resume = w.wake = std::max(now + 1, until);
    account_wait(w, e.step, kind, now, w.resume, now + 1);
  }

  void account_wait(WarpRun& w, uint32_t step, const char* kind, double since, double until, double soonest) {
    if (until <= soonest) return;
    w.waits[kind] += until - soonest;
    const uint32_t line = statement(w, step).line;
    w.lines[line] += until - soonest;
    if (keeps_events_)
      event(w.cta, warp_track(w), "wait: " + std::string(kind) + ", PTX line " + std::to_string(line), since, until);
  }

  // ---------------------------------------------------------------------------------------------------------
  // Results

  const Statement& statement(const WarpRun& w, uint32_t step) const {
    const Program& program = *trace_.program;
    return program.text->statements[program.code[w.trace->steps[step].code].statement];
  }

  static std::string warp_track(const WarpRun& w) { return "warp " + std::to_string(w.index); }

  void event(uint32_t cta, const std::string& track, const std::string& name, double begin, double end) {
    if (keeps_events_ && end > begin) events_.push_back({cta, track, name, begin, end});
  }

  std::string result() {
    double cycles = last_async_;
    for (const WarpRun& w : warps_) cycles = std::max(cycles, w.end);
    for (WarpRun& w : warps_)
      if (w.burst_end >= 0) event(w.cta, warp_track(w), "exponentials", w.burst_begin, w.burst_end);
    Json json;
    json.begin('{').key("cycles").real(cycles).key("ctas").begin('[');
    for (uint32_t cta = 0; cta < sms_.size(); ++cta) write_cta(json, cta);
    json.end(']').key("events").begin('[');
    for (const Event& e : events_)
      json.begin('[').number(e.cta).string(e.track).string(e.name).real(e.begin).real(e.end).end(']');
    json.end(']').end('}');
    return json.text;
  }

  void write_cta(Json& json, uint32_t cta) {
    const Sm& sm = sms_[cta];
    json.begin('{').key("tensor").real(sm.tensor_busy).key("tma").real(sm.tma_busy);
    json.key("shared").real(sm.shared_busy).key("fresh_bytes").real(sm.fresh_bytes).key("warps").begin('[');
    for (const WarpRun& w : warps_) {
      if (w.cta != cta) continue;
      json.begin('{').key("warp").number(w.index).key("end").real(w.end).key("issued").number(int64_t(w.issued));
      json.key("units").begin('{');
      for (size_t u = 0; u < UNITS; ++u)
        if (w.busy[u] > 0) json.key(UNIT_NAMES[u]).real(w.busy[u]);
      json.end('}').key("waits").begin('{');
      for (const auto& [kind, clocks] : w.waits) json.key(kind).real(clocks);
      json.end('}').key("lines").begin('{');
      for (const auto& [line, clocks] : w.lines) json.key(std::to_string(line)).real(clocks);
      json.end('}').end('}');
    }
    json.end(']').end('}');
  }
};

}  // namespace

std::string estimate(const ClusterTrace& trace, const Settings& settings, bool events) {
  return Run(trace, settings, events).run();
}

}  // namespace emu
