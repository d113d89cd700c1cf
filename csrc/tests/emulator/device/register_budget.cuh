// The emulator has no register file.
#pragma once

namespace pixelfly::device {

template <int kRegisters>
void claim_registers() {}
template <int kRegisters>
void release_registers() {}

}  // namespace pixelfly::device
