#include "machine/pool.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "varptq.h"

namespace vq {
namespace {

// A region follows the last one within microseconds while a layer runs, and waking a sleeping
// thread costs tens of them.
constexpr auto kSpin = std::chrono::microseconds(30);

// The next task of one worker's part; on its own cache line.
struct alignas(64) Part {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// What is used of an OpenMP runtime, libgomp's entry for a parallel region.
struct OpenMP {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread)() = nullptr;
};

// The libgomp this process has loaded, under whatever name a wheel gave it. Other systems' torch
// brings another runtime, if any.
OpenMP loaded_openmp() {
  OpenMP found;
#if defined(__linux__)
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        if (!std::strstr(info->dlpi_name, "libgomp")) return 0;
        void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
        if (!library) return 0;
        auto* openmp = static_cast<OpenMP*>(data);
        openmp->parallel =
            reinterpret_cast<decltype(OpenMP::parallel)>(dlsym(library, "GOMP_parallel"));
        openmp->thread =
            reinterpret_cast<decltype(OpenMP::thread)>(dlsym(library, "omp_get_thread_num"));
        return 1;
      },
      &found);
#endif
  return found;
}

// libgomp's team does not survive a fork and hangs in the child.
std::atomic<bool> forked{false};

// Null where there is none to use.
const OpenMP* openmp() {
  static const OpenMP found = loaded_openmp();
  return found.parallel && found.thread && !forked.load() ? &found : nullptr;
}

class Pool {
 public:
  // False where another thread uses the pool.
  bool run(int64_t tasks, int threads, Task task, void* context) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy) return false;
    const OpenMP* team = openmp();
    if (!team) threads = start_workers(threads);
    if (parts_count_ < threads) {
      parts_.reset(new Part[threads]);
      parts_count_ = threads;
    }
    for (int w = 0; w < threads; ++w) {
      parts_[w].next.store(tasks * w / threads, std::memory_order_relaxed);
      parts_[w].end = tasks * (w + 1) / threads;
    }
    task_ = task;
    context_ = context;
    active_ = threads;
    if (team)
      team->parallel(&Pool::member, this, static_cast<unsigned>(threads), 0);
    else
      run_on_workers(threads);
    return true;
  }

 private:
  // One thread of a team, which may be smaller than asked for: the others' parts are taken over.
  static void member(void* self) {
    auto* pool = static_cast<Pool*>(self);
    pool->work(openmp()->thread(), pool->active_);
  }

  void run_on_workers(int threads) {
    running_.store(threads - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      region_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(0, threads);
    wait_for_workers();
  }

  // How many threads there are to work with, the caller among them.
  int start_workers(int threads) {
    while (static_cast<int>(workers_.size()) + 1 < threads) {
      const int id = static_cast<int>(workers_.size()) + 1;
      const uint64_t seen = region_.load(std::memory_order_relaxed);
      try {
        workers_.emplace_back([this, id, seen] { loop(id, seen); });
        workers_.back().detach();
      } catch (const std::system_error&) {
        return id;
      }
    }
    return threads;
  }

  void loop(int id, uint64_t seen) {
    for (;;) {
      const int threads = wait_for_region(seen);
      if (id >= threads) continue;
      work(id, threads);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  int wait_for_region(uint64_t& seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (region_.load(std::memory_order_acquire) == seen &&
           std::chrono::steady_clock::now() < until)
      relax();
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return region_.load(std::memory_order_relaxed) != seen; });
    seen = region_.load(std::memory_order_relaxed);
    return active_;
  }

  void wait_for_workers() {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (running_.load(std::memory_order_acquire) != 0 &&
           std::chrono::steady_clock::now() < until)
      relax();
    if (running_.load(std::memory_order_acquire) == 0) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_.load(std::memory_order_acquire) == 0; });
  }

  void work(int id, int threads) {
    for (int step = 0; step < threads; ++step) {
      Part& part = parts_[(id + step) % threads];
      for (;;) {
        const int64_t index = part.next.fetch_add(1, std::memory_order_relaxed);
        if (index >= part.end) break;
        task_(context_, index, id);
      }
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::unique_ptr<Part[]> parts_;
  int parts_count_ = 0;
  int active_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  std::atomic<uint64_t> region_{0};
  std::atomic<int> running_{0};
};

std::atomic<Pool*> the_pool{nullptr};
thread_local bool inside_task = false;

// Threads do not survive a fork: the child starts with a new pool. The old one is never freed,
// since its mutexes may be locked, nor is the last one, since its workers wait in it until the end.
void forget_pool() {
  forked.store(true);
  the_pool.store(nullptr);
}

Pool& pool() {
  static std::mutex making;
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found) return *found;
  std::lock_guard<std::mutex> lock(making);
#if defined(_WIN32)
  (void)forget_pool;  // no process forks there
#else
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
#endif
  if (!the_pool.load()) the_pool.store(new Pool);
  return *the_pool.load();
}

int quota_of(const char* quota_file, const char* period_file) {
  long long quota = -1, period = 0;
  if (FILE* file = std::fopen(quota_file, "r")) {
    // cgroup 2 has both in one file, and the word "max" for no limit.
    const int read = std::fscanf(file, "%lld %lld", &quota, &period);
    std::fclose(file);
    if (read < 1) return 0;
  }
  if (period_file) {
    if (FILE* file = std::fopen(period_file, "r")) {
      if (std::fscanf(file, "%lld", &period) != 1) period = 0;
      std::fclose(file);
    }
  }
  return quota > 0 && period > 0 ? static_cast<int>((quota + period - 1) / period) : 0;
}

// Cores the scheduler may put this process on, cut to the container's CPU quota: threads beyond it
// stop each other.
int available() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = CPU_COUNT(&set);
#endif
  static const int quota =
      std::max(quota_of("/sys/fs/cgroup/cpu.max", nullptr),
               quota_of("/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
                        "/sys/fs/cgroup/cpu/cpu.cfs_period_us"));
  return std::max(1, quota > 0 ? std::min(quota, cores) : cores);
}

}  // namespace

int usable_threads(int asked) { return std::max(1, std::min(asked, available())); }

void parallel(int64_t tasks, int threads, Task task, void* context) {
  threads = static_cast<int>(std::min<int64_t>(threads > 1 ? usable_threads(threads) : 1, tasks));
  if (threads > 1 && !inside_task) {
    inside_task = true;
    const bool done = pool().run(tasks, threads, task, context);
    inside_task = false;
    if (done) return;
  }
  for (int64_t index = 0; index < tasks; ++index) task(context, index, 0);
}

}  // namespace vq

extern "C" int32_t vq_threads(int32_t asked) { return vq::usable_threads(asked); }
