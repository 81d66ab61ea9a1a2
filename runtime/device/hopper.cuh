// Hopper's own instructions, as functions.

__device__ u8* shared_memory() {
    extern __shared__ u8 shared[];
    return shared;
}

__device__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }  // for TMA
__device__ bool barrier_try(u32 barrier, int parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}
__device__ void barrier_wait(u32 barrier, int parity) {
    while (!barrier_try(barrier, parity)) {}
}

template <int BARRIER, int THREADS>
__device__ void sync_threads() { asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS) : "memory"); }

// Of each thread of a warpgroup. All of a block's together must be what it began with.
template <int COUNT>
__device__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// Copies bytes, a multiple of 16, to shared memory and counts them at the barrier.
__device__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// TMA: copies a box of a tensor to shared memory, zeros where it is outside, and counts its bytes at the barrier.
struct alignas(64) Map { u64 words[16]; };  // CUtensorMap

__device__ void load_box(u32 to, const void* map, u32 barrier, int x0, int x1, int x2, int x3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3) : "memory");
}
__device__ void load_box(u32 to, const void* map, u32 barrier, int x0, int x1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(x0), "r"(x1) : "memory");
}

__device__ void prefetch(const void* from, int bytes) {  // to the L2 cache; a multiple of 16
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

__device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS>  // that may still be under way
__device__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory"); }
__device__ void written(float& sum) { asm volatile("" : "+f"(sum)); }  // by wgmma: not to be read before this

__device__ float tanh_nearly(float x) {  // off by 2^-11
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
