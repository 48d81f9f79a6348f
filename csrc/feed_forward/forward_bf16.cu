#include "launch.h"

namespace fuseformer {
template const char* feed_forward_forward<Bfloat16>(const FeedForwardParams&, int, Activation,
                                                    Stream);
}
