#include "linear_launch.h"

namespace fuseformer {
template const char* linear_activation<Bfloat16>(const LinearParams&, Activation, Stream);
template const char* activation_gradient<Bfloat16>(const ActivationGradientParams&, Activation,
                                                   Stream);
}  // namespace fuseformer
