#include "decode_launch.h"

namespace fuseformer {
template const char* attention_decode<Bfloat16>(const DecodeParams&, int, Stream);
}
