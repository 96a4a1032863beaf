import os
import signal
import time

import pytest

from aoe_jax.data.workers import work_through
from aoe_jax.errors import UserError


class Task:
    """The work of these tests."""

    def __init__(self, folder):
        self._folder = folder

    def __call__(self, task):
        kind, number = task
        (self._folder / f"{number}-{os.getpid()}").touch()
        if kind == "mistake":
            raise UserError(f"mistake {number}")
        if kind == "failure":
            raise ZeroDivisionError(f"failure {number}")
        if kind == "killed" or (
            kind == "killed once" and len(list(self._folder.glob(f"{number}-*"))) == 1
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "slow":
            time.sleep(60)
        return number**2


def run(folder, tasks, count=2):
    names = {task: str(task) for task in tasks}
    return dict(item for item in work_through(names, count, Task, (folder,)) if item)


def test_every_task_has_its_result(tmp_path, caplog):
    tasks = [("easy", number) for number in range(20)]
    assert run(tmp_path, tasks) == {task: task[1] ** 2 for task in tasks}
    assert 1 <= len({name.split("-")[1] for name in os.listdir(tmp_path)}) <= 2
    assert run(tmp_path, []) == {}
    assert not caplog.messages


def test_process_that_dies_is_replaced(tmp_path, caplog):
    tasks = [("easy", 1), ("killed once", 2), ("easy", 3)]
    assert run(tmp_path, tasks, count=1) == {task: task[1] ** 2 for task in tasks}
    assert caplog.messages == [
        "a process died at ('killed once', 2) with SIGKILL; another one takes its place"
    ]


def refuse():
    raise UserError("no tokenizer")


def test_set_up_that_fails(caplog):
    with pytest.raises(UserError, match="no tokenizer"):
        list(work_through({1: "a task"}, 1, refuse, ()))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("mistake", UserError, "^mistake 5$"),
        (
            "failure",
            RuntimeError,
            r"at \('failure', 5\):\nTraceback(.|\n)*ZeroDivisionError: failure 5",
        ),
        (
            "killed",
            UserError,
            r"--processes=2: 3 processes died at \('killed', 5\), the last one with SIGKILL; if",
        ),
    ],
)
def test_what_goes_wrong_ends_all(tmp_path, kind, error, message):
    began = time.monotonic()
    with pytest.raises(error, match=message):
        run(tmp_path, [("slow", 1), (kind, 5)])
    assert time.monotonic() - began < 50
