// Threads. Compiled once, for the oldest instruction set; the kernels pass functions compiled for theirs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <string>
#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace fastvae {

using i64 = std::int64_t;
using address = std::uintptr_t;

// Below this many elements a thread costs more than it saves (measured: docs/log.md).
constexpr i64 kElementsPerThread = 20000;

// Where macOS's torch has its OpenMP runtime: an extension's libraries are not visible there by name.
inline std::string& openmp_library() {
  static std::string path;
  return path;
}

// The OpenMP runtime that torch loaded into this process, whichever compiler built this file. None is linked:
// a second one would compete for the cores. GNU's, LLVM's and Intel's runtimes all have these functions on
// Linux, LLVM's on macOS; without them one thread computes.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;

  OpenMP() {
#ifdef __linux__
    // Torch loads its runtime with global visibility; where it did not, GNU's is opened by name, which finds
    // a loaded one.
    if (!find(dlopen(nullptr, RTLD_LAZY))) find(dlopen("libgomp.so.1", RTLD_LAZY));
#elif defined(__APPLE__)
    find(dlopen(openmp_library().c_str(), RTLD_LAZY | RTLD_NOLOAD));
#endif
  }

 private:
#if defined(__linux__) || defined(__APPLE__)
  bool find(void* library) {
    if (library == nullptr) return false;
    thread = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
    threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads"));
    void* function = thread && threads ? dlsym(library, "GOMP_parallel") : nullptr;
    parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(function);
    return parallel != nullptr;
  }
#endif
};
inline const OpenMP& openmp() {
  static const OpenMP runtime;
  return runtime;
}

// Runs work(context, begin, end) on contiguous parts of [0, units), and rethrows one part's exception. A
// part's bounds depend on the number of threads, so a unit's result must not depend on its neighbours.
inline void parallel_ranges(int threads, i64 units, i64 elements, void (*work)(void*, i64, i64),
                            void* context) {
  struct Team {
    i64 parts, units;
    void (*work)(void*, i64, i64);
    void* context;
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // the first one: an exception may not leave a parallel region
  };
  Team team{std::min<i64>({static_cast<i64>(threads), units, elements / kElementsPerThread}), units, work,
            context};
  // One thread opens no parallel region: it would hang in a process forked after OpenMP ran.
  if (team.parts <= 1 || openmp().parallel == nullptr) {
    if (units > 0) work(context, 0, units);
    return;
  }
  // The team may be smaller than requested.
  auto run = [](void* p) {
    Team& t = *static_cast<Team*>(p);
    for (i64 part = openmp().thread(); part < t.parts && !t.failed; part += openmp().threads()) {
      try {
        t.work(t.context, t.units * part / t.parts, t.units * (part + 1) / t.parts);
      } catch (...) {
        if (!t.failed.exchange(true)) t.error = std::current_exception();
      }
    }
  };
  openmp().parallel(run, &team, static_cast<unsigned>(team.parts), 0);
  if (team.error) std::rethrow_exception(team.error);
}

}  // namespace fastvae
