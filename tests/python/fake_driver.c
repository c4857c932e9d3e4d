/* A libcuda.so.1 for machines without one: it has one GPU, finds every kernel, and writes each launch to $FAKE_CUDA_LOG instead of running
   it. It shows what the launcher passes; it computes nothing. FAKE_CUDA_* variables make it old, or a GPU of another kind.
   With RUN_KERNELS it hands each launch to tests/emulated/driver.cpp instead. */
#include "params.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct Kernel {
    char name[64];
};
static struct Kernel kernels[64];
static int kernel_count;

/* CUlaunchAttribute with the value clusterDim. */
struct Attribute {
    unsigned id, padding, cluster[3], rest[13];
};

struct Config {
    unsigned grid[3], block[3], shared;
    void* stream;
    const struct Attribute* attributes;
    unsigned attribute_count;
};

static int number(const char* variable, int otherwise) {
    const char* text = getenv(variable);
    return text ? atoi(text) : otherwise;
}

static size_t parameter_bytes(const char* name) {
    static const struct {
        const char* prefix;
        size_t bytes;
    } known[] = {
        {"probe", sizeof(void*)},
        {"prepare_block", sizeof(struct PrepareBlockParams)},
        {"kv_inject", sizeof(struct KvInjectParams)},
        {"block_attention", sizeof(struct BlockAttentionParams)},
        {"sample_", sizeof(struct SampleRowsParams)},
        {"accept", sizeof(struct AcceptParams)},
        {"tree_top_k", sizeof(struct TreeTopKParams)},
        {"tree_build", sizeof(struct TreeBuildParams)},
        {"compact_kv", sizeof(struct CompactKvParams)},
        {"delta_", sizeof(struct DeltaRuleParams)},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strncmp(name, known[i].prefix, strlen(known[i].prefix)) == 0) return known[i].bytes;
    return 0;
}

static FILE* log_file(void) {
    const char* path = getenv("FAKE_CUDA_LOG");
    return path ? fopen(path, "a") : NULL;
}

int cuInit(unsigned flags) { return (int)flags; }
int cuDriverGetVersion(int* version) { return *version = number("FAKE_CUDA_VERSION", 13000), 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGetName(char* name, int size, int device) { return snprintf(name, (size_t)size, "Fake %d", device), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    int capability = number("FAKE_CUDA_CAPABILITY", 90);
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 97 ? 232448
        : attribute == 120                                                                           ? capability >= 90
                                                                                                     : 132;
    return device;
}
/* Blocks of a cluster, 1 without; 0 where no device takes the launch. */
static unsigned cluster_of(const struct Config* c) {
    if (!c->attribute_count) return 1;
    const struct Attribute* a = c->attributes;
    unsigned z = a->cluster[2];
    int whole = c->attribute_count == 1 && a->id == 4 && a->cluster[0] == 1 && a->cluster[1] == 1 && z > 1 && z <= 8;
    return whole && c->grid[2] % z == 0 && number("FAKE_CUDA_CAPABILITY", 90) >= 90 ? z : 0;
}
/* FAKE_CUDA_CLUSTERS: how many there is room for. */
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const struct Config* c) {
    if (!function || cluster_of(c) < 2) return 1;
    return *clusters = number("FAKE_CUDA_CLUSTERS", 16), 0;
}
int cuGetErrorName(int code, const char** text) { return *text = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_FAKE", 0; }
int cuGetErrorString(int code, const char** text) { return *text = code == 1 ? "invalid argument" : "made up", 0; }
/* With FAKE_CUDA_NO_CONTEXT a thread has none until it is given a device's primary one; 2: it cannot be. */
static _Thread_local int entered = -1;
static const char primary[16];

int cuCtxGetDevice(int* device) {
    if (number("FAKE_CUDA_NO_CONTEXT", 0) && entered < 0) return 201;
    return *device = entered < 0 ? number("FAKE_CUDA_CURRENT", 0) : entered, 0;
}
int cuDevicePrimaryCtxRetain(const void** context, int device) {
    if (number("FAKE_CUDA_NO_CONTEXT", 0) == 2) return 2;
    return *context = primary + device, 0;
}
int cuCtxSetCurrent(const char* context) { return entered = (int)(context - primary), 0; }
int cuLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
    /* The header of a fatbin. */
    const unsigned magic = 0xBA55ED50;
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    if ((size_t)code % 8 || memcmp(code, &magic, sizeof magic)) return 1;
    /* As many loads fail for want of memory. */
    static int failed;
    if (failed++ < number("FAKE_CUDA_LOADS_FAIL", 0)) return 2;
    FILE* log = log_file();
    if (log) fprintf(log, "{\"load\": true}\n"), fclose(log);
    return *library = (void*)kernels, 0;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    if (library != kernels || kernel_count == 64) return 1;
    strncpy(kernels[kernel_count].name, name, sizeof kernels[0].name - 1);
    return *kernel = &kernels[kernel_count++], 0;
}
int cuKernelGetParamInfo(struct Kernel* kernel, size_t index, size_t* offset, size_t* size) {
    *offset = 0;
    *size = parameter_bytes(kernel->name) + (size_t)number("FAKE_CUDA_EXTRA_BYTES", 0);
    return (int)index;
}
int cuKernelGetFunction(void** function, void* kernel) { return *function = kernel, 0; }
int cuKernelGetAttribute(int* value, int attribute, void* kernel, int device) {
    (void)kernel;
    /* FAKE_CUDA_CODE: the architecture that the code was written for. */
    return *value = attribute == 4 ? 32 : attribute == 5 ? number("FAKE_CUDA_CODE", 90) : 0, device;
}
int cuKernelSetAttribute(int attribute, int value, struct Kernel* kernel, int device) {
    FILE* log = log_file();
    if (log) fprintf(log, "{\"set\": \"%s\", \"attribute\": %d, \"value\": %d}\n", kernel->name, attribute, value), fclose(log);
    return device;
}
#ifdef RUN_KERNELS
int run_kernel(const char* name, const void* parameters, unsigned cluster);
#endif

int cuLaunchKernelEx(const struct Config* c, struct Kernel* kernel, void** parameters, void** extra) {
    if (number("FAKE_CUDA_NO_BINARY", 0)) return 209;
    unsigned cluster = cluster_of(c);
    if (number("FAKE_CUDA_REFUSE", 0) || !cluster) return 1;
#ifdef RUN_KERNELS
    return run_kernel(kernel->name, parameters[0], cluster);
#endif
    FILE* log = log_file();
    if (!log || extra) return 1;
    fprintf(log, "{\"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"cluster\": %u, \"stream\": %zu, \"parameters\": \"",
            kernel->name, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared, cluster, (size_t)c->stream);
    for (size_t i = 0; i < parameter_bytes(kernel->name); i++) fprintf(log, "%02x", ((unsigned char*)parameters[0])[i]);
    fprintf(log, "\"}\n");
    fclose(log);
    return 0;
}
