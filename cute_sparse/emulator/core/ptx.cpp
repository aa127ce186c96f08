// Tokens, declarations and statements of PTX (PTX ISA, chapters 4 and 5). Scoped blocks, as inline assembly makes
// them, may declare registers and labels of their own.
#include "ptx.h"

#include <cctype>
#include <cstdlib>
#include <unordered_map>

namespace emu {

bool Statement::has(const char* modifier) const {
  for (size_t i = 1; i < modifiers.size(); ++i)
    if (modifiers[i] == modifier) return true;
  return false;
}

namespace {

struct Token {
  enum class Kind : uint8_t { word, number, string, punctuation, end } kind = Kind::end;
  std::string text;
  uint32_t line = 0;
  size_t begin = 0, end = 0;  // in the source
};

[[noreturn]] void fail(uint32_t line, const std::string& why) {
  Site site;
  site.ptx_line = line;
  throw EmulatorError(ErrorKind::parse, "PTX line " + std::to_string(line) + ": " + why, site);
}

bool starts_word(char c) { return std::isalpha((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.'; }
bool in_word(char c) { return std::isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.'; }

std::vector<Token> tokenize(const std::string& s) {
  std::vector<Token> tokens;
  uint32_t line = 1;
  size_t i = 0;
  const size_t n = s.size();
  while (i < n) {
    const char c = s[i];
    if (c == '\n') { ++line; ++i; continue; }
    if (std::isspace((unsigned char)c)) { ++i; continue; }
    if (c == '/' && i + 1 < n && s[i + 1] == '/') {
      while (i < n && s[i] != '\n') ++i;
      continue;
    }
    if (c == '/' && i + 1 < n && s[i + 1] == '*') {
      i += 2;
      while (i + 1 < n && !(s[i] == '*' && s[i + 1] == '/')) { if (s[i] == '\n') ++line; ++i; }
      i += 2;
      continue;
    }
    Token t;
    t.line = line;
    t.begin = i;
    if (c == '"') {
      ++i;
      while (i < n && s[i] != '"') { if (s[i] == '\\') ++i; ++i; }
      ++i;
      t.kind = Token::Kind::string;
    } else if (std::isdigit((unsigned char)c)) {
      t.kind = Token::Kind::number;
      while (i < n && (std::isalnum((unsigned char)s[i]) || s[i] == '.' ||
                       ((s[i] == '-' || s[i] == '+') && (s[i - 1] == 'e' || s[i - 1] == 'E') && s[t.begin + 1] != 'x')))
        ++i;
    } else if (starts_word(c)) {
      t.kind = Token::Kind::word;
      ++i;
      while (i < n) {
        if (in_word(s[i])) { ++i; continue; }
        // `::` belongs to a word inside an opcode (shared::cta), never at its end (labels end with one colon)
        if (s[i] == ':' && i + 2 < n && s[i + 1] == ':' && std::isalnum((unsigned char)s[i + 2])) { i += 2; continue; }
        break;
      }
    } else {
      t.kind = Token::Kind::punctuation;
      ++i;
    }
    t.end = i;
    t.text = s.substr(t.begin, t.end - t.begin);
    tokens.push_back(std::move(t));
  }
  Token end;
  end.line = line;
  end.begin = end.end = n;
  tokens.push_back(end);
  return tokens;
}

std::vector<std::string> split_opcode(const std::string& opcode) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t i = 0; i <= opcode.size(); ++i)
    if (i == opcode.size() || opcode[i] == '.') {
      parts.push_back(opcode.substr(begin, i - begin));
      begin = i + 1;
    }
  return parts;
}

std::string fold_space(const std::string& s, size_t begin, size_t end) {
  std::string out;
  for (size_t i = begin; i < end; ++i) {
    if (std::isspace((unsigned char)s[i])) {
      if (!out.empty() && out.back() != ' ') out += ' ';
    } else {
      out += s[i];
    }
  }
  return out;
}

RegClass class_of_type(const std::string& type, uint32_t line) {
  if (type == ".pred") return RegClass::pred;
  if (type == ".b16" || type == ".u16" || type == ".s16" || type == ".f16" || type == ".bf16") return RegClass::b16;
  if (type == ".b8" || type == ".u8" || type == ".s8") return RegClass::b16;
  if (type == ".b32" || type == ".u32" || type == ".s32" || type == ".f32" || type == ".f16x2" || type == ".bf16x2")
    return RegClass::b32;
  if (type == ".b64" || type == ".u64" || type == ".s64" || type == ".f64") return RegClass::b64;
  if (type == ".b128") return RegClass::b128;
  fail(line, "unknown register type " + type);
}

uint32_t slots_of(RegClass cls) { return cls == RegClass::b128 ? 4 : cls == RegClass::b64 ? 2 : 1; }

uint32_t bytes_of_type(const std::string& type, uint32_t line) {
  const size_t digits = type.find_first_of("0123456789");
  if (digits == std::string::npos) fail(line, "unknown type " + type);
  return uint32_t(std::stoul(type.substr(digits))) / 8;
}

class Parser {
 public:
  explicit Parser(const std::string& source) : source_(source), tokens_(tokenize(source)) {}

  ModuleText module() {
    ModuleText m;
    while (!at_end()) {
      const Token& t = peek();
      if (t.text == ".version" || t.text == ".address_size") { next(); next(); }
      else if (t.text == ".target") { next(); m.target = next().text; while (accept(",")) next(); }
      else if (t.text == ".file") { file_directive(); }
      else if (t.text == ".visible" || t.text == ".weak" || t.text == ".extern") { next(); }
      else if (t.text == ".entry") { m.kernels.push_back(entry()); }
      else if (t.text == ".func") { skip_function(); }
      else if (t.text == ".global" || t.text == ".const") { next(); m.globals.push_back(variable()); }
      else if (t.text == ".shared") { next(); module_shared_.push_back(variable()); }
      else if (t.text == ".section") { skip_section(); }
      else if (t.text == ";" ) { next(); }
      else fail(t.line, "unexpected '" + t.text + "' at module level");
    }
    name_sources(m);
    return m;
  }

 private:
  struct Declared { RegClass cls; uint32_t base; uint32_t count; bool numbered; };
  struct Scope {
    uint32_t id = 0;
    std::unordered_map<std::string, Declared> registers;
    std::unordered_map<std::string, uint32_t> labels;
    std::vector<std::pair<uint32_t, uint32_t>> references;  // (statement, operand) of unresolved labels
  };

  const std::string& source_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  std::vector<Scope> scopes_;
  std::vector<Variable> module_shared_;
  std::unordered_map<std::string, std::string> files_;
  std::string location_;

  const Token& peek(size_t k = 0) const { return tokens_[std::min(at_ + k, tokens_.size() - 1)]; }
  const Token& next() { return tokens_[at_ < tokens_.size() - 1 ? at_++ : at_]; }
  bool at_end() const { return peek().kind == Token::Kind::end; }
  bool accept(const char* text) { if (peek().text == text) { next(); return true; } return false; }
  const Token& expect(const char* text) {
    if (peek().text != text) fail(peek().line, std::string("expected '") + text + "', found '" + peek().text + "'");
    return next();
  }
  uint64_t integer() {
    const bool negative = accept("-");
    const Token& t = next();
    if (t.kind != Token::Kind::number) fail(t.line, "expected an integer, found '" + t.text + "'");
    const uint64_t v = std::strtoull(t.text.c_str(), nullptr, 0);
    return negative ? uint64_t(-int64_t(v)) : v;
  }

  void file_directive() {  // .file index "name" [, time, size]
    next();
    const std::string index = next().text;
    std::string name = next().text;
    if (name.size() >= 2 && name.front() == '"') name = name.substr(1, name.size() - 2);
    while (accept(",")) next();
    files_[index] = name;
  }

  void loc_directive() {  // .loc file line column [, function_name label, inlined_at file line column]
    const uint32_t line = next().line;
    const std::string file = next().text, row = next().text;
    while (!at_end() && peek().line == line) next();
    location_ = file + ":" + row;
  }

  // The files behind the numbers of .loc are named at the end of the text.
  void name_sources(ModuleText& m) const {
    for (KernelText& kernel : m.kernels)
      for (Statement& s : kernel.statements) {
        const auto file = files_.find(s.source.substr(0, s.source.find(':')));
        if (file != files_.end()) s.source = file->second + s.source.substr(s.source.find(':'));
      }
  }

  void skip_section() {
    while (!at_end() && peek().text != "{") next();
    skip_braces();
  }
  void skip_braces() {
    int depth = 0;
    do {
      if (peek().text == "{") ++depth;
      if (peek().text == "}") --depth;
      next();
    } while (depth > 0 && !at_end());
  }
  void skip_function() {
    while (!at_end() && peek().text != ";" && peek().text != "{") next();
    if (peek().text == "{") skip_braces(); else next();
  }

  // [.align N] .type name[count] [= {values}];
  Variable variable() {
    Variable v;
    if (accept(".align")) v.align = uint32_t(integer());
    const Token& type = next();
    const uint32_t element = bytes_of_type(type.text, type.line);
    v.name = next().text;
    uint64_t count = 1;
    while (accept("[")) {
      if (accept("]")) { count = 0; continue; }
      count *= integer();
      expect("]");
    }
    v.bytes = count * element;
    v.align = std::max(v.align, element);
    if (accept("=")) initialiser(v, element);
    expect(";");
    return v;
  }

  void initialiser(Variable& v, uint32_t element) {
    const bool braces = accept("{");
    v.init.assign(v.bytes, 0);
    size_t at = 0;
    do {
      const Operand op = operand();
      if (op.kind != Operand::Kind::immediate) fail(peek().line, "only constant initialisers are supported");
      for (uint32_t b = 0; b < element && at < v.init.size(); ++b) v.init[at++] = uint8_t(op.bits >> (8 * b));
    } while (braces && accept(","));
    if (braces) expect("}");
  }

  KernelText entry() {
    next();
    KernelText k;
    k.name = next().text;
    if (accept("(")) {
      while (!accept(")")) {
        parameter(k);
        accept(",");
      }
    }
    while (peek().text != "{" && peek().text != ";") performance_directive(k);
    if (accept(";")) return k;
    for (const Variable& v : module_shared_) add_shared(k, v);
    body(k);
    return k;
  }

  void parameter(KernelText& k) {
    const uint32_t line = peek().line;
    expect(".param");
    Parameter p;
    if (accept(".align")) p.align = uint32_t(integer());
    const Token& type = next();
    const uint32_t element = bytes_of_type(type.text, type.line);
    while (peek().text[0] == '.') {  // .ptr .global .align N
      const std::string attribute = next().text;
      if (attribute == ".align") integer();
    }
    p.name = next().text;
    uint64_t count = 1;
    if (accept("[")) { count = integer(); expect("]"); }
    if (p.name.empty()) fail(line, "parameter without a name");
    p.align = std::max(p.align, element);
    p.bytes = uint32_t(count * element);
    p.offset = (k.parameter_bytes + p.align - 1) / p.align * p.align;
    k.parameter_bytes = p.offset + p.bytes;
    k.parameters.push_back(p);
  }

  void performance_directive(KernelText& k) {
    const std::string name = next().text;
    uint32_t values[3] = {1, 1, 1};
    size_t n = 0;
    while (peek().kind == Token::Kind::number) {
      const uint32_t v = uint32_t(integer());
      if (n < 3) values[n] = v;
      ++n;
      if (!accept(",")) break;
    }
    if (name == ".reqntid") std::copy(values, values + 3, k.reqntid);
    if (name == ".reqnctapercluster") std::copy(values, values + 3, k.reqnctapercluster);
  }

  void add_shared(KernelText& k, Variable v) {
    v.offset = (k.static_shared_bytes + v.align - 1) / v.align * v.align;
    k.static_shared_bytes = uint32_t(v.offset + v.bytes);
    k.shared.push_back(v);
  }

  void body(KernelText& k) {
    uint32_t depth = 0, next_scope = 0;
    location_.clear();
    do {
      const Token& t = peek();
      if (at_end()) fail(t.line, "kernel body does not end");
      if (t.text == "{") {
        next();
        ++depth;
        scopes_.emplace_back();
        scopes_.back().id = next_scope++;
      } else if (t.text == "}") {
        next();
        --depth;
        close_scope(k);
      } else if (t.text == ".reg") {
        registers(k);
      } else if (t.text == ".shared") {
        next();
        add_shared(k, variable());
      } else if (t.text == ".local") {
        next();
        Variable v = variable();
        const uint64_t end = k.local.empty() ? 0 : k.local.back().offset + k.local.back().bytes;
        v.offset = (end + v.align - 1) / v.align * v.align;
        k.local.push_back(v);
      } else if (t.text == ".loc") {
        loc_directive();
      } else if (t.text == ".pragma") {
        while (next().text != ";") {}
      } else if (t.kind == Token::Kind::word && t.text[0] != '.' && peek(1).text == ":") {
        scopes_.back().labels[t.text] = uint32_t(k.statements.size());
        next();
        next();
      } else if (t.text == ";") {
        next();
      } else {
        statement(k);
      }
    } while (depth > 0);
  }

  // Labels of the scope become known; references to others go to the enclosing scope.
  void close_scope(KernelText& k) {
    Scope scope = std::move(scopes_.back());
    scopes_.pop_back();
    for (const auto& [name, index] : scope.labels) k.labels[std::to_string(scope.id) + ":" + name] = index;
    for (const auto& [statement, operand] : scope.references) {
      Operand& op = k.statements[statement].operands[operand];
      if (scope.labels.count(op.name)) {
        op.name = std::to_string(scope.id) + ":" + op.name;
      } else if (!scopes_.empty()) {
        scopes_.back().references.emplace_back(statement, operand);
      } else {
        fail(k.statements[statement].line, "unknown name '" + op.name + "'");
      }
    }
  }

  void registers(KernelText& k) {
    next();
    const Token& type = next();
    const RegClass cls = class_of_type(type.text, type.line);
    do {
      const std::string name = next().text;
      uint32_t count = 1;
      bool numbered = false;
      if (accept("<")) { count = uint32_t(integer()); expect(">"); numbered = true; }
      scopes_.back().registers[name] = {cls, k.register_slots, count, numbered};
      k.register_slots += count * slots_of(cls);
    } while (accept(","));
    expect(";");
  }

  bool find_register(const std::string& name, Reg& out) const {
    size_t digits = name.size();
    while (digits > 0 && std::isdigit((unsigned char)name[digits - 1])) --digits;
    const std::string prefix = name.substr(0, digits);
    const uint32_t number = digits < name.size() ? uint32_t(std::strtoul(name.c_str() + digits, nullptr, 10)) : 0;
    for (size_t i = scopes_.size(); i-- > 0;) {
      const auto& declared = scopes_[i].registers;
      auto it = declared.find(name);
      if (it != declared.end() && !it->second.numbered) {
        out = {it->second.cls, it->second.base};
        return true;
      }
      if (digits == name.size()) continue;
      it = declared.find(prefix);
      if (it != declared.end() && it->second.numbered && number < it->second.count) {
        out = {it->second.cls, it->second.base + number * slots_of(it->second.cls)};
        return true;
      }
    }
    return false;
  }

  Operand number() {
    const Token& t = next();
    Operand op;
    op.kind = Operand::Kind::immediate;
    const std::string& s = t.text;
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) {
      op.is_float = op.is_float32 = true;
      op.bits = std::strtoull(s.c_str() + 2, nullptr, 16);
    } else if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) {
      op.is_float = true;
      op.bits = std::strtoull(s.c_str() + 2, nullptr, 16);
    } else if (s.find_first_of(".") != std::string::npos ||
               (s.find_first_of("eE") != std::string::npos && (s.size() < 2 || s[1] != 'x'))) {
      op.is_float = true;
      const double v = std::strtod(s.c_str(), nullptr);
      __builtin_memcpy(&op.bits, &v, 8);
    } else if (s.size() > 2 && s[0] == '0' && (s[1] == 'b' || s[1] == 'B')) {
      op.bits = std::strtoull(s.c_str() + 2, nullptr, 2);
    } else {
      op.bits = std::strtoull(s.c_str(), nullptr, 0);
    }
    return op;
  }

  Operand operand() {
    Operand op = simple_operand();
    if (peek().text == "|") {
      next();
      Operand pair;
      pair.kind = Operand::Kind::pair;
      pair.parts.push_back(std::move(op));
      pair.parts.push_back(simple_operand());
      return pair;
    }
    return op;
  }

  Operand simple_operand() {
    const Token& t = peek();
    Operand op;
    if (accept("!")) {
      op = simple_operand();
      op.negated = true;
      return op;
    }
    if (accept("-")) {
      op = number();
      if (op.is_float) {
        op.bits ^= op.is_float32 ? 0x80000000ull : 0x8000000000000000ull;
      } else {
        op.bits = uint64_t(-int64_t(op.bits));
      }
      return op;
    }
    if (t.kind == Token::Kind::number) return number();
    if (accept("{")) {
      op.kind = Operand::Kind::vector;
      while (!accept("}")) {
        op.parts.push_back(simple_operand());
        accept(",");
      }
      return op;
    }
    if (accept("[")) {
      op.kind = Operand::Kind::address;
      op.parts.push_back(simple_operand());
      op.offset = op.parts[0].offset;  // of a symbol, "+ number" is part of its operand
      if (accept("+")) {
        op.offset = int64_t(integer());
      } else if (peek().text == "-") {
        op.offset = int64_t(integer());
      }
      while (accept(",")) op.parts.push_back(simple_operand());
      expect("]");
      return op;
    }
    if (accept("(")) {  // call arguments; kept so that the statement can be named
      op.kind = Operand::Kind::vector;
      while (!accept(")")) {
        op.parts.push_back(simple_operand());
        accept(",");
      }
      return op;
    }
    if (t.kind != Token::Kind::word) fail(t.line, "unexpected '" + t.text + "' in an operand");
    next();
    if (t.text == "_") {
      op.kind = Operand::Kind::sink;
      return op;
    }
    if (find_register(t.text, op.reg)) {
      op.kind = Operand::Kind::reg;
      return op;
    }
    op.kind = Operand::Kind::symbol;
    op.name = t.text;
    if (peek().text == "+" && peek(1).kind == Token::Kind::number) { next(); op.offset = int64_t(integer()); }
    return op;
  }

  bool is_known_symbol(const KernelText& k, const std::string& name) const {
    if (name[0] == '%') return true;  // special register
    for (const auto& p : k.parameters) if (p.name == name) return true;
    for (const auto& v : k.shared) if (v.name == name) return true;
    for (const auto& v : k.local) if (v.name == name) return true;
    return false;
  }

  void statement(KernelText& k) {
    Statement s;
    const size_t begin = peek().begin;
    s.line = peek().line;
    s.source = location_;
    if (accept("@")) {
      s.guarded = true;
      s.guard_negated = accept("!");
      const Token& t = next();
      if (!find_register(t.text, s.guard) || s.guard.cls != RegClass::pred)
        fail(t.line, "'" + t.text + "' is not a predicate register");
    }
    s.line = peek().line;
    const Token& op = next();
    if (op.kind != Token::Kind::word) fail(op.line, "expected an instruction, found '" + op.text + "'");
    s.opcode = op.text;
    s.modifiers = split_opcode(op.text);
    while (peek().text != ";") {
      if (at_end()) fail(s.line, "statement does not end");
      s.operands.push_back(operand());
      if (!accept(",") && peek().text != ";") {
        if (peek().text == "(" ) continue;  // call
        fail(peek().line, "expected ',' or ';', found '" + peek().text + "'");
      }
    }
    s.text = fold_space(source_, begin, std::min(peek().begin, begin + 240));
    next();
    const uint32_t index = uint32_t(k.statements.size());
    const bool branches = s.modifiers[0] == "bra" || s.modifiers[0] == "brx" || s.modifiers[0] == "call";
    for (uint32_t i = 0; branches && i < s.operands.size(); ++i)
      if (s.operands[i].kind == Operand::Kind::symbol && !is_known_symbol(k, s.operands[i].name)) {
        if (s.modifiers[0] == "bra") {
          s.operands[i].kind = Operand::Kind::label;
          scopes_.back().references.emplace_back(index, i);
        }
      }
    k.statements.push_back(std::move(s));
  }
};

}  // namespace

ModuleText parse_ptx(const std::string& ptx) { return Parser(ptx).module(); }

}  // namespace emu
