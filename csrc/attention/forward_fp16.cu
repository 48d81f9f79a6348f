#include "launch.h"

namespace fuseformer {
template const char* attention_forward<Half>(const AttentionParams&, int, Stream);
}
