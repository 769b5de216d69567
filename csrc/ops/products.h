// Who takes matrix products. The one choice that a machine decides; all ways give the same numbers
// but for rounding.
#pragma once

#include <optional>
#include <string>

namespace blip_trace::ops {

enum class Way {
  torch,    // torch's own product
  own,      // `linear` of the kernels, in the type of the inputs
  widened,  // of bfloat16 by `linear`, through float32: the products are the same, and all sums are
            // float32 anyway
};

// float32: torch's product is MKL, tuned for Intel's processors: there it was a fifth faster than
// `linear` (Skylake), on AMD's it is slower (Zen 4: 190 against 215 GFLOP/s, and 150 against 200 on
// a hundred rows).
// bfloat16: torch's where the processor has tiles for them. Else `linear`, in bfloat16 if the
// kernels multiply that (Zen 4: 440 against 290 to 400 GFLOP/s), or widened, which without such
// instructions is several times faster than torch.
Way float32_way();
Way bfloat16_way();

// For tests: all products the way of this name, if the kernels have it; nullopt: what is said
// above.
void force_way(std::optional<std::string> name);

// As `force_way` takes it.
const char* name_of(Way way);

}  // namespace blip_trace::ops
