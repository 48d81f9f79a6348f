#include "few_rows_launch.h"

namespace fuseformer {
template const char* few_rows_hidden<Half>(const FewRowsParams&, Stream);
template const char* few_rows_output<Half>(const FewRowsParams&, Stream);
}  // namespace fuseformer
