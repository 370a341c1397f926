"""What an answer is worth: log-probabilities, reward models, a Llama as judge, or any Python function.

A scorer is a function of a row and answers to it that returns a finite number for each answer. A row is what a line of
the input holds: `messages`, a `prompt` or `tokens`, and whatever else. An answer has its `text`, its `finish_reason`,
and where it was drawn just now its `logprob` and `n_tokens`. Knows nothing of where answers come from or go.
"""

import copy
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama.datasets.prompts import kind_of, prompt_ids
from llama.decoding.answering import Answer
from llama.generation import Llama
from llama.parallel import RankFailed
from llama.rejection_sampling.reward_model import RewardModel
from llama.tokenizer import ChatFormat, Dialog, Tokenizer

Scorer = Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], Sequence[float]]

JUDGE_TEMPLATE = """\
Here is a request and an answer to it.

Request:
{prompt}

Answer:
{answer}

Is this answer correct and helpful? Reply with Yes or No."""

KINDS = "logprob, mean_logprob, reward:DIR, judge, judge:DIR or module:function"


NO_ANSWER_IN_TEMPLATE = "the judge's template has no {answer}: expected {answer}, and {prompt} where it is needed"

# These end a run, whatever raises them; anything else that a scorer raises marks an answer.
FATAL = (RankFailed, MemoryError, torch.OutOfMemoryError)


class Logprob:
    """The log-probability of an answer's tokens given the prompt under a model, nats, in total or the mean.

    Of an answer that was drawn just now it is known. Any other text is encoded as a whole, which may be other tokens
    than those it was drawn in. What ends an answer (the end of turn, a stop string) does not count: an answer of
    nothing has 0 in total, and no mean, so that it is not the best there is.
    """

    def __init__(self, llama: Llama, mean: bool = False):
        self.llama, self.mean = llama, mean

    def __call__(self, row: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> list[float]:
        known = [(a["logprob"], a["n_tokens"]) if "logprob" in a else None for a in answers]
        encoded = {i: self.llama.tokenizer.encode(answers[i]["text"]) for i, pair in enumerate(known) if pair is None}
        n_tokens = [len(encoded[i]) if pair is None else pair[1] for i, pair in enumerate(known)]
        if self.mean and 0 in n_tokens:
            raise ValueError("the answer has no tokens to take the mean over: expected one or more")
        totals = [0.0 if pair is None else pair[0] for pair in known]
        if encoded:
            prompt = prompt_ids(self.llama, row)
            texts = [prompt + ids for ids in encoded.values()]
            scored = self.llama.answer(texts, True, True, shared=False, max_gen_len=0, temperature=0)
            for i, (answer,) in zip(encoded, scored):
                totals[i] = math.fsum(answer.prompt_token_logprobs[len(prompt) :])
        return [total / n for total, n in zip(totals, n_tokens)] if self.mean else totals


class Reward:
    """A reward model's score of a row's dialog, or text, with the answer."""

    def __init__(self, model: RewardModel):
        self.model = model

    def __call__(self, row: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> list[float]:
        prompt = _prompt_of(row)
        return self.model.score([self.model.encode(prompt, answer["text"]) for answer in answers])


class Judge:
    """The log-probability, nats, that a model gives a verdict such as "Yes" on an answer.

    Args:
        llama: the judge, tuned for dialogs.
        template: what the judge is asked, with {prompt} and {answer} in it.
        verdict: how the judge's reply must begin.

    Raises:
        ValueError: the template has no place for the answer, or the verdict is empty.
    """

    def __init__(self, llama: Llama, template: str = JUDGE_TEMPLATE, verdict: str = "Yes"):
        if "{answer}" not in template:
            raise ValueError(NO_ANSWER_IN_TEMPLATE)
        self.llama, self.template = llama, template
        self.verdict = llama.tokenizer.encode(verdict)
        if not self.verdict:
            raise ValueError("the judge's verdict is empty: expected a text such as Yes")

    def __call__(self, row: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> list[float]:
        prompt = _prompt_of(row)
        if not isinstance(prompt, str):
            alone = len(prompt) == 1
            prompt = "\n\n".join(m["content"] if alone else f"{m['role'].capitalize()}: {m['content']}" for m in prompt)
        prompts = []
        for answer in answers:
            pieces = re.split(r"(\{prompt\}|\{answer\})", self.template)  # once: what is put in is text
            content = "".join({"{prompt}": prompt, "{answer}": answer["text"]}.get(piece, piece) for piece in pieces)
            prompts.append(self.llama.formatter.encode_dialog_prompt([{"role": "user", "content": content}]))
        # The verdict is forced; its log-probability is that of the model's own logits. As an answer and not as part of
        # the prompt, so that what the prompts have in common is run once.
        forced = [_Forced(len(prompt), self.verdict) for prompt in prompts]
        results = self.llama.answer(
            prompts, True, shared=False, temperature=0, max_gen_len=len(self.verdict), logits_processor=forced
        )
        return [self._logprob(answer) for (answer,) in results]

    def _logprob(self, answer: Answer) -> float:
        if answer.tokens != self.verdict:
            raise ValueError("no room for the verdict after the judge's prompt: expected a larger max_seq_len")
        return math.fsum(answer.token_logprobs)


class _Forced:
    """A logits processor that leaves nothing but the next token of an answer that is given."""

    def __init__(self, prompt_length: int, answer: list[int]):
        self.prompt_length, self.answer = prompt_length, answer

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        token = self.answer[ids.shape[1] - self.prompt_length]
        return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor([token], device=logits.device), 0.0)


def _prompt_of(row: Mapping[str, Any]) -> str | Dialog:
    """The text or the dialog that a row's answers answer. Raises ValueError if it is neither."""
    if (kind := kind_of(row)) == "tokens":
        raise ValueError(
            "the line has token ids alone, and this scorer reads text: give the line `messages` or a `prompt` in place "
            "of `tokens`, or score with logprob, mean_logprob or a function of your own"
        )
    if kind == "prompt" and not isinstance(row["prompt"], str):
        raise ValueError(f"prompt = {row['prompt']!r}: expected a text")
    if kind == "messages":
        ChatFormat.check_messages(row["messages"])
    return row[kind]


def python_function(spec: str) -> Scorer:
    """The function that module:function names; the module may lie in the current directory.

    Raises:
        ValueError: there is no such module, or nothing that can be called of that name in it.
    """
    module_name, _, name = spec.partition(":")
    if "" in module_name.split("."):
        raise ValueError(
            f"scorer {spec!r}: expected module:function, with the module's full name and no dots around it"
        )
    added = "" not in sys.path
    if added:
        sys.path.insert(0, "")  # the current directory, as for `python -m`
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # of an import inside it
        raise ValueError(
            f"scorer {spec!r}: there is no module {module_name!r} in the current directory or installed; "
            f"expected one of {KINDS}"
        ) from None
    finally:
        if added:
            sys.path.remove("")
    function = getattr(module, name, None)
    if not callable(function):
        where = getattr(module, "__file__", None) or f"the module {module_name}"  # one that is part of Python has none
        found = "no such name" if function is None else f"a {type(function).__name__}"
        raise ValueError(f"scorer {spec!r}: {where} has {found}: expected a function (row, answers)")
    return function


def is_judge(spec: str) -> bool:
    return spec.partition(":")[0] == "judge"


def check_spec(spec: str, judge_template: str | None = None) -> Scorer | None:
    """Looks at what the command line says of a scorer before any weights are read; returns it if it needs none.

    Raises:
        ValueError, FileNotFoundError: it is none, or names what is not there.
    """
    kind, colon, rest = spec.partition(":")
    if spec in ("logprob", "mean_logprob", "judge") or (kind in ("reward", "judge") and rest):
        if is_judge(spec) and "{answer}" not in (judge_template or JUDGE_TEMPLATE):
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
    judge_template: str | None = None,
    judge_answer: str = "Yes",
    *,
    tokenizer: Tokenizer | None = None,
    model_parallel_size: int | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 8,
    device: Any = None,
    dtype: Any = None,
) -> Scorer:
    """The scorer that the command line names, as one of `KINDS`.

    Args:
        spec: its kind, and where it is.
        llama: the model that `logprob`, `mean_logprob` and `judge` ask; None is fine for the others.
        judge_template, judge_answer: as `template` and `verdict` of `Judge`.
        tokenizer: whose ids a reward model without a tokenizer of its own reads.
        model_parallel_size, max_seq_len, max_batch_size, device, dtype: as in `Llama.build`, for a scorer's own model.
    """
    kind, _, rest = spec.partition(":")
    if (scorer := check_spec(spec, judge_template)) is not None:
        return scorer
    if kind == "reward":
        return Reward(RewardModel.build(rest, tokenizer, model_parallel_size, device=device, dtype=dtype))
    if kind == "judge":
        if rest:
            where = (max_seq_len, max_batch_size, model_parallel_size)
            llama = Llama.build(rest, None, *where, device=device, dtype=dtype)
        return Judge(llama, judge_template or JUDGE_TEMPLATE, judge_answer)
    return Logprob(llama, mean=kind == "mean_logprob")


def score_answers(
    scorer: Scorer,
    row: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    group: dist.ProcessGroup | None = None,
) -> list[tuple[float | None, str | None]]:
    """(score, None) of each answer, or (None, why there is none).

    A scorer that raises, or returns something other than finite numbers, is asked once more for each answer alone, so
    that only those it cannot score are marked.

    Args:
        scorer: one of this module, which every rank of a model calls together; or a function of the caller's, which
            the first of them calls for all, so that they agree whatever it does.
        row, answers: its arguments.
        group: the ranks of the model.
    """
    if not answers:
        return []
    if isinstance(scorer, (Logprob, Reward, Judge)) or group is None or dist.get_world_size(group) == 1:
        return _marks(scorer, row, answers)
    marks = [_marks(scorer, row, answers) if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(marks, src=dist.get_global_rank(group, 0), group=group)
    return marks[0]


def _marks(
    scorer: Scorer, row: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]
) -> list[tuple[float | None, str | None]]:
    try:
        # Copies, for what a caller's code does to them must not change what is written.
        values = scorer(copy.deepcopy(row), copy.deepcopy(answers))
        if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
            raise TypeError(f"the scorer returned {values!r}: expected a list with a number for each answer")
        scores = [_as_score(value) for value in values]
        if len(scores) != len(answers):
            raise ValueError(f"{len(scores)} scores for {len(answers)} answers: expected one for each")
    except FATAL:
        raise
    except (Exception, SystemExit) as error:  # whatever a caller's code may raise
        if len(answers) > 1:
            return [mark for answer in answers for mark in _marks(scorer, row, [answer])]
        return [(None, f"{type(error).__name__}: {error}")]
    return [(score, None) for score in scores]


def _as_score(value: Any) -> float:
    if isinstance(value, (str, bytes)) or value is None:
        raise TypeError(f"the scorer returned {value!r}: expected a number")
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"the scorer returned {score}: expected a finite number")
    return score
