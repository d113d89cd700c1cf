// What a launcher returns. The binding turns anything but ok() into a Python exception; nothing
// below the binding throws, exits or prints.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace pixelfly {

enum class StatusCode : int32_t {
  kOk = 0,
  kUnsupported = 1,  // no kernel serves this call: say what was asked and what is available
  kInvalid = 2,      // the arguments contradict each other
  kCuda = 3,         // a CUDA call failed
};

struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  std::string message;

  static Status success() { return {}; }
  static Status unsupported(std::string m) { return {StatusCode::kUnsupported, std::move(m)}; }
  static Status invalid(std::string m) { return {StatusCode::kInvalid, std::move(m)}; }
  static Status cuda(std::string m) { return {StatusCode::kCuda, std::move(m)}; }

  bool ok() const { return code == StatusCode::kOk; }
};

}  // namespace pixelfly
