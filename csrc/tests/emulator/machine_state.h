// What machine.cpp keeps of thread blocks, their threads and what they wait for.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

namespace emulator {

constexpr size_t kStackBytes = 256 * 1024;
constexpr uint8_t kPoison = 0xff;  // NaN in every floating-point type

struct MBarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  // Bytes may land before they are announced, as long as an arrival that can is still to come.
  void check_bytes() const {
    if (pending == 0 && bytes < 0) fail("more bytes land on an mbarrier than it expects");
  }
  void settle() {
    if (pending == 0 && bytes == 0) {
      phase ^= 1;
      pending = arrivals;
    }
  }
};

struct NamedBarrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  WarpValues given{}, taken{};
  int arrived = 0;
  uint64_t generation = 0;
};

// A thread block; a cluster's run together.
struct Block {
  Index index;
  alignas(1024) uint8_t shared[kDynamicBase + kSharedLimit] = {};
  std::vector<uint16_t> unfenced;  // writes to each granule that were not fenced
  int64_t all_unfenced = 0;
  std::map<uint32_t, MBarrier> barriers;
  std::map<int, NamedBarrier> named;
  std::vector<Warp> warps;
};

struct Fiber {
  Block* block = nullptr;
  int number = 0;  // in the block
  Index index;
  ucontext_t context{};
  std::jmp_buf where;
  bool started = false;  // and can go on where it left
  std::unique_ptr<uint8_t[]> stack;
  bool done = true;
  std::function<bool()> ready;  // empty: can run
  const char* waits_for = "";
  Queue products, copies, stores;
  std::vector<uint32_t> unfenced;  // 16-byte granules of shared memory that it wrote to
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  std::jmp_buf scheduler;
  uint64_t version = 0;  // of all shared memory
  const std::function<void()>* body = nullptr;
  std::string error;

  std::vector<std::unique_ptr<Block>> cluster;
  Block* block = nullptr;  // whose thread, or whose copy, runs
  size_t alive = 0;        // threads that have not ended
  NamedBarrier cluster_barrier;
  unsigned largest_cluster = 1;

  Index grid, threads;
  uint32_t shared_bytes = 0;
  std::deque<std::pair<Block*, std::function<void()>>> posted;

  std::mt19937_64 random{1};
  Eagerness eagerness = Eagerness::kRandom;

  bool chance(int one_in) { return random() % static_cast<uint64_t>(one_in) == 0; }
};

}  // namespace emulator
