"""The comparison with MaxText, with a replacement of MaxText's Python."""

import json

import pytest

from aoe_jax.errors import UserError
from benchmarks import maxtext
from tests.runs import run

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
FIGURES = {"versions": {"maxtext": "0.2.5"}, "devices": 128, "temp_bytes": 3e9, "size": SIZE}
# Reads and writes 2.77e12 bytes: a second on v5p.
PROGRAM = """HloModule step

ENTRY %main (a: f32[346250,1000000]) -> f32[346250,1000000] {
  %a = f32[346250,1000000] parameter(0)
  ROOT %negative = f32[346250,1000000] negate(%a)
}
"""


def stand_in(folder):
    """A program in the place of MaxText's Python: it writes small figures."""
    (folder / "figures").write_text(json.dumps(FIGURES))
    (folder / "program").write_text(PROGRAM)
    program = folder / "python"
    program.write_text(f"""#!/bin/sh
        cp {folder}/figures "$3/figures.json"
        cp {folder}/program "$3/0.jit_train_step.after_codegen.txt"
    """)
    program.chmod(0o755)
    return program


def test_a_recipe_beside_its_published_step(tmp_path):
    file = tmp_path / "figures.json"
    arguments = [f"--python={stand_in(tmp_path)}", "--recipe=mixtral_8x7b_v5p", f"--json={file}"]
    status, stdout, stderr = run(["-m", "benchmarks.maxtext", *arguments])
    assert status == 0, stderr
    assert "mixtral_8x7b_v5p: published 50.70 s, likely 1.00 s (-98.0%)" in stdout
    (figure,) = json.loads(file.read_text())["figures"]
    assert figure["hbm_traffic_bytes"] == 2 * 4 * 346250e6 and figure["temp_bytes"] == 3e9
    assert figure["error"] == pytest.approx(1 / 50.7 - 1)


@pytest.mark.parametrize("variant", maxtext.VARIANTS)
def test_models_are_of_equal_size(variant):
    size = maxtext.our_size(maxtext.our_configuration(variant, 16))
    assert size.keys() == SIZE.keys()
    assert f"{size['parameters']:,} parameters" in maxtext.check_sizes(variant, size, SIZE)
    for field, value in SIZE.items():
        other = [] if isinstance(value, list) else value * 2
        with pytest.raises(UserError, match=f"{variant} has {field} .*; make them equal"):
            maxtext.check_sizes(variant, size, SIZE | {field: other})
