// probe: says which code the driver picked from the fatbin, as __CUDA_ARCH__ (900 for sm_90a). One thread.

extern "C" __global__ void probe(int* arch) {
#ifdef __CUDA_ARCH__
    *arch = __CUDA_ARCH__;
#endif
}
