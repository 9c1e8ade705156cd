// Replay of an op's launches on a GPU. The first call of a kind is planned in Python, by Triton, which
// records the results and launches (kernels/recording.py). Later calls allocate the results and launch,
// without Python. A call's kind is its key: shapes, strides, dtypes, alignment, device and settings, but no
// addresses and no offsets. Whatever is not recorded, or watched by hooks, runs in Python as before.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dispatcher.hpp"
#include "python.hpp"
#include "torch.hpp"

namespace fastvae {

// The driver that launches, found when the first op is recorded: Triton has loaded it by then. Contexts and
// launches have one prototype in CUDA and HIP.
struct Driver {
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                void**) = nullptr;
  int (*context)(void**) = nullptr;
  int (*set_context)(void*) = nullptr;
  int (*error_name)(int, const char**) = nullptr;  // of CUDA only
  int (*stream)(std::int32_t, void**) = nullptr;
  int (*device_type)() = nullptr;
  int (*device_index)(Handle, std::int32_t*) = nullptr;
  int (*guard)(std::int32_t, Handle*) = nullptr;
  int (*delete_guard)(Handle) = nullptr;
  bool complete = false;

  Driver() {
#ifdef __linux__
    const auto look = [](auto& function, void* library, const char* name) {
      function = library ? reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name)) : nullptr;
    };
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    void* of_gpu = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    const bool hip = of_gpu == nullptr;
    if (hip) of_gpu = dlopen("libtorch_hip.so", RTLD_LAZY | RTLD_NOLOAD);
    void* driver = of_gpu ? dlopen(hip ? "libamdhip64.so" : "libcuda.so.1", RTLD_LAZY) : nullptr;
    look(launch, driver, hip ? "hipModuleLaunchKernel" : "cuLaunchKernel");
    look(context, driver, hip ? "hipCtxGetCurrent" : "cuCtxGetCurrent");
    look(set_context, driver, hip ? "hipCtxSetCurrent" : "cuCtxSetCurrent");
    look(error_name, hip ? nullptr : driver, "cuGetErrorName");
    look(stream, of_gpu, "aoti_torch_get_current_cuda_stream");
    look(device_type, torch, "aoti_torch_device_type_cuda");
    look(device_index, torch, "aoti_torch_get_device_index");
    look(guard, torch, "aoti_torch_create_device_guard");
    look(delete_guard, torch, "aoti_torch_delete_device_guard");
    complete = launch && context && set_context && stream && device_type && device_index && guard &&
               delete_guard && torch_interface().complete;
#endif
  }
};
inline const Driver& driver() {
  static const Driver functions;
  return functions;
}

// Where a kernel's parameter comes from: the address of an argument's tensor or of a result, an argument that
// is a number, or a constant.
enum class Source { kTensor, kResult, kNumber, kConstant };
struct Parameter {
  Source source;
  int index;
  Word value;
};
struct Launch {
  void* function;
  unsigned grid[3], threads, shared;
  std::vector<Parameter> parameters;
  std::string name;
  pybind11::list hooks;  // of the kernel, which Triton must call
};
// A contiguous tensor for the kernels to fill, or scratch.
struct Creation {
  int like;  // an argument of this shape and dtype, contiguous; -1 if none is
  pybind11::tuple size, stride;
  pybind11::object dtype;
  std::vector<i64> sizes, strides;
  std::int32_t type;
};
struct Plan {
  bool replays = false;  // false: the call runs in Python
  std::int32_t device = 0;
  void* context = nullptr;
  std::vector<Creation> creations;
  std::vector<int> shown;  // creations that are results; -1: None
  bool single = false;     // the result is not a tuple
  std::vector<Launch> launches;
  pybind11::object kept;  // the programs
};

constexpr int kMostTensors = 32, kMostWords = 64;

// An op, and its plans.
struct ReplayedOp {
  std::string name;
  // Of the arguments: as in Registered, and n (an integer) and v (a real number), which vary from call to
  // call.
  std::string types;
  PyObject* planner;    // of the arguments: the results, and a description of the plan or None
  PyObject* in_python;  // the op without a plan
  Registered registered;
  std::unordered_map<std::string, std::shared_ptr<const Plan>> plans;
  static constexpr std::size_t kMostPlans = 4096;
};
inline std::vector<ReplayedOp*>& replayed_ops() {
  static auto* const all = new std::vector<ReplayedOp*>;
  return *all;
}

// What may not change under a replay: the backend in force, and Triton's hooks and debugging.
struct ReplaySettings {
  PyObject* choice = nullptr;  // a context variable
  bool serves_by_default = false;
  std::vector<PyObject*> empty;  // dictionaries and lists, which are empty while nothing is watched

  static bool is_served(PyObject* name) {
    return PyUnicode_CompareWithASCIIString(name, "native") == 0 ||
           PyUnicode_CompareWithASCIIString(name, "triton") == 0;
  }
  bool allow() const {
    if (choice == nullptr) return false;
    PyObject* name = nullptr;
    if (PyContextVar_Get(choice, nullptr, &name) != 0) throw pybind11::error_already_set();
    const bool serves = name == nullptr || name == Py_None ? serves_by_default : is_served(name);
    Py_XDECREF(name);
    if (!serves) return false;
    for (PyObject* container : empty)
      if ((PyDict_CheckExact(container) ? PyDict_GET_SIZE(container) : PyList_GET_SIZE(container)) != 0)
        return false;
    return true;
  }
};
inline ReplaySettings& replay_settings() {
  static auto* const settings = new ReplaySettings;
  return *settings;
}

// The arguments of a call, one after the other: its key, addresses and numbers.
class ReplayKey {
 public:
  explicit ReplayKey(std::string& key) : key_(key) { key_.clear(); }

  bool tensor(Handle handle, PyObject* object) {
    const TorchInterface& torch = torch_interface();
    std::int32_t device = 0, index = 0, layout = 0, type = 0;
    i64 axes = 0, bytes = 0, offset = 0, *sizes = nullptr, *strides = nullptr;
    if (at_ == kMostTensors) return false;
    succeed(torch.device(handle, &device));
    succeed(torch.layout(handle, &layout));
    if (device != driver().device_type() || layout != torch.strided) return false;
    succeed(driver().device_index(handle, &index));
    if (device_ >= 0 && index != device_) return false;
    device_ = index;
    succeed(torch.dtype(handle, &type));
    succeed(torch.axes(handle, &axes));
    succeed(torch.sizes(handle, &sizes));
    succeed(torch.strides(handle, &strides));
    succeed(torch.bytes(handle, &bytes));
    succeed(torch.offset(handle, &offset));
    int known = 0;
    while (known < kDtypes && torch.dtypes[known] != type) ++known;
    if (known == kDtypes) return false;
    i64 last = offset, count = 1;
    note(type | (axes << 16) | (i64{index} << 32));
    for (i64 i = 0; i < axes; ++i) {
      note(sizes[i]);
      note(strides[i]);
      count *= sizes[i];
      last += (sizes[i] - 1) * strides[i];
    }
    // Nothing to read, or a storage that was freed, which Python reports.
    if (count == 0 || (last + 1) * kItemSizes[known] > bytes) return false;
    void* data = nullptr;
    succeed(torch.data(handle, &data));
    addresses[at_] = reinterpret_cast<address>(data);
    // Programs are for addresses divisible by 16, or not, and on AMD for what 31 bits address. A plan knows
    // its inputs by their addresses, so tensors that share one have another.
    int same = 0;
    while (addresses[same] != addresses[at_]) ++same;
    note(static_cast<i64>(addresses[at_] & 15) | (bytes < (i64{1} << 31) ? 16 : 0) | (same << 8));
    objects[at_] = object;
    if (first == nullptr) first = object;
    ++at_;
    return true;
  }
  void none() { note(-1); }
  void integer(i64 value) { note(value); }
  void real(double value) { note(bits_of(value)); }
  void text(const char* characters) {
    const std::size_t size = std::strlen(characters);
    note(static_cast<i64>(size));
    key_.append(characters, size);
  }
  // Numbers that vary: a program is for 32 or 64 bits.
  void varying(i64 value) {
    note(value == static_cast<std::int32_t>(value) ? 1 : 2);
    numbers[number_++] = static_cast<Word>(value);
  }
  // Special values have programs of their own kind.
  void varying(double value) {
    const i64 bits = bits_of(value);
    const bool special = value == 0 || value == 1 || value == -1 || !std::isfinite(value);
    note(special ? bits : bits == static_cast<std::int32_t>(bits) ? 1 : 2);
    numbers[number_++] = static_cast<Word>(bits);
  }

  // By the order of tensors, and of varying numbers.
  address addresses[kMostTensors];
  PyObject *objects[kMostTensors], *first = nullptr;
  Word numbers[kMostWords];

 private:
  static i64 bits_of(double value) {
    i64 bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  }
  void note(i64 number) { key_.append(reinterpret_cast<const char*>(&number), sizeof number); }
  std::string& key_;
  int at_ = 0, number_ = 0;
  std::int32_t device_ = -1;
};

// Reads one argument in Python's objects. Returns false for one that is not replayed.
inline bool read_argument(ReplayKey& key, char type, PyObject* argument) {
  static const Py_ssize_t at = find_handle();
  switch (type) {
    case 't':
    case 'T':
      if (argument == Py_None) {
        key.none();
        return true;
      }
      return at >= 0 && PyObject_TypeCheck(argument, reinterpret_cast<PyTypeObject*>(torch_names().base)) &&
             key.tensor(reinterpret_cast<char*>(argument) + at, argument);
    case 'i': key.integer(to_integer(argument)); return true;
    case 'n': key.varying(to_integer(argument)); return true;
    case 'f': key.real(to_real(argument)); return true;
    case 'v': key.varying(to_real(argument)); return true;
    case 'b': key.integer(argument == Py_True); return true;
    case 's': {
      const char* characters = PyUnicode_AsUTF8(argument);
      if (characters == nullptr) throw pybind11::error_already_set();
      key.text(characters);
      return true;
    }
    case 'd': {
      int found = 0;
      while (found < kDtypes && torch_names().dtypes[found] != argument) ++found;
      key.integer(found);
      return found < kDtypes;
    }
    case 'l': {
      const pybind11::object items =
          owned(PySequence_Fast(argument, "fastvae._C: needs of gradients must be a sequence"));
      const Py_ssize_t count = PySequence_Fast_GET_SIZE(items.ptr());
      key.integer(count);
      for (Py_ssize_t i = 0; i < count; ++i) key.integer(PySequence_Fast_GET_ITEM(items.ptr(), i) == Py_True);
      return true;
    }
    default: return false;
  }
}

// Reads all arguments, a record's fields one by one.
inline bool read_arguments(ReplayKey& key, const std::string& types, PyObject* const* arguments,
                           Py_ssize_t number) {
  std::size_t at = 0;
  for (Py_ssize_t i = 0; i < number; ++i) {
    PyObject* argument = arguments[i];
    if (at < types.size() && types[at] != 'l' && PyTuple_Check(argument)) {
      for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(argument); ++j, ++at)
        if (at >= types.size() || !read_argument(key, types[at], PyTuple_GET_ITEM(argument, j))) return false;
    } else if (at >= types.size() || !read_argument(key, types[at++], argument)) {
      return false;
    }
  }
  return at == types.size();
}

// Makes the plan's device current for a scope. Threads that never called the driver have no context.
class InContext {
 public:
  explicit InContext(const Plan& plan) {
    void* current = nullptr;
    driver().context(&current);
    if (current == plan.context) {
      right = true;
      return;
    }
    succeed(driver().guard(plan.device, &guard_));
    driver().context(&current);
    // A context of another address was created after a reset: its programs are not the plan's.
    right = current == plan.context || (current == nullptr && driver().set_context(plan.context) == 0);
  }
  InContext(const InContext&) = delete;
  ~InContext() {
    if (guard_ != nullptr) driver().delete_guard(guard_);
  }
  bool right = false;

 private:
  Handle guard_ = nullptr;
};

inline void launch_all(const ReplayedOp& op, const Plan& plan, const ReplayKey& key, const address* results) {
  void* stream = nullptr;
  succeed(driver().stream(plan.device, &stream));
  for (const Launch& launch : plan.launches) {
    Word words[kMostWords];
    void* parameters[kMostWords];
    for (std::size_t i = 0; i < launch.parameters.size(); ++i) {
      const Parameter& p = launch.parameters[i];
      words[i] = p.source == Source::kTensor   ? key.addresses[p.index]
                 : p.source == Source::kResult ? results[p.index]
                 : p.source == Source::kNumber ? key.numbers[p.index]
                                               : p.value;
      parameters[i] = &words[i];
    }
    const int error = driver().launch(launch.function, launch.grid[0], launch.grid[1], launch.grid[2],
                                      launch.threads, 1, 1, launch.shared, stream, parameters, nullptr);
    if (error != 0) {
      const char* name = nullptr;
      if (driver().error_name) driver().error_name(error, &name);
      throw std::runtime_error("fastvae::" + op.name + ": the launch of " + launch.name + " failed with " +
                               (name ? name : "error " + std::to_string(error)) +
                               "; an earlier kernel may be the cause: run with CUDA_LAUNCH_BLOCKING=1");
    }
  }
}

// The plan of a key, if it can be replayed now.
inline std::shared_ptr<const Plan> plan_of(const ReplayedOp& op, const std::string& key) {
  const auto found = op.plans.find(key);
  if (found == op.plans.end() || !found->second->replays || !replay_settings().allow()) return nullptr;
  for (const Launch& launch : found->second->launches)
    if (PyList_GET_SIZE(launch.hooks.ptr()) != 0) return nullptr;
  return found->second;
}

template <class Number>
std::vector<Number> numbers_of(const pybind11::object& sequence) {
  std::vector<Number> numbers;
  for (const pybind11::handle item : sequence) numbers.push_back(item.cast<Number>());
  return numbers;
}

// Builds a plan from (device, creations, shown, single, launches, kept); see kernels/recording.py.
inline Plan plan_from(const pybind11::object& description) {
  namespace py = pybind11;
  Plan plan;
  if (description.is_none() || !driver().complete) return plan;
  const py::tuple parts = description;
  plan.device = parts[0].cast<std::int32_t>();
  Handle guard = nullptr;
  succeed(driver().guard(plan.device, &guard));
  driver().context(&plan.context);
  driver().delete_guard(guard);
  if (plan.context == nullptr) return plan;
  for (const py::handle item : py::list(parts[1])) {
    const py::tuple its(py::reinterpret_borrow<py::object>(item));
    Creation creation{its[0].cast<int>(), its[1], pybind11::tuple(), its[2], {}, {}, 0};
    int dtype = 0;
    while (dtype < kDtypes && torch_names().dtypes[dtype] != creation.dtype.ptr()) ++dtype;
    if (dtype == kDtypes) return plan;
    creation.type = torch_interface().dtypes[dtype];
    creation.sizes = numbers_of<i64>(creation.size);
    creation.strides.resize(creation.sizes.size());
    creation.stride = pybind11::tuple(creation.sizes.size());
    i64 stride = 1;
    for (std::size_t i = creation.sizes.size(); i-- > 0; stride *= creation.sizes[i])
      creation.stride[i] = creation.strides[i] = stride;
    plan.creations.push_back(std::move(creation));
  }
  plan.shown = numbers_of<int>(parts[2]);
  plan.single = parts[3].cast<bool>();
  for (const py::handle item : py::list(parts[4])) {
    const py::tuple its(py::reinterpret_borrow<py::object>(item));
    const auto grid = numbers_of<unsigned>(its[1]);
    Launch launch{reinterpret_cast<void*>(its[0].cast<Word>()),
                  {grid[0], grid[1], grid[2]},
                  its[2].cast<unsigned>(),
                  its[3].cast<unsigned>(),
                  {},
                  its[5].cast<std::string>(),
                  its[6]};
    for (const py::handle parameter : py::list(its[4])) {
      const py::tuple p(py::reinterpret_borrow<py::object>(parameter));
      launch.parameters.push_back(
          {static_cast<Source>(p[0].cast<int>()), p[1].cast<int>(), p[2].cast<Word>()});
    }
    if (launch.parameters.size() > static_cast<std::size_t>(kMostWords)) return plan;
    plan.launches.push_back(std::move(launch));
  }
  plan.kept = parts[5];
  plan.replays = plan.creations.size() <= static_cast<std::size_t>(kMostTensors);
  return plan;
}

inline PyObject* called(PyObject* function, PyObject* const* arguments, Py_ssize_t number) {
  return PyObject_Vectorcall(function, arguments, static_cast<std::size_t>(number), nullptr);
}

// The op as a Python function.
inline PyObject* replay(PyObject* self, PyObject* const* arguments, Py_ssize_t number) {
  return guarded([&]() -> PyObject* {
    auto& op = *static_cast<ReplayedOp*>(PyCapsule_GetPointer(self, "fastvae op"));
    thread_local std::string bytes;
    ReplayKey key(bytes);
    if (!driver().complete || !read_arguments(key, op.types, arguments, number))
      return called(op.in_python, arguments, number);
    const std::shared_ptr<const Plan> plan = plan_of(op, bytes);
    if (plan == nullptr) {
      // The first plan sets what is watched.
      const bool watched = replay_settings().choice != nullptr && !replay_settings().allow();
      if (watched || op.plans.count(bytes) != 0) return called(op.in_python, arguments, number);
      const std::string its = bytes;  // planning may call other ops
      const pybind11::tuple made(owned(called(op.planner, arguments, number)));
      if (op.plans.size() >= ReplayedOp::kMostPlans) op.plans.clear();
      op.plans[its] = std::make_shared<const Plan>(plan_from(made[1]));
      return pybind11::object(made[0]).release().ptr();
    }
    const InContext context(*plan);
    if (!context.right) {
      op.plans.erase(bytes);
      return called(op.in_python, arguments, number);
    }
    const Torch& names = torch_names();
    const std::size_t count = plan->creations.size();
    pybind11::object made[kMostTensors];
    address results[kMostTensors];
    for (std::size_t i = 0; i < count; ++i) {
      const Creation& its = plan->creations[i];
      if (PyObject* empty = names.empty_on_gpu) {
        PyObject* given[] = {its.size.ptr(), its.stride.ptr(), its.dtype.ptr()};
        made[i] = owned(called(empty, given, 3));
      } else if (its.like >= 0) {
        made[i] = owned(PyObject_CallOneArg(names.empty_like, key.objects[its.like]));
      } else {
        PyObject* given[] = {key.first, its.size.ptr(), its.dtype.ptr()};
        made[i] = owned(PyObject_VectorcallMethod(names.new_empty, given, 2, names.with_dtype));
      }
      static const Py_ssize_t at = find_handle();
      void* data = nullptr;
      succeed(torch_interface().data(reinterpret_cast<char*>(made[i].ptr()) + at, &data));
      results[i] = reinterpret_cast<address>(data);
    }
    launch_all(op, *plan, key, results);
    if (plan->single) return made[plan->shown[0]].release().ptr();
    pybind11::tuple all(plan->shown.size());
    for (std::size_t i = 0; i < plan->shown.size(); ++i)
      all[i] = plan->shown[i] < 0 ? pybind11::none() : made[plan->shown[i]];
    return all.release().ptr();
  });
}

// The op as the dispatcher's kernel for GPU tensors.
inline void replay_boxed(ReplayedOp& op, Word* stack, std::uint64_t arguments, std::uint64_t results) {
  const pybind11::gil_scoped_acquire gil;
  FromDispatcher from(op.registered, stack, arguments, results);
  std::string bytes;
  ReplayKey key(bytes);
  bool reads = driver().complete;
  for (std::size_t i = 0; reads && i < op.types.size(); ++i) {
    switch (op.types[i]) {
      case 't':
      case 'T':
        if (Handle handle = from.handle()) {
          reads = key.tensor(handle, nullptr);
        } else {
          key.none();
        }
        break;
      case 'i': key.integer(from.integer()); break;
      case 'n': key.varying(from.integer()); break;
      case 'f': key.real(from.real()); break;
      case 'v': key.varying(from.real()); break;
      case 'b': key.integer(from.flag()); break;
      case 's': key.text(from.text()); break;
      case 'd': key.integer(from.dtype()); break;
      case 'l': {
        const int count = from.length();
        const Need need = from.need();
        key.integer(count);
        for (int j = 0; j < count; ++j) key.integer(need[j]);
        break;
      }
      default: reads = false;
    }
  }
  const std::shared_ptr<const Plan> plan = reads ? plan_of(op, bytes) : nullptr;
  if (plan == nullptr) return from.otherwise();
  const InContext context(*plan);
  if (!context.right) {
    op.plans.erase(bytes);
    return from.otherwise();
  }
  HandleMade made[kMostTensors];
  address addresses[kMostTensors];
  for (std::size_t i = 0; i < plan->creations.size(); ++i) {
    const Creation& its = plan->creations[i];
    made[i] = HandleMade::on_gpu(its.sizes, its.strides, its.type, driver().device_type(), plan->device);
    if (made[i].handle == nullptr) return from.otherwise();  // out of memory, which Python reports
    addresses[i] = made[i].data;
  }
  launch_all(op, *plan, key, addresses);
  from.give(plan->shown, made, driver().device_type(), plan->device);
}

// Boxed kernels get no state: a function for each op.
constexpr int kMostReplayed = 160;
template <int kNumber>
void replay_entry(Word* stack, std::uint64_t arguments, std::uint64_t results) {
  replay_boxed(*replayed_ops()[kNumber], stack, arguments, results);
}
template <std::size_t... kNumbers>
Boxed replay_entry_of(std::size_t number, std::index_sequence<kNumbers...>) {
  static const Boxed entries[] = {&replay_entry<static_cast<int>(kNumbers)>...};
  return entries[number];
}

// Makes the function of an op. `types` has n and v where numbers vary; `in_python` and `planner` get the
// function's arguments, `boxed` those of the dispatcher, with handles.
inline pybind11::object replayed(const std::string& name, const std::string& types, pybind11::object planner,
                                 pybind11::object in_python) {
  static PyMethodDef definition = fast_method("replay", &replay);
  auto* op = new ReplayedOp{name, types, planner.release().ptr(), in_python.release().ptr(), {}, {}};
  replayed_ops().push_back(op);  // never deleted, as the op
  const pybind11::capsule self(op, "fastvae op");
  return owned(PyCFunction_New(&definition, self.ptr()));
}

// Registers the function's op as the kernel of fastvae::<name> for GPU tensors; returns false where this
// torch does not support it.
inline bool implement_on_gpu(const pybind11::object& function, const std::string& name, bool empty_for_none,
                             pybind11::object in_python) {
  static Handle library = [&] {
    Handle made = nullptr;
    if (torch_interface().complete) torch_interface().library("fastvae", "CUDA", "fastvae", 1, &made);
    return made;
  }();
  auto* op =
      static_cast<ReplayedOp*>(PyCapsule_GetPointer(PyCFunction_GetSelf(function.ptr()), "fastvae op"));
  std::size_t number = 0;
  while (replayed_ops()[number] != op) ++number;
  if (library == nullptr || number >= static_cast<std::size_t>(kMostReplayed)) return false;
  std::string types = op->types;
  for (char& type : types) type = type == 'n' ? 'i' : type == 'v' ? 'f' : type;
  op->registered = {0, empty_for_none, types, in_python.release().ptr(), nullptr};
  const Boxed entry = replay_entry_of(number, std::make_index_sequence<kMostReplayed>());
  return torch_interface().implement(library, name.c_str(), entry, kInterface) == 0;
}

// Sets what is checked before each replay.
inline void watch(const pybind11::object& choice, const std::string& default_backend,
                  const pybind11::list& containers) {
  ReplaySettings& settings = replay_settings();
  settings.choice = pybind11::object(choice).release().ptr();
  settings.serves_by_default = default_backend == "native" || default_backend == "triton";
  settings.empty.clear();
  for (const pybind11::handle container : containers) {
    if (!PyDict_CheckExact(container.ptr()) && !PyList_CheckExact(container.ptr()))
      throw pybind11::type_error("fastvae._C: expected dictionaries and lists to watch");
    settings.empty.push_back(pybind11::reinterpret_borrow<pybind11::object>(container).release().ptr());
  }
}

// Drops all plans.
inline void forget() {
  for (ReplayedOp* op : replayed_ops()) op->plans.clear();
}

// The number of plans of all ops, and of those that replay; for tests.
inline pybind11::tuple count_plans() {
  std::size_t all = 0, replaying = 0;
  for (const ReplayedOp* op : replayed_ops())
    for (const auto& plan : op->plans) {
      ++all;
      replaying += plan.second->replays;
    }
  return pybind11::make_tuple(all, replaying);
}

}  // namespace fastvae
