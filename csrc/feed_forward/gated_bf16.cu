#include "gated_launch.h"

namespace fuseformer {
template const char* gated_activation<Bfloat16>(const LinearParams&, Stream);
template const char* gated_gradient<Bfloat16>(const GatedGradientParams&, Stream);
}  // namespace fuseformer
