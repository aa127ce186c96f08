// The words that may stand behind a mnemonic. Families ask for the words that they know ("has ftz?"); a word that
// none of them asks for would be dropped in silence, so what is not listed here makes the statement unknown.
// PTX ISA, "Instruction Set": the syntax lines of each instruction. Families that compare whole opcodes are not listed.
#include <algorithm>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "machine.h"

namespace emu {

namespace {

using Words = std::unordered_set<std::string>;

const char* const TYPES =
    "b8 b16 b32 b64 b128 u8 u16 u32 u64 s8 s16 s32 s64 f16 f16x2 bf16 bf16x2 f32 f32x2 f64 pred u16x2 s16x2";
const char* const ARITHMETIC = "rn rz rm rp ftz sat lo hi wide cc relu";
const char* const EXTREMUM = "ftz NaN xorsign abs relu";
const char* const COMPARISON =
    "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz";
const char* const SPACES = "global local const param param::entry param::func shared shared::cta shared::cluster";
const char* const ORDER = "weak volatile relaxed acquire release acq_rel mmio cta cluster gpu sys nc";
const char* const CACHE =
    "ca cg cs lu cv wb wt L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate "
    "L2::evict_normal L2::evict_first L2::evict_last L2::cache_hint L2::64B L2::128B L2::256B";
const char* const VECTORS = "v2 v4 v8";
const char* const ATOMICS = "and or xor cas exch add inc dec min max noftz async mbarrier::complete_tx::bytes";

Words words(std::initializer_list<const char*> lists) {
  Words result;
  for (const char* list : lists) {
    std::istringstream stream(list);
    for (std::string word; stream >> word;) result.insert(word);
  }
  return result;
}

const std::unordered_map<std::string, Words>& vocabulary() {
  static const std::unordered_map<std::string, Words> known = [] {
    std::unordered_map<std::string, Words> table;
    const auto add = [&](const char* mnemonics, std::initializer_list<const char*> lists) {
      std::istringstream stream(mnemonics);
      for (std::string mnemonic; stream >> mnemonic;) table[mnemonic] = words(lists);
    };
    add("add sub mul mad fma addc subc madc", {TYPES, ARITHMETIC});
    add("min max", {TYPES, EXTREMUM});
    add("neg abs", {TYPES, "ftz"});
    add("div rem sad rcp sqrt rsqrt sin cos lg2 ex2 tanh", {TYPES, "rn rz rm rp ftz approx full"});
    add("and or xor not cnot shl shr popc clz brev selp mov copysign bfe bfi", {TYPES});
    add("bfind", {TYPES, "shiftamt"});
    add("setp set", {TYPES, COMPARISON});
    add("slct", {TYPES, "ftz"});
    add("prmt", {TYPES, "f4e b4e rc8 ecl ecr rc16"});
    add("shf szext bmsk", {TYPES, "l r clamp wrap"});
    add("lop3", {TYPES, "and or"});
    add("dp2a dp4a", {TYPES, "lo hi"});
    add("ld ldu", {TYPES, SPACES, ORDER, CACHE, VECTORS});
    add("st", {TYPES, SPACES, ORDER, CACHE, VECTORS, "async mbarrier::complete_tx::bytes bulk"});
    add("atom red", {TYPES, SPACES, ORDER, CACHE, VECTORS, ATOMICS});
    add("prefetch prefetchu", {SPACES, "L1 L2 L2::evict_last L2::evict_normal tensormap"});
    add("applypriority discard", {"global L2 L2::evict_normal L2::128"});
    add("isspacep", {SPACES});
    add("mapa", {TYPES, "shared::cluster"});
    return table;
  }();
  return known;
}

}  // namespace

bool words_known(const Statement& statement) {
  const auto entry = vocabulary().find(statement.mnemonic());
  if (entry == vocabulary().end()) return true;
  return std::all_of(statement.modifiers.begin() + 1, statement.modifiers.end(),
                     [&](const std::string& word) { return entry->second.count(word) != 0; });
}

}  // namespace emu
