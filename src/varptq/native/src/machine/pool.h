// Threads of the native core.
//
// Regions run on the team of torch's OpenMP (libgomp) where that is loaded: its workers go on
// spinning for a while after each region of torch, and a thread of ours would share a core with one.
// Else on a pool of our own, whose workers sleep between regions, so that torch has the
// machine to itself while it computes. Worker w starts with the w-th of equal consecutive parts of
// the tasks, the same part in every call, so that weights stay near one core; who is done takes
// what others have left.
#pragma once

#include <cstdint>

namespace vq {

// worker: 0 .. threads - 1, different for tasks that run at the same time within one call.
using Task = void (*)(void* context, int64_t index, int worker);

// Runs task(context, i, worker) for i in 0 .. tasks - 1 and returns when all are done. A call from
// inside a task, or while another thread of the process uses the pool, runs on the calling thread
// alone. Tasks must not throw.
void parallel(int64_t tasks, int threads, Task task, void* context);

// min(asked, cores this process may use, CPU quota of its cgroup), at least 1.
int usable_threads(int asked);

template <class Function>
void parallel_for(int64_t tasks, int threads, Function& function) {
  parallel(
      tasks, threads,
      [](void* context, int64_t index, int worker) {
        (*static_cast<Function*>(context))(index, worker);
      },
      &function);
}

}  // namespace vq
