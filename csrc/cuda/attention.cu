// Attention of packed groups: which kernel, for which team of threads.
#include <limits>

#include "attention_bf16.cuh"
#include "attention_float.cuh"

namespace blip_trace::cuda {
namespace {

// From so many query rows a group on, on average, a block works on one tile of queries; below,
// single warps do, for most of a larger tile would be empty.
constexpr int64_t rows_of_long_groups = 32;

// Tiles of twice as many queries read keys and values half as often from shared memory, but leave a
// large GPU (132 processors, each with room for two) idle where there are few of them.
constexpr int64_t many_blocks = 2 * 132;

bool many_large_tiles(const Attention& a) {
  constexpr int64_t rows = 128;
  return a.rows >= rows * a.groups && a.rows / rows * a.heads >= many_blocks;
}

template <class Team>
const char* start(void (*kernel)(Attention, int), const Attention& a, Stream stream) {
  const int64_t numbers = tiles<Team::rows>(a.rows, a.groups) * a.heads;
  if (numbers > std::numeric_limits<int>::max()) return "more rows than one launch can have";
  const int64_t blocks = (numbers + Team::teams - 1) / Team::teams;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Team::threads * Team::teams),
                Team::shared_bytes, stream, a, static_cast<int>(numbers));
}

template <class Team>
const char* start_on_tensor_cores(const Attention& a, Stream stream) {
  return start<Team>(in_whole_chunks<Bfloat16>(a) ? attention_on_tensor_cores<Team, true>
                                                  : attention_on_tensor_cores<Team, false>,
                     a, stream);
}

template <int head>
const char* start_on_tensor_cores(const Attention& a, Stream stream) {
  if (a.rows < rows_of_long_groups * a.groups)
    return start_on_tensor_cores<TensorTeam<head, 1, 1, 16>>(a, stream);
  if constexpr (head <= 64) {
    if (many_large_tiles(a)) return start_on_tensor_cores<TensorTeam<head, 4, 2, 64>>(a, stream);
  }
  return start_on_tensor_cores<TensorTeam<head, 4, 1, head <= 64 ? 64 : 32>>(a, stream);
}

template <class Team>
const char* start_in_float(const Attention& a, Stream stream) {
  return start<Team>(in_whole_chunks<float>(a) ? attention_in_float<Team, true>
                                               : attention_in_float<Team, false>,
                     a, stream);
}

template <int head>
const char* start_in_float(const Attention& a, Stream stream) {
  if (a.rows < rows_of_long_groups * a.groups)
    return start_in_float<FloatTeam<head, 1, 16>>(a, stream);
  return start_in_float<FloatTeam<head, 4, head <= 64 ? 64 : 32>>(a, stream);
}

}  // namespace

const char* attention(const Attention& a, Stream stream) {
  if (a.rows == 0 || a.groups == 0) return nullptr;
  if (a.type == Type::float32) {
    if (a.head_size <= 32) return start_in_float<32>(a, stream);
    if (a.head_size <= 64) return start_in_float<64>(a, stream);
    return start_in_float<largest_head>(a, stream);
  }
  if (a.head_size <= 16) return start_on_tensor_cores<16>(a, stream);
  if (a.head_size <= 32) return start_on_tensor_cores<32>(a, stream);
  if (a.head_size <= 64) return start_on_tensor_cores<64>(a, stream);
  return start_on_tensor_cores<largest_head>(a, stream);
}

}  // namespace blip_trace::cuda
