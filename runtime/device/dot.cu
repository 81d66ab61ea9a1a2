// partial[block] is the block's share of the dot product of x and y, in double. Which thread adds which products is
// fixed, so the sum has the same bits each time.
extern "C" __global__ void dot(const float* x, const float* y, i64 n, double* partial) {
    __shared__ double shared[256];
    double sum = 0;
    EACH(i, n) sum += (double)x[i] * y[i];
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    if (!threadIdx.x) partial[blockIdx.x] = shared[0];
}
