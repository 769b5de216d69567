#include "common.h"

#include <new>

namespace blip_trace::ops {

void check_matrix(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
                    "blip_trace::", op, " takes float32 or bfloat16, and ", name, " is ",
                    x.scalar_type(), ".");
  TORCH_CHECK_VALUE(x.dim() == 2, "blip_trace::", op, ": ", name,
                    " must have two dimensions, but its shape is ", x.sizes(), ".");
}

void check_like(const char* op, const char* name, const Tensor& x, const Tensor& like,
                at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.scalar_type() == like.scalar_type(), "blip_trace::", op, ": ", name, " is ",
                    x.scalar_type(), ", but the input is ", like.scalar_type(),
                    "; both must be of one type.");
  TORCH_CHECK_VALUE(x.device() == like.device(), "blip_trace::", op, ": ", name, " is on ",
                    x.device(), ", but the input is on ", like.device(), ".");
  TORCH_CHECK_VALUE(x.sizes() == sizes, "blip_trace::", op, ": ", name, " must have shape ", sizes,
                    ", but it is ", x.sizes(), ".");
}

void check_rows(const char* op, const char* name, const Tensor& rows, std::int64_t limit) {
  TORCH_CHECK_VALUE(rows.scalar_type() == at::kInt && rows.dim() == 1 && rows.is_contiguous(),
                    "blip_trace::", op, ": ", name, " must be a contiguous vector of int32.");
  const auto* values = const_data<std::int32_t>(rows);
  for (std::int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < limit, "blip_trace::", op, ": ", name, "[", i,
                      "] is ", values[i], ", out of range for ", limit, " rows.");
  }
}

std::int64_t check_starts(const char* op, const char* name, const Tensor& starts,
                          std::int64_t total) {
  TORCH_CHECK_VALUE(starts.scalar_type() == at::kInt && starts.dim() == 1 &&
                        starts.is_contiguous() && starts.numel() >= 1,
                    "blip_trace::", op, ": ", name,
                    " must be a contiguous vector of int32 that is not empty.");
  const auto* values = const_data<std::int32_t>(starts);
  const std::int64_t parts = starts.numel() - 1;
  TORCH_CHECK_INDEX(values[0] == 0 && values[parts] == total, "blip_trace::", op, ": ", name,
                    " must run from 0 to ", total, ", but it runs from ", values[0], " to ",
                    values[parts], ".");
  for (std::int64_t i = 0; i < parts; ++i) {
    TORCH_CHECK_INDEX(values[i] <= values[i + 1], "blip_trace::", op, ": ", name,
                      " must not fall, but ", values[i], " is followed by ", values[i + 1], ".");
  }
  return parts;
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
