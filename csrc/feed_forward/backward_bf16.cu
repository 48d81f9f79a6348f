#include "backward_launch.h"

namespace fuseformer {
template const char* feed_forward_backward<Bfloat16>(const FeedForwardGradientParams&, int, Stream);
template FeedForwardBackwardSizes feed_forward_backward_sizes<Bfloat16>(int);
}  // namespace fuseformer
