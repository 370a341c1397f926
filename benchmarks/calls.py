"""How many functions of the package one greedy `chat_completion` enters, and how deep they call each other.

    python -m benchmarks.calls --list

`sys.setprofile` counts the functions in `llama/` on the embedded checkpoint, after a first call, by file and qualified
name (so the lambdas of one function count once), and the most of them on the stack at once. A comprehension is part of
its function, as it is for Python from 3.12 on.
"""

import argparse
import sys
from pathlib import Path
from types import FrameType

import llama
from llama import Llama

PACKAGE = str(Path(llama.__file__).resolve().parent)
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")  # of Python before 3.12
DEMO = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"


def name_of(frame: FrameType) -> str:
    """The qualified name of a function; with Python 3.10, which does not tell it, the name and the line."""
    code = frame.f_code
    return getattr(code, "co_qualname", f"{code.co_name} at line {code.co_firstlineno}")


def count(call) -> tuple[dict[tuple[str, str], int], list[str]]:
    """How often call() enters each function of the package, and the deepest stack of them."""
    entered: dict[tuple[str, str], int] = {}  # by file and name
    deepest: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal deepest
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_name in COMPREHENSIONS:
            return
        key = (code.co_filename, name_of(frame))
        entered[key] = entered.get(key, 0) + 1
        stack, above = [], frame
        while above is not None:
            if above.f_code.co_filename.startswith(PACKAGE):
                stack.append(name_of(above))
            above = above.f_back
        if len(stack) > len(deepest):
            deepest = stack[::-1]

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered, deepest


def count_greedy_chat() -> tuple[dict[tuple[str, str], int], list[str]]:
    """The counts of one greedy `chat_completion`, after a first call."""
    model = Llama.build(DEMO, max_seq_len=256, device="cpu")
    dialogs = [[{"role": "user", "content": "What is 21 + 34?"}]]
    model.chat_completion(dialogs, temperature=0)
    return count(lambda: model.chat_completion(dialogs, temperature=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the functions, and the deepest stack")
    arguments = parser.parse_args()
    entered, deepest = count_greedy_chat()
    if arguments.list:
        for (file, name), n in sorted(entered.items()):
            print(f"{n:7} {Path(file).relative_to(PACKAGE)} {name}")
        print("\n".join(f"{'  ' * depth}{name}" for depth, name in enumerate(deepest)))
    print(f"one greedy chat_completion enters {len(entered)} functions of the package, at most {len(deepest)} deep")


if __name__ == "__main__":
    main()
