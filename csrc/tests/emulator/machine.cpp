// longjmp() to another stack, which the checked one would take for an error.
#undef _FORTIFY_SOURCE

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "machine_state.h"

namespace emulator {
namespace {

Machine the_machine;
Machine& machine() { return the_machine; }

// Fibers change places by setjmp and longjmp: swapcontext() takes two system calls each time.
void leave_fiber() {
  Machine& m = machine();
  if (_setjmp(m.current->where) == 0) _longjmp(m.scheduler, 1);
}

void fiber_main() {
  while (true) {  // one thread after another
    Machine& m = machine();
    (*m.body)();
    Fiber& f = *m.current;
    if (!f.products.empty()) m.error = "a thread ended without waiting for its products";
    if (!f.stores.empty()) m.error = "a thread ended while its stores still read shared memory";
    f.done = true;
    leave_fiber();
  }
}

void enter_fiber(Fiber& f) {
  if (_setjmp(machine().scheduler) != 0) return;
  if (f.started) _longjmp(f.where, 1);
  f.started = true;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
  setcontext(&f.context);
}

void start(Fiber* f) {
  if (!f->done) f->started = false;  // left in the middle of a launch that failed
  f->done = false;
  f->ready = nullptr;
  f->products = Queue();
  f->copies = Queue();
  f->stores = Queue();
  f->unfenced.clear();
}

void run_posted() {
  Machine& m = machine();
  const size_t i = m.random() % m.posted.size();
  auto [block, work] = std::move(m.posted[i]);
  m.posted.erase(m.posted.begin() + static_cast<long>(i));
  m.block = block;
  work();
}

std::string deadlock() {
  std::map<std::string, int> waiting;
  for (const auto& f : machine().fibers) {
    if (!f->done) ++waiting[f->waits_for];
  }
  std::string text = "deadlock in block " + std::to_string(machine().cluster[0]->index.x) + ":";
  for (const auto& [what, count] : waiting) {
    text += " " + std::to_string(count) + " threads wait for " + what + ";";
  }
  return text;
}

void clear(Block& block, size_t warps) {
  ++machine().version;
  std::memset(block.shared, kPoison, sizeof(block.shared));
  block.unfenced.assign(sizeof(block.shared) / 16 + 1, 0);
  block.all_unfenced = 0;
  block.barriers.clear();
  block.named.clear();
  block.warps.assign(warps, Warp());
}

void run_cluster() {
  Machine& m = machine();
  for (auto& b : m.cluster) clear(*b, m.fibers.size() / m.cluster.size() / kWarp + 1);
  m.cluster_barrier = {};
  m.posted.clear();
  for (auto& f : m.fibers) start(f.get());
  m.alive = m.fibers.size();
  while (m.alive > 0) {
    bool progress = false;
    const size_t first = m.random() % m.fibers.size();
    for (size_t i = 0; i < m.fibers.size(); ++i) {
      Fiber& f = *m.fibers[(first + i) % m.fibers.size()];
      m.block = f.block;
      if (f.done || (f.ready && !f.ready())) continue;
      f.ready = nullptr;
      m.current = &f;
      enter_fiber(f);
      m.current = nullptr;
      progress = true;
      if (f.done) --m.alive;
      if (!m.error.empty()) return;
      const bool early = m.eagerness == Eagerness::kEarly;
      while (!m.posted.empty() && (early || (m.eagerness == Eagerness::kRandom && m.chance(4)))) {
        run_posted();
      }
    }
    if (progress) continue;
    if (!m.posted.empty()) {
      run_posted();
      continue;
    }
    // Stores that nobody waits for are read in the end.
    bool stored = false;
    for (auto& f : m.fibers) {
      if (f->stores.pending() > 0) {
        m.block = f->block;
        f->stores.advance(1);
        stored = true;
        break;
      }
    }
    if (!stored) {
      m.error = deadlock();
      return;
    }
  }
  if (!m.posted.empty()) m.error = "the block ended with copies in flight";
}

}  // namespace

const Index& thread_index() { return machine().current->index; }
const Index& block_index() { return machine().block->index; }
const Index& block_dim() { return machine().threads; }
const Index& grid_dim() { return machine().grid; }
int thread_number() { return machine().current->number; }
int lane() { return thread_number() % kWarp; }

void configure(uint64_t seed, Eagerness eagerness) {
  machine().random.seed(seed);
  machine().eagerness = eagerness;
  machine().largest_cluster = 1;
}

unsigned largest_cluster() { return machine().largest_cluster; }

void fail(const std::string& what) {
  Machine& m = machine();
  m.error = what;
  if (m.current == nullptr) throw std::runtime_error(what);
  leave_fiber();
  std::abort();  // never resumed
}

void launch(const Index& grid, const Index& block, uint32_t shared_bytes,
            const std::function<void()>& body, unsigned cluster) {
  Machine& m = machine();
  if (shared_bytes > kSharedLimit) {
    throw std::runtime_error("a launch asks for " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
  }
  m.grid = grid;
  m.threads = block;
  m.shared_bytes = shared_bytes;
  m.body = &body;
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (cluster == 0 || cluster > kClusterLimit || grid.z % cluster != 0) {
    throw std::runtime_error("a launch asks for clusters of " + std::to_string(cluster) + " of " +
                             std::to_string(grid.z) + " thread blocks");
  }
  m.largest_cluster = std::max(m.largest_cluster, cluster);
  while (m.cluster.size() < cluster) m.cluster.push_back(std::make_unique<Block>());
  m.cluster.resize(cluster);
  while (m.fibers.size() < cluster * threads) {
    m.fibers.push_back(std::make_unique<Fiber>());
    m.fibers.back()->stack = std::make_unique<uint8_t[]>(kStackBytes);
  }
  m.fibers.resize(cluster * threads);
  for (size_t i = 0; i < m.fibers.size(); ++i) {
    const auto n = static_cast<unsigned>(i % threads);
    m.fibers[i]->block = m.cluster[i / threads].get();
    m.fibers[i]->number = static_cast<int>(n);
    m.fibers[i]->index = {n % block.x, n / block.x % block.y, n / (block.x * block.y)};
  }
  for (unsigned z = 0; z < grid.z; z += cluster) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        for (unsigned i = 0; i < cluster; ++i) m.cluster[i]->index = {x, y, z + i};
        m.error.clear();
        run_cluster();
        if (!m.error.empty()) {
          m.current = nullptr;
          throw std::runtime_error(m.error);
        }
      }
    }
  }
}

uint8_t* dynamic_shared() { return machine().block->shared + kDynamicBase; }

uint32_t shared_address(const void* p) {
  const auto* byte = static_cast<const uint8_t*>(p);
  const Block& block = *machine().block;
  const uint8_t* begin = block.shared;
  if (byte >= begin && byte < begin + sizeof(block.shared)) {
    return static_cast<uint32_t>(byte - begin);
  }
  return 0x40000000u | static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) & 0x3fffffffu);
}

const uint8_t* shared_view(uint32_t address, uint32_t bytes) {
  const Machine& m = machine();
  if (address < kDynamicBase || address + bytes > kDynamicBase + m.shared_bytes) {
    fail("shared memory [" + std::to_string(address) + ", +" + std::to_string(bytes) +
         ") lies outside the " + std::to_string(m.shared_bytes) + " bytes at " +
         std::to_string(kDynamicBase));
  }
  return m.block->shared + address;
}

uint8_t* shared_bytes(uint32_t address, uint32_t bytes) {
  ++machine().version;
  return const_cast<uint8_t*>(shared_view(address, bytes));
}

const void* shared_memory() { return machine().block->shared; }
uint64_t shared_version() { return machine().version; }

void mark_written(uint32_t address, uint32_t bytes) {
  Machine& m = machine();
  for (uint32_t g = address / 16; g <= (address + bytes - 1) / 16; ++g) {
    m.current->unfenced.push_back(g);
    ++m.block->unfenced[g];
    ++m.block->all_unfenced;
  }
}

void fence_async() {
  Machine& m = machine();
  for (uint32_t g : m.current->unfenced) --m.block->unfenced[g];
  m.block->all_unfenced -= static_cast<int64_t>(m.current->unfenced.size());
  m.current->unfenced.clear();
}

void check_fenced(uint32_t address, uint32_t bytes, const char* reader) {
  const Block& block = *machine().block;
  if (block.all_unfenced == 0) return;
  for (uint32_t g = address / 16; g <= (address + bytes - 1) / 16; ++g) {
    if (block.unfenced[g] > 0) {
      fail(std::string(reader) + " reads shared memory that was written without a proxy fence");
    }
  }
}

void wait_until(const std::function<bool()>& ready, const char* what) {
  Machine& m = machine();
  if (ready() && !m.chance(8)) return;
  m.current->ready = ready;
  m.current->waits_for = what;
  leave_fiber();
}

Queue& products() { return machine().current->products; }
Queue& copies() { return machine().current->copies; }
Queue& bulk_stores() { return machine().current->stores; }

void maybe_advance(Queue& queue) {
  Machine& m = machine();
  if (m.eagerness == Eagerness::kEarly) queue.advance(queue.pending());
  if (m.eagerness == Eagerness::kRandom && m.chance(3)) queue.advance(1);
}

void post(std::function<void()> work) {
  machine().posted.emplace_back(machine().block, std::move(work));
}

void barrier_init(uint32_t address, int arrivals) {
  machine().block->barriers[address] = {arrivals, arrivals, 0, 0};
}

namespace {
MBarrier& barrier(uint32_t address) {
  auto& barriers = machine().block->barriers;
  const auto at = barriers.find(address);
  if (at == barriers.end()) fail("an mbarrier is used before it is initialised");
  return at->second;
}
}  // namespace

void barrier_arrive(uint32_t address, int count) {
  MBarrier& b = barrier(address);
  b.pending -= count;
  if (b.pending < 0) fail("an mbarrier gets more arrivals than it expects in a phase");
  b.check_bytes();
  b.settle();
}
void barrier_expect(uint32_t address, uint32_t bytes) {
  barrier(address).bytes += bytes;
  barrier_arrive(address, 1);
}
void barrier_complete(uint32_t address, uint32_t bytes) {
  MBarrier& b = barrier(address);
  b.bytes -= bytes;
  b.check_bytes();
  b.settle();
}
void barrier_wait(uint32_t address, uint32_t parity) {
  const MBarrier* b = &barrier(address);
  wait_until([b, parity] { return b->phase != parity; }, "an mbarrier");
}

void named_arrive(int id, int threads) {
  NamedBarrier& b = machine().block->named[id];
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.generation;
  }
}
void named_sync(int id, int threads) {
  const NamedBarrier* b = &machine().block->named[id];
  const uint64_t before = b->generation;
  named_arrive(id, threads);
  wait_until([b, before] { return b->generation != before; },
             id == 0 ? "__syncthreads" : "a named barrier");
}

void cluster_sync() {
  Machine& m = machine();
  NamedBarrier* b = &m.cluster_barrier;
  const uint64_t before = b->generation;
  ++b->arrived;
  // Threads that have ended are not waited for.
  const auto passed = [&m, b, before] {
    if (b->generation == before && b->arrived == static_cast<int>(m.alive)) {
      b->arrived = 0;
      ++b->generation;
    }
    return b->generation != before;
  };
  wait_until(passed, "its cluster");
}

namespace {
// As the cluster's block of that number, which must not have ended.
template <typename F>
auto in_block(unsigned block, F f) {
  Machine& m = machine();
  if (block >= m.cluster.size()) fail("a cluster has no such thread block");
  Block* other = m.cluster[block].get();
  if (std::none_of(m.fibers.begin(), m.fibers.end(),
                   [&](const auto& f) { return f->block == other && !f->done; })) {
    fail("shared memory of a thread block that has ended");
  }
  struct Back {
    Block* mine = std::exchange(machine().block, nullptr);
    ~Back() { machine().block = mine; }
  } back;
  m.block = other;
  return f();
}
}  // namespace

uint8_t* shared_bytes_of(unsigned block, uint32_t address, uint32_t bytes) {
  return in_block(block, [&] { return shared_bytes(address, bytes); });
}
void barrier_arrive_of(unsigned block, uint32_t address) {
  in_block(block, [&] { barrier_arrive(address, 1); });
}

const WarpValues& warp_exchange(const LaneValues& mine) {
  Warp& w = machine().block->warps[static_cast<size_t>(thread_number() / kWarp)];
  w.given[static_cast<size_t>(lane())] = mine;
  const uint64_t before = w.generation;
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    w.taken = w.given;
    ++w.generation;
  } else {
    wait_until([&w, before] { return w.generation != before; }, "the other lanes of its warp");
  }
  return w.taken;
}

}  // namespace emulator
