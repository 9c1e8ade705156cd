// Stand-in for CUDA's runtime and driver on a machine without a card.
//
// Device memory is the host's. Whatever is asked of a stream happens at once, in the calling thread, unless
// the stream is being captured: then it becomes a node of the graph and happens at each replay. Copies and
// sets are real. Kernels are counted, and do nothing unless a callback stands in for the device.
//
// What a caller may get wrong on a card fails here too: a launch without a context, a function or a stream of
// another device, waiting for a stream under capture, memory that was never allocated.
//
// Names that start with fakecard_ are the controls, called by tools/fakecard/control.py.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <elf.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

constexpr int MOST_DEVICES = 8;
constexpr size_t CARD_BYTES = size_t(80) << 30;
// The caching allocator asks for blocks of 2 MiB and more, which a card aligns likewise.
constexpr size_t BLOCK = size_t(2) << 20;
constexpr const char* CARD = "Fake H100 (no card)";

// What is counted, and fails on demand. The order is that of control.py.
enum Kind { RUNTIME, DRIVER, LIBRARY, GRAPH, MALLOC, COPY, SET, KINDS };

struct Record {  // of a launch, copy or set; the layout is that of control.py
  const char* name;
  void* function;
  void* stream;
  unsigned grid[3];
  unsigned threads, shared;
  int kind, device, captured;
};

struct Context {
  int device;
};

struct Graph {
  std::vector<std::function<int()>> nodes;
  unsigned long long id = 0;
  bool invalid = false;
};

struct Stream {
  int device = 0;
  int priority = 0;
  Graph* graph = nullptr;  // under capture
};

struct Event {
  double milliseconds = 0;
  Graph* graph = nullptr;  // recorded under capture: a stream that waits for it joins
};

struct Module {
  Context* context;
  std::string image, path;
};

struct Function {
  std::string name;
  Module* module;
  std::vector<unsigned> sizes;  // of the parameters, in bytes
};

struct Allocation {
  size_t size;
  int device;
  bool host;
};

// Not destroyed: torch calls the runtime from its own destructors, which run in an unknown order.
template <class T>
T& kept() {
  static T* value = new T;
  return *value;
}

std::mutex& lock() { return kept<std::mutex>(); }
auto& kernels() { return kept<std::unordered_map<const void*, const char*>>(); }
auto& streams() { return kept<std::unordered_set<Stream*>>(); }
auto& allocations() { return kept<std::map<uintptr_t, Allocation>>(); }
auto& records() { return kept<std::vector<Record>>(); }

Context contexts[MOST_DEVICES];
Stream default_streams[MOST_DEVICES];
std::array<size_t, MOST_DEVICES> used;
std::atomic<long> counts[KINDS];
// Errors that were ordered: the code, the calls that succeed before, the calls that fail.
int failure[KINDS];
std::atomic<long> succeeding[KINDS], failing[KINDS];
std::atomic<bool> recording;
std::atomic<unsigned long long> captures;
// Returns 0, or the error that the launch or the replay returns.
using Device = int (*)(const Record*, void** parameters);
std::atomic<Device> device;

thread_local int current = 0;
thread_local Context* context = nullptr;  // null until the thread's first call that needs one, as on a card
thread_local cudaError_t last_error = cudaSuccess;
thread_local Graph* capturing = nullptr;  // by this thread

int count_devices() {
  static const int n = [] {
    const char* text = getenv("FASTVAE_FAKECARD_DEVICES");
    const int wanted = text ? atoi(text) : 1;
    return wanted < 1 ? 1 : wanted > MOST_DEVICES ? MOST_DEVICES : wanted;
  }();
  return n;
}

Context* context_of(int n) {
  contexts[n].device = n;
  return &contexts[n];
}

void enter() {
  if (context == nullptr) context = context_of(current);
}

cudaError_t error(cudaError_t code) {
  if (code != cudaSuccess) last_error = code;
  return code;
}

// Returns the error that was ordered for this call, else 0.
int ordered(Kind kind) {
  if (failing[kind].load(std::memory_order_relaxed) <= 0) return 0;
  if (succeeding[kind].fetch_sub(1) > 0) return 0;
  return failing[kind].fetch_sub(1) > 0 ? failure[kind] : 0;
}

Stream* stream_of(const void* handle) {
  const auto number = reinterpret_cast<uintptr_t>(handle);
  // 0, and 1 and 2: the legacy and the thread's default stream.
  if (number > 2) return static_cast<Stream*>(const_cast<void*>(handle));
  default_streams[current].device = current;
  return &default_streams[current];
}

void note(Record r) {
  if (!recording.load(std::memory_order_relaxed)) return;
  std::lock_guard<std::mutex> guard(lock());
  records().push_back(r);
}

Record record_of(Kind kind, const char* name, Stream* s, dim3 grid = {}, unsigned threads = 0,
                 unsigned shared = 0, void* function = nullptr) {
  return {name, function, s, {grid.x, grid.y, grid.z}, threads, shared, kind, current, s->graph != nullptr};
}

// Does the work, or adds it to the graph that the stream is captured in.
template <class Work>
int submit(Stream* s, Work work) {
  if (s->graph == nullptr) return work();
  std::lock_guard<std::mutex> guard(lock());
  s->graph->nodes.emplace_back(std::move(work));
  return 0;
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) * 1e3 + double(t.tv_nsec) * 1e-6;
}

cudaError_t allocate(void** p, size_t n, bool host) {
  enter();
  ++counts[MALLOC];
  *p = nullptr;
  if (const int code = ordered(MALLOC)) return error(cudaError_t(code));
  const size_t unit = host ? 4096 : BLOCK, size = (n + unit - 1) / unit * unit;
  std::lock_guard<std::mutex> guard(lock());
  if (!host && used[current] + size > CARD_BYTES) return error(cudaErrorMemoryAllocation);
  *p = aligned_alloc(unit, size ? size : unit);
  if (*p == nullptr) return error(cudaErrorMemoryAllocation);
  if (!host) used[current] += size;
  allocations()[reinterpret_cast<uintptr_t>(*p)] = {size, current, host};
  return cudaSuccess;
}

cudaError_t release(void* p) {
  if (p == nullptr) return cudaSuccess;
  std::lock_guard<std::mutex> guard(lock());
  const auto found = allocations().find(reinterpret_cast<uintptr_t>(p));
  if (found == allocations().end()) return error(cudaErrorInvalidValue);
  if (!found->second.host) used[found->second.device] -= found->second.size;
  allocations().erase(found);
  free(p);
  return cudaSuccess;
}

// Returns the first address of the block that an address lies in, or 0.
uintptr_t block_of(uintptr_t address, Allocation* found) {
  std::lock_guard<std::mutex> guard(lock());
  auto next = allocations().upper_bound(address);
  if (next == allocations().begin()) return 0;
  --next;
  if (address >= next->first + next->second.size) return 0;
  *found = next->second;
  return next->first;
}

// Waiting for work that only a replay will do is an error, and spoils the capture.
cudaError_t wait_for(Graph* graph) {
  if (graph == nullptr) return cudaSuccess;
  graph->invalid = true;
  return error(cudaErrorStreamCaptureUnsupported);
}

cudaError_t copy(void* to, const void* from, size_t n, Stream* s) {
  enter();
  ++counts[COPY];
  if (const int code = ordered(COPY)) return error(cudaError_t(code));
  note(record_of(COPY, "copy", s));
  return cudaError_t(submit(s, [=] {
    memmove(to, from, n);
    return 0;
  }));
}

cudaError_t set(void* to, int value, size_t n, Stream* s) {
  enter();
  ++counts[SET];
  if (const int code = ordered(SET)) return error(cudaError_t(code));
  note(record_of(SET, "set", s));
  return cudaError_t(submit(s, [=] {
    memset(to, value, n);
    return 0;
  }));
}

cudaError_t launch_of_torch(const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t handle) {
  enter();
  ++counts[RUNTIME];
  if (const int code = ordered(RUNTIME)) return error(cudaError_t(code));
  Stream* s = stream_of(handle);
  if (s->device != current) return error(cudaErrorInvalidResourceHandle);
  const auto found = kernels().find(kernel);
  const char* name = found == kernels().end() ? "?" : found->second;
  note(record_of(RUNTIME, name, s, grid, block.x * block.y * block.z, unsigned(shared)));
  return cudaError_t(submit(s, [] { return 0; }));
}

CUresult launch(CUfunction handle, dim3 grid, dim3 block, unsigned shared, CUstream stream, void** given) {
  ++counts[DRIVER];
  if (const int code = ordered(DRIVER)) return CUresult(code);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  auto* f = reinterpret_cast<Function*>(handle);
  Stream* s = stream_of(stream);
  if (f->module->context != context || s->device != context->device) return CUDA_ERROR_INVALID_HANDLE;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    return CUDA_ERROR_INVALID_VALUE;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || (given == nullptr && !f->sizes.empty()))
    return CUDA_ERROR_INVALID_VALUE;
  Record r = record_of(DRIVER, f->name.c_str(), s, grid, threads, shared, f);
  note(r);
  if (s->graph == nullptr) {
    const Device run = device.load(std::memory_order_relaxed);
    return CUresult(run ? run(&r, given) : 0);
  }
  // The graph keeps the parameters' values: the caller's array is gone at the replay.
  std::vector<std::vector<char>> values;
  for (size_t i = 0; i < f->sizes.size(); ++i) {
    const char* value = static_cast<const char*>(given[i]);
    values.emplace_back(value, value + f->sizes[i]);
  }
  return CUresult(submit(s, [r, values]() mutable {
    std::vector<void*> parameters;
    for (auto& value : values) parameters.push_back(value.data());
    const Device run = device.load(std::memory_order_relaxed);
    return run ? run(&r, parameters.data()) : 0;
  }));
}

// Sizes of a kernel's parameters, from the attributes that the assembler leaves in the ELF image.
std::vector<unsigned> parameter_sizes(const std::string& image, const std::string& kernel) {
  std::vector<unsigned> sizes;
  Elf64_Ehdr head;
  if (image.size() < sizeof head) return sizes;
  memcpy(&head, image.data(), sizeof head);
  if (memcmp(head.e_ident, ELFMAG, SELFMAG) != 0) return sizes;
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image.data() + head.e_shoff);
  const char* names = image.data() + sections[head.e_shstrndx].sh_offset;
  for (int i = 0; i < head.e_shnum; ++i) {
    if (names + sections[i].sh_name != ".nv.info." + kernel) continue;
    const char* at = image.data() + sections[i].sh_offset;
    const char* end = at + sections[i].sh_size;
    while (at + 4 <= end) {
      // An attribute: its format, its number, and a value, or in format 4 the value's size, which follows.
      const unsigned format = uint8_t(at[0]), number = uint8_t(at[1]);
      uint16_t length;
      memcpy(&length, at + 2, sizeof length);
      at += 4;
      if (format != 4) continue;
      if (number == 0x17 && length == 12) {  // KPARAM_INFO: index, ordinal and offset, size in the high bits
        uint16_t ordinal;
        uint32_t packed;
        memcpy(&ordinal, at + 4, sizeof ordinal);
        memcpy(&packed, at + 8, sizeof packed);
        if (sizes.size() <= ordinal) sizes.resize(ordinal + 1);
        sizes[ordinal] = packed >> 18;
      }
      at += length;
    }
  }
  return sizes;
}

size_t image_size(const void* image) {
  Elf64_Ehdr head;
  memcpy(&head, image, sizeof head);
  if (memcmp(head.e_ident, ELFMAG, SELFMAG) != 0) return 0;
  const size_t sections = head.e_shoff + size_t(head.e_shentsize) * head.e_shnum;
  const size_t segments = head.e_phoff + size_t(head.e_phentsize) * head.e_phnum;
  return sections > segments ? sections : segments;
}

int attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 65536;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return 65536;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: return 1;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 233472;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return 232448;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: return 1;
    default: return 0;
  }
}

}  // namespace

extern "C" {

// ---- controls

long fakecard_count(int kind) { return counts[kind]; }

void fakecard_record(int on) {
  std::lock_guard<std::mutex> guard(lock());
  records().clear();
  recording = on != 0;
}

long fakecard_recorded() {
  std::lock_guard<std::mutex> guard(lock());
  return long(records().size());
}

void fakecard_get(long i, Record* out) {
  std::lock_guard<std::mutex> guard(lock());
  *out = records()[size_t(i)];
}

// Of the calls of this kind, ``times`` return ``code``, after ``skipped`` that succeed.
void fakecard_fail(int kind, int code, long skipped, long times) {
  failure[kind] = code;
  succeeding[kind] = skipped;
  failing[kind] = times;
}

void fakecard_device(Device f) { device = f; }

// Does ``work(number)`` in the order of a stream: at once, or at each replay of the graph under capture.
int fakecard_submit(void* stream, int (*work)(long), long number) {
  return submit(stream_of(stream), [=] { return work(number); });
}

int fakecard_capturing(void* stream) { return stream_of(stream)->graph != nullptr; }

int fakecard_block(uintptr_t address, uintptr_t* first, size_t* size) {
  Allocation found{};
  *first = block_of(address, &found);
  *size = found.size;
  return *first != 0;
}

int fakecard_parameters(void* function, unsigned* sizes, int most) {
  const auto& own = static_cast<Function*>(function)->sizes;
  for (int i = 0; i < most && i < int(own.size()); ++i) sizes[i] = own[size_t(i)];
  return int(own.size());
}

const char* fakecard_image(void* function, size_t* size) {
  const auto& image = static_cast<Function*>(function)->module->image;
  *size = image.size();
  return image.data();
}

const char* fakecard_path(void* function) { return static_cast<Function*>(function)->module->path.c_str(); }

// A launch by one of NVIDIA's libraries (libraries.py).
int fakecard_library(const char* name) {
  ++counts[LIBRARY];
  if (const int code = ordered(LIBRARY)) return code;
  Stream* s = stream_of(nullptr);
  note(record_of(LIBRARY, name, s));
  if (capturing != nullptr) {
    std::lock_guard<std::mutex> guard(lock());
    capturing->nodes.emplace_back([] { return 0; });
  }
  return 0;
}

// ---- runtime: devices

cudaError_t cudaGetDeviceCount(int* n) {
  *n = count_devices();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* n) {
  *n = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int n) {
  if (n < 0 || n >= count_devices()) return error(cudaErrorInvalidDevice);
  current = n;
  context = context_of(n);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int n) {
  if (n < 0 || n >= count_devices()) return error(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  strcpy(p->name, CARD);
  const auto of = [](CUdevice_attribute a) { return attribute(a); };
  p->totalGlobalMem = CARD_BYTES;
  p->sharedMemPerBlock = size_t(of(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK));
  p->regsPerBlock = of(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
  p->warpSize = of(CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = of(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  for (int i = 0; i < 3; ++i) {
    p->maxThreadsDim[i] = attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X + i);
    p->maxGridSize[i] = attribute(CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X + i);
  }
  p->totalConstMem = size_t(of(CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY));
  p->major = of(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  p->minor = of(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  p->textureAlignment = 512;
  p->multiProcessorCount = of(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  p->canMapHostMemory = 1;
  p->concurrentKernels = 1;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = 1;
  p->memoryBusWidth = of(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  p->l2CacheSize = of(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  p->maxThreadsPerMultiProcessor = of(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  p->sharedMemPerMultiprocessor = size_t(of(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR));
  p->regsPerMultiprocessor = of(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR);
  p->managedMemory = 1;
  p->sharedMemPerBlockOptin = size_t(of(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN));
  p->maxBlocksPerMultiProcessor = of(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  *v = attribute(a);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

cudaError_t cudaDeviceGetPCIBusId(char* text, int n, int which) {
  snprintf(text, size_t(n), "0000:%02d:00.0", which);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = reinterpret_cast<cudaMemPool_t>(1);
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }

cudaError_t cudaDeviceSynchronize() {
  enter();
  return wait_for(capturing);
}

// ---- runtime: errors

cudaError_t cudaGetLastError() {
  const cudaError_t code = last_error;
  last_error = cudaSuccess;
  return code;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t code) {
  switch (code) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    default: return "an error of the fake card";
  }
}

const char* cudaGetErrorString(cudaError_t code) { return cudaGetErrorName(code); }

// ---- runtime: memory

cudaError_t cudaMalloc(void** p, size_t n) { return allocate(p, n, false); }
cudaError_t cudaFree(void* p) {
  enter();
  return release(p);
}
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return allocate(p, n, true); }
cudaError_t cudaFreeHost(void* p) { return release(p); }
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t* left, size_t* all) {
  enter();
  *all = CARD_BYTES;
  *left = CARD_BYTES - used[current];
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  Allocation found{};
  memset(a, 0, sizeof *a);
  if (block_of(reinterpret_cast<uintptr_t>(p), &found) == 0) {
    a->type = cudaMemoryTypeUnregistered;
    a->device = cudaInvalidDeviceId;
    a->hostPointer = const_cast<void*>(p);
    return cudaSuccess;
  }
  a->type = found.host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  a->device = found.device;
  a->devicePointer = const_cast<void*>(p);
  a->hostPointer = found.host ? const_cast<void*>(p) : nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  if (capturing != nullptr) return wait_for(capturing);
  return copy(to, from, n, stream_of(nullptr));
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t s) {
  return copy(to, from, n, stream_of(s));
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t s) {
  return copy(to, from, n, stream_of(s));
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t handle) {
  enter();
  ++counts[COPY];
  Stream* s = stream_of(handle);
  note(record_of(COPY, "copy", s));
  return cudaError_t(submit(s, [=] {
    for (size_t i = 0; i < height; ++i)
      memmove(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
    return 0;
  }));
}

// Constants of torch's kernels, which do nothing here.
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t n) {
  if (capturing != nullptr) return wait_for(capturing);
  return set(to, value, n, stream_of(nullptr));
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t s) {
  return set(to, value, n, stream_of(s));
}

// ---- runtime: streams and events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned, int priority) {
  enter();
  auto* s = new Stream;
  s->device = current;
  s->priority = priority;
  std::lock_guard<std::mutex> guard(lock());
  streams().insert(s);
  *handle = reinterpret_cast<cudaStream_t>(s);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
  return cudaStreamCreateWithPriority(s, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  auto* s = reinterpret_cast<Stream*>(handle);
  std::lock_guard<std::mutex> guard(lock());
  if (streams().erase(s) == 0) return error(cudaErrorInvalidResourceHandle);
  delete s;
  return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) {
  *priority = stream_of(s)->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t s) { return wait_for(stream_of(s)->graph); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait_for(stream_of(s)->graph); }

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Stream* s = stream_of(handle);
  Graph* graph = reinterpret_cast<Event*>(event)->graph;
  if (graph != nullptr && s->graph == nullptr) s->graph = graph;
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t f, void* data, unsigned) {
  f(handle, cudaSuccess, data);
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* data) {
  return cudaError_t(submit(stream_of(s), [=] {
    f(data);
    return 0;
  }));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  enter();
  *e = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t s, unsigned) {
  auto* event = reinterpret_cast<Event*>(handle);
  event->milliseconds = now();
  event->graph = stream_of(s)->graph;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return wait_for(reinterpret_cast<Event*>(e)->graph); }

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  *ms = float(reinterpret_cast<Event*>(to)->milliseconds - reinterpret_cast<Event*>(from)->milliseconds);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete reinterpret_cast<Event*>(e);
  return cudaSuccess;
}

// ---- runtime: capture and graphs

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode own = cudaStreamCaptureModeGlobal;
  std::swap(own, *mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  Stream* s = stream_of(handle);
  if (s->graph != nullptr || s == stream_of(nullptr)) return error(cudaErrorStreamCaptureUnsupported);
  s->graph = capturing = new Graph;
  s->graph->id = ++captures;
  return cudaSuccess;
}

static cudaStreamCaptureStatus status_of(const Stream* s) {
  if (s->graph == nullptr) return cudaStreamCaptureStatusNone;
  return s->graph->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  *status = status_of(stream_of(s));
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* n) {
  const Stream* s = stream_of(handle);
  *status = status_of(s);
  if (id) *id = s->graph ? s->graph->id : 0;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(s->graph);
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}

// The same before CUDA 13.
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, cudaStreamCaptureStatus* status,
                                        unsigned long long* id, cudaGraph_t* graph,
                                        const cudaGraphNode_t** nodes, size_t* n) {
  return cudaStreamGetCaptureInfo(s, status, id, graph, nodes, nullptr, n);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
  Graph* graph = stream_of(handle)->graph;
  *out = nullptr;
  if (graph == nullptr) return error(cudaErrorIllegalState);
  std::lock_guard<std::mutex> guard(lock());
  for (Stream* s : streams())  // those that joined, too
    if (s->graph == graph) s->graph = nullptr;
  for (Stream& s : default_streams)
    if (s.graph == graph) s.graph = nullptr;
  capturing = nullptr;
  if (graph->invalid) return error(cudaErrorStreamCaptureInvalidated);
  *out = reinterpret_cast<cudaGraph_t>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  *out = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

// Events may still refer to a graph, so it is emptied and kept.
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  reinterpret_cast<Graph*>(graph)->nodes.clear();
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* n) {
  *n = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream) {
  enter();
  ++counts[GRAPH];
  if (const int code = ordered(GRAPH)) return error(cudaError_t(code));
  note(record_of(GRAPH, "graph", stream_of(stream)));
  for (auto& node : reinterpret_cast<Graph*>(handle)->nodes)
    if (const int code = node()) return error(cudaError_t(code));
  return cudaSuccess;
}

// ---- runtime: kernels

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t,
                                                                   unsigned) {
  *n = 8;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 8;
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  *p = const_cast<void*>(symbol);
  return cudaSuccess;
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPoint(const char* name, void** f, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, f, 0, flags, result);
}

static thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 0; }

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
  std::lock_guard<std::mutex> guard(lock());
  kernels()[host] = name;
}

cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t s) {
  return launch_of_torch(f, grid, block, shared, s);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
  return launch_of_torch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 grid, dim3 block, void**, size_t shared,
                                        cudaStream_t s) {
  return launch_of_torch(f, grid, block, shared, s);
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(f));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t s) {
  return launch_of_torch(f, grid, block, shared, s);
}

// ---- driver

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* v) {
  *v = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* d, int n) {
  if (n < 0 || n >= count_devices()) return CUDA_ERROR_INVALID_DEVICE;
  *d = n;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* n) {
  *n = count_devices();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* text, int n, CUdevice) {
  snprintf(text, size_t(n), "%s", CARD);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
  *v = attribute(a);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* c) {
  *c = reinterpret_cast<CUcontext>(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext c) {
  context = reinterpret_cast<Context*>(c);
  if (context != nullptr) current = context->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* d) {
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *d = context->device;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) {
  if (d < 0 || d >= count_devices()) return CUDA_ERROR_INVALID_DEVICE;
  *c = reinterpret_cast<CUcontext>(context_of(d));
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* v, CUlimit) {
  *v = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* m, const void* image) {
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  const size_t size = image ? image_size(image) : 0;
  *m = reinterpret_cast<CUmodule>(
      new Module{context, std::string(static_cast<const char*>(image), size), std::string()});
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule* m, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(m, image);
}

CUresult cuModuleLoad(CUmodule* m, const char* path) {
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  FILE* file = fopen(path, "rb");
  if (file == nullptr) return CUDA_ERROR_FILE_NOT_FOUND;
  std::string image;
  char part[65536];
  for (size_t n; (n = fread(part, 1, sizeof part, file)) > 0;) image.append(part, n);
  fclose(file);
  *m = reinterpret_cast<CUmodule>(new Module{context, image, path});
  return CUDA_SUCCESS;
}

// Functions, which graphs keep, refer to their modules: they stay.
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* f, CUmodule handle, const char* name) {
  auto* m = reinterpret_cast<Module*>(handle);
  *f = reinterpret_cast<CUfunction>(new Function{name, m, parameter_sizes(m->image, name)});
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuGetErrorName(CUresult code, const char** text) {
  *text = cudaGetErrorName(cudaError_t(code));  // the same numbers
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult code, const char** text) { return cuGetErrorName(code, text); }

CUresult cuPointerGetAttribute(void* out, CUpointer_attribute a, CUdeviceptr p) {
  Allocation found{};
  if (block_of(uintptr_t(p), &found) == 0) return CUDA_ERROR_INVALID_VALUE;
  switch (a) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(out) = p; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(out) = found.device; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void** parameters, void**) {
  return launch(f, dim3(x, y, z), dim3(block_x, block_y, block_z), shared, stream, parameters);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** parameters, void**) {
  return launch(f, dim3(c->gridDimX, c->gridDimY, c->gridDimZ),
                dim3(c->blockDimX, c->blockDimY, c->blockDimZ), c->sharedMemBytes, c->hStream, parameters);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
  *n = 8;
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  *n = 1;
  return CUDA_SUCCESS;
}

CUresult cuGetProcAddress_v2(const char* name, void** f, int, cuuint64_t,
                             CUdriverProcAddressQueryResult* result) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

}  // extern "C"
