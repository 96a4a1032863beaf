"""Equal sizes in the comparison with MaxText."""

import pytest

from aoe_jax.errors import UserError
from benchmarks import maxtext

pytestmark = pytest.mark.slow

# As MaxText 0.2.5 states it for `MODEL` on 16 devices.
SIZE = {
    "layers": 12,
    "width": 768,
    "heads": 12,
    "head_width": 64,
    "experts": 8,
    "top_k": 2,
    "expert_width": 3072,
    "vocabulary": 32_000,
    "computation_dtype": "bfloat16",
    "parameters": 732_457_728,
    "state_dtypes": ["float32"],
    "state_numbers": 3 * 732_457_728,
    "tokens_per_step": 16 * 8 * 2048,
}


@pytest.mark.parametrize("variant", maxtext.VARIANTS)
def test_models_are_of_equal_size(variant):
    size = maxtext.our_size(maxtext.our_configuration(variant, 16))
    assert size.keys() == SIZE.keys()
    assert f"{size['parameters']:,} parameters" in maxtext.check_sizes(variant, size, SIZE)
    for field, value in SIZE.items():
        other = [] if isinstance(value, list) else value * 2
        with pytest.raises(UserError, match=f"{variant} has {field} .*; make them equal"):
            maxtext.check_sizes(variant, size, SIZE | {field: other})
