// Attention of packed groups: which kernel, and which team of threads.
#include <limits>

#include "attention_bf16.cuh"
#include "attention_float.cuh"

namespace blip_trace::cuda {
namespace {

// From so many query rows a group on, on average, a block works on one tile of queries. Below,
// single warps do: most of a larger tile would be empty.
constexpr int64_t rows_of_long_groups = 32;

bool groups_are_long(const Attention& a) { return a.rows >= rows_of_long_groups * a.groups; }

// Tiles of 128 queries read keys and values half as often from shared memory as those of 64, but
// are worth it only if they are full and fill a large GPU: 132 processors with room for two each.
bool large_tiles_fill(const Attention& a) {
  constexpr int64_t rows = 128, blocks = 2 * 132;
  return a.rows >= rows * a.groups && a.rows / rows * a.heads >= blocks;
}

template <class Team>
const char* start(void (*kernel)(Attention, int), const Attention& a, Stream stream) {
  const int64_t numbers = tiles<Team::rows>(a.rows, a.groups) * a.heads;
  if (numbers > std::numeric_limits<int>::max()) return "more rows than one launch can have";
  const int64_t blocks = (numbers + Team::teams - 1) / Team::teams;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Team::threads * Team::teams),
                Team::shared_bytes, stream, a, static_cast<int>(numbers));
}

template <int head, int warps, int blocks, int keys>
const char* start_in_bf16(const Attention& a, Stream stream) {
  using Team = in_bf16::Team<head, warps, blocks, keys>;
  return start<Team>(
      in_whole_chunks<bf16>(a) ? in_bf16::attend<Team, true> : in_bf16::attend<Team, false>, a,
      stream);
}

template <int head>
const char* start_in_bf16(const Attention& a, Stream stream) {
  if (!groups_are_long(a)) return start_in_bf16<head, 1, 1, 16>(a, stream);
  if constexpr (head <= 64) {
    return large_tiles_fill(a) ? start_in_bf16<head, 4, 2, 64>(a, stream)
                               : start_in_bf16<head, 4, 1, 64>(a, stream);
  } else {
    return start_in_bf16<head, 4, 1, 32>(a, stream);
  }
}

template <int head, int warps, int keys>
const char* start_in_float(const Attention& a, Stream stream) {
  using Team = in_float::Team<head, warps, keys>;
  return start<Team>(
      in_whole_chunks<float>(a) ? in_float::attend<Team, true> : in_float::attend<Team, false>, a,
      stream);
}

template <int head>
const char* start_in_float(const Attention& a, Stream stream) {
  return groups_are_long(a) ? start_in_float<head, 4, head <= 64 ? 64 : 32>(a, stream)
                            : start_in_float<head, 1, 16>(a, stream);
}

}  // namespace

const char* attention(const Attention& a, Stream stream) {
  if (a.rows == 0 || a.groups == 0) return nullptr;
  if (a.type == Type::float32) {
    if (a.head_size <= 32) return start_in_float<32>(a, stream);
    if (a.head_size <= 64) return start_in_float<64>(a, stream);
    return start_in_float<largest_head>(a, stream);
  }
  if (a.head_size <= 16) return start_in_bf16<16>(a, stream);
  if (a.head_size <= 32) return start_in_bf16<32>(a, stream);
  if (a.head_size <= 64) return start_in_bf16<64>(a, stream);
  return start_in_bf16<largest_head>(a, stream);
}

}  // namespace blip_trace::cuda
