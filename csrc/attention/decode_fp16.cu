#include "decode_launch.h"

namespace fuseformer {
template const char* attention_decode<Half>(const DecodeParams&, int, Stream);
}
