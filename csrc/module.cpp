// The Python module blip_trace._C. Importing it registers torch.ops.blip_trace.*; what it defines
// itself is about the build and the processor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/capability.h"
#include "ops/products.h"

namespace py = pybind11;
using namespace blip_trace;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = BLIP_TRACE_COMPILER;
  info["torch"] = BLIP_TRACE_TORCH_VERSION;
#ifdef _OPENMP
  info["threads"] = "OpenMP";
#else
  info["threads"] = "none";
#endif
  info["cpu_capabilities"] = cpu::built_capabilities();
  return info;
}

void set_cpu_capability(const std::string& name) {
  if (!cpu::set_capability(name))
    throw py::value_error("this processor does not run the build '" + name + "'");
}

py::dict products() {
  py::dict ways;
  ways["float32"] = ops::name_of(ops::float32_way());
  ways["bfloat16"] = ops::name_of(ops::bfloat16_way());
  return ways;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", build_info, "Compiler, torch version, threads and instruction sets of this build.");
  m.def("cpu_capability", [] { return cpu::kernels().name; }, "The instruction set in use.");
  m.def("available_cpu_capabilities", cpu::available_capabilities, "Those this processor runs.");
  m.def("set_cpu_capability", set_cpu_capability, "Chooses an instruction set; for tests.");
  m.def("products", products, "Who takes the products of each type: torch, own, or widened.");
  m.def("force_products", ops::force_way,
        "Takes all products that way, where the kernels have it; None: as the processor; for tests.");
}
