// Threads and their memory, for drivers: not for files compiled per instruction set. Work is cut by sizes alone, never by the number of threads, so bits do not depend on it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace fillm {

// Calls body(begin, end) for consecutive pieces of [0, count), on up to `threads` threads.
template <class Body>
void parallel(int64_t count, int64_t piece, int threads, const Body& body) {
    const int64_t pieces = (count + piece - 1) / piece;
    const int team = static_cast<int>(std::min<int64_t>(pieces, std::max(threads, 1)));
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t p; (p = next.fetch_add(1, std::memory_order_relaxed)) < pieces;)
            body(p * piece, std::min(count, (p + 1) * piece));
    };
    if (team <= 1) {
        work();
        return;
    }
#pragma omp parallel num_threads(team)
    work();
}

// Memory of one thread, 64-byte aligned, kept between calls: a fresh block per call would be paid for in page faults.
// Slot 0 is the calling thread's for a whole call, slots 1 and 2 those of a work item, which may run on the same thread;
// slot 3 is for what a driver keeps while it calls another one.
template <int SLOT>
void* thread_memory(size_t bytes) {
    struct Block {
        std::unique_ptr<unsigned char[]> memory;
        size_t bytes = 0;
    };
    thread_local Block block;
    if (block.bytes < bytes) {
        block.memory.reset(new unsigned char[bytes + 64]);
        block.bytes = bytes;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(block.memory.get());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

inline void* scratch(size_t bytes) { return thread_memory<0>(bytes); }
inline void* kept_scratch(size_t bytes) { return thread_memory<3>(bytes); }
inline void* item_scratch(size_t bytes) { return thread_memory<1>(bytes); }

}  // namespace fillm
