"""Workers without a model: they answer at once, fail to start, or die of a task."""

import os
import signal
from collections.abc import Callable


class Echo:
    """Returns the line of each task; a task that is `poison` kills the process."""

    room = 4

    def __init__(self):
        self.n_calls = 0

    def facts(self) -> dict:
        return {"room": self.room, "package": 1}

    def open(self, make: Callable) -> None:
        self.made = make()

    def work(self, tasks: list[dict]) -> list[dict]:
        self.n_calls += 1
        if any(task.get("poison") for task in tasks):
            os.kill(os.getpid(), signal.SIGKILL)
        return [{"line": task["line"], "made": self.made, "pid": os.getpid()} for task in tasks]


class Unsure(Echo):
    """Its facts differ in each process."""

    def facts(self) -> dict:
        return super().facts() | {"model": os.getpid()}


class DiesOnce(Echo):
    """Its second call kills its first process, and marks this by a file."""

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def work(self, tasks: list[dict]) -> list[dict]:
        marks = os.path.join(self.folder, "died")
        if self.n_calls == 1 and not os.path.exists(marks):
            open(marks, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().work(tasks)


def cannot_start() -> None:
    raise FileNotFoundError("ckpt_dir /nowhere does not exist")


def dies_while_starting() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def made() -> str:
    return "made"
