// Writes one JSON value after another; commas are set by `separate`.
#pragma once
#include <cstdint>
#include <cstdio>
#include <string>

namespace emu {

class Json {
 public:
  std::string text;

  Json& begin(char bracket) { separate(); text += bracket; fresh_ = true; return *this; }
  Json& end(char bracket) { text += bracket; fresh_ = false; return *this; }
  Json& key(const std::string& name) { separate(); quote(name); text += ':'; fresh_ = true; return *this; }
  Json& string(const std::string& value) { separate(); quote(value); return *this; }
  Json& number(int64_t value) { separate(); text += std::to_string(value); return *this; }
  Json& real(double value) {
    separate();
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.9g", value);
    text += buffer;
    return *this;
  }

 private:
  bool fresh_ = true;

  void separate() {
    if (!fresh_) text += ',';
    fresh_ = false;
  }
  void quote(const std::string& value) {
    text += '"';
    for (unsigned char c : value) {
      if (c == '"' || c == '\\') {
        text += '\\';
        text += char(c);
      } else if (c < 0x20) {
        char buffer[8];
        std::snprintf(buffer, sizeof buffer, "\\u%04x", c);
        text += buffer;
      } else {
        text += char(c);
      }
    }
    text += '"';
  }
};

}  // namespace emu
