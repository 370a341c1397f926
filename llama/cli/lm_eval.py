"""The model "llama" for lm-evaluation-harness: EleutherAI's benchmarks on a checkpoint, with `lm_eval`'s own options.

    python -m llama.evaluation --model llama --model_args ckpt_dir=DIR --tasks hellaswag --batch_size 16
    torchrun --nproc_per_node 8 -m llama.evaluation --model llama --model_args ckpt_dir=DIR --tasks gsm8k
    python -m llama.evaluation --model llama --model_args ckpt_dir=DIR,replicas=8 --tasks gsm8k    # docs/machines.md

`lm_eval` (0.4.13) has a fixed table of models and no option to add one; this command has one model more. In Python,
import this file, then call `lm_eval.simple_evaluate(model="llama", model_args=…)`.

Texts become ids as in the harness's `hf` model: a begin-of-text token comes first, and the name of a special token
becomes that token. Needs the extra `eval`.
"""

import itertools
import math
from collections import Counter
from typing import Any

from llama import GenerationError, Llama
from llama.checkpoint.open import open_checkpoint
from llama.cli.arguments import MISTAKES
from llama.datasets.runs import RemoteModel, Result, Run, Task
from llama.decoding.answering import Answer, Job
from llama.decoding.scoring import TokenScores
from llama.options import per_prompt
from llama.sampling import call_seed
from llama.tokenizer import ChatFormat

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is not installed, or a part of it is missing ({error}): pip install '.[eval]'"
    ) from error

# The decoding options of a task, besides `until` and the budget, by their names in Transformers.
DECODING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size")


@register_model("llama")
class LlamaLM(TemplateLM):
    """A checkpoint as a model of lm-evaluation-harness. The arguments come from the harness's command line.

    Args:
        ckpt_dir: Meta's directory or Hugging Face's.
        tokenizer_path: the tokenizer's file; the directory's own when None.
        max_length: the most tokens that are read at once; longer contexts lose their beginning.
        batch_size: how many sequences run at a time; "auto": max_batch_size, or 8.
        max_batch_size: for "auto".
        model_parallel_size: over how many processes the model is split; all of them when None. Replicas share requests.
        device: as in `Llama.build`; but "cuda:0", the command's default, means this process's card, or the CPU if
            there is none.
        dtype, seed, draft: as in `Llama.build`.
        replicas, ray: replicas on a Ray cluster, and its address, as in `llama batch`.
        add_bos_token: whether texts get a begin-of-text token.
        max_gen_toks: the budget of an answer if the task sets none.
    """

    def __init__(
        self,
        ckpt_dir: str,
        tokenizer_path: str | None = None,
        max_length: int = 2048,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        model_parallel_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        seed: int = 1,
        draft: str | None = None,
        add_bos_token: bool = True,
        max_gen_toks: int = 256,
        replicas: int | None = None,
        ray: str | None = None,
    ):
        super().__init__()
        device = None if device == "cuda:0" else device
        rows = (max_batch_size or 8) if str(batch_size).startswith("auto") else int(batch_size)
        # One position more, because the last token of a text is predicted but not read.
        size = {"max_seq_len": max_length + 1, "max_batch_size": rows, "model_parallel_size": model_parallel_size}
        size |= {"ckpt_dir": ckpt_dir, "tokenizer_path": tokenizer_path, "device": device, "dtype": dtype}
        arguments = size | {"seed": seed, "draft": draft}
        is_remote = replicas is not None or ray is not None
        self.llama = LlamaOnReplicas(arguments, replicas, ray) if is_remote else Llama.build(**arguments)
        self.ckpt_dir, self.max_length, self.max_gen_toks = str(ckpt_dir), max_length, max_gen_toks
        self.add_bos_token = add_bos_token
        self._device = "cpu" if is_remote else self.llama.answerer.shared.engine.model.rotary.device

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.llama.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, after a begin-of-text token, unless it begins with one or `add_bos_token` is False."""
        tokenizer = self.llama.tokenizer
        names = {name for name, token in tokenizer.special_tokens.items() if token == tokenizer.bos_id}
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token and not string.startswith(tuple(names))
        return tokenizer.encode(string, bos=add_special_tokens, allowed_special="all")

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Each continuation's log-probability, and whether it is the greedy one. Long contexts lose their beginning."""
        pairs = []
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens: expected at most max_length = {self.max_length}"
                )
            pairs.append((context[-room:], continuation))
        scored = self.llama.score_tokens([(ids + continuation, len(ids)) for ids, continuation in pairs], shared=True)
        if errors := [scores.error for scores in scored if scores.error is not None]:
            raise GenerationError(errors[0], [])
        results = [(math.fsum(scores.logprobs), scores.is_greedy) for scores in scored]
        for (texts, *_), result in zip(requests, results):
            if texts is not None:  # None: a window; `loglikelihood_rolling` caches the whole text
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows of max_length tokens; each token is predicted once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to the first of its stop strings."""
        eos = self.llama.tokenizer.decode([self.eot_token_id])
        prompts: list[list[int]] = []
        options: dict[str, list] = {name: [] for name in ("max_gen_len", "stop", *DECODING)}
        for request in requests:
            context, asked = request.args
            kwargs = normalize_gen_kwargs(asked, self.max_gen_toks)
            budget, sampled = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
            if not 0 < budget < self.max_length:
                raise ValueError(f"max_gen_toks = {budget}: expected 1 to max_length - 1 = {self.max_length - 1}")
            until = [stop for stop in handle_stop_sequences(kwargs.pop("until"), eos) if stop]
            decoding = {"temperature": 0.0, "top_p": 1.0, "top_k": None, "min_p": None}
            decoding |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0} | kwargs
            if unknown := decoding.keys() - {*DECODING}:
                raise ValueError(f"the task sets {sorted(unknown)}: expected only options among {', '.join(DECODING)}")
            if not sampled:
                decoding |= {"temperature": 0.0, "top_p": 1.0, "top_k": None, "min_p": None}
            prompts.append(self.tok_encode(context)[-(self.max_length - budget) :])
            for name, value in {"max_gen_len": budget, "stop": until, **decoding}.items():
                options[name].append(value)
        answers = self.llama.answer(prompts, False, False, not disable_tqdm, **options) if prompts else []
        texts = [answer.text for (answer,) in answers]
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialog as text in Llama 3's format. `tok_encode` turns it into the ids of `ChatFormat`."""
        tokenizer, formatter = self.llama.tokenizer, self.llama.formatter
        if formatter.template is not None:
            text = formatter.template.render(chat_history, add_generation_prompt)
            return text if add_generation_prompt else text.rstrip()
        if tokenizer.kind != "llama3":
            raise ValueError("a dialog of Llama 2 cannot be text: the tokens between its turns have no text")
        ids = [tokenizer.bos_id]
        for message in chat_history:
            ids += formatter.encode_message(message)
        if add_generation_prompt:
            ids += formatter.encode_header({"role": "assistant", "content": ""})
        else:  # the last message is the beginning of the answer
            ids = ids[:-1]
        return tokenizer.decode(ids)

    @property
    def tokenizer_name(self) -> str:
        return self.ckpt_dir.replace("/", "__")


class LlamaOnReplicas:
    """The methods of `Llama` that the harness needs, on replicas: the same answers. This process has no weights."""

    def __init__(self, arguments: dict[str, Any], replicas: int | None, address: str | None):
        names = ("ckpt_dir", "tokenizer_path", "max_seq_len", "max_batch_size")
        self.tokenizer, _ = open_checkpoint(*(arguments[name] for name in names))
        self.formatter = ChatFormat(self.tokenizer)
        self.remote = RemoteModel(arguments, replicas, address=address)
        self.n_calls = itertools.count(1)

    def results(self, tasks: list[Task]) -> list[Result]:
        """The results of tasks, whose `line` is their place in the list. Raises GenerationError."""
        found = {r["line"]: r for r in self.remote.replicas.results(_Requests, iter(tasks), _cost)}
        if errors := [found[line]["error"] for line in range(len(tasks)) if "error" in found[line]]:
            raise GenerationError(errors[0], [])
        return [found[line] for line in range(len(tasks))]

    def score_tokens(self, texts: list[tuple[list[int], int]], shared: bool = True) -> list[TokenScores]:
        """As `Llama.score_tokens`; texts that begin alike go to one replica."""
        order = sorted(range(len(texts)), key=lambda index: texts[index][0])
        n_each = 8 * self.remote.replicas.facts["max_batch_size"]
        parts = [order[start : start + n_each] for start in range(0, len(order), n_each)]
        tasks = [{"line": line, "texts": [texts[index] for index in part]} for line, part in enumerate(parts)]
        scores = [score for result in self.results(tasks) for score in result["scores"]]
        by_index = dict(zip(order, scores))
        return [TokenScores(**by_index[index]) for index in range(len(texts))]

    def answer(self, prompts: list[list[int]], *_: bool, **options: Any) -> list[list[Answer]]:
        """As `Llama.answer`, with a seed for each call."""
        seed, occurrences, tasks = call_seed(self.remote.seed, next(self.n_calls)), Counter(), []
        for line, (prompt, option) in enumerate(zip(prompts, per_prompt(len(prompts), **options))):
            before = occurrences[tuple(prompt)]
            occurrences[tuple(prompt)] += 1
            given = {name: getattr(option, name) for name in options} | {"seed": seed}
            tasks.append({"line": line, "prompt": prompt, "options": given, "occurrence": before})
        return [[Answer([], result["text"], "stop")] for result in self.results(tasks)]


class _Requests(Run):
    """Requests of the harness on a replica: prompts to answer, or texts to score."""

    def begin(self, task: Task) -> list[Job] | Result:
        if "texts" in task:
            return {"line": task["line"], "scores": [vars(found) for found in self.llama.score_tokens(task["texts"])]}
        return [Job(task["line"], task["prompt"], self.option_of(task["options"]), task["occurrence"])]

    def go_on(self, job: Job, answers: list[Answer]) -> Result:
        failed = {} if answers[0].error is None else {"error": answers[0].error}
        return {"line": job.key, "text": answers[0].text, **failed}

    def task_of(self, row: Any) -> Task:
        raise NotImplementedError  # the harness's requests are the tasks; there are no rows


def _cost(task: Task) -> int:
    """The tokens of a task to read, and the most to generate."""
    return len(task["prompt"]) + task["options"]["max_gen_len"] if "prompt" in task else len(task["texts"][0][0])


def main() -> None:
    """Runs `lm_eval` with this model, and the arguments of the command line."""
    try:
        cli_evaluate()
    except MISTAKES as error:
        raise SystemExit(f"llama.evaluation: {error}") from error


if __name__ == "__main__":
    main()
