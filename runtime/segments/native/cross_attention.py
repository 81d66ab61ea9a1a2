"""Cross-attention to text and image by kernels of our own: one for every GPU with FP8, one for Hopper."""

from trt_wan.runtime.device.kernels import ATTENTION, read_source


def multiply(keys: int) -> str:
    """CUDA: 64 rows by `keys` keys, both in shared memory, 16 channels at a time (PTX ISA, wgmma)."""
    sums = keys // 2
    names = ", ".join(f"%{i}" for i in range(sums))
    outputs = ", ".join(f'"+f"(s[{i // 4}][{i % 4}])' for i in range(sums))
    return f"""
template <> struct Multiply<{keys}> {{
    static __device__ void run(float (&s)[{keys // 8}][4], u64 a, u64 b, int add) {{
        asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{sums + 2}, 0; "
            "wgmma.mma_async.sync.aligned.m64n{keys}k16.f32.bf16.bf16 {{{names}}}, "
            "%{sums}, %{sums + 1}, p, 1, 1, 0, 0; }}"
            : {outputs} : "l"(a), "l"(b), "r"(add));
    }}
}};"""


def add_values(columns: int, name: str) -> str:
    sums = columns // 2
    names = ", ".join(f"%{i}" for i in range(sums))
    outputs = ", ".join(f'"+f"(s[first + {i // 4}][{i % 4}])' for i in range(sums))
    a = ", ".join(f"%{sums + i}" for i in range(4))
    return f"""
template <int first>
__device__ void {name}(float (&s)[16][4], const u32 (&a)[4], u64 b, int add) {{
    asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{sums + 5}, 0; "
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{names}}}, "
        "{{{a}}}, %{sums + 4}, p, 1, 1, 1; }}"
        : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}}"""


def source(sizes: set[int]) -> str:
    parts = [ATTENTION, "template <int N> struct Multiply;", *(multiply(n) for n in sorted(sizes))]
    parts += [add_values(128, "add_128"), add_values(64, "add_64")]
    parts.append("""
__device__ u64 matrix(u32 address, u32 slab);
template <int N>
__device__ void add_values(float (&out)[16][4], const u32 (&p)[N / 16][4], u32 values, bool add) {
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
#if VALUES_VARIANT == 2
        add_64<0>(out, p[n], matrix(values + n * 2048, 1024), n > 0 || add);
        add_64<8>(out, p[n], matrix(values + N * 128 + n * 2048, 1024), n > 0 || add);
#else
        add_128<0>(out, p[n], matrix(values + n * 2048, N * 128), n > 0 || add);
#endif
    }
}
""")
    parts.append("__device__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }\n__device__ float low(u32 pair) { return __uint_as_float(pair << 16); }\n")
    return "\n".join(parts) + read_source(__package__, "cross_attention_hopper.cu")
