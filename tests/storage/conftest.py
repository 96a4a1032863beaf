"""Servers of object stores on this machine, and a folder on a disk or in an object store."""

import contextlib
import logging

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from aoe_jax.storage.paths import parsed_path
from tests.object_store import object_store


@pytest.fixture(scope="session")
def store_server():
    """Runs one Google Cloud Storage server per session, because etils caches its address."""
    with object_store() as store:
        yield store


@pytest.fixture(scope="session")
def s3_server():
    """Runs a server of S3 and yields the environment variables with which programs use it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="localhost", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture
def store(store_server):
    with in_environment(store_server.variables):
        yield store_server


@pytest.fixture
def s3(s3_server):
    with in_environment(s3_server):
        fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
        yield
        fsspec.filesystem("s3").clear_instance_cache()


@contextlib.contextmanager
def in_environment(variables):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def folder(request, tmp_path):
    """A new folder for each test, in the GCS store unless a test is parametrised by `folder`."""
    place = getattr(request, "param", "gs")
    if place == "disk":
        return tmp_path / "run"
    request.getfixturevalue({"gs": "store", "s3": "s3"}[place])
    fsspec.filesystem(place).clear_instance_cache()
    url = f"{place}://bucket/{request.node.originalname}"
    return parsed_path(url, "--workdir", in_store=True)
