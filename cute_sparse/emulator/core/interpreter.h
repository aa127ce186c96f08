// Between the interpreter loop (machine.cpp) and the schedule (schedule.cpp).
#pragma once
#include "machine.h"

namespace emu {

// Executes at most `quantum` instructions of a warp; returns how many. Fewer: every group is blocked, or it ended.
uint32_t run_warp(Warp& warp, uint32_t quantum, bool checks);

}  // namespace emu
