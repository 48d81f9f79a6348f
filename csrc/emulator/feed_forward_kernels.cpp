// The feed-forward kernels, compiled for the emulator from the source that ships.
#include "../feed_forward/launch.h"

namespace fuseformer {

template const char* feed_forward_forward<Bfloat16>(const FeedForwardParams&, int, Activation,
                                                    Stream);
template const char* feed_forward_forward<Half>(const FeedForwardParams&, int, Activation, Stream);

}  // namespace fuseformer
