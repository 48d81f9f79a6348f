// The feed-forward kernels, compiled for the emulator from the source that ships.
#include "../feed_forward/backward_launch.h"
#include "../feed_forward/few_rows_launch.h"
#include "../feed_forward/gated_launch.h"
#include "../feed_forward/launch.h"
#include "../feed_forward/linear_launch.h"

namespace fuseformer {

template const char* feed_forward_forward<Bfloat16>(const FeedForwardParams&, int, Activation,
                                                    Stream);
template const char* feed_forward_forward<Half>(const FeedForwardParams&, int, Activation, Stream);
template const char* feed_forward_backward<Bfloat16>(const FeedForwardGradientParams&, int, Stream);
template const char* feed_forward_backward<Half>(const FeedForwardGradientParams&, int, Stream);
template FeedForwardBackwardSizes feed_forward_backward_sizes<Bfloat16>(int);
template FeedForwardBackwardSizes feed_forward_backward_sizes<Half>(int);
template const char* linear_activation<Bfloat16>(const LinearParams&, Stream);
template const char* linear_activation<Half>(const LinearParams&, Stream);
template const char* activation_gradient<Bfloat16>(const ActivationGradientParams&, Stream);
template const char* activation_gradient<Half>(const ActivationGradientParams&, Stream);
template const char* gated_activation<Bfloat16>(const LinearParams&, Stream);
template const char* gated_activation<Half>(const LinearParams&, Stream);
template const char* gated_gradient<Bfloat16>(const GatedGradientParams&, Stream);
template const char* gated_gradient<Half>(const GatedGradientParams&, Stream);
template const char* few_rows_hidden<Bfloat16>(const FewRowsParams&, Stream);
template const char* few_rows_hidden<Half>(const FewRowsParams&, Stream);
template const char* few_rows_output<Bfloat16>(const FewRowsParams&, Stream);
template const char* few_rows_output<Half>(const FewRowsParams&, Stream);

}  // namespace fuseformer
