/* A stand-in for NVIDIA's CUDA libraries. ONNX Runtime's real CUDA provider opens sessions on it, so a machine without a
   GPU shows what a GPU would be asked to do: which nodes it gets, what is launched and captured, what crosses the bus.

   Memory is host memory, copies copy and are counted, kernels do nothing and are counted by name. So the results of
   kernels mean nothing here. environment.py adds a function that returns 0 for everything that the provider imports and
   that is not defined below. */
#define _GNU_SOURCE
#include <driver_types.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int r; /* cudaError_t, and the status types of the libraries on top of it; 0 is success */
typedef size_t z;

/* -- what is counted; counters.py reads it in this order ------------------------------------------------------------ */

enum { LAUNCHES, H2D, D2H, D2D, COPIES_IN, COPIES_OUT, ALLOCATIONS, CAPTURES, REPLAYS, CAPTURED_ALLOCATIONS, COUNTERS };
static long counted[COUNTERS];
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

/* A captured graph is the counts of one replay. Nothing runs while a capture records. */
typedef struct { long counts[COUNTERS]; } graph;
static graph *recording;

static void count(int what, long by) {
  if (recording) recording->counts[what] += by;
  else counted[what] += by;
}
void standin_counts(long *out) { memcpy(out, counted, sizeof counted); }

/* -- kernels, by the host function that stands for each ------------------------------------------------------------- */

#define KERNELS (1 << 17)
static struct { const void *function; const char *name; long launches; } kernel[KERNELS];

static int place(const void *function) {
  int i = (int)(((uintptr_t)function >> 3) * 2654435761u & (KERNELS - 1));
  while (kernel[i].function && kernel[i].function != function) i = (i + 1) & (KERNELS - 1);
  kernel[i].function = function;
  return i;
}
static r launch(const void *function, const char *name) {
  pthread_mutex_lock(&guard);
  int i = place(function);
  if (name) kernel[i].name = name;
  kernel[i].launches++;
  count(LAUNCHES, 1);
  pthread_mutex_unlock(&guard);
  return 0;
}
/* Writes lines "launches name" into `out`; captured launches count once, when they are recorded. */
void standin_kernels(char *out, z room) {
  z used = 0;
  out[0] = 0;
  for (int i = 0; i < KERNELS; i++)
    if (kernel[i].launches && used < room)
      used += snprintf(out + used, room - used, "%ld %s\n", kernel[i].launches, kernel[i].name ? kernel[i].name : "?");
}
static void *fat[4];
void **__cudaRegisterFatBinary(void *binary) { return (void **)fat; }
void __cudaRegisterFunction(void **fat, const void *function, char *device, const char *name, ...) {
  pthread_mutex_lock(&guard);
  kernel[place(function)].name = name;
  pthread_mutex_unlock(&guard);
}
r __cudaGetKernel(void **out, const void *function) { *out = (void *)function; return 0; }
r cudaLaunchKernel(const void *function, ...) { return launch(function, 0); }
r __cudaLaunchKernel(const void *function, ...) { return launch(function, 0); }
r cudaLaunchCooperativeKernel(const void *function, ...) { return launch(function, 0); }
r cudaLaunchKernelExC(const void *config, const void *function, void **arguments) { return launch(function, 0); }

/* -- memory: device blocks are known by their addresses, so that the directions of copies can be told apart --------- */

#define BLOCKS 65536
static struct { char *start; z length; } block[BLOCKS];
static int blocks;

static int on_device(const void *address) {
  const char *p = address;
  for (int i = 0; i < blocks; i++)
    if (block[i].start && p >= block[i].start && p < block[i].start + block[i].length) return 1;
  return 0;
}
static r give(void **out, z bytes, int device) {
  *out = aligned_alloc(256, (bytes + 511) / 256 * 256);
  if (!*out) return cudaErrorMemoryAllocation;
  memset(*out, 0, bytes);
  pthread_mutex_lock(&guard);
  if (recording) counted[CAPTURED_ALLOCATIONS]++; /* a GPU would end the capture with an error */
  counted[ALLOCATIONS]++;
  int i = 0;
  if (device) {
    while (i < blocks && block[i].start) i++;
    if (i == BLOCKS) abort();
    block[i].start = *out;
    block[i].length = bytes;
    if (i == blocks) blocks++;
  }
  pthread_mutex_unlock(&guard);
  return 0;
}
static r take(void *address) {
  pthread_mutex_lock(&guard);
  for (int i = 0; i < blocks; i++)
    if (block[i].start == address) block[i].start = 0;
  pthread_mutex_unlock(&guard);
  free(address);
  return 0;
}
static r copied(const void *to, const void *from, z bytes) {
  pthread_mutex_lock(&guard);
  int in = on_device(to), out = on_device(from);
  if (in && out) count(D2D, bytes);
  else if (in) count(H2D, bytes), count(COPIES_IN, 1);
  else if (out) count(D2H, bytes), count(COPIES_OUT, 1);
  pthread_mutex_unlock(&guard);
  return 0;
}
static r copy(void *to, const void *from, z bytes) { memmove(to, from, bytes); return copied(to, from, bytes); }
r cudaMalloc(void **out, z bytes) { return give(out, bytes, 1); }
r cudaMallocAsync(void **out, z bytes, void *stream) { return give(out, bytes, 1); }
r cudaMallocFromPoolAsync(void **out, z bytes, void *pool, void *stream) { return give(out, bytes, 1); }
r cudaMallocHost(void **out, z bytes) { return give(out, bytes, 0); }
r cudaHostAlloc(void **out, z bytes, unsigned flags) { return give(out, bytes, 0); }
r cudaFree(void *address) { return take(address); }
r cudaFreeAsync(void *address, void *stream) { return take(address); }
r cudaFreeHost(void *address) { return take(address); }
r cudaMemcpy(void *to, const void *from, z bytes, int kind) { return copy(to, from, bytes); }
r cudaMemcpyAsync(void *to, const void *from, z bytes, int kind, void *stream) { return copy(to, from, bytes); }
r cudaMemcpy2DAsync(void *to, z to_pitch, const void *from, z from_pitch, z width, z height, int kind, void *stream) {
  for (z row = 0; row < height; row++) memmove((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
  return copied(to, from, width * height);
}
r cudaMemset(void *to, int value, z bytes) { memset(to, value, bytes); return 0; }
r cudaMemsetAsync(void *to, int value, z bytes, void *stream) { memset(to, value, bytes); return 0; }
r cudaMemGetInfo(z *left, z *total) { *left = *total = (z)8 << 30; return 0; }
r cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *address) {
  memset(out, 0, sizeof *out);
  out->type = on_device(address) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  return 0;
}

/* -- one device, of compute capability 8.6 -------------------------------------------------------------------------- */

r cudaGetDevice(int *out) { *out = 0; return 0; }
r cudaGetDeviceCount(int *out) { *out = 1; return 0; }
r cudaDriverGetVersion(int *out) { *out = 13000; return 0; }
r cudaRuntimeGetVersion(int *out) { *out = 13000; return 0; }
r cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
  memset(out, 0, sizeof *out);
  strcpy(out->name, "stand-in");
  out->major = 8;
  out->minor = 6;
  out->multiProcessorCount = 16;
  out->warpSize = 32;
  out->totalGlobalMem = (z)8 << 30;
  out->totalConstMem = 65536;
  out->l2CacheSize = 4 << 20;
  out->unifiedAddressing = out->concurrentKernels = 1;
  out->sharedMemPerBlock = 49152;
  out->sharedMemPerBlockOptin = 101376;
  out->sharedMemPerMultiprocessor = 102400;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->maxThreadsPerBlock = 1024;
  out->maxThreadsPerMultiProcessor = 1536;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  return 0;
}
r cudaDeviceGetAttribute(int *out, int attribute, int device) {
  int wanted[] = {cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor}, values[] = {8, 6};
  *out = attribute == wanted[0] ? values[0] : attribute == wanted[1] ? values[1] : 1;
  return 0;
}

/* -- streams, events, captured graphs ------------------------------------------------------------------------------- */

r cudaStreamCreate(void **out) { *out = (void *)1; return 0; }
r cudaStreamCreateWithFlags(void **out, unsigned flags) { *out = (void *)1; return 0; }
r cudaEventCreate(void **out) { *out = (void *)1; return 0; }
r cudaEventCreateWithFlags(void **out, unsigned flags) { *out = (void *)1; return 0; }
r cudaStreamBeginCapture(void *stream, int mode) { recording = calloc(1, sizeof(graph)); return 0; }
r cudaStreamIsCapturing(void *stream, int *out) {
  *out = recording ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return 0;
}
r cudaStreamEndCapture(void *stream, void **out) {
  *out = recording;
  recording = 0;
  count(CAPTURES, 1);
  return 0;
}
r cudaGraphInstantiate(void **out, void *captured, unsigned long long flags) {
  *out = malloc(sizeof(graph));
  memcpy(*out, captured, sizeof(graph));
  return 0;
}
r cudaGraphLaunch(void *captured, void *stream) {
  for (int i = 0; i < COUNTERS; i++) count(i, ((graph *)captured)->counts[i]);
  count(REPLAYS, 1);
  return 0;
}
r cudaGraphDestroy(void *captured) { free(captured); return 0; }
r cudaGraphExecDestroy(void *captured) { free(captured); return 0; }

/* -- the libraries on top: handles without content, and products, which are launches -------------------------------- */

r cublasCreate_v2(void **out) { *out = (void *)1; return 0; }
r cublasLtCreate(void **out) { *out = (void *)1; return 0; }
r cudnnCreate(void **out) { *out = (void *)1; return 0; }
r cublasGetMathMode(void *handle, int *out) { *out = 0; return 0; }
#define PRODUCT(name) r name(void) { return launch(name, #name); }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasHgemm)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasHgemmStridedBatched)
PRODUCT(cublasLtMatmul)
PRODUCT(cudnnReduceTensor)
