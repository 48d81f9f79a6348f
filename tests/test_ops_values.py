"""What is finite gives what is right, on every backend: large values, padding that holds NaN."""

import pytest
import torch
from value_checks import (
    HUGE,
    LEAST,
    MAGNITUDES,
    large_products,
    lengths_past_32_bits,
    magnitude,
    whole_rows,
)

BACKENDS = ("reference", "cpu", "triton")
DTYPES = (torch.float32, torch.float16)
# Huge biases, sinks, slopes and softcaps are not yet right on Triton.
ON_TRITON = (
    "a bias of finfo.min",
    "a softcap of 1e-3",
    "a large scale",
    "a scale of 0",
    "a tiny scale",
    "a negative scale",
    "a window past 64 bits",
    "a window past 32 bits",
)


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request):
    if request.param == "triton":
        request.getfixturevalue("triton_on_cpu")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("plain", ["reference", "cpu"])
def test_options_of_any_size(name, dtype, plain):
    magnitude(name, dtype, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ON_TRITON)
def test_options_of_any_size_on_triton(name, dtype, triton_on_cpu):
    magnitude(name, dtype, "triton")


@pytest.mark.parametrize("value", [LEAST, -HUGE, HUGE])
@pytest.mark.parametrize("plain", ["reference", "cpu"])
def test_rows_of_one_huge_bias_give_the_mean(value, plain):
    whole_rows(value, torch.float32, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", ["cpu", "triton"])
@pytest.mark.parametrize("op", ["attention", "varlen_attention", "decode_attention"])
def test_products_past_half_precision(op, fused, dtype, triton_on_cpu):
    large_products(op, dtype, fused)


def test_lengths_past_32_bits(backend):
    lengths_past_32_bits(backend, torch.float32)
