#include "backward_launch.h"

namespace fuseformer {
template const char* feed_forward_backward<Half>(const FeedForwardGradientParams&, int, Stream);
template FeedForwardBackwardSizes feed_forward_backward_sizes<Half>(int);
}  // namespace fuseformer
