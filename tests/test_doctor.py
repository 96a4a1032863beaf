"""The examination of a machine: all checks on a mesh, and the detection of wrong kernels."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.model import attention
from aoe_jax.moe import grouped_matmul
from aoe_jax.planning import examination, kernel_checks
from aoe_jax.planning.examination import fitted
from aoe_jax.sharding import make_mesh
from configs import doctor as accelerators
from tests.arrays import Device
from tests.hasty import xla_flags
from tests.in_process import call
from tests.runs import finish, start
from tests.settings import config_of

SMALL = {"model.n_layers": 1, "model.unroll": 1, "model.n_heads": 2, "model.d_model": 32}
SMALL |= {"model.vocab_size": 256, "model.dtype": "float32", "experts.n_experts": 4}
SMALL |= {"experts.top_k": 2, "experts.d_ffn": 32, "experts.d_low": 8}
SMALL |= {"data.seq_len": 32, "train.batch_size": 8}
FIELDS = [f"--config.{name}={value}" for name, value in SMALL.items()]
COMMAND = ["--config=configs/tiny.py:published", *FIELDS]


@pytest.mark.slow
def test_all_parts_on_a_mesh(tmp_path):
    file = tmp_path / "report.json"
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.expert=2"]
    command = ["-m", "aoe_jax.doctor", *COMMAND, *mesh, f"--json={file}"]
    status, stdout, stderr = finish(start(command, XLA_FLAGS=xla_flags(4)))
    assert status == 0, stdout + stderr
    report = json.loads(file.read_text())
    assert report["passed"] and report["machine"]["devices"] == 4
    assert {backend["backend"] for backend in report["backends"]} == {"blocks", "blocked"}
    steps = report["steps"]
    assert steps["mfu"] is None
    assert steps["tokens_per_second"] == pytest.approx(8 * 32 / steps["step_seconds"])
    assert abs(steps["loss"] - math.log(256)) < 1
    names = [verdict["name"] for verdict in report["verdicts"]]
    assert names[0] == "attention blocks" and "grouped products blocked" in names
    assert names[-2:] == ["AoE layer", "training steps"]
    lines = stdout.splitlines()[-len(names) :]
    assert [line.split(":")[0] for line in lines] == [f"PASS {name}" for name in names]


def test_a_wrong_kernel_is_status_1(monkeypatch, capsys):
    right = attention.BACKENDS["blocks"]
    monkeypatch.setitem(attention.BACKENDS, "blocks", lambda *args: 1.01 * right(*args))
    steps = {"error": "RuntimeError: left out"}
    monkeypatch.setattr(examination, "take_steps", lambda config: steps)
    dense = ["--config.experts.kind=dense", "--config.balance.aux_weight=0"]
    assert call("aoe_jax.doctor", *COMMAND, *dense) == 1
    *_, verdict, _, of_steps = capsys.readouterr().out.splitlines()
    assert verdict.startswith("FAIL attention blocks: 1x2x2x32x16 (BxHxGxSxh): ")
    assert "largest error 1.0e-02" in verdict
    assert verdict.endswith("fallback: none, it is plain JAX")
    assert of_steps == "FAIL training steps: RuntimeError: left out"


def test_a_report_needs_a_file_in_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"--json=nowhere/a\.json: there is no folder nowhere"):
        call("aoe_jax.doctor", "--json=nowhere/a.json")
    with pytest.raises(UserError, match=f"--json={tmp_path}: is a folder; name a file"):
        call("aoe_jax.doctor", f"--json={tmp_path}")


def small(**changes):
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    return config_of(SMALL | {"experts.kind": "aoe", "balance.aux_weight": 0.0} | settings)


def judged(config, n_devices=1):
    """Returns the verdicts on a configuration's kernels by name; the last one if a name repeats."""
    config = fitted(config, n_devices)
    mesh = make_mesh(config, jax.devices()[:n_devices])
    with jax.set_mesh(mesh):
        backends = examination.choose_backends(config, mesh.devices.flat[0])
        found = examination.kernel_verdicts(config, mesh, backends)
        return {verdict["name"]: verdict for verdict in found}


def raising(kernel):
    def call(*args):
        raise RuntimeError("first line\nno such instruction")

    return call


def wrong_on_one_device(kernel):
    return lambda *args: kernel(*args) * jnp.where(jax.lax.axis_index("data") == 1, 1.02, 1.0)


def wrong_gradient(kernel):
    """Returns a kernel with right values, but the first argument's gradient is 2% too large."""

    def call(first, *others):
        return kernel(1.02 * first - jax.lax.stop_gradient(0.02 * first), *others)

    return call


def use_ragged(monkeypatch, kernel):
    monkeypatch.setitem(grouped_matmul.BACKENDS, "ragged", kernel)
    monkeypatch.setattr(grouped_matmul, "_default_backend", lambda device: "ragged")


@pytest.mark.parametrize(
    "breakage", [wrong_gradient, pytest.param(raising, marks=pytest.mark.slow)]
)
def test_a_wrong_grouped_product_is_named(monkeypatch, breakage):
    use_ragged(monkeypatch, breakage(grouped_matmul.BACKENDS["ragged"]))
    monkeypatch.setattr(kernel_checks, "attention_cases", lambda *args: [])
    found = judged(small(experts__d_wide=32))
    verdict = found["grouped products ragged"]
    assert not verdict["passed"] and not found["AoE layer"]["passed"]
    assert verdict["fallback"] == "--config.experts.grouped_matmul=blocked"
    words = {raising: "RuntimeError: no such instruction", wrong_gradient: "(d_rows, "}
    assert words[breakage] in verdict["text"]


@pytest.mark.parametrize(
    ("breakage", "dtype"), [(wrong_on_one_device, "float32"), (wrong_gradient, "bfloat16")]
)
def test_wrong_attention_is_named_with_its_fallback(monkeypatch, breakage, dtype):
    monkeypatch.setitem(attention.BACKENDS, "splash", breakage(attention.BACKENDS["blocks"]))
    config = small(model__attention="splash", model__dtype=dtype, experts__kind="dense")
    (verdict,) = judged(config, n_devices=2).values()  # a dense model has no grouped products
    assert not verdict["passed"] and verdict["name"] == "attention splash"
    if breakage is wrong_on_one_device:
        assert str(jax.devices()[1]) in verdict["text"]
    assert verdict["fallback"] == "--config.model.attention=blocks"


def without_d_k_at_the_end(kernel):
    """Returns a kernel in which the last 128 keys of one head have no gradient."""

    def call(q, k, v, segment_ids):
        is_lost = jnp.zeros(k.shape, bool).at[0, -1, -128:].set(True)
        return kernel(q, jnp.where(is_lost, jax.lax.stop_gradient(k), k), v, segment_ids)

    return call


def without_documents_in_one_head(kernel):
    def call(q, k, v, segment_ids):
        y, wrong = kernel(q, k, v, segment_ids), kernel(q, k, v, None)
        return y.at[:, -1].set(wrong[:, -1])

    return call


def without_one_row(kernel):
    return lambda rows, weights, sizes: kernel(rows, weights, sizes).at[100].set(0)


def checked(config, case_of):
    """Checks a case on one device; returns whether it passes, for each input."""
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        results = kernel_checks.check(case_of(config), mesh, config.model.dtype)
    return {result["input"]: result["passed"] for result in results}


@pytest.mark.slow
def test_an_error_in_a_small_part_of_an_array_fails(monkeypatch):
    sizes = {"model__n_heads": 24, "model__d_model": 192, "data__seq_len": 512}
    config = fitted(small(model__dtype="bfloat16", train__batch_size=1, **sizes), 1)
    right, product = attention.BACKENDS["blocks"], grouped_matmul.BACKENDS["ragged"]
    for kernel, causal, documents in (
        (right, True, True),
        (without_d_k_at_the_end(right), False, False),
        (without_documents_in_one_head(right), True, False),
    ):
        monkeypatch.setitem(attention.BACKENDS, "blocks", kernel)
        found = checked(config, lambda config: kernel_checks.attention_cases(config, "blocks")[0])
        assert found == {"causal": causal, "documents": documents}
    for kernel, passes in ((product, True), (without_one_row(product), False)):
        use_ragged(monkeypatch, kernel)
        shape = 4, 64, 64
        found = checked(config, lambda config: kernel_checks.grouped_case(config, "ragged", shape))
        assert [*found.values()] == 3 * [passes]


ONE = {"experts__n_experts": 1, "experts__top_k": 1}  # its scores have no gradient
WHOLE = {"experts__score_neurons": 4, "experts__score": "max", "model__dtype": "bfloat16"}


@pytest.mark.slow
def test_special_layers_and_empty_groups_pass():
    for changes in (ONE, ONE | {"experts__kind": "router"}, WHOLE):
        found = checked(fitted(small(**changes), 1), kernel_checks.layer_case)
        assert found == {"all experts": True}
    # One of 8 groups is empty; for it, backend "blocked" subtracts the numbers that it has added.
    config, shape = fitted(small(data__seq_len=256), 1), (8, 128, 32)
    found = checked(config, lambda config: kernel_checks.grouped_case(config, "blocked", shape))
    assert all(found.values())


def test_the_error_of_numbers_that_are_not_finite_is_infinite():
    want = jax.random.normal(jax.random.key(0), (2, 200, 4))
    assert kernel_checks._relative_error(want, want) == 0
    for value in (math.nan, math.inf):
        got = want.at[1, 199, 3].set(value)
        assert kernel_checks._relative_error(got, want) == jnp.inf


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layer"), [("aoe", "AoE layer"), ("router", "MoE layer")])
def test_right_kernels_pass_in_bfloat16(kind, layer):
    """Attention, grouped products and layers, on a mesh that splits everything."""
    mesh = {"mesh__fsdp": 2, "mesh__expert": 2, "mesh__tensor": 2}
    sizes = {"experts__d_ffn": 48} | ({"experts__d_wide": 64} if kind == "aoe" else {})
    config = small(model__dtype="bfloat16", experts__kind=kind, **mesh, **sizes)
    found = judged(config, n_devices=8)
    assert all(verdict["passed"] for verdict in found.values()), found
    assert list(found) == ["attention blocks", "grouped products blocked", layer]


def test_the_fallback_of_a_layer():
    for mesh, wanted in (
        ({}, "--config.experts.grouped_matmul=blocked"),
        ({"mesh__expert": 2}, "--config.mesh.expert=1"),
        ({"mesh__expert": 2, "mesh__transport": "all_to_all"}, "--config.mesh.transport=ring"),
    ):
        assert examination.fallback("AoE layer", small(**mesh)) == wanted


def test_steps_that_are_not_finite_fail():
    steps = dict.fromkeys(("tokens_per_second", "step_seconds"), 1.0)
    steps |= {"finite": False, "loss": math.nan, "mfu": None}
    verdict = examination.steps_verdict(steps)
    assert not verdict["passed"]
    assert verdict["text"].startswith("loss nan, not finite in some steps; ")


def gpu(kind, capability):
    return Device(platform="gpu", device_kind=kind, compute_capability=capability)


def test_reasons_of_plain_backends():
    def reasons(kind, capability, **changes):
        config = fitted(small(**changes), 1)
        found = examination.choose_backends(config, gpu(kind, capability))
        assert {backend["backend"] for backend in found} <= {"blocks", "blocked", "cudnn"}
        return {backend["kernel"].split()[0]: backend["why"] for backend in found}

    a100 = reasons("NVIDIA A100-SXM4-80GB", "8.0", model__dtype="bfloat16")
    assert a100["attention"] == "the fastest on NVIDIA A100-SXM4-80GB"
    h100 = reasons("NVIDIA H100 80GB HBM3", "9.0")
    assert "backend='cudnn' with float32: use bfloat16" in h100["attention"]
    assert "backend='mosaic_gpu' with float32: use bfloat16" in h100["grouped"]
    config = fitted(small(model__dtype="bfloat16"), 1)
    _, *grouped = examination.choose_backends(config, gpu("NVIDIA H100 80GB HBM3", "9.0"))
    assert {product["backend"] for product in grouped} == {"mosaic_gpu"}
    h100 = reasons("NVIDIA H100 80GB HBM3", "9.0", experts__grouped_matmul="blocked")
    assert h100["grouped"] == "set by config.experts.grouped_matmul=blocked"


def test_a_step_fits_a_device():
    """The paper's batch of 2,048 sequences is reduced to 16,384 tokens per device."""
    config = fitted(Config.from_config_dict(accelerators.get_config()), 4)
    assert config.mesh.data == 4 and config.tokens_per_step == 4 * 16_384
    assert fitted(small(), 8).train.batch_size == 8
