"""Every test runs with eight virtual CPU devices, and XLA compiles with few optimisations."""

import gc
import os
import shutil
import signal
import tempfile

import jax
import pytest

from aoe_jax.moe import grouped_matmul, transports
from tests.hasty import HASTY, xla_flags

# A shell may ignore SIGINT, and the processes that tests start would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(8)}
assert len(jax.devices()) == 8
# On several CPU devices, programs from the cache deadlock.
jax.config.update("jax_enable_compilation_cache", False)
os.environ["XLA_FLAGS"] = xla_flags(8, HASTY)  # the TPU compiler accepts only these flags


def pytest_configure(config):
    """Makes the folder of `tests.runs.scratch`. The cache of pytest keeps the programs that started
    processes compile, and model code that transformers loads, until `--cache-clear` is used.
    """
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist inherit the variable
        os.environ["AOE_JAX_SCRATCH"] = tempfile.mkdtemp(prefix="aoe_jax_tests_")
    if hasattr(config, "cache"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("compiled"))
        os.environ["HF_MODULES_CACHE"] = str(config.cache.mkdir("transformers"))


def pytest_collection_finish():
    """Makes garbage collection rare, because it would take a tenth of the time."""
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["AOE_JAX_SCRATCH"], ignore_errors=True)


@pytest.fixture
def x64():
    """64-bit numbers."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device(monkeypatch):
    """Makes JAX report a single device, for which programs compile faster."""
    devices = jax.devices()[:1]
    monkeypatch.setattr("jax.device_count", lambda: 1)
    monkeypatch.setattr("jax.devices", lambda *_: devices)
    monkeypatch.setattr("jax.local_devices", lambda *_, **__: devices)


@pytest.fixture
def ragged(monkeypatch):
    """Computes grouped products with `jax.lax.ragged_dot`, which compiles in less than half the
    time. It is for tests that do not depend on the backend.
    """
    monkeypatch.setattr(grouped_matmul, "_default_backend", lambda device: "ragged")


@pytest.fixture
def first_round_only(monkeypatch):
    """Compiles programs without the further rounds of expert parallelism."""
    monkeypatch.setattr(transports._Rounds, "further_rounds", lambda self, first, *_: first)
    jax.clear_caches()  # programs that were traced before have further rounds
    yield
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Clears JAX's caches after each module, because the programs of all modules need gigabytes,
    and modules share few of them.
    """
    yield
    jax.clear_caches()
