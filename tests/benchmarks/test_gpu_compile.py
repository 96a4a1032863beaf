"""The table of grouped products on GPUs, without a compiler for them."""

import jax
import pytest

from benchmarks.compiling import PRODUCTS, lower_for
from benchmarks.gpu_compile import _figure, _in_words


def test_one_product_alone():
    shapes = {"forward": (64, 16), "d_rows": (64, 8), "d_weights": (2, 8, 16)}
    for product in PRODUCTS:
        lowered = lower_for(jax.devices()[0], "blocked", 64, 8, 16, 2, "float32", product)
        assert lowered.out_info.shape == shapes[product]


@pytest.mark.parametrize("product", PRODUCTS)
def test_what_a_backend_does_not_take_is_an_error_in_the_table(product):
    found = _figure(jax.devices()[0], "mosaic_gpu", (64, 8, 16, 2), "float32", product)
    assert "use bfloat16 or float16" in found["error"] and _in_words(found) == "no"
