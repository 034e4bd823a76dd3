// The tests' GPU: blocks of threads as fibers of one CPU thread, so that barriers and exchanges in a warp work.
//
// Some blocks are resident at a time and advance in turns; with a seed, blocks, turns and threads come in an order
// drawn from it. A kernel whose result depends on any of these, or that lacks a barrier, gives itself away by
// another result.
// Shared memory starts as garbage. Threads that wait for each other in vain are an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace fillm::host {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Barrier {
    int arrived = 0;
    uint64_t passed = 0;
};

struct WarpState {
    Barrier barrier;
    uint64_t slots[2][32];  // of this exchange and of the one before, which slow lanes may still read
};

struct BlockState;

struct Fiber {
    ucontext_t context;  // of its first entry; later ones go through `place`, since swapcontext makes a system call
    jmp_buf place;
    bool begun = false;
    BlockState* block = nullptr;
    int thread = 0;
    const Barrier* waits = nullptr;  // for its `passed` to move on from `since`
    uint64_t since = 0;
    bool done = false;

    bool can_run() const { return !done && (waits == nullptr || waits->passed != since); }
};

struct BlockState {
    unsigned index = 0;
    int left = 0;  // threads that have not returned
    std::vector<Fiber> fibers;
    std::vector<int> order;
    std::vector<WarpState> warps;
    Barrier barrier;
    std::vector<uint64_t> memory;  // shared; 64-bit words for the alignment
};

// What the tests set.
struct Settings {
    int multiprocessors = 3;
    int resident = 1;   // blocks that advance in turns
    uint64_t seed = 0;  // 0: everything in its natural order
};

class Machine {
public:
    Settings settings;
    Index threads, blocks;

    void run(int64_t block_count, int thread_count, size_t shared, std::function<void()> body) {
        if (thread_count % 32) throw std::runtime_error("threads of a block must be whole warps");
        body_ = std::move(body);
        shared_ = shared;
        threads.x = static_cast<unsigned>(thread_count);
        blocks.x = static_cast<unsigned>(block_count);
        random_.seed(settings.seed);
        std::vector<unsigned> order(static_cast<size_t>(block_count));
        std::iota(order.begin(), order.end(), 0u);
        if (settings.seed) std::shuffle(order.begin(), order.end(), random_);
        std::vector<std::unique_ptr<BlockState>> resident;
        size_t next = 0;
        while (next < order.size() || !resident.empty()) {
            while (next < order.size() && resident.size() < static_cast<size_t>(settings.resident))
                resident.push_back(start(order[next++]));
            const size_t turn = settings.seed ? random_() % resident.size() : 0;
            if (!advance(*resident[turn]) && stuck(resident)) throw std::runtime_error("threads wait in vain");
            if (resident[turn]->left == 0) {
                finish(*resident[turn]);
                resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(turn));
            }
        }
    }

    Fiber& now() { return *now_; }

    void yield() {
        if (_setjmp(now_->place) == 0) _longjmp(scheduler_, 1);
    }

    // Waits until `expected` threads have come to the barrier.
    void arrive(Barrier& barrier, int expected) {
        if (++barrier.arrived == expected) {
            barrier.arrived = 0;
            ++barrier.passed;
            return;
        }
        now_->waits = &barrier;
        now_->since = barrier.passed;
        yield();
        now_->waits = nullptr;
    }

    // Gives a value to the warp and takes that of lane `from`.
    uint64_t exchange(uint64_t value, int from) {
        WarpState& warp = own_warp();
        uint64_t* slots = warp.slots[warp.barrier.passed % 2];
        slots[now_->thread % 32] = value;
        arrive(warp.barrier, 32);
        return slots[from];
    }

    // Gives a value to the warp and returns those of all lanes.
    const uint64_t* gather(uint64_t value) {
        WarpState& warp = own_warp();
        uint64_t* slots = warp.slots[warp.barrier.passed % 2];
        slots[now_->thread % 32] = value;
        arrive(warp.barrier, 32);
        return slots;
    }

    WarpState& own_warp() { return now_->block->warps[static_cast<size_t>(now_->thread / 32)]; }

private:
    static constexpr size_t kStack = 64 * 1024;

    std::unique_ptr<BlockState> start(unsigned index) {
        auto block = std::make_unique<BlockState>();
        block->index = index;
        block->left = static_cast<int>(threads.x);
        block->fibers.resize(threads.x);
        block->order.resize(threads.x);
        block->warps.resize(threads.x / 32);
        block->memory.assign(shared_ / 8 + 1, ~uint64_t(0));
        std::iota(block->order.begin(), block->order.end(), 0);
        if (settings.seed) std::shuffle(block->order.begin(), block->order.end(), random_);
        for (unsigned t = 0; t < threads.x; ++t) begin(*block, block->fibers[t], static_cast<int>(t));
        return block;
    }

    void begin(BlockState& block, Fiber& fiber, int thread) {
        fiber.block = &block;
        fiber.thread = thread;
        if (stacks_.empty()) stacks_.emplace_back(new unsigned char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks_.back().release();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        stacks_.pop_back();
        makecontext(&fiber.context, &Machine::enter, 0);
    }

    void finish(BlockState& block) {
        for (Fiber& fiber : block.fibers)
            stacks_.emplace_back(static_cast<unsigned char*>(fiber.context.uc_stack.ss_sp));
    }

    // Lets every thread of the block that can run do so until it waits; whether one could.
    bool advance(BlockState& block) {
        bool moved = false;
        for (int t : block.order) {
            Fiber& fiber = block.fibers[static_cast<size_t>(t)];
            if (!fiber.can_run()) continue;
            moved = true;
            now_ = &fiber;
            enter_or_resume();
        }
        return moved;
    }

    static bool stuck(const std::vector<std::unique_ptr<BlockState>>& resident) {
        for (const auto& block : resident)
            for (const Fiber& fiber : block->fibers)
                if (fiber.can_run()) return false;
        return true;
    }

    // Comes back when the fiber gives up its turn or ends.
    void enter_or_resume() {
        if (_setjmp(scheduler_)) return;
        if (now_->begun) _longjmp(now_->place, 1);
        now_->begun = true;
        setcontext(&now_->context);
    }

    static void enter();

    jmp_buf scheduler_;
    Fiber* now_ = nullptr;
    std::function<void()> body_;
    size_t shared_ = 0;
    std::mt19937_64 random_;
    std::vector<std::unique_ptr<unsigned char[]>> stacks_;
};

inline Machine machine;

inline void Machine::enter() {
    machine.body_();
    Fiber& fiber = machine.now();
    fiber.done = true;
    --fiber.block->left;
    machine.yield();
}

}  // namespace fillm::host
