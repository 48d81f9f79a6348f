#include "launch.h"

namespace fuseformer {
template const char* attention_forward<Bfloat16>(const AttentionParams&, int, Stream);
}
