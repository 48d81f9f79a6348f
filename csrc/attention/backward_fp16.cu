#include "launch.h"

namespace fuseformer {
template const char* attention_backward<Half>(const AttentionGradientParams&, int, Stream);
template int backward_step_rows<Half>(int);
}  // namespace fuseformer
