#include "few_rows_launch.h"

namespace fuseformer {
template const char* few_rows_hidden<Bfloat16>(const FewRowsParams&, Stream);
template const char* few_rows_output<Bfloat16>(const FewRowsParams&, Stream);
}  // namespace fuseformer
