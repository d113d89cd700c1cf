// A CUDA thread block, or a cluster of them, on the CPU, for running the real kernels without a
// GPU.
//
// Every CUDA thread is a fiber. Fibers switch only where the hardware could make a thread wait:
// barriers, mbarriers, warp-wide instructions, waits for asynchronous copies and products. What is
// asynchronous on the chip is asynchronous here: a TMA copy or a wgmma product happens at some
// later moment, chosen at random from a seed, but not after something waited for it. So a missing
// wait, a stage released too early or an unfenced write shows as a wrong result or as an error:
//   * the target of a copy is poisoned with NaN from its start until it lands;
//   * generic writes to shared memory that the writer has not fenced must not be read by TMA or
//     wgmma;
//   * every access must lie in the shared memory the launch asked for;
//   * when nobody can go on, the launch fails with what each thread waits for.
// Timing, register limits and the weak memory model are not modelled.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr uint32_t kSharedLimit = 232448;  // bytes a Hopper thread block can have
constexpr unsigned kClusterLimit = 8;      // that every Hopper GPU can place
constexpr int kWarp = 32;

// What the current fiber sees.
const Index& thread_index();
const Index& block_index();
const Index& block_dim();
const Index& grid_dim();
int thread_number();  // in the block
int lane();

// How the seed decides: never early (as late as allowed), at once, or at random.
enum class Eagerness { kLate, kEarly, kRandom };
void configure(uint64_t seed, Eagerness eagerness);
unsigned largest_cluster();  // of the launches since then

// Runs `body` once for each thread of each block; `cluster` blocks that follow each other in z run
// side by side, all others one after the other. Throws std::runtime_error on any violation.
void launch(const Index& grid, const Index& block, uint32_t shared_bytes,
            const std::function<void()>& body, unsigned cluster = 1);

[[noreturn]] void fail(const std::string& what);

// Shared memory. Addresses of dynamic memory start at kDynamicBase; static __shared__ variables
// have addresses of their own, good for barriers only.
constexpr uint32_t kDynamicBase = 1040;  // not rounder than the hardware promises
uint8_t* dynamic_shared();
uint32_t shared_address(const void* p);
uint8_t* shared_bytes(uint32_t address, uint32_t bytes);       // checked; to be written to at once
const uint8_t* shared_view(uint32_t address, uint32_t bytes);  // checked; to be read
// What was read of this thread block's shared memory holds as long as both stay the same.
const void* shared_memory();
uint64_t shared_version();
void mark_written(uint32_t address, uint32_t bytes);  // a generic write by this thread
void fence_async();                                   // this thread's writes are fenced now
void check_fenced(uint32_t address, uint32_t bytes, const char* reader);

// Switches to other fibers until `ready()`; `what` names it in a deadlock report.
void wait_until(const std::function<bool()>& ready, const char* what);

// Work of a thread that completes some time after it was issued, in order within a queue.
class Queue {
 public:
  void issue(std::function<void()> work) { open_.push_back(std::move(work)); }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t pending) {
    while (groups_.size() > pending) run_oldest();
  }
  // Completes up to `count` groups early.
  void advance(size_t count) {
    while (count-- > 0 && !groups_.empty()) run_oldest();
  }
  size_t pending() const { return groups_.size(); }
  bool empty() const { return groups_.empty() && open_.empty(); }

 private:
  void run_oldest() {
    std::vector<std::function<void()>> group = std::move(groups_.front());
    groups_.erase(groups_.begin());
    for (auto& work : group) work();
  }
  std::vector<std::function<void()>> open_;
  std::vector<std::vector<std::function<void()>>> groups_;
};
Queue& products();     // wgmma of the current thread
Queue& copies();       // cp.async of the current thread
Queue& bulk_stores();  // TMA stores of the current thread, until shared memory has been read
void maybe_advance(Queue& queue);  // lets the seed complete some of it now

// A copy engine's work: runs at a moment of the scheduler's choice.
void post(std::function<void()> work);

// mbarriers, by shared address.
void barrier_init(uint32_t address, int arrivals);
void barrier_arrive(uint32_t address, int count);
void barrier_arrive_of(unsigned block, uint32_t address);  // of the cluster's
void barrier_expect(uint32_t address, uint32_t bytes);
void barrier_complete(uint32_t address, uint32_t bytes);
void barrier_wait(uint32_t address, uint32_t parity);

// Named barriers (0 is __syncthreads).
void named_arrive(int id, int threads);
void named_sync(int id, int threads);

// All threads of the cluster that have not ended.
void cluster_sync();
// Shared memory of the cluster's block of that number, which must not have ended; checked. Writes
// to it are not looked for by check_fenced().
uint8_t* shared_bytes_of(unsigned block, uint32_t address, uint32_t bytes);

// Warp-wide exchange: every lane gives up to six values and sees those of all 32, until its next
// exchange.
using LaneValues = std::array<uint32_t, 6>;
using WarpValues = std::array<LaneValues, kWarp>;
const WarpValues& warp_exchange(const LaneValues& mine);

// Address after a swizzle of 128 (or 64) bytes: the 16-byte chunk within the span is xored with the
// row of 128 bytes it lies in.
inline uint32_t swizzle(uint32_t address, int span) {
  return span == 128 ? address ^ ((address >> 7 & 7) << 4) : address ^ ((address >> 7 & 3) << 4);
}

}  // namespace emulator
