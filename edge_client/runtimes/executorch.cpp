// ExecuTorch behind a plain C interface, so that Python needs ctypes only: no torch, no binding library, one
// build for every Python version. Links against the libraries of the `executorch` wheel.
//
// Every function returns 0, or -1 and leaves a message in `edgetrain_et_error()`. A handle is used by one
// thread at a time; the message is the calling thread's own.

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/method_meta.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::extension::BufferDataLoader;
using executorch::extension::MallocMemoryAllocator;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::MemoryManager;
using executorch::runtime::Method;
using executorch::runtime::MethodMeta;
using executorch::runtime::Program;
using executorch::runtime::Result;
using executorch::runtime::Span;
using executorch::runtime::Tag;
using executorch::runtime::TensorInfo;

// The wheel has the symbols of its thread pool but not the header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t count);
  size_t get_thread_count() const;
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

constexpr const char* kMethod = "forward";
constexpr size_t kAlignment = 64;
constexpr size_t kMaxMessage = 4096;

thread_local std::string message;   // what failed, for the caller
thread_local std::string logged;    // what the runtime said meanwhile

void collect_log(
    et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* text, size_t size) {
  if (level != et_pal_log_level_t::kError && level != et_pal_log_level_t::kFatal) {
    return;
  }
  const std::string line(text, size);
  if (logged.size() < kMaxMessage && logged.find(line) == std::string::npos) {
    logged += logged.empty() ? line : "; " + line;
  }
}

int fail(const std::string& what) {
  message = logged.empty() ? what : what + ": " + logged;
  logged.clear();
  return -1;
}

int fail(const std::string& what, Error error) {
  return fail(what + " (" + executorch::runtime::to_string(error) + ")");
}

void initialize() {
  static const bool done = [] {
    executorch::runtime::register_pal(executorch::runtime::PalImpl::create(collect_log, __FILE__));
    executorch::runtime::runtime_init();
    return true;
  }();
  (void)done;
}

struct Buffer {
  explicit Buffer(size_t size) : memory(new uint8_t[size + kAlignment]) {
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    span = {reinterpret_cast<uint8_t*>((address + kAlignment - 1) / kAlignment * kAlignment), size};
  }
  std::unique_ptr<uint8_t[]> memory;
  Span<uint8_t> span;
};

// Shape and type of one input, in the form that a TensorImpl points to.
struct Shape {
  explicit Shape(const TensorInfo& info)
      : type(info.scalar_type()),
        sizes(info.sizes().begin(), info.sizes().end()),
        order(info.dim_order().begin(), info.dim_order().end()),
        strides(sizes.size()),
        bytes(info.nbytes()) {
    int32_t stride = 1;
    for (size_t i = order.size(); i-- > 0;) {
      strides[order[i]] = stride;
      stride *= sizes[order[i]];
    }
  }
  ScalarType type;
  std::vector<int32_t> sizes;
  std::vector<uint8_t> order;
  std::vector<int32_t> strides;
  size_t bytes;
};

struct Graph {
  Graph(const void* data, size_t size) : loader(data, size) {}

  BufferDataLoader loader;
  std::unique_ptr<Program> program;
  MallocMemoryAllocator method_allocator;
  MallocMemoryAllocator temporary_allocator;
  std::vector<Buffer> buffers;
  std::vector<Span<uint8_t>> spans;
  std::unique_ptr<HierarchicalAllocator> planned;
  std::unique_ptr<MemoryManager> manager;
  // Destroyed before what it points to.
  std::unique_ptr<Method> method;
  std::vector<Shape> inputs;
  std::vector<Shape> outputs;
  // Where the caller wants each output; null while it has not said.
  std::vector<void*> wanted;
  size_t planned_bytes = 0;
};

int describe(const MethodMeta& meta, Graph& graph) {
  for (size_t i = 0; i < meta.num_inputs(); ++i) {
    const Result<Tag> tag = meta.input_tag(i);
    const Result<TensorInfo> info = meta.input_tensor_meta(i);
    if (!tag.ok() || *tag != Tag::Tensor || !info.ok()) {
      return fail("input " + std::to_string(i) + " is no tensor");
    }
    graph.inputs.emplace_back(*info);
  }
  for (size_t i = 0; i < meta.num_outputs(); ++i) {
    const Result<Tag> tag = meta.output_tag(i);
    const Result<TensorInfo> info = meta.output_tensor_meta(i);
    if (!tag.ok() || *tag != Tag::Tensor || !info.ok()) {
      return fail("output " + std::to_string(i) + " is no tensor");
    }
    graph.outputs.emplace_back(*info);
  }
  return 0;
}

int load(Graph& graph, uint64_t max_planned_bytes) {
  Result<Program> program = Program::load(&graph.loader, Program::Verification::InternalConsistency);
  if (!program.ok()) {
    return fail("not a program that this ExecuTorch reads", program.error());
  }
  graph.program = std::make_unique<Program>(std::move(*program));
  const Result<MethodMeta> meta = graph.program->method_meta(kMethod);
  if (!meta.ok()) {
    return fail("the program has no method 'forward'", meta.error());
  }
  if (describe(*meta, graph) != 0) {
    return -1;
  }
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const Result<int64_t> size = meta->memory_planned_buffer_size(i);
    if (!size.ok() || *size < 0 || graph.planned_bytes + static_cast<uint64_t>(*size) > max_planned_bytes) {
      return fail("the program plans more memory than its manifest allows");
    }
    graph.planned_bytes += static_cast<size_t>(*size);
    graph.buffers.emplace_back(static_cast<size_t>(*size));
  }
  for (const Buffer& buffer : graph.buffers) {
    graph.spans.push_back(buffer.span);
  }
  graph.planned = std::make_unique<HierarchicalAllocator>(
      Span<Span<uint8_t>>(graph.spans.data(), graph.spans.size()));
  graph.manager = std::make_unique<MemoryManager>(
      &graph.method_allocator, graph.planned.get(), &graph.temporary_allocator);
  Result<Method> method = graph.program->load_method(kMethod, graph.manager.get());
  if (!method.ok()) {
    return fail("the program does not load", method.error());
  }
  graph.method = std::make_unique<Method>(std::move(*method));
  graph.wanted.assign(graph.outputs.size(), nullptr);
  return 0;
}

}  // namespace

extern "C" {

// The message of the last failure on this thread.
const char* edgetrain_et_error() { return message.c_str(); }

// Loads a program; `data` must stay as it is until `edgetrain_et_close`. Null on failure.
void* edgetrain_et_open(const void* data, uint64_t size, uint64_t max_planned_bytes) {
  initialize();
  logged.clear();
  try {
    auto graph = std::make_unique<Graph>(data, size);
    if (load(*graph, max_planned_bytes) != 0) {
      return nullptr;
    }
    return graph.release();
  } catch (const std::exception& error) {
    fail(std::string("loading failed: ") + error.what());
    return nullptr;
  }
}

void edgetrain_et_close(void* handle) { delete static_cast<Graph*>(handle); }

uint64_t edgetrain_et_planned_bytes(const void* handle) {
  return static_cast<const Graph*>(handle)->planned_bytes;
}

int32_t edgetrain_et_count(const void* handle, int32_t output) {
  const auto* graph = static_cast<const Graph*>(handle);
  return static_cast<int32_t>((output != 0 ? graph->outputs : graph->inputs).size());
}

// Writes the scalar type (as in torch) to `type`, and up to 16 sizes. Returns the rank, or -1.
int32_t edgetrain_et_describe(const void* handle, int32_t output, int32_t index, int32_t* type, int32_t* sizes) {
  const auto* graph = static_cast<const Graph*>(handle);
  const Shape& shape = (output != 0 ? graph->outputs : graph->inputs).at(static_cast<size_t>(index));
  if (shape.sizes.size() > 16) {
    return fail("a tensor of more than 16 dimensions");
  }
  for (size_t i = 0; i < shape.order.size(); ++i) {
    if (shape.order[i] != i) {
      return fail("a tensor that is not row-major");
    }
  }
  *type = static_cast<int32_t>(shape.type);
  std::copy(shape.sizes.begin(), shape.sizes.end(), sizes);
  return static_cast<int32_t>(shape.sizes.size());
}

// Makes an input read from `data`, or an output write to it, from now on. Nothing is copied.
int32_t edgetrain_et_bind(void* handle, int32_t output, int32_t index, void* data, uint64_t bytes) {
  auto* graph = static_cast<Graph*>(handle);
  logged.clear();
  const auto i = static_cast<size_t>(index);
  Shape& shape = (output != 0 ? graph->outputs : graph->inputs).at(i);
  if (bytes != shape.bytes) {
    return fail("a buffer of " + std::to_string(bytes) + " bytes for a tensor of " + std::to_string(shape.bytes));
  }
  if (output != 0) {
    // The program plans memory of its own for its outputs, as stock apps need it; ours takes its place. Untouched
    // pages of the arena cost nothing.
    graph->method->get_output(i).toTensor().unsafeGetTensorImpl()->set_data(data);
    graph->wanted[i] = data;
    return 0;
  }
  TensorImpl tensor(
      shape.type,
      static_cast<ssize_t>(shape.sizes.size()),
      shape.sizes.data(),
      data,
      shape.order.data(),
      shape.strides.data());
  const Error error = graph->method->set_input(EValue(Tensor(&tensor)), i);
  return error == Error::Ok ? 0 : fail("input " + std::to_string(i) + " cannot be bound", error);
}

int32_t edgetrain_et_run(void* handle) {
  logged.clear();
  auto* graph = static_cast<Graph*>(handle);
  try {
    const Error error = graph->method->execute();
    if (error != Error::Ok) {
      return fail("the program failed", error);
    }
    for (size_t i = 0; i < graph->wanted.size(); ++i) {
      // A view of another tensor points there again.
      const void* data = graph->method->get_output(i).toTensor().const_data_ptr();
      if (graph->wanted[i] != nullptr && graph->wanted[i] != data) {
        std::memcpy(graph->wanted[i], data, graph->outputs[i].bytes);
      }
    }
    return 0;
  } catch (const std::exception& error) {
    return fail(std::string("the program failed: ") + error.what());
  }
}

// Threads of the one pool that all programs of the process share; 0 leaves it as it is. Returns the number.
int32_t edgetrain_et_threads(uint32_t count) {
  initialize();
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool == nullptr) {
    return 1;
  }
  if (count != 0 && pool->get_thread_count() != count) {
    pool->_unsafe_reset_threadpool(count);
  }
  return static_cast<int32_t>(pool->get_thread_count());
}

}  // extern "C"
