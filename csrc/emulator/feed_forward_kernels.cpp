// The feed-forward kernels, compiled for the emulator from the source that ships.
#include "../feed_forward/linear_launch.h"

namespace fuseformer {

template const char* linear_activation<Bfloat16>(const LinearParams&, Activation, Stream);
template const char* linear_activation<Half>(const LinearParams&, Activation, Stream);
template const char* activation_gradient<Bfloat16>(const ActivationGradientParams&, Activation,
                                                   Stream);
template const char* activation_gradient<Half>(const ActivationGradientParams&, Activation, Stream);

}  // namespace fuseformer
