// A discrete-event estimate of the cycles that a traced cluster takes on one chip: warp schedulers that issue, units
// with rates, results with latencies, asynchronous engines, and barriers that complete when what completed them in the
// trace has happened again. It is for comparing kernels on one chip, not a prediction of a clock.
//
// What it knows of the assembler. Register moves cost nothing. A mul whose only use is an add or sub becomes part of
// it. Between two branches or waits independent instructions may pass each other, within `window` of them; memory and
// synchronisation keep their order. Two instructions of a trace that the machine would have executed in another order
// (what a polling loop saw, which CTA claimed a tile) stay as they were traced.
#pragma once
#include <map>
#include <string>

#include "trace.h"

namespace emu {

using Settings = std::map<std::string, double>;  // cute_sparse/emulator/chips.py names and explains them

// {"cycles", "ctas": [{"tensor": busy cycles, "tma", "shared", "fresh_bytes",
//                      "warps": [{"warp", "end", "issued": instructions, "units": {unit: busy cycles},
//                                 "waits": {kind: cycles}, "lines": {PTX line: cycles waited}}]}],
//  "events": [[CTA in the cluster, track, name, begin, end]]}   only if asked for; track: a warp or an engine
std::string estimate(const ClusterTrace& trace, const Settings& settings, bool events);

}  // namespace emu
