// Bits of the tensor map. NVIDIA documents none of them: the positions were read off descriptors that host code had
// encoded. What each field means is the CUDA driver API's (cuTensorMapEncodeTiled) and the PTX ISA's (5.5 "Tensors",
// 9.7.9.26 "tensormap.replace") to say.
#include "tensor_map.h"

#include <cstring>

namespace emu {

namespace {

using Words = std::array<uint32_t, TENSOR_MAP_LIVE_BYTES / 4>;

[[noreturn]] void refuse(ErrorKind kind, const std::string& why) { throw EmulatorError(kind, "tensor map: " + why); }

uint32_t bits(uint32_t word, uint32_t first, uint32_t count) { return (word >> first) & ((1u << count) - 1); }

// w2: [1] and [18] are always set; [4:7) rank - 1; [7:11) type; [11:13) interleave; [13:15) swizzle; [15] fill;
// [16] tf32; [19:21) swizzle atomicity; [21:23) L2 promotion, a hint. No tiled map was seen with another bit.
void check_kind(uint32_t w2) {
  constexpr uint32_t ALWAYS = 1u << 1 | 1u << 18;
  constexpr uint32_t UNKNOWN = 1u << 0 | 1u << 2 | 1u << 3 | 1u << 17;
  if ((w2 & ALWAYS) != ALWAYS || (w2 & UNKNOWN))
    refuse(ErrorKind::invalid_operand,
           "word 2 is " + std::to_string(w2) + ", which no tiled tensor map has (tiled maps are supported; im2col "
           "and gather maps are not)");
}

ElementType decode_type(uint32_t code) {
  if (code > uint32_t(ElementType::bf16))
    refuse(ErrorKind::invalid_operand, "element type " + std::to_string(code) +
                                           " is not supported (4-bit and 6-bit elements); 8 to 64 bits are");
  return ElementType(code);
}

// PTX ISA 5.5.7: 16-byte chunks are XORed with the address bits from 7 on. 128-byte swizzling with 32-byte chunks
// (atomicity 1) is its sub-mode for 32-bit elements.
Swizzle decode_swizzle(uint32_t mode, uint32_t atomicity) {
  if (atomicity > 1 || (atomicity == 1 && mode != 3))
    refuse(ErrorKind::invalid_operand, "swizzle atomicity " + std::to_string(atomicity) + " with swizzle mode " +
                                           std::to_string(mode) + " is not supported (16 bytes is; 32 bytes with "
                                           "the 128-byte swizzle is)");
  if (atomicity == 1) return {128, 0x60, 2};
  switch (mode) {
    case 1: return {32, 0x10, 3};
    case 2: return {64, 0x30, 3};
    case 3: return {128, 0x70, 3};
    default: return {};
  }
}

// Strides of dimensions 1..4 are stored in units of 16 bytes: 32 low bits each in w3..w6, 4 high bits each in w7.
uint64_t decode_stride(const Words& w, uint32_t dim) {
  const uint64_t high = bits(w[7], 4 * (dim - 1), 4);
  return (high << 32 | w[2 + dim]) << 4;
}

// Boxes are bytes: box0 in w13[24:32), box1..box4 in w14. Element strides are 3 bits each, from w13[0) on.
uint32_t decode_box(const Words& w, uint32_t dim) {
  return (dim == 0 ? bits(w[13], 24, 8) : bits(w[14], 8 * (dim - 1), 8)) + 1;
}

// The requirements of cuTensorMapEncodeTiled that a kernel could violate by editing a map, or that are not modelled.
void check_box(const TensorMap& map) {
  if (map.address % 16)
    refuse(ErrorKind::misaligned, "the tensor's address must be a multiple of 16 bytes");
  if (map.row_bytes % 16)
    refuse(ErrorKind::invalid_operand,
           "a row of the box has " + std::to_string(map.row_bytes) + " bytes; it must be a multiple of 16");
  if (map.swizzle.span && map.row_bytes != map.swizzle.span)
    refuse(ErrorKind::invalid_operand,
           "a row of the box has " + std::to_string(map.row_bytes) + " bytes under a " +
               std::to_string(map.swizzle.span) + "-byte swizzle; only rows as long as the swizzle are supported");
  const bool is_float = map.type == ElementType::f16 || map.type == ElementType::bf16 ||
                        map.type == ElementType::f32 || map.type == ElementType::f32_ftz ||
                        map.type == ElementType::f64;
  if (map.nan_fill && !is_float) refuse(ErrorKind::invalid_operand, "NaN fill needs a floating-point element type");
  if (map.tf32 && map.type != ElementType::f32 && map.type != ElementType::f32_ftz)
    refuse(ErrorKind::invalid_operand, "tf32 rounding needs 32-bit floating-point elements");
}

}  // namespace

uint32_t element_bytes(ElementType type) {
  switch (type) {
    case ElementType::u8: return 1;
    case ElementType::u16: case ElementType::f16: case ElementType::bf16: return 2;
    case ElementType::u32: case ElementType::s32: case ElementType::f32: case ElementType::f32_ftz: return 4;
    case ElementType::u64: case ElementType::s64: case ElementType::f64: return 8;
  }
  return 0;
}

const char* element_name(ElementType type) {
  static const char* const names[] = {"u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f32.ftz", "f64", "bf16"};
  return names[uint32_t(type)];
}

TensorMap decode_tensor_map(const uint8_t* descriptor) {
  Words w;
  std::memcpy(w.data(), descriptor, TENSOR_MAP_LIVE_BYTES);
  check_kind(w[2]);
  TensorMap map;
  std::memcpy(map.raw.data(), descriptor, TENSOR_MAP_LIVE_BYTES);
  map.address = uint64_t(w[1]) << 32 | w[0];
  map.rank = bits(w[2], 4, 3) + 1;
  if (map.rank > MAX_TENSOR_RANK) refuse(ErrorKind::invalid_operand, "rank " + std::to_string(map.rank));
  map.type = decode_type(bits(w[2], 7, 4));
  map.element = element_bytes(map.type);
  if (bits(w[2], 11, 2))
    refuse(ErrorKind::invalid_operand, "interleaved layouts are not supported; no interleave is");
  map.swizzle = decode_swizzle(bits(w[2], 13, 2), bits(w[2], 19, 2));
  map.nan_fill = bits(w[2], 15, 1);
  map.tf32 = bits(w[2], 16, 1);
  map.rows = 1;
  for (uint32_t d = 0; d < MAX_TENSOR_RANK; ++d) {
    const bool used = d < map.rank;
    map.dims[d] = used ? uint64_t(w[8 + d]) + 1 : 1;
    map.strides[d] = d == 0 ? map.element : used ? decode_stride(w, d) : 0;
    map.box[d] = used ? decode_box(w, d) : 1;
    // Without interleave, the driver API ignores the element stride of dimension 0.
    map.steps[d] = used && d > 0 ? bits(w[13], 3 * d, 3) + 1 : 1;
    map.counts[d] = (map.box[d] + map.steps[d] - 1) / map.steps[d];
    if (d > 0) map.rows *= map.counts[d];
  }
  map.row_bytes = map.counts[0] * map.element;
  map.box_bytes = map.rows * map.row_bytes;
  check_box(map);
  return map;
}

std::string coordinates_text(const int32_t* coordinates, uint32_t rank) {
  std::string text = "{";
  for (uint32_t d = 0; d < rank; ++d) text += (d ? ", " : "") + std::to_string(coordinates[d]);
  return text + "}";
}

}  // namespace emu
