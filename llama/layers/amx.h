// The setup of AMX, whose tiles are registers of sixteen rows of 64 bytes.
// Intel's Architectures Software Developer's Manual, volume 1, chapter 18.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace {

constexpr int64_t kArchReqXcompPerm = 0x1023, kXfeatureXtileData = 18;  // docs.kernel.org/arch/x86/xstate

// Asks the system to let this process use tiles.
bool may_use_tiles() { return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0; }

// Tile intrinsics do not tell the compiler which memory they read and write; this does.
inline void touch(const void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace
