import json

import pytest

from aoe_jax.errors import UserError
from aoe_jax.json_files import read_json, write_json


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "Expecting"), ("[1]", "holds no JSON object"), (None, "No such file")],
)
def test_mistakes(tmp_path, content, message):
    path = tmp_path / "value.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"value\.json can't be read.*{message}.*; name another"):
        read_json(path, "name another")
