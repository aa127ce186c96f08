// What Python calls (through ctypes). Texts that are returned belong to the caller, who frees them with
// emulator_free. JSON is described beside the function that makes it.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

// Enters a device; arch "sm_90a", "sm_100a" or "sm_103a", order 0 eager, 1 late, 2 random. Returns 0, or -1 with a pending error.
int emulator_enter(const char* arch, uint32_t sms, int order, uint64_t seed, uint32_t threads, int checks,
                   uint64_t max_warp_instructions);
void emulator_leave();

void emulator_add_memory(uint64_t address, uint64_t bytes, const char* name, int writable);
void emulator_remove_memory(uint64_t address);

void emulator_add_program(const char* cubin, size_t cubin_bytes, const char* ptx, size_t ptx_bytes);
void emulator_unload_library(void* library);

// Launches so far in this device, and one of them:
// {"kernel", "grid": [x, y, z], "block", "cluster", "shared_bytes", "seconds", "warp_instructions",
//  "lines": {"<PTX line>": times executed by a warp},
//  "warps": [{"opcodes": {opcode: [issued, executed]}, "macs": {kind: n}, "tma_bytes_loaded", ...}]}
// "warps" has one entry for each warp index of a CTA, summed over the CTAs; "issued" includes instructions whose
// guard was false in every lane.
size_t emulator_launch_count();
char* emulator_launch(size_t index);

// The calling thread's pending error, which is then forgotten; null if there is none:
// {"kind", "message", "kernel", "cta", "warp", "lane", "ptx_line", "ptx_text", "source", "tensor"}
char* emulator_take_error();

void emulator_free(char* text);
}
