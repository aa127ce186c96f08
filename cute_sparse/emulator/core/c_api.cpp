#include "c_api.h"

#include <cstdlib>
#include <cstring>
#include <map>

#include "json.h"
#include "session.h"

namespace emu {

namespace {

Json& write_dims(Json& json, const Dim3& d) {
  return json.begin('[').number(d.x).number(d.y).number(d.z).end(']');
}

struct Times { uint64_t issued = 0, executed = 0; };

void write_role(Json& json, const LaunchRecord::Role& role, const Program& program) {
  std::map<std::string, Times> opcodes;
  for (size_t i = 0; i < role.issued.size(); ++i) {
    if (!role.issued[i]) continue;
    Times& times = opcodes[program.text->statements[program.code[i].statement].opcode];
    times.issued += role.issued[i];
    times.executed += role.executed[i];
  }
  json.begin('{').key("opcodes").begin('{');
  for (auto& [opcode, times] : opcodes)
    json.key(opcode).begin('[').number(int64_t(times.issued)).number(int64_t(times.executed)).end(']');
  json.end('}').key("macs").begin('{');
  for (auto& [kind, macs] : role.tally.macs) json.key(kind).number(int64_t(macs));
  json.end('}');
  const Tally& t = role.tally;
  json.key("tma_bytes_loaded").number(int64_t(t.tma_bytes_loaded));
  json.key("tma_bytes_stored").number(int64_t(t.tma_bytes_stored));
  json.key("tma_bytes_reduced").number(int64_t(t.tma_bytes_reduced));
  json.key("shared_bytes_read").number(int64_t(t.shared_bytes_read));
  json.key("shared_bytes_written").number(int64_t(t.shared_bytes_written));
  json.key("global_bytes_read").number(int64_t(t.global_bytes_read));
  json.key("global_bytes_written").number(int64_t(t.global_bytes_written));
  json.end('}');
}

std::map<uint32_t, uint64_t> executed_by_line(const LaunchRecord& record) {
  std::map<uint32_t, uint64_t> lines;
  for (const auto& role : record.roles)
    for (size_t i = 0; i < role.executed.size(); ++i)
      if (role.executed[i])
        lines[record.program->text->statements[record.program->code[i].statement].line] += role.executed[i];
  return lines;
}

}  // namespace

char* owned_by_caller(const std::string& text) {
  char* copy = static_cast<char*>(std::malloc(text.size() + 1));
  std::memcpy(copy, text.c_str(), text.size() + 1);
  return copy;
}

std::string launch_as_json(const LaunchRecord& record) {
  Json json;
  json.begin('{').key("kernel").string(record.kernel);
  write_dims(json.key("grid"), record.config.grid);
  write_dims(json.key("block"), record.config.block);
  write_dims(json.key("cluster"), record.config.cluster);
  json.key("shared_bytes").number(record.shared_bytes);
  json.key("seconds").real(record.seconds).key("warp_instructions").number(int64_t(record.warp_instructions));
  json.key("unheard").begin('[');
  for (const uint32_t k : record.unheard) json.number(record.program->text->statements[k].line);
  json.end(']');
  json.key("lines").begin('{');
  for (auto& [line, times] : executed_by_line(record)) json.key(std::to_string(line)).number(int64_t(times));
  json.end('}').key("warps").begin('[');
  for (const auto& role : record.roles) write_role(json, role, *record.program);
  json.end(']').end('}');
  return json.text;
}

std::string error_as_json(const EmulatorError& error) {
  const Site& site = error.site;
  Json json;
  json.begin('{').key("kind").string(error_kind_name(error.kind)).key("message").string(error.what());
  json.key("kernel").string(site.kernel).key("cta").number(site.cta).key("warp").number(site.warp);
  json.key("lane").number(site.lane).key("ptx_line").number(site.ptx_line).key("ptx_text").string(site.ptx_text);
  json.key("source").string(site.source).key("tensor").string(site.tensor).end('}');
  return json.text;
}

}  // namespace emu

#define EXPORT extern "C" __attribute__((visibility("default")))

using emu::Session;
using emu::owned_by_caller;

EXPORT int emulator_enter(const char* arch, uint32_t sms, int order, uint64_t seed, uint32_t threads, int checks,
                          uint64_t max_warp_instructions) {
  Session& session = Session::get();
  return session.guarded([&] {
    if (session.entered) throw emu::EmulatorError(emu::ErrorKind::bad_launch, "a device is already entered");
    emu::Device& device = session.device;
    device.arch = arch;
    device.sms = sms;
    device.order = static_cast<emu::Order>(order);
    device.seed = seed;
    device.threads = threads;
    device.checks = checks != 0;
    device.max_warp_instructions = max_warp_instructions;
    session.launches.clear();
    session.entered = true;
  });
}

EXPORT void emulator_leave() { Session::get().entered = false; }

EXPORT void emulator_add_memory(uint64_t address, uint64_t bytes, const char* name, int writable) {
  Session::get().device.memory.add(address, bytes, name, writable != 0);
}
EXPORT void emulator_remove_memory(uint64_t address) { Session::get().device.memory.remove(address); }

EXPORT void emulator_add_program(const char* cubin, size_t cubin_bytes, const char* ptx, size_t ptx_bytes) {
  Session::get().add_program(std::string(cubin, cubin_bytes), std::string(ptx, ptx_bytes));
}
EXPORT void emulator_unload_library(void* library) {
  Session::get().unload_library(static_cast<emu::Library*>(library));
}

EXPORT size_t emulator_launch_count() { return Session::get().launches.size(); }
EXPORT char* emulator_launch(size_t index) { return owned_by_caller(Session::get().launches.at(index)); }

EXPORT char* emulator_take_error() {
  auto error = Session::get().take_error();
  return error ? owned_by_caller(emu::error_as_json(*error)) : nullptr;
}

EXPORT void emulator_free(char* text) { std::free(text); }
