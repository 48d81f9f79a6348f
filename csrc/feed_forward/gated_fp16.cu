#include "gated_launch.h"

namespace fuseformer {
template const char* gated_activation<Half>(const LinearParams&, Stream);
template const char* gated_gradient<Half>(const GatedGradientParams&, Stream);
}  // namespace fuseformer
