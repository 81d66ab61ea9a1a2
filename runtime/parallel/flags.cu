// Streams without memory operations signal and wait by kernels of one thread. Values wrap, as those of CUDA do.
extern "C" __global__ void set_flag(u32* flag, u32 value) {
    __threadfence_system();  // all that the stream did before
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

extern "C" __global__ void wait_flag(const u32* flag, u32 value) {
    u32 now;
    do asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(now) : "l"(flag) : "memory");
    while ((int)(now - value) < 0);
}
