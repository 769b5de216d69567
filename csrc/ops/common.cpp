#include "common.h"

#include <new>

namespace blip_trace::ops {

void check_rows(const char* op, const char* name, const Tensor& rows, std::int64_t limit) {
  const auto* values = const_data<std::int32_t>(rows);
  for (std::int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < limit, "blip_trace::", op, ": ", name, "[", i,
                      "] is ", values[i], ", out of range for ", limit, " rows.");
  }
}

void check_starts(const char* op, const char* name, const Tensor& starts, std::int64_t total) {
  const auto* values = const_data<std::int32_t>(starts);
  const std::int64_t parts = starts.numel() - 1;
  TORCH_CHECK_INDEX(values[0] == 0 && values[parts] == total, "blip_trace::", op, ": ", name,
                    " must run from 0 to ", total, ", but it runs from ", values[0], " to ",
                    values[parts], ".");
  for (std::int64_t i = 0; i < parts; ++i) {
    TORCH_CHECK_INDEX(values[i] <= values[i + 1], "blip_trace::", op, ": ", name,
                      " must not fall, but ", values[i], " is followed by ", values[i + 1], ".");
  }
}

float* scratch(std::int64_t floats) {
  constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, alignment); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local std::int64_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(
        ::operator new(static_cast<std::size_t>(floats) * sizeof(float), alignment)));
    size = floats;
  }
  return memory.get();
}

}  // namespace blip_trace::ops
