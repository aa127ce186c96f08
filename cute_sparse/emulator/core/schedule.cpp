// Clusters: their creation, the asynchronous operations between their warps, the order in which all of it happens;
// and launches, which run clusters on host threads.
#include <algorithm>
#include <chrono>
#include <thread>

#include "interpreter.h"
#include "machine.h"
#include "spaces.h"

namespace emu {

std::string describe_wait(const Cta& cta, const Wait& wait);  // barrier.cpp

// ---------------------------------------------------------------------------------------------------------
// Asynchronous operations

namespace {

// The operation at `index` may complete now: nothing older of its queue is pending.
bool eligible(const Cluster& cluster, size_t index) {
  const uint64_t queue = cluster.pending[index]->queue;
  if (queue == 0) return true;
  for (size_t k = 0; k < index; ++k)
    if (cluster.pending[k]->queue == queue) return false;
  return true;
}

void complete_at(Cluster& cluster, size_t index) {
  std::unique_ptr<AsyncOp> op = std::move(cluster.pending[index]);
  cluster.pending.erase(cluster.pending.begin() + long(index));
  if (op->queue) --cluster.queue_length[op->queue];
  cluster.completing = op->statement;
  op->complete(cluster);
  cluster.notify();
}

// Late: the youngest operation that may complete, so that unordered ones come in the reverse of program order.
void complete_youngest(Cluster& cluster) {
  for (size_t k = cluster.pending.size(); k-- > 0;)
    if (eligible(cluster, k)) return complete_at(cluster, k);
}

void complete_random(Cluster& cluster) {
  std::vector<size_t> choices;
  for (size_t k = 0; k < cluster.pending.size(); ++k)
    if (eligible(cluster, k)) choices.push_back(k);
  complete_at(cluster, choices[cluster.random() % choices.size()]);
}

}  // namespace

void Cluster::issue(std::unique_ptr<AsyncOp> op) {
  if (launch->device->order == Order::eager && (op->queue == 0 || queue_length[op->queue] == 0)) {
    completing = op->statement;
    op->complete(*this);
    notify();
    return;
  }
  if (op->queue) ++queue_length[op->queue];
  pending.push_back(std::move(op));
}

void Cluster::drain(uint64_t queue, uint32_t remaining) {
  uint32_t left = queue_length[queue];
  for (size_t k = 0; left > remaining && k < pending.size();) {
    if (pending[k]->queue != queue) { ++k; continue; }
    complete_at(*this, k);
    --left;
    k = 0;  // completing may have changed the list
  }
}

Cta& Cluster::cta_of(uint32_t shared_address, const Warp* warp) {
  const uint32_t rank = shared_address >> SHARED_RANK_SHIFT;
  if (rank >= ctas.size()) {
    const std::string message = "shared address names CTA rank " + std::to_string(rank) + " of a cluster of " +
                                std::to_string(ctas.size());
    if (warp) warp->fail(ErrorKind::out_of_bounds, message);
    throw EmulatorError(ErrorKind::out_of_bounds, message);
  }
  return *ctas[rank];
}

// ---------------------------------------------------------------------------------------------------------
// Creation

namespace {

struct RegisterFile {  // of one warp; kept between clusters, so that large files are not allocated anew
  std::unique_ptr<uint32_t[]> words;
  std::vector<uint64_t> state;
};

// What a host thread adds up over the clusters it runs.
struct Totals {
  std::vector<LaunchRecord::Role> roles;
};

uint64_t special_value(const Warp& w, const std::string& name, uint32_t lane) {
  const Launch& launch = *w.cluster->launch;
  const LaunchConfig& c = launch.config;
  const Cta& cta = *w.cta;
  const uint32_t thread = w.index * LANES + lane;
  const uint32_t grid[3] = {c.grid.x, c.grid.y, c.grid.z}, block[3] = {c.block.x, c.block.y, c.block.z};
  const uint32_t cluster[3] = {c.cluster.x, c.cluster.y, c.cluster.z};
  const uint32_t tid[3] = {thread % block[0], thread / block[0] % block[1], thread / block[0] / block[1]};
  const int axis = name.back() == 'y' ? 1 : name.back() == 'z' ? 2 : 0;
  const std::string stem = name.size() > 2 && name[name.size() - 2] == '.' ? name.substr(0, name.size() - 2) : name;
  if (stem == "%tid") return tid[axis];
  if (stem == "%ntid") return block[axis];
  if (stem == "%ctaid") return cta.ctaid[axis];
  if (stem == "%nctaid") return grid[axis];
  if (stem == "%clusterid") return cta.ctaid[axis] / cluster[axis];
  if (stem == "%nclusterid") return grid[axis] / cluster[axis];
  if (stem == "%cluster_ctaid") return cta.ctaid[axis] % cluster[axis];
  if (stem == "%cluster_nctaid") return cluster[axis];
  if (name == "%cluster_ctarank") return cta.rank;
  if (name == "%cluster_nctarank") return c.cluster.count();
  if (name == "%is_explicit_cluster") return c.cluster.count() > 1;
  if (name == "%laneid") return lane;
  if (name == "%warpid") return w.index;
  if (name == "%nwarpid") return 64;
  if (name == "%smid") return cta.linear % launch.device->sms;
  if (name == "%nsmid") return launch.device->sms;
  if (name == "%gridid") return 1;
  if (name == "%lanemask_eq") return 1u << lane;
  if (name == "%lanemask_lt") return (1u << lane) - 1;
  if (name == "%lanemask_le") return lane == 31 ? ALL_LANES : (1u << (lane + 1)) - 1;
  if (name == "%lanemask_gt") return lane == 31 ? 0 : ~((1u << (lane + 1)) - 1);
  if (name == "%lanemask_ge") return ~((1u << lane) - 1);
  if (name == "%dynamic_smem_size") return c.dynamic_shared_bytes;
  if (name == "%total_smem_size" || name == "%aggr_smem_size") return cta.shared_bytes;
  throw EmulatorError(ErrorKind::unknown_opcode, "special register " + name);
}

uint64_t variable_value(const Warp& w, const std::string& name) {  // "@shared:64+8", see program.cpp
  const size_t colon = name.find(':'), plus = name.find('+');
  uint64_t value = std::stoull(name.substr(colon + 1));
  const uint64_t extra = plus == std::string::npos ? 0 : uint64_t(std::stoll(name.substr(plus + 1)));
  if (name.rfind("@param", 0) == 0) return uint64_t(w.cluster->launch->parameters) + value + extra;
  if (name.rfind("@local", 0) == 0) return LOCAL_WINDOW + value + extra;
  if (value == UINT32_MAX) value = w.program->text->static_shared_bytes;  // extern: behind the static variables
  return (uint64_t(w.cta->rank) << SHARED_RANK_SHIFT) + SHARED_BASE + value + extra;
}

void fill_constants(Warp& w) {
  for (const auto& c : w.program->constants) {
    if (c.wide) std::fill_n(w.u64(c.slot), LANES, c.bits); else std::fill_n(w.u32(c.slot), LANES, uint32_t(c.bits));
    w.state[c.slot] = slot_state::WRITTEN;
  }
  for (const auto& s : w.program->specials) {
    std::string name = s.name;
    const size_t slash = name.find('/');
    const bool narrow = slash != std::string::npos;
    if (narrow) name.resize(slash);
    for (uint32_t lane = 0; lane < LANES; ++lane) {
      const uint64_t value = name[0] == '@' ? variable_value(w, name) : special_value(w, name, lane);
      if (narrow) w.u32(s.slot)[lane] = uint32_t(value); else w.u64(s.slot)[lane] = value;
    }
    w.state[s.slot] = slot_state::WRITTEN;
  }
}

uint32_t live_lanes(const LaunchConfig& c, uint32_t warp) {
  const uint64_t threads = c.block.count();
  const uint64_t begin = uint64_t(warp) * LANES;
  return threads >= begin + LANES ? ALL_LANES : (1u << (threads - begin)) - 1;
}

constexpr uint32_t TENSOR_GRANULES = 8 * 512;  // 16 lanes x 1 column each

class Resident {  // a cluster and the memory that it runs in
 public:
  Resident(Launch& launch, Totals& totals) : launch_(launch), totals_(totals) {}

  void start(uint64_t index) {
    cluster_ = std::make_unique<Cluster>();
    timed_out_at_event_ = UINT64_MAX;
    Cluster& cluster = *cluster_;
    cluster.launch = &launch_;
    cluster.index = index;
    cluster.random.seed(launch_.device->seed * 0x9e3779b97f4a7c15ull + index);
    cluster.race.enabled = launch_.device->checks;
    if (launch_.device->tracer && launch_.device->tracer->wants(index)) start_trace(index);
    const LaunchConfig& c = launch_.config;
    const uint32_t per_cta = uint32_t((c.block.count() + LANES - 1) / LANES);
    const uint32_t cluster_size = uint32_t(c.cluster.count());
    files_.resize(size_t(per_cta) * cluster_size);
    cluster.cluster_barrier.expected_threads = uint32_t(c.block.count()) * cluster_size;
    const Dim3 clusters{c.grid.x / c.cluster.x, c.grid.y / c.cluster.y, c.grid.z / c.cluster.z};
    const uint32_t at[3] = {uint32_t(index % clusters.x), uint32_t(index / clusters.x % clusters.y),
                            uint32_t(index / clusters.x / clusters.y)};
    for (uint32_t rank = 0; rank < cluster_size; ++rank) {
      auto cta = std::make_unique<Cta>();
      cta->cluster = &cluster;
      cta->rank = rank;
      cta->ctaid[0] = at[0] * c.cluster.x + rank % c.cluster.x;
      cta->ctaid[1] = at[1] * c.cluster.y + rank / c.cluster.x % c.cluster.y;
      cta->ctaid[2] = at[2] * c.cluster.z + rank / c.cluster.x / c.cluster.y;
      cta->linear = cta->ctaid[0] + uint64_t(c.grid.x) * (cta->ctaid[1] + uint64_t(c.grid.y) * cta->ctaid[2]);
      cta->shared_bytes = launch_.program->text->static_shared_bytes + c.dynamic_shared_bytes;
      cta->shared.assign(SHARED_BASE + (cta->shared_bytes + 127) / 128 * 128, 0xff);
      cta->shared_shadow = std::make_unique<Shadow>(cluster.race, cta->shared.size() / SHARED_GRANULE_BYTES);
      cta->tensor_shadow = std::make_unique<Shadow>(cluster.race, TENSOR_GRANULES);
      cta->warps.resize(per_cta);
      cta->live_warps = per_cta;
      for (uint32_t w = 0; w < per_cta; ++w) start_warp(*cta, w, files_[size_t(rank) * per_cta + w]);
      cluster.ctas.push_back(std::move(cta));
    }
    for (auto& cta : cluster.ctas)
      for (Warp& w : cta->warps) warps_.push_back(&w);
  }

  // Runs until the cluster ends (true), or has spun for a long time without any event (false: others may go on).
  bool run() {
    Cluster& cluster = *cluster_;
    const Device& device = *launch_.device;
    uint64_t quiet = 0, last_event = cluster.events;
    while (!warps_.empty()) {
      if (launch_.failed.load(std::memory_order_relaxed)) return true;
      const uint64_t done = round();
      account(done);
      if (device.order == Order::random && !cluster.pending.empty() && cluster.random() % 2) complete_random(cluster);
      if (done == 0) {
        if (!cluster.pending.empty()) {
          if (device.order == Order::random) complete_random(cluster); else complete_youngest(cluster);
        } else if (!warps_.empty()) {
          time_out_or_fail();
        }
      }
      if (cluster.events != last_event) { last_event = cluster.events; quiet = 0; }
      quiet += done;
      if (quiet > 20000 && !cluster.pending.empty()) {  // warps poll for what only time can bring
        complete_youngest(cluster);
        quiet = 0;
      }
      if (quiet > 400000) return false;
    }
    while (!cluster.pending.empty()) complete_youngest(cluster);
    finish();
    return true;
  }

 private:
  Launch& launch_;
  Totals& totals_;
  std::unique_ptr<Cluster> cluster_;
  std::vector<RegisterFile> files_;
  std::vector<Warp*> warps_;  // not yet ended
  uint64_t timed_out_at_event_ = UINT64_MAX;

  void start_warp(Cta& cta, uint32_t index, RegisterFile& file) {
    Warp& w = cta.warps[index];
    const Program& program = *launch_.program;
    w.cluster = cta.cluster;
    w.cta = &cta;
    w.program = &program;
    w.index = index;
    w.live = live_lanes(launch_.config, index);
    if (!file.words) {
      file.words.reset(new uint32_t[size_t(program.slots) * LANES + 8]);
      file.state.resize(program.slots);
    }
    std::fill(file.state.begin(), file.state.end(), 0);
    w.regs = reinterpret_cast<uint32_t*>((uintptr_t(file.words.get()) + 31) / 32 * 32);
    w.state = file.state.data();
    w.groups.push_back(Group{0, w.live});
    w.actor = cta.cluster->race.new_actor();
    w.clock.know(w.actor, 1);
    w.issued = totals_.roles[index].issued.data();
    w.executed = totals_.roles[index].executed.data();
    if (cta.cluster->trace) {
      auto& warps = cta.cluster->trace->warps;
      warps.push_back(std::make_unique<WarpTrace>());
      w.trace = warps.back().get();
      w.trace->cta_rank = cta.rank;
      w.trace->warp = index;
    }
    fill_constants(w);
  }

  void start_trace(uint64_t index) {
    cluster_->trace = std::make_shared<ClusterTrace>();
    cluster_->trace->cluster = index;
    cluster_->trace->program = launch_.program;
  }

  // One turn for every warp that may have something to do; returns the number of instructions executed.
  uint64_t round() {
    Cluster& cluster = *cluster_;
    const Device& device = *launch_.device;
    const bool random = device.order == Order::random;
    if (random) std::shuffle(warps_.begin(), warps_.end(), cluster.random);
    uint64_t done = 0;
    for (size_t k = 0; k < warps_.size(); ++k) {
      Warp& w = *warps_[k];
      const uint32_t quantum = random ? 1 + uint32_t(cluster.random() % 128) : 512;
      if (w.seen_event == cluster.events) continue;  // still blocked, and nothing has happened since
      for (Group& g : w.groups) g.blocked = false;
      const uint64_t event = cluster.events;
      const uint32_t executed = run_warp(w, quantum, device.checks);
      w.seen_event = executed == quantum ? UINT64_MAX : event;
      done += executed;
      if (random && !cluster.pending.empty() && cluster.random() % 4 == 0) complete_random(cluster);
    }
    warps_.erase(std::remove_if(warps_.begin(), warps_.end(), [](Warp* w) { return w->live == 0; }), warps_.end());
    return done;
  }

  void account(uint64_t done) {
    const uint64_t limit = launch_.device->max_warp_instructions;
    const uint64_t total = launch_.instructions.fetch_add(done) + done;
    if (limit && total > limit)
      throw EmulatorError(ErrorKind::timeout, "the launch executed more than " + std::to_string(limit) +
                                                  " warp instructions:" + describe_all());
  }

  // Nothing can move: try_wait gives up once, as hardware does after a time; if that moved nothing, it is a deadlock.
  void time_out_or_fail() {
    bool any = false;
    if (timed_out_at_event_ != cluster_->events) {
      timed_out_at_event_ = cluster_->events;
      for (Warp* w : warps_)
        for (Group& g : w->groups)
          if (g.wait.may_time_out) {
            any = g.timed_out = true;
            w->seen_event = UINT64_MAX;
          }
    }
    if (!any) throw_deadlock();
  }

  std::string describe_all() const {
    std::string text;
    for (const Warp* w : warps_)
      for (const Group& g : w->groups) {
        const Statement& s = launch_.program->text->statements[launch_.program->code[g.pc].statement];
        text += "\n  CTA " + std::to_string(w->cta->linear) + " warp " + std::to_string(w->index) + ", PTX line " +
                std::to_string(s.line) + ": " + s.text + (s.source.empty() ? "" : " (" + s.source + ")");
        if (g.wait.kind != Wait::Kind::none) text += "\n    waits for " + describe_wait(*w->cta, g.wait);
      }
    return text;
  }

  [[noreturn]] void throw_deadlock() const {
    const Warp& first = *warps_.front();
    const bool converging = std::all_of(warps_.begin(), warps_.end(), [](const Warp* w) {
      return std::any_of(w->groups.begin(), w->groups.end(),
                         [](const Group& g) { return g.wait.kind == Wait::Kind::convergence; });
    });
    throw EmulatorError(converging ? ErrorKind::convergence : ErrorKind::deadlock,
                        "every warp is blocked:" + describe_all(), first.site());
  }

  // Every copy has arrived and every warp has ended: bytes that came unannounced let some phase complete without its
  // data. (Bytes announced that never come are harmless at the end: FlashAttention-4 announces a tile beyond its last.)
  void check_transactions(const Cta& cta) const {
    for (const auto& [offset, barrier] : cta.mbarriers)
      if (barrier.initialised && barrier.tx_bytes < 0) {
        Site site;
        site.kernel = launch_.program->text->name;
        site.cta = int64_t(cta.linear);
        throw EmulatorError(ErrorKind::barrier, "the CTA has ended, and on its mbarrier at offset " +
                                                    std::to_string(offset) + " " + std::to_string(-barrier.tx_bytes) +
                                                    " bytes arrived that were never expected", site);
      }
  }

  void finish() {
    for (auto& cta : cluster_->ctas) check_transactions(*cta);
    for (auto& cta : cluster_->ctas)
      for (Warp& w : cta->warps) totals_.roles[w.index].tally += w.tally;
    if (cluster_->trace) {
      std::lock_guard<std::mutex> lock(launch_.traces_mutex);
      launch_.traces.push_back(cluster_->trace);
    }
    cluster_.reset();
  }
};

// ---------------------------------------------------------------------------------------------------------
// Launch

void check_launch(const Device& device, const KernelText& text, const LaunchConfig& c) {
  auto refuse = [&](const std::string& why) {
    Site site;
    site.kernel = text.name;
    throw EmulatorError(ErrorKind::bad_launch, why, site);
  };
  const uint32_t grid[3] = {c.grid.x, c.grid.y, c.grid.z}, block[3] = {c.block.x, c.block.y, c.block.z};
  const uint32_t cluster[3] = {c.cluster.x, c.cluster.y, c.cluster.z};
  if (c.grid.count() == 0) refuse("the grid is empty");
  if (c.block.count() == 0 || c.block.count() > 1024)
    refuse("a block of " + std::to_string(c.block.count()) + " threads; the device runs 1 to 1024");
  if (c.grid.y > 65535 || c.grid.z > 65535) refuse("grid.y and grid.z are at most 65535");
  for (int a = 0; a < 3; ++a) {
    if (cluster[a] == 0 || grid[a] % cluster[a])
      refuse("the cluster does not divide the grid along axis " + std::to_string(a));
    if (text.reqntid[a] && text.reqntid[a] != block[a]) refuse("the kernel requires another block size (.reqntid)");
    if (text.reqnctapercluster[a] && text.reqnctapercluster[a] != cluster[a])
      refuse("the kernel requires another cluster size (.reqnctapercluster)");
  }
  if (c.cluster.count() > 16) refuse("a cluster of " + std::to_string(c.cluster.count()) + " CTAs; at most 16");
  const uint32_t shared = text.static_shared_bytes + c.dynamic_shared_bytes;
  if (shared > 232448)
    refuse(std::to_string(shared) + " bytes of shared memory per CTA; " + device.arch + " has 232448");
}

void copy_parameters(Launch& launch, void** arguments) {
  const KernelText& text = *launch.program->text;
  constexpr size_t ALIGN = 128;  // of a tensor map, the most demanding parameter
  launch.parameter_storage.resize(text.parameter_bytes + 2 * ALIGN);
  launch.parameters = reinterpret_cast<uint8_t*>(
      (uintptr_t(launch.parameter_storage.data()) + ALIGN - 1) / ALIGN * ALIGN);
  uint32_t index = 0;
  for (const Parameter& p : text.parameters)
    std::memcpy(launch.parameters + p.offset, arguments[index++], p.bytes);
}

void merge(LaunchRecord& record, const Totals& totals) {
  for (size_t r = 0; r < totals.roles.size(); ++r) {
    LaunchRecord::Role& into = record.roles[r];
    const LaunchRecord::Role& from = totals.roles[r];
    for (size_t k = 0; k < from.issued.size(); ++k) {
      into.issued[k] += from.issued[k];
      into.executed[k] += from.executed[k];
      record.warp_instructions += from.issued[k];
    }
    into.tally += from.tally;
  }
}

// Executed or not, they have not made a difference (Launch::heard).
std::vector<uint32_t> unheard_statements(const Launch& launch) {
  static const std::vector<std::string> heard_of = {
      "mbarrier.try_wait", "mbarrier.test_wait", "mbarrier.arrive", "mbarrier.expect_tx", "tcgen05.commit",
      "wgmma.fence", "bar.warp.sync", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group"};
  std::vector<uint32_t> found;
  const auto& statements = launch.program->text->statements;
  for (uint32_t k = 0; k < statements.size(); ++k)
    if (!launch.heard[k] && std::any_of(heard_of.begin(), heard_of.end(), [&](const std::string& prefix) {
          return statements[k].opcode.compare(0, prefix.size(), prefix) == 0;
        }))
      found.push_back(k);
  return found;
}

// One host thread: starts clusters, and keeps those that spin on others' progress until all are done.
void run_thread(Launch& launch, Totals& totals, uint32_t resident_limit) {
  std::vector<std::unique_ptr<Resident>> waiting;
  std::unique_ptr<Resident> fresh;
  for (;;) {
    if (launch.failed) return;
    bool started = false;
    if (waiting.size() < resident_limit) {
      const uint64_t index = launch.next_cluster.fetch_add(1);
      if (index < launch.clusters) {
        if (!fresh) fresh = std::make_unique<Resident>(launch, totals);
        fresh->start(index);
        started = true;
        if (!fresh->run()) waiting.push_back(std::move(fresh));
      }
    }
    if (!started && waiting.empty()) return;
    for (size_t k = waiting.size(); k-- > 0;)
      if (waiting[k]->run()) waiting.erase(waiting.begin() + long(k));
  }
}

}  // namespace

LaunchRecord run_launch(Device& device, const std::shared_ptr<Module>& module, const std::string& kernel,
                        const LaunchConfig& config, void** arguments) {
  const auto found = module->programs.find(kernel);
  if (found == module->programs.end())
    throw EmulatorError(ErrorKind::bad_launch, "the module has no kernel '" + kernel + "'");
  Launch launch;
  launch.device = &device;
  launch.program = found->second;
  launch.config = config;
  check_launch(device, *launch.program->text, config);
  if (device.tracer && device.order != Order::eager)
    throw EmulatorError(ErrorKind::bad_launch, "a launch is traced in the eager order only");
  launch.clusters = config.grid.count() / config.cluster.count();
  launch.heard = std::vector<std::atomic<uint8_t>>(launch.program->code.size());
  copy_parameters(launch, arguments);
  device.memory.add(uint64_t(launch.parameters), launch.program->text->parameter_bytes + 1, "kernel parameters", false);

  const auto begin = std::chrono::steady_clock::now();
  const size_t codes = launch.program->code.size();
  const uint32_t warps = uint32_t((config.block.count() + LANES - 1) / LANES);
  auto empty_roles = [&] {
    std::vector<LaunchRecord::Role> roles(warps);
    for (auto& role : roles) {
      role.issued.assign(codes, 0);
      role.executed.assign(codes, 0);
    }
    return roles;
  };
  LaunchRecord record;
  record.kernel = kernel;
  record.config = config;
  record.shared_bytes = launch.program->text->static_shared_bytes + config.dynamic_shared_bytes;
  record.program = launch.program;
  record.roles = empty_roles();

  const uint32_t resident = std::max<uint32_t>(1, device.sms / uint32_t(config.cluster.count()));
  const uint32_t threads = uint32_t(std::min<uint64_t>({std::max(1u, device.threads), resident, launch.clusters}));
  std::vector<Totals> totals(threads);
  for (Totals& t : totals) t.roles = empty_roles();
  std::mutex error_mutex;
  std::exception_ptr error;
  auto work = [&](uint32_t t) {
    try {
      run_thread(launch, totals[t], (resident + threads - 1) / threads);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
      launch.failed = true;
    }
  };
  std::vector<std::thread> helpers;
  for (uint32_t t = 1; t < threads; ++t) helpers.emplace_back(work, t);
  work(0);
  for (std::thread& t : helpers) t.join();
  device.memory.remove(uint64_t(launch.parameters));
  if (error) std::rethrow_exception(error);
  if (device.tracer) {
    std::sort(launch.traces.begin(), launch.traces.end(),
              [](const auto& a, const auto& b) { return a->cluster < b->cluster; });
    device.tracer->launches.push_back(std::move(launch.traces));
  }
  for (const Totals& t : totals) merge(record, t);
  record.unheard = unheard_statements(launch);
  record.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return record;
}

}  // namespace emu
