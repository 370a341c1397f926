"""`Llama`: build it from a directory, then complete texts and answer dialogs. Text at the door, tokens inside.

Everything a user passes in is checked here, before anything runs; the work is the engine's.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist

from llama import checkpoint as checkpoints
from llama import parallel
from llama.engine import Engine, Sequence
from llama.model import Transformer
from llama.sampling import RandomStream
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # with logprobs=True: the text of each token,
    logprobs: list[float]  # and its natural-log probability


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]
    logprobs: list[float]


class Llama:
    """A model and its tokenizer, ready to generate. `Llama.build` makes one."""

    @staticmethod
    def build(
        ckpt_dir: str | os.PathLike,
        tokenizer_path: str | os.PathLike | None = None,
        max_seq_len: int = 2048,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> "Llama":
        """Loads a checkpoint, in a plain `python` or in each process of a torchrun.

        Process groups are made if there are none yet, and on ranks other than 0 stdout is silenced; nothing else that
        is global is touched.

        Args:
            ckpt_dir: a directory with params.json and consolidated.NN.pth, of any number of shards.
            tokenizer_path: tokenizer.model of `ckpt_dir` when None.
            max_seq_len: room for a prompt and its answer, tokens.
            max_batch_size: how many sequences run at a time; more prompts than that take turns.
            model_parallel_size: over how many processes the model is split; all of them when None.
            seed: what the random numbers of calls without a seed of their own come from.
            device: "cuda", "mps", "cpu"; the first of these that is there when None.
            dtype: of the weights and the computation; the checkpoint's, or the nearest the device has, when None.

        Raises:
            FileNotFoundError: a directory or file is missing.
            ValueError: a file is broken, disagrees with another, or a number is out of range.
                On several processes each raises when one does.
        """
        started = time.perf_counter()
        for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: expected an integer of at least 1")
        device = parallel.pick_device(device)
        dtype = _as_dtype(dtype)
        parallel.initialize(model_parallel_size, device)
        parallel.silence_other_ranks()
        with parallel.fail_together():
            ckpt_dir = Path(ckpt_dir)
            params = checkpoints.read_params(ckpt_dir)
            tokenizer = Tokenizer(ckpt_dir / "tokenizer.model" if tokenizer_path is None else tokenizer_path)
            args = checkpoints.model_args(params, ckpt_dir, tokenizer.n_words, max_seq_len, max_batch_size)
            checkpoint = checkpoints.MetaCheckpoint(ckpt_dir, args)
            with torch.device("meta"):
                model = Transformer(args)
            dtype = dtype or parallel.pick_dtype(checkpoint.dtype, device)
            checkpoints.load_weights(model, checkpoint, dtype, device)
            model.allocate_cache()
        if dist.get_rank() == 0:
            print(f"Loaded in {time.perf_counter() - started:.2f} seconds")
        return Llama(model, tokenizer, seed)

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1):
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = ChatFormat(tokenizer)
        self.seed = seed
        self._engine = Engine(model)
        self._n_calls = 0

    def generate(
        self,
        prompt_tokens: SequenceOf[SequenceOf[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continues prompts of token ids.

        Each prompt has its own budget of min(max_gen_len, max_seq_len - its length) tokens and ends early at a stop
        token, which is not part of the answer. What a prompt gives does not depend on the others of the call.

        Args:
            prompt_tokens: the prompts, each a list of at least one id.
            max_gen_len: the most new tokens of an answer; as many as fit when None.
            temperature: divides the logits before sampling; 0 takes the most likely token each time.
            top_p: samples from the smallest set of tokens that holds this much of the probability, in (0, 1].
            logprobs: whether to return the log-probability of each token.
            echo: whether each answer begins with its prompt; the first prompt token's logprob is 0.0.
            seed: makes the call reproducible; without it, each call of a `Llama` draws anew, from the seed of `build`.

        Returns:
            The answers' ids, in the order of the prompts; and for each token its log-probability under the model, the
            untempered logits' log-softmax in nats, or None when not asked for.

        Raises:
            ValueError, TypeError: a prompt is empty, longer than max_seq_len or has ids out of range (named by its
                index), or a number is out of range. Nothing has run then.
        """
        self._check_sampling(max_gen_len, temperature, top_p, seed)
        prompts = [self._check_prompt(index, prompt) for index, prompt in enumerate(prompt_tokens)]
        if seed is None:
            self._n_calls += 1
            digest = hashlib.blake2b(f"{self.seed} {self._n_calls}".encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, "little")
        occurrences: Counter[tuple[int, ...]] = Counter()
        sequences = []
        for prompt in prompts:
            room = self.model.args.max_seq_len - len(prompt)
            sequences.append(
                Sequence(
                    prompt,
                    room if max_gen_len is None else min(max_gen_len, room),
                    RandomStream(seed, prompt, occurrences[tuple(prompt)]),
                    float(temperature),
                    float(top_p),
                    frozenset(self.tokenizer.stop_tokens),
                    logprobs,
                    logprobs and echo,
                )
            )
            occurrences[tuple(prompt)] += 1
        for _ in self._engine.run(sequences):
            pass
        tokens = [s.prompt + s.tokens if echo else s.tokens for s in sequences]
        return tokens, [s.prompt_token_logprobs + s.token_logprobs for s in sequences] if logprobs else None

    def text_completion(
        self,
        prompts: SequenceOf[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
    ) -> list[CompletionPrediction]:
        """Continues texts. Arguments and errors as in `generate`; an empty text is continued from nothing.

        Returns:
            For each prompt {"generation": text}, with "tokens" and "logprobs" when these are asked for.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is a str: expected a list of them, so pass [prompt]")
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(
                    f"prompt {index} is a {type(prompt).__name__}: expected a str (`generate` takes token ids)"
                )
        prompt_tokens = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        answers, answer_logprobs = self.generate(
            prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, seed=seed
        )
        predictions: list[CompletionPrediction] = [{"generation": self.tokenizer.decode(answer)} for answer in answers]
        return self._add_logprobs(predictions, answers, answer_logprobs)

    def chat_completion(
        self,
        dialogs: SequenceOf[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: int | None = None,
    ) -> list[ChatPrediction]:
        """Answers dialogs, each a list of {"role", "content"} that ends with the user's message.

        Arguments and errors as in `generate`. Text in a message is text: "<|eot_id|>" is those characters.

        Returns:
            For each dialog {"generation": {"role": "assistant", "content": text}}, with "tokens" and "logprobs" when
            these are asked for.
        """
        prompt_tokens = []
        for index, dialog in enumerate(dialogs):
            try:
                prompt_tokens.append(self.formatter.encode_dialog_prompt(dialog))
            except ValueError as error:
                raise ValueError(f"dialog {index}: {error}") from None
        answers, answer_logprobs = self.generate(prompt_tokens, max_gen_len, temperature, top_p, logprobs, seed=seed)
        predictions: list[ChatPrediction] = [
            {"generation": {"role": "assistant", "content": self.tokenizer.decode(answer)}} for answer in answers
        ]
        return self._add_logprobs(predictions, answers, answer_logprobs)

    def _add_logprobs(self, predictions: list, answers: list[list[int]], logprobs: list[list[float]] | None) -> list:
        if logprobs is not None:
            for prediction, answer, values in zip(predictions, answers, logprobs):
                prediction["tokens"] = [self.tokenizer.decode([token]) for token in answer]
                prediction["logprobs"] = values
        return predictions

    def _check_sampling(self, max_gen_len: int | None, temperature: float, top_p: float, seed: int | None) -> None:
        if max_gen_len is not None and (not isinstance(max_gen_len, int) or max_gen_len < 0):
            raise ValueError(f"max_gen_len = {max_gen_len!r}: expected an integer of at least 0, or None")
        if not _is_number(temperature) or not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature = {temperature!r}: expected a finite number of at least 0")
        if not _is_number(top_p) or not 0 < top_p <= 1:
            raise ValueError(f"top_p = {top_p!r}: expected a number in (0, 1]")
        if seed is not None and not isinstance(seed, int):
            raise ValueError(f"seed = {seed!r}: expected an integer, or None")

    def _check_prompt(self, index: int, prompt: SequenceOf[int]) -> list[int]:
        """The prompt as a list of int, whatever holds its ids: a list, a tuple, an array or a tensor."""
        name, limit, vocab_size = f"prompt {index}", self.model.args.max_seq_len, self.model.args.vocab_size
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(prompt, (list, tuple)):
            kind = type(prompt).__name__
            raise TypeError(f"{name} is a {kind}: expected a list of token ids (`text_completion` takes texts)")
        if len(prompt) == 0:
            raise ValueError(f"{name} is empty: expected at least one token id, such as the tokenizer's bos_id")
        if len(prompt) > limit:
            raise ValueError(
                f"{name} has {len(prompt):,} tokens: expected at most max_seq_len = {limit:,}, which `Llama.build` sets"
            )
        for token in prompt:
            if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= token < vocab_size:
                raise ValueError(f"{name} has {token!r} among its ids: expected integers from 0 to {vocab_size - 1}")
        return [int(token) for token in prompt]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its object or its name, such as "bfloat16"."""
    named = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if named not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype = {dtype!r}: expected bfloat16, float16 or float32")
    return named
