// A libcuda.so.1 that says what it is asked for and does nothing: what reaches a driver can be
// looked at where there is none.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct {
    unsigned grid[3], block[3], shared;
    void* stream;
} Config;

static int succeed(void) { return 0; }
static int version(int* to) { return *to = 13000, 0; }
static int count(int* to) { return *to = 2, 0; }
static int device(int* to, int index) { return *to = index, 0; }
static int retain(void** to, int index) { return *to = (void*)(uintptr_t)(0x3000 + index), 0; }
static int no_context(void** to) { return *to = 0, 0; }
static int set_context(void* context) { return printf("context %p\n", context), 0; }
static int load(void** to, const char* code) {
    return *to = (void*)0x1111, printf("load %.3s\n", code + 1), 0;
}
static int kernel(void** to, void* library, const char* name) {
    return *to = (void*)0x2222, printf("kernel %s of %p\n", name, library), 0;
}
static int launch(const Config* c, void* function, void** arguments) {
    printf("launch %p grid %u %u %u block %u %u %u shared %u stream %p argument %llx\n", function,
           c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared,
           c->stream, *(unsigned long long*)arguments[0]);
    return 0;
}

int cuGetProcAddress_v2(const char* name, void** to, int v, uint64_t flags, int* status) {
    static const struct {
        const char* name;
        void* function;
    } table[] = {{"cuGetProcAddress", cuGetProcAddress_v2},
                 {"cuDriverGetVersion", version},
                 {"cuDeviceGetCount", count},
                 {"cuDeviceGet", device},
                 {"cuDevicePrimaryCtxRetain", retain},
                 {"cuCtxGetCurrent", no_context},
                 {"cuCtxSetCurrent", set_context},
                 {"cuLibraryLoadData", load},
                 {"cuLibraryGetKernel", kernel},
                 {"cuLaunchKernelEx", launch}};
    *to = succeed;
    for (unsigned i = 0; i < sizeof(table) / sizeof(*table); ++i)
        if (!strcmp(name, table[i].name)) *to = table[i].function;
    if (status) *status = 0;
    return 0;
}
int cuGetProcAddress(const char* name, void** to, int v, uint64_t flags) {
    return cuGetProcAddress_v2(name, to, v, flags, 0);
}
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* to) { return version(to); }
