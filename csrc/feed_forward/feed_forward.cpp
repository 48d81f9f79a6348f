#include "feed_forward.h"

#include <limits>

#include "entry.h"

namespace fuseformer {
namespace {

int within(const char* name, int64_t value, int64_t most) {
  if (value < 0 || value > most) {
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) +
                                ", expected 0 to " + std::to_string(most));
  }
  return static_cast<int>(value);
}

// A tensor like `like` of the given sizes, whose rows are copied 16 bytes at a time.
void require_like(const TensorView& x, const TensorView& like, const std::vector<int64_t>& sizes) {
  require_shape(x, sizes);
  require_dtype(x, like.dtype);
  require_device(x, like);
  require_rows_of_16_bytes(x);
}

RowTensor rows(const TensorView& x, const TensorView& like, int64_t count, int64_t columns) {
  require_like(x, like, {count, columns});
  return {x.data, x.strides[0]};
}

const void* bias(const TensorView& x, const TensorView& like, int64_t size) {
  if (!x.given) return nullptr;
  require_like(x, like, {size});
  return x.data;
}

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  throw std::invalid_argument("activation: got " + name +
                              ", expected relu, gelu, gelu_tanh or silu");
}

FeedForwardParams params_of(const FeedForwardArguments& a) {
  for (const TensorView* matrix : {&a.x, &a.w1}) {
    if (matrix->sizes.size() != 2) {
      refuse(*matrix, "shape " + shape_text(matrix->sizes), "2 dimensions");
    }
  }
  if (a.x.dtype != DType::kBfloat16 && a.x.dtype != DType::kFloat16) {
    refuse(a.x, name_of(a.x.dtype), "bfloat16 or float16");
  }
  const int64_t tokens = a.x.sizes[0], width = a.x.sizes[1], hidden = a.w1.sizes[0];
  // Rows of w2 in bytes, and what the last block and the last step reach past the end, are within
  // 32 bits.
  constexpr int64_t kMost = 1 << 29;
  FeedForwardParams params = {};
  params.tokens = within("tokens", tokens, kMost);
  params.hidden = within("hidden", hidden, kMost);
  if (hidden % 8 != 0) {
    refuse(a.w1, std::to_string(hidden) + " hidden units", "a multiple of 8");
  }
  params.x = rows(a.x, a.x, tokens, width);
  params.w1 = rows(a.w1, a.x, hidden, width).data;
  require_contiguous(a.w1);
  params.w2 = rows(a.w2, a.x, width, hidden);
  params.y = rows(a.y, a.x, tokens, width);
  params.b1 = bias(a.b1, a.x, hidden);
  params.b2 = bias(a.b2, a.x, width);
  if (a.seed.given) {
    require_dtype(a.seed, DType::kInt64);
    require_device(a.seed, a.x);
    if (a.seed.numel() != 1) refuse(a.seed, "shape " + shape_text(a.seed.sizes), "one number");
    params.seed = static_cast<const int64_t*>(a.seed.data);
    params.dropout_threshold =
        static_cast<uint32_t>(within("dropout_threshold", a.dropout_threshold, 1 << 16));
    params.dropout_scale = static_cast<float>(a.dropout_scale);
  }
  return params;
}

}  // namespace

void run_feed_forward_forward(const FeedForwardArguments& a, Stream stream) {
  const Activation activation = activation_of(a.activation);
  const FeedForwardParams params = params_of(a);
  const int width = within("width", a.x.sizes[1], std::numeric_limits<int>::max());
  const char* failure = a.x.dtype == DType::kBfloat16
                            ? feed_forward_forward<Bfloat16>(params, width, activation, stream)
                            : feed_forward_forward<Half>(params, width, activation, stream);
  if (failure != nullptr) throw std::runtime_error(std::string("feed-forward: ") + failure);
}

}  // namespace fuseformer
