#include "launch.h"

namespace fuseformer {
template const char* feed_forward_forward<Half>(const FeedForwardParams&, int, Activation, Stream);
}
