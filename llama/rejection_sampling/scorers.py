"""Scorers of answers: log-probabilities, reward models, a Llama as judge, or any Python function.

A scorer takes a row and answers to it, and returns a finite number for each answer. A row has the fields of a line of
the input: `messages`, a `prompt` or `tokens`, and any others. An answer has its `text` and `finish_reason`; if it was
drawn just now, also its `logprob` and `n_tokens`. Knows nothing of where answers come from or go.
"""

import copy
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist

from llama import parallel
from llama.datasets.prompts import kind_of, prompt_ids
from llama.generation import Llama
from llama.parallel import RankFailed
from llama.rejection_sampling.reward_model import RewardModel
from llama.tokenizer import ChatFormat, Dialog, Tokenizer
from llama.tokenizer.open_turns import as_dialog

Row = Mapping[str, Any]
Answers = Sequence[Mapping[str, Any]]
Scorer = Callable[[Row, Answers], Sequence[float]]

JUDGE_TEMPLATE = """\
Here is a request and an answer to it.

Request:
{prompt}

Answer:
{answer}

Is this answer correct and helpful? Reply with Yes or No."""
NO_ANSWER_IN_TEMPLATE = "the judge's template has no {answer}: expected {answer}, and {prompt} if it is needed"

KINDS = "logprob, mean_logprob, reward:DIR, judge, judge:DIR or module:function"

# These end a run. Any other exception of a scorer becomes the answer's error.
FATAL = (RankFailed, MemoryError, torch.OutOfMemoryError)


class Logprob:
    """The log-probability of an answer's tokens after the prompt, nats: the total, or the mean.

    An answer that was drawn just now has it already; any other text is encoded and scored. The token that ends an
    answer does not count. The total of an empty answer is 0; it has no mean, because it must not be the best answer.
    """

    def __init__(self, llama: Llama, mean: bool = False):
        self.llama, self.mean = llama, mean

    def __call__(self, row: Row, answers: Answers) -> list[float]:
        encode = self.llama.tokenizer.encode
        texts = {i: encode(answer["text"]) for i, answer in enumerate(answers) if "logprob" not in answer}
        n_tokens = [len(texts[i]) if i in texts else answer["n_tokens"] for i, answer in enumerate(answers)]
        if self.mean and 0 in n_tokens:
            raise ValueError("the answer has no tokens, and so no mean: expected one or more")
        totals = [0.0 if i in texts else answer["logprob"] for i, answer in enumerate(answers)]
        if texts:
            prompt = prompt_ids(self.llama, row)
            texts = {i: ids for i, ids in texts.items() if ids}
            for i, total in zip(texts, _logprobs(self.llama, [(prompt, ids) for ids in texts.values()])):
                totals[i] = total
        return [total / n for total, n in zip(totals, n_tokens)] if self.mean else totals


class Reward:
    """A reward model's score of a row's dialog or text with the answer."""

    def __init__(self, model: RewardModel):
        self.model = model

    def __call__(self, row: Row, answers: Answers) -> list[float]:
        prompt = _prompt_of(row)
        return self.model.score([self.model.encode(prompt, answer["text"]) for answer in answers])


class Judge:
    """The log-probability, nats, that a chat model's reply begins with a verdict such as "Yes".

    The template is the question to the model. It has {answer} in it, and {prompt} if it needs the prompt.
    """

    def __init__(self, llama: Llama, template: str = JUDGE_TEMPLATE, verdict: str = "Yes"):
        if "{answer}" not in template:
            raise ValueError(NO_ANSWER_IN_TEMPLATE)
        self.llama, self.template = llama, template
        self.verdict = llama.tokenizer.encode(verdict)
        if not self.verdict:
            raise ValueError("the judge's verdict is empty: expected a text such as Yes")

    def __call__(self, row: Row, answers: Answers) -> list[float]:
        prompt = _prompt_of(row)
        if not isinstance(prompt, str):
            alone = len(prompt) == 1
            prompt = "\n\n".join(m["content"] if alone else f"{m['role'].capitalize()}: {m['content']}" for m in prompt)
        # Split once, so that braces in the prompt or the answer are text.
        texts, pieces = [], re.split(r"(\{prompt\}|\{answer\})", self.template)
        for answer in answers:
            content = "".join({"{prompt}": prompt, "{answer}": answer["text"]}.get(piece, piece) for piece in pieces)
            texts.append((prompt_ids(self.llama, {"messages": [{"role": "user", "content": content}]}), self.verdict))
        return _logprobs(self.llama, texts)


def _logprobs(llama: Llama, texts: list[tuple[list[int], list[int]]]) -> list[float]:
    """The log-probability of each continuation after its prompt. Raises ValueError if one is too long or fails."""
    results = llama.score_tokens([(prompt + ids, len(prompt)) for prompt, ids in texts])
    for result in results:
        if result.error is not None:
            raise ValueError(result.error)
    return [math.fsum(result.logprobs) for result in results]


def _prompt_of(row: Row) -> str | Dialog:
    """The text or the dialog of a row. Raises ValueError if it has neither."""
    if (kind := kind_of(row)) == "tokens":
        hint = "give the line `messages` or a `prompt`, or score with logprob, mean_logprob or a function of your own"
        raise ValueError(f"the line has only token ids, and this scorer reads text: {hint}")
    if kind == "prompt" and not isinstance(row["prompt"], str):
        raise ValueError(f"prompt = {row['prompt']!r}: expected a text")
    if kind == "messages":
        ChatFormat.check_messages(dialog := as_dialog(row["messages"]))
        return dialog
    return row[kind]


def add_scores(scorer: Scorer, row: Row, answers: Sequence[dict[str, Any]]) -> None:
    """Adds to each answer without an `error` its `score`, or None and an `error`. All ranks of a model call this."""
    sound = [answer for answer in answers if "error" not in answer]
    group = fairscale_groups.get_model_parallel_group()
    rollouts = [answer for answer in sound if "messages" in answer]  # each has its own dialog
    parts = [({**row, "messages": answer["messages"][:-1]}, [answer]) for answer in rollouts]
    for part_row, part in [*parts, (row, [answer for answer in sound if "messages" not in answer])]:
        for answer, (score, error) in zip(part, score_answers(scorer, part_row, part, group)):
            answer |= {"score": score} if error is None else {"score": None, "error": error}


def score_answers(
    scorer: Scorer, row: Row, answers: Answers, group: dist.ProcessGroup | None = None
) -> list[tuple[float | None, str | None]]:
    """(score, None) for each answer, or (None, why it has none).

    If a scorer raises, or returns anything but finite numbers, it is called again for each answer alone, so that only
    the answers it cannot score get an error. If it returns the wrong number of scores, all answers get an error. All
    ranks of the model (`group`) call a scorer of this module together. Only the first rank calls a function of the
    caller's, so that all ranks have the same scores.
    """
    if not answers:
        return []
    if isinstance(scorer, (Logprob, Reward, Judge)) or group is None or dist.get_world_size(group) == 1:
        return _scores(scorer, row, answers)
    scores = [_scores(scorer, row, answers) if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(scores, src=dist.get_global_rank(group, 0), group=group)
    return scores[0]


def _scores(scorer: Scorer, row: Row, answers: Answers) -> list[tuple[float | None, str | None]]:
    try:
        # Copies, because the caller's code must not change what is written.
        values = scorer(copy.deepcopy(row), copy.deepcopy(answers))
        if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
            raise TypeError(f"the scorer returned {values!r}: expected a list with a number for each answer")
        values = list(values)
        if len(values) != len(answers):  # the scores cannot be matched to the answers
            found = f"{len(values)} score{'s' * (len(values) != 1)} for {len(answers)} answers"
            return [(None, f"{found}: expected one for each")] * len(answers)
        scores = [_as_score(value) for value in values]
    except FATAL:
        raise
    except (Exception, SystemExit) as error:  # anything that the caller's code may raise
        if len(answers) > 1:
            return [score for answer in answers for score in _scores(scorer, row, [answer])]
        return [(None, f"{type(error).__name__}: {error}")]
    return [(score, None) for score in scores]


def _as_score(value: Any) -> float:
    if isinstance(value, (str, bytes)) or value is None:
        raise TypeError(f"the scorer returned {value!r}: expected a number")
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"the scorer returned {score}: expected a finite number")
    return score


# Scorers by their names on the command line


def is_judge(spec: str) -> bool:
    return spec.partition(":")[0] == "judge"


def check_spec(spec: str, judge_template: str = JUDGE_TEMPLATE) -> Scorer | None:
    """Checks the name of a scorer before any weights are read. Returns the scorer if it needs no weights.

    Raises:
        ValueError, FileNotFoundError: there is no such scorer, or no such directory or function.
    """
    kind, colon, rest = spec.partition(":")
    if spec in ("logprob", "mean_logprob", "judge") or (kind in ("reward", "judge") and rest):
        if is_judge(spec) and "{answer}" not in judge_template:
            raise ValueError(NO_ANSWER_IN_TEMPLATE)
        if rest and not Path(rest).is_dir():
            raise FileNotFoundError(f"scorer {spec!r}: there is no directory {rest}: expected a model's")
        return None
    if not colon or not kind or not rest:
        raise ValueError(f"scorer {spec!r}: expected one of {KINDS}")
    return python_function(spec)


def load_scorer(
    spec: str,
    llama: Llama | None,
    judge_template: str = JUDGE_TEMPLATE,
    judge_answer: str = "Yes",
    *,
    tokenizer: Tokenizer | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 8,
    **loading: Any,
) -> Scorer:
    """The scorer of a name, one of `KINDS`.

    Args:
        llama: the model of `logprob`, `mean_logprob` and `judge`; may be None for the others.
        judge_template, judge_answer: as `template` and `verdict` of `Judge`.
        tokenizer: for a reward model without a tokenizer of its own.
        max_seq_len, max_batch_size, loading: as in `Llama.build`, for a scorer's own model.
    """
    kind, _, rest = spec.partition(":")
    if (scorer := check_spec(spec, judge_template)) is not None:
        return scorer
    if kind == "reward":
        return Reward(RewardModel.build(rest, tokenizer, **loading))
    if kind == "judge":
        judge = Llama.build(rest, None, max_seq_len, max_batch_size, **loading) if rest else llama
        return Judge(judge, judge_template, judge_answer)
    return Logprob(llama, mean=kind == "mean_logprob")


def named_scorer(scorer: Any, llama: Llama | None) -> Scorer:
    """A scorer itself, or the one of a name. Raises TypeError; for a name also as `check_spec`."""
    if not isinstance(scorer, str):
        if not callable(scorer):
            raise TypeError(f"scorer = {scorer!r}: expected a function (row, answers), or one of {KINDS}")
        return scorer
    if llama is None:
        if (function := check_spec(scorer)) is None:
            raise ValueError(f"scorer {scorer!r} needs a model: expected a function, such as load_scorer(…) returns")
        return function
    with parallel.fail_together():
        size = dist.get_world_size() // parallel.n_replicas()
        return load_scorer(scorer, llama, tokenizer=llama.tokenizer, model_parallel_size=size)


def python_function(spec: str) -> Scorer:
    """The function of `module:function`; the module may be in the current directory. Raises ValueError."""
    module_name, _, name = spec.partition(":")
    if "" in module_name.split("."):
        expected = "expected module:function, with the module's full name and no dots around it"
        raise ValueError(f"scorer {spec!r}: {expected}")
    if module_name.endswith(".py"):
        raise ValueError(f"scorer {spec!r}: a module is named without .py: expected {module_name[:-3]}:{name}")
    sys.path.insert(0, "")  # the current directory, as for `python -m`
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # anything that the caller's code may raise
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if not is_missing:
            raise ValueError(f"scorer {spec!r}: {module_name} fails ({type(error).__name__}: {error})") from error
        found = f"there is no module {module_name!r} in the current directory or installed"
        raise ValueError(f"scorer {spec!r}: {found}; expected one of {KINDS}") from None
    finally:
        sys.path.remove("")
    function = getattr(module, name, None)
    if not callable(function):
        where = getattr(module, "__file__", None) or f"the module {module_name}"  # a module built into Python has none
        found = "no such name" if function is None else f"a {type(function).__name__}"
        raise ValueError(f"scorer {spec!r}: {where} has {found}: expected a function (row, answers)")
    return function
