// Traces of launches, and their timing (trace.h, timing.h), for Python.
#include <cstdlib>
#include <sstream>

#include "c_api.h"
#include "session.h"
#include "timing.h"

using emu::Session;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// "name value" lines.
emu::Settings parse_settings(const char* text) {
  emu::Settings settings;
  std::istringstream lines(text);
  std::string name;
  double value;
  while (lines >> name >> value) settings[name] = value;
  return settings;
}

}  // namespace

// From now on launches are traced: one cluster of each, or all (-1); -2: no more, and what was traced is forgotten.
EXPORT void emulator_trace(int64_t cluster) {
  auto& tracer = Session::get().device.tracer;
  tracer = cluster < -1 ? nullptr : std::make_shared<emu::Tracer>();
  if (tracer) tracer->cluster = cluster;
}

EXPORT size_t emulator_traced_launches() {
  const auto& tracer = Session::get().device.tracer;
  return tracer ? tracer->launches.size() : 0;
}

EXPORT size_t emulator_traced_clusters(size_t launch) {
  return Session::get().device.tracer->launches.at(launch).size();
}

// The estimate of timing.h, for emulator_free; null with a pending error.
EXPORT char* emulator_estimate(size_t launch, size_t cluster, const char* settings, int events) {
  Session& session = Session::get();
  char* text = nullptr;
  session.guarded([&] {
    const auto& trace = *session.device.tracer->launches.at(launch).at(cluster);
    text = emu::owned_by_caller(emu::estimate(trace, parse_settings(settings), events != 0));
  });
  return text;
}
