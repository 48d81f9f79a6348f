#include "linear_launch.h"

namespace fuseformer {
template const char* linear_activation<Half>(const LinearParams&, Stream);
template const char* activation_gradient<Half>(const ActivationGradientParams&, Stream);
}  // namespace fuseformer
