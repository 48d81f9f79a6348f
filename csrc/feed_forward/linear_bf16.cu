#include "linear_launch.h"

namespace fuseformer {
template const char* linear_activation<Bfloat16>(const LinearParams&, Stream);
template const char* activation_gradient<Bfloat16>(const ActivationGradientParams&, Stream);
}  // namespace fuseformer
