// The attention kernels, compiled for the emulator from the source that ships.
#include "../attention/decode_launch.h"
#include "../attention/launch.h"

namespace fuseformer {

template const char* attention_forward<Bfloat16>(const AttentionParams&, int, Stream);
template const char* attention_forward<Half>(const AttentionParams&, int, Stream);
template const char* attention_backward<Bfloat16>(const AttentionGradientParams&, int, Stream);
template const char* attention_backward<Half>(const AttentionGradientParams&, int, Stream);
template const char* attention_decode<Bfloat16>(const DecodeParams&, int, Stream);
template const char* attention_decode<Half>(const DecodeParams&, int, Stream);
template int backward_step_rows<Bfloat16>(int);
template int backward_step_rows<Half>(int);

}  // namespace fuseformer
