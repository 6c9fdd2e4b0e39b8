/* A made-up CUDA device in host memory, for onnxruntime's CUDA provider on a machine without a GPU.

   Memory is the host's, copies are real and counted, kernels do nothing. What the provider and its
   kernels check on the host (shapes, types, attributes, threads of a block, what a capturing stream
   forbids) is checked as on a device; results are garbage, and nothing may look at them.

   Every other function of CUDA that the provider is linked to is made beside this file, by
   libraries.py, and answers 0. Offsets are those of CUDA 13's structures. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
enum { SUCCESS = 0, CAPTURE_UNSUPPORTED = 900 };
enum { HOST_TO_HOST = 0, HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3 };
static const size_t MEMORY = (size_t)80 << 30;
static const char *NAME = "no GPU: a made-up device of the tests of rope-export";

/* What the tests ask afterwards. */
static long copies[4], launches;
static int capturing, captured, replayed;
API long fake_cuda_copies(int kind) { return copies[kind]; }
API long fake_cuda_launches(void) { return launches; }
API int fake_cuda_captured(void) { return captured; }
API int fake_cuda_replayed(void) { return replayed; }
API void fake_cuda_forget(void) { memset(copies, 0, sizeof copies); launches = 0; }

/* Nothing that waits, or allocates, may happen while a stream captures. */
#define NOT_WHILE_CAPTURING if (capturing) return CAPTURE_UNSUPPORTED

/* The device: an H100 as far as the provider asks. */
static void at(unsigned char *p, size_t offset, int value) { memcpy(p + offset, &value, 4); }
static void wide_at(unsigned char *p, size_t offset, size_t value) { memcpy(p + offset, &value, 8); }

API int cudaGetDeviceProperties(void *properties, int device) {
  unsigned char *p = properties;
  memset(p, 0, 1008);
  memcpy(p, NAME, strlen(NAME));
  wide_at(p, 288, MEMORY);         /* totalGlobalMem */
  wide_at(p, 296, 48 << 10);       /* sharedMemPerBlock */
  at(p, 304, 65536);               /* regsPerBlock */
  at(p, 308, 32);                  /* warpSize */
  wide_at(p, 312, 2147483647);     /* memPitch */
  at(p, 320, 1024);                /* maxThreadsPerBlock */
  at(p, 324, 1024), at(p, 328, 1024), at(p, 332, 64);           /* maxThreadsDim */
  at(p, 336, 2147483647), at(p, 340, 65535), at(p, 344, 65535); /* maxGridSize */
  wide_at(p, 352, 65536);          /* totalConstMem */
  at(p, 360, 9), at(p, 364, 0);    /* major, minor */
  wide_at(p, 368, 512);            /* textureAlignment */
  at(p, 384, 132);                 /* multiProcessorCount */
  at(p, 392, 1);                   /* canMapHostMemory */
  at(p, 560, 1);                   /* concurrentKernels */
  at(p, 564, 1);                   /* ECCEnabled */
  at(p, 584, 3);                   /* asyncEngineCount */
  at(p, 588, 1);                   /* unifiedAddressing */
  at(p, 592, 5120);                /* memoryBusWidth */
  at(p, 596, 50 << 20);            /* l2CacheSize */
  at(p, 604, 2048);                /* maxThreadsPerMultiProcessor */
  at(p, 608, 1);                   /* streamPrioritiesSupported */
  at(p, 612, 1), at(p, 616, 1);    /* globalL1CacheSupported, localL1CacheSupported */
  wide_at(p, 624, 228 << 10);      /* sharedMemPerMultiprocessor */
  at(p, 632, 65536);               /* regsPerMultiprocessor */
  at(p, 636, 1);                   /* managedMemory */
  at(p, 668, 1);                   /* cooperativeLaunch */
  wide_at(p, 672, 227 << 10);      /* sharedMemPerBlockOptin */
  at(p, 688, 32);                  /* maxBlocksPerMultiProcessor */
  wide_at(p, 696, 1024);           /* reservedSharedMemPerBlock */
  at(p, 720, 1);                   /* memoryPoolsSupported */
  at(p, 748, 1);                   /* clusterLaunch */
  return SUCCESS;
}

API int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break; /* MaxThreadsPerBlock, MaxBlockDimX, Y */
    case 4: *value = 64; break;                   /* MaxBlockDimZ */
    case 5: *value = 2147483647; break;           /* MaxGridDimX */
    case 6: case 7: *value = 65535; break;        /* MaxGridDimY, Z */
    case 8: *value = 48 << 10; break;             /* MaxSharedMemoryPerBlock */
    case 10: *value = 32; break;                  /* WarpSize */
    case 12: case 82: *value = 65536; break;      /* MaxRegistersPerBlock, PerMultiprocessor */
    case 16: *value = 132; break;                 /* MultiProcessorCount */
    case 38: *value = 50 << 20; break;            /* L2CacheSize */
    case 39: *value = 2048; break;                /* MaxThreadsPerMultiProcessor */
    case 75: *value = 9; break;                   /* ComputeCapabilityMajor */
    case 76: *value = 0; break;                   /* ComputeCapabilityMinor */
    case 81: *value = 228 << 10; break;           /* MaxSharedMemoryPerMultiprocessor */
    case 97: *value = 227 << 10; break;           /* MaxSharedMemoryPerBlockOptin */
    case 106: *value = 32; break;                 /* MaxBlocksPerMultiprocessor */
    case 95: case 115: case 120: *value = 1; break; /* CooperativeLaunch, MemoryPools, Cluster */
    default: *value = 0;
  }
  return SUCCESS;
}

API int cudaGetDeviceCount(int *n) { *n = 1; return SUCCESS; }
API int cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
API int cudaDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
API int cudaRuntimeGetVersion(int *version) { *version = 13000; return SUCCESS; }
API const char *cudaGetErrorName(int error) { return error ? "FAKE_CUDA_REFUSED" : "cudaSuccess"; }
API const char *cudaGetErrorString(int error) {
  return error == CAPTURE_UNSUPPORTED ? "not permitted while a stream is capturing" : "no error";
}

/* Memory, cleared: counts and indices that a kernel would have written are 0. */
static int allocate(void **p, size_t n) { *p = calloc(1, n ? n : 1); return *p ? SUCCESS : 2; }
API int cudaMalloc(void **p, size_t n) { NOT_WHILE_CAPTURING; return allocate(p, n); }
API int cudaMallocHost(void **p, size_t n) { NOT_WHILE_CAPTURING; return allocate(p, n); }
API int cudaHostAlloc(void **p, size_t n, unsigned f) { NOT_WHILE_CAPTURING; return allocate(p, n); }
API int cudaMallocFromPoolAsync(void **p, size_t n, void *pool, void *s) { return allocate(p, n); }
API int cudaFree(void *p) { NOT_WHILE_CAPTURING; free(p); return SUCCESS; }
API int cudaFreeHost(void *p) { NOT_WHILE_CAPTURING; free(p); return SUCCESS; }
API int cudaFreeAsync(void *p, void *s) { free(p); return SUCCESS; }
API int cudaMemGetInfo(size_t *available, size_t *total) {
  *available = *total = MEMORY;
  return SUCCESS;
}

static int copy(void *to, const void *from, size_t n, int kind) {
  if (kind >= 0 && kind < 4) copies[kind]++;
  if (n) memmove(to, from, n);
  return SUCCESS;
}
API int cudaMemcpy(void *to, const void *from, size_t n, int kind) {
  NOT_WHILE_CAPTURING;
  return copy(to, from, n, kind);
}
API int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *s) {
  return copy(to, from, n, kind);
}
API int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                          size_t width, size_t height, int kind, void *s) {
  if (kind >= 0 && kind < 4) copies[kind]++;
  for (size_t i = 0; i < height; i++)
    memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
  return SUCCESS;
}
API int cudaMemset(void *p, int v, size_t n) { NOT_WHILE_CAPTURING; memset(p, v, n); return SUCCESS; }
API int cudaMemsetAsync(void *p, int v, size_t n, void *s) { memset(p, v, n); return SUCCESS; }

/* Handles are memory that nobody reads. */
static int handle(void **p) { *p = calloc(1, 4096); return SUCCESS; }
API int cudaEventCreate(void **p) { return handle(p); }
API int cudaEventCreateWithFlags(void **p, unsigned flags) { return handle(p); }
API int cudaStreamCreate(void **p) { return handle(p); }
API int cudaStreamCreateWithFlags(void **p, unsigned flags) { return handle(p); }
API int cudaMemPoolCreate(void **p, const void *properties) { return handle(p); }
API int cudaLibraryLoadData(void **p) { return handle(p); }
API int cudaLibraryGetKernel(void **p) { return handle(p); }
API int __cudaGetKernel(void **p, const void *entry) { return handle(p); }
static void *fat_binary[512];
API void **__cudaRegisterFatBinary(void *binary) { return fat_binary; }
static int nothing(void) { return SUCCESS; }
API int cudaGetDriverEntryPointByVersion(const char *symbol, void **f, unsigned version,
                                         unsigned long long flags, int *status) {
  *f = (void *)nothing;
  if (status) *status = 0;
  return SUCCESS;
}
API int cudaPointerGetAttributes(void *attributes, const void *p) {
  memset(attributes, 0, 24); /* not registered: memory of the host */
  return SUCCESS;
}

/* Waiting is over at once; not while capturing. */
API int cudaDeviceSynchronize(void) { NOT_WHILE_CAPTURING; return SUCCESS; }
API int cudaStreamSynchronize(void *s) { NOT_WHILE_CAPTURING; return SUCCESS; }
API int cudaEventSynchronize(void *e) { NOT_WHILE_CAPTURING; return SUCCESS; }
API int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 1; return SUCCESS; }

/* Kernels. */
static int launch(void) { launches++; return SUCCESS; }
API int cudaLaunchKernel(void) { return launch(); }
API int __cudaLaunchKernel(void) { return launch(); }
API int cudaLaunchKernelExC(void) { return launch(); }
API int cudaLaunchCooperativeKernel(void) { return launch(); }
API int cudaLaunchHostFunc(void *s, void (*f)(void *), void *data) { f(data); return SUCCESS; }
API int cudaFuncGetAttributes(void *attributes, const void *f) {
  unsigned char *p = attributes;
  memset(p, 0, 140);
  at(p, 24, 1024);      /* maxThreadsPerBlock */
  at(p, 28, 32);        /* numRegs */
  at(p, 32, 90);        /* ptxVersion */
  at(p, 36, 90);        /* binaryVersion */
  at(p, 44, 227 << 10); /* maxDynamicSharedSizeBytes */
  return SUCCESS;
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n) { *n = 2; return SUCCESS; }

/* CUDA graphs. */
API int cudaStreamBeginCapture(void *s, int mode) { capturing = 1; return SUCCESS; }
API int cudaStreamEndCapture(void *s, void **graph) {
  capturing = 0;
  captured++;
  return handle(graph);
}
API int cudaStreamIsCapturing(void *s, int *status) { *status = capturing; return SUCCESS; }
API int cudaGraphInstantiate(void **p) { return handle(p); }
API int cudaGraphLaunch(void *graph, void *s) { replayed++; return SUCCESS; }
