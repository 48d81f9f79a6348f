#include "launch.h"

namespace fuseformer {
template const char* attention_backward<Bfloat16>(const AttentionGradientParams&, int, Stream);
template int backward_step_rows<Bfloat16>(int);
}  // namespace fuseformer
