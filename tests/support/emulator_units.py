"""Translation units with a few of the CUDA C++ kernels, in bfloat16: quickly compiled."""

from collections.abc import Sequence

#: What the translation units of feed-forward offer for each dtype: the arguments of each function.
FEED_FORWARD_ENTRIES = {
    "feed_forward_forward": "const FeedForwardParams&, int, Activation, Stream",
    "feed_forward_backward": "const FeedForwardGradientParams&, int, Stream",
    "linear_activation": "const LinearParams&, Stream",
    "activation_gradient": "const ActivationGradientParams&, Stream",
    "gated_activation": "const LinearParams&, Stream",
    "gated_gradient": "const GatedGradientParams&, Stream",
    "few_rows_hidden": "const FewRowsParams&, Stream",
    "few_rows_output": "const FewRowsParams&, Stream",
}


def attention_unit(head_dims: Sequence[int], *, backward: bool = True, decode: bool = False) -> str:
    """Return a translation unit with the bfloat16 kernels of a few head dims: quickly compiled."""

    def switch(call: str, otherwise: str) -> str:
        cases = (f"if (head_dim == {dim}) return {call.format(dim)};" for dim in head_dims)
        return "\n".join([*cases, f"return {otherwise};"])

    nothing = '"not built"'
    forward = switch("forward_of<Bfloat16, {}>(params, stream)", nothing)
    gradient = switch("backward_of<Bfloat16, {}>(given, stream)", nothing)
    if not backward:
        gradient = f"return (void)given, (void)head_dim, (void)stream, {nothing};"
    rows = switch("with_backward_traits<Bfloat16, {}>(rows)", "0")
    decodes = "template const char* attention_decode<Bfloat16>(const DecodeParams&, int, Stream);"
    if not decode:
        decodes = decodes.replace("template", "template <>").replace(
            ";", f" {{ return {nothing}; }}"
        )
    return f"""
#include "attention/decode_launch.h"
#include "attention/launch.h"
namespace fuseformer {{
template <>
const char* attention_forward<Bfloat16>(const AttentionParams& params, int head_dim,
                                        Stream stream) {{
{forward}
}}
template <>
const char* attention_backward<Bfloat16>(const AttentionGradientParams& given, int head_dim,
                                         Stream stream) {{
{gradient}
}}
template <>
int backward_step_rows<Bfloat16>(int head_dim) {{
const auto rows = [](auto traits) {{ return decltype(traits)::kBlockM; }};
{rows}
}}
template <>
int backward_step_rows<Half>(int) {{ return 0; }}
template <>
const char* attention_forward<Half>(const AttentionParams&, int, Stream) {{ return {nothing}; }}
template <>
const char* attention_backward<Half>(const AttentionGradientParams&, int, Stream) {{
return {nothing};
}}
{decodes}
template <>
const char* attention_decode<Half>(const DecodeParams&, int, Stream) {{ return {nothing}; }}
}}
"""


def feed_forward_unit(*built: str, text: str = "") -> str:
    """Return a translation unit with the bfloat16 kernels of a few functions: quickly compiled.

    `text` may define others, all that are left say that they were not built.
    """
    parts = ("backward_", "few_rows_", "gated_", "linear_", "")
    lines = [f'#include "feed_forward/{part}launch.h"' for part in parts]
    lines += ["namespace fuseformer {", text]
    for name, arguments in FEED_FORWARD_ENTRIES.items():
        for element in ("Bfloat16", "Half"):
            function = f"const char* {name}<{element}>({arguments})"
            if element == "Bfloat16" and name in built:
                lines.append(f"template {function};")
            elif f"{name}<{element}>" not in text:
                lines.append(f'template <> {function} {{ return "not built"; }}')
    lines += [
        f"template FeedForwardBackwardSizes feed_forward_backward_sizes<{element}>(int);"
        for element in ("Bfloat16", "Half")
    ]
    return "\n".join([*lines, "}", ""])
