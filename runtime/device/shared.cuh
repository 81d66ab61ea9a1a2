// Instructions name shared memory by 32-bit addresses.
__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

