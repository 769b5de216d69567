// How products of bfloat16 matrices are taken.
#pragma once

#include <optional>

namespace blip_trace::ops {

// Whether they go to torch as they are. Where the processor has no bfloat16 products they are taken
// through float32: the products are the same and the sums are float32 in both, but torch's own way
// is several times slower there.
bool native_bf16_products();
void set_native_bf16_products(
    std::optional<bool> native);  // for tests; nullopt: what the processor has

}  // namespace blip_trace::ops
