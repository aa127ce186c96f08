// The tensor map (CUtensorMap): what a TMA instruction knows of a tensor in global memory and of the box that it
// moves. Decoded from the 128-byte descriptor that the host code wrote.
#pragma once
#include <array>
#include <cstdint>
#include <string>

#include "error.h"

namespace emu {

constexpr uint32_t TENSOR_MAP_BYTES = 128;       // size of the descriptor
constexpr uint32_t TENSOR_MAP_LIVE_BYTES = 64;   // the others are not written by the host
constexpr uint32_t TENSOR_MAP_ALIGNMENT = 64;
constexpr uint32_t MAX_TENSOR_RANK = 5;

// PTX ISA, "tensormap.replace", table of .elemtype: what an element is. 8-bit floats travel as u8.
enum class ElementType : uint8_t { u8, u16, u32, s32, u64, s64, f16, f32, f32_ftz, f64, bf16 };
uint32_t element_bytes(ElementType type);
const char* element_name(ElementType type);

// PTX ISA 5.5.7 "Swizzling modes": which bits of the shared address are exchanged.
struct Swizzle {
  uint32_t span = 0;   // bytes of a row in which chunks are permuted (0: none)
  uint32_t mask = 0;   // address bits that change
  uint32_t shift = 0;  // they are XORed with the bits this much above them
  // Where the byte goes that would lie at this shared address without swizzling. The address is the absolute one.
  uint32_t apply(uint32_t address) const { return address ^ ((address >> shift) & mask); }
};

struct TensorMap {
  uint64_t location = 0;                               // generic address of the descriptor
  std::array<uint8_t, TENSOR_MAP_LIVE_BYTES> raw{};    // its bytes, to notice that it was changed
  uint64_t address = 0;                                // of element {0, 0, ...}
  uint32_t rank = 0;
  ElementType type = ElementType::u8;
  uint32_t element = 1;                                // bytes of one element
  std::array<uint64_t, MAX_TENSOR_RANK> dims{};        // elements; 1 beyond the rank
  std::array<uint64_t, MAX_TENSOR_RANK> strides{};     // bytes; [0] is the element's size
  std::array<uint32_t, MAX_TENSOR_RANK> box{};         // elements spanned in the tensor
  std::array<uint32_t, MAX_TENSOR_RANK> steps{};       // element strides: every steps[d]-th element is taken
  std::array<uint32_t, MAX_TENSOR_RANK> counts{};      // elements taken: ceil(box / steps)
  Swizzle swizzle;
  bool nan_fill = false;                               // out-of-bounds elements are NaN instead of 0
  bool tf32 = false;                                   // loads round f32 to tf32
  uint32_t row_bytes = 0;                              // counts[0] elements: one row in shared memory
  uint32_t rows = 0;                                   // product of the other counts
  uint32_t box_bytes = 0;                              // rows * row_bytes: what a load announces to its mbarrier
};

// Throws EmulatorError (without a site) on what is not modelled (interleaved layouts, sub-byte elements, im2col) and
// on what the hardware refuses (alignment, box sizes).
TensorMap decode_tensor_map(const uint8_t* descriptor);

// "{64, 0, 3}", the first `rank` of five coordinates.
std::string coordinates_text(const int32_t* coordinates, uint32_t rank);

}  // namespace emu
