"""`Llama`: build it from a directory, then complete texts and answer dialogs. Text at the door, tokens inside.

Everything a user passes in is checked here, before anything runs; the work is done a floor below.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from llama import parallel
from llama.checkpoint.loading import load_weights
from llama.checkpoint.open import open_checkpoint
from llama.decoding import scoring
from llama.decoding.answering import Answer, Answerer, GenerationError, Job, TopLogprobs
from llama.decoding.speculative import DraftModel, NgramLookup, Proposer, SpeculativeEngine, open_draft
from llama.engine import Engine
from llama.layers.quantization import KINDS
from llama.model import Transformer
from llama.options import DecodingOptions, per_prompt
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer
from llama.tokenizer.open_turns import OpenDialog


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # with logprobs=True: the text of each token,
    logprobs: list[float]  # and its natural-log probability
    top_logprobs: TopLogprobs  # with top_logprobs=k
    speculation: dict[str, int]  # with build(draft=...): see `Speculation`


class ChatPrediction(TypedDict, total=False):
    generation: Message
    dialog: Dialog  # of a dialog with open turns: the whole of it, filled
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: TopLogprobs
    speculation: dict[str, int]


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
        compile: bool = False,
        quantize: str | None = None,
        draft: str | os.PathLike | None = None,
    ) -> "Llama":
        """Loads a checkpoint, in a plain `python` or in each process of a torchrun.

        Process groups are made if there are none yet; on CUDA the process's current device is set, as NCCL wants it;
        on ranks other than 0 stdout is silenced. Nothing else that is global is touched.

        Args:
            ckpt_dir: a directory with params.json and consolidated.NN.pth, or Hugging Face's with config.json and
                safetensors files; of any number of shards.
            tokenizer_path: tokenizer.model of `ckpt_dir` when None, or its tokenizer.json where there is no other.
            max_seq_len: room for a prompt and its answer, tokens.
            max_batch_size: how many sequences run at a time; more prompts than that take turns.
            model_parallel_size: over how many processes the model is split; all of them when None.
            seed: what the random numbers of calls without a seed of their own come from.
            device: "cuda", "mps", "cpu"; the first of these that is there when None.
            dtype: of the weights and the computation; the checkpoint's, or the nearest the device has, when None.
            compile: whether to compile the decoding step with `torch.compile`: a minute the first time on a machine.
            quantize: "int8" or "int4" rounds the matrices while they are loaded, to a half or a quarter of bfloat16's
                bytes (`llama.layers.quantization`); the embedding and the norms stay. The computation is in bfloat16
                unless `dtype` says otherwise, which has the fast kernels.
            draft: what proposes tokens, for the model to check several at a time: the same answers, sooner. The
                directory of a smaller model with the same tokenizer, or "ngram", which looks the last tokens up in
                prompt and answer (`llama.decoding.speculative`). Beam searches do without.

        Raises:
            FileNotFoundError: a directory or file is missing.
            ValueError: a file is broken, disagrees with another, or a number is out of range.
                On several processes each raises when one does.
            MemoryError: the device has no room for the weights and the cache.
        """
        started = time.perf_counter()
        for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: expected an integer of at least 1")
        if quantize not in (None, *KINDS):
            raise ValueError(f"quantize = {quantize!r}: expected {' or '.join(map(repr, KINDS))}, or None")
        if not isinstance(draft, (str, os.PathLike, type(None))):
            raise TypeError(f"draft = {draft!r}: expected a directory, 'ngram' or None")
        device = parallel.pick_device(device)
        dtype = _as_dtype(dtype)
        proposer: Proposer | None = NgramLookup() if draft == "ngram" else None
        parallel.initialize(model_parallel_size, device)
        parallel.silence_other_ranks()
        with parallel.fail_together():
            tokenizer, checkpoint = open_checkpoint(Path(ckpt_dir), tokenizer_path, max_seq_len, max_batch_size)
            if is_model := draft not in (None, "ngram"):
                draft_model, draft_checkpoint = open_draft(draft, tokenizer, max_seq_len, max_batch_size)
            try:
                if checkpoint.quantization and quantize not in (None, checkpoint.quantization):
                    raise ValueError(
                        f"quantize = {quantize!r}, but {ckpt_dir} is quantised to {checkpoint.quantization} already: "
                        "pass None, or the checkpoint that it was made of"
                    )
                with torch.device("meta"):
                    model = Transformer(checkpoint.args)
                rounded = quantize or checkpoint.quantization
                dtype = dtype or parallel.pick_dtype(torch.bfloat16 if rounded else checkpoint.dtype, device)
                loaded = load_weights(model, checkpoint, dtype, device, quantize)
                model.allocate_cache()
                if is_model:
                    load_weights(draft_model, draft_checkpoint, dtype, device)
                    proposer = DraftModel(draft_model)
            except RuntimeError as error:  # PyTorch has no class of its own for a CPU out of memory
                if "alloc" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                raise MemoryError(
                    f"not enough memory on {device} for this checkpoint with max_seq_len = {max_seq_len} and "
                    f"max_batch_size = {max_batch_size}: `python -m llama info` says what it takes; lower them"
                ) from error
        if dist.get_rank() == 0:
            print(loaded.describe(device, time.perf_counter() - started, dist.get_world_size()))
        return Llama(model, tokenizer, seed, proposer, compile)

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        seed: int = 1,
        proposer: Proposer | None = None,
        compile: bool = False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = ChatFormat(tokenizer)
        self.seed = seed
        if model.cache is None:
            model.allocate_cache()
        self._engine = Engine(model) if proposer is None else SpeculativeEngine(model, proposer)
        if compile:
            with parallel.fail_at_once():
                took = self._engine.compile()
            if dist.get_rank() == 0:
                print(took)
        self._answerer = Answerer(self._engine, tokenizer)
        self._n_calls = 0

    def generate(
        self,
        prompt_tokens: SequenceOf[SequenceOf[int]],
        max_gen_len: int | list[int] | None = None,
        temperature: float | list[float] = 0.6,
        top_p: float | list[float] = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        progress: bool = False,
        **options: Any,
    ) -> tuple:
        """Continues prompts of token ids.

        Each prompt has its own budget of min(max_gen_len, max_seq_len - its length) tokens and ends early at a stop
        token, which is not part of the answer. What a prompt gives does not depend on the others of the call: not on
        their number, lengths or order, nor on the processes it runs on.

        Args:
            prompt_tokens: the prompts, each a list of at least one id; any number of them.
            max_gen_len: the most new tokens of an answer; as many as fit when None.
            temperature: divides the logits before sampling; 0 takes the most likely token each time.
            top_p: samples from the smallest set of tokens that holds this much of the probability, in (0, 1].
            logprobs: whether to return the log-probability of each token.
            echo: whether each answer begins with its prompt; the first prompt token's logprob is 0.0.
            progress: whether to show a bar of the prompts done and tokens/s.
            options: any other field of `DecodingOptions`: top_k, min_p, repetition_penalty, no_repeat_ngram_size,
                num_return_sequences, num_beams, length_penalty, early_stopping, stop, logit_bias, seed,
                logits_processor, top_logprobs. Each, and those above, may be a list with one value for each prompt.
                Without `seed`, each call of a `Llama` draws anew, from the seed of `build`.

        Returns:
            The answers' ids, in the order of the prompts, `num_return_sequences` to each; and for each token its
            log-probability under the model, the log-softmax of its untempered logits in nats, or None when not asked
            for. With top_logprobs=k also, for each token, the k most likely (id, log-probability).

        Raises:
            ValueError, TypeError: a prompt is empty, longer than max_seq_len or has ids out of range (named by its
                index), or an option is out of range. Nothing has run then.
            GenerationError: the model or a logits_processor gave logits that cannot be used, for some of the prompts.
        """
        options |= {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
        if not isinstance(prompt_tokens, Iterable):
            raise TypeError(f"prompt_tokens is {prompt_tokens!r}: expected a list of prompts, each a list of token ids")
        prompts = [self.check_prompt(index, prompt) for index, prompt in enumerate(prompt_tokens)]
        by_prompt = self.answer(prompts, logprobs, echo, progress, **options)
        answers = [(prompt, answer) for prompt, group in zip(prompts, by_prompt) for answer in group]
        tokens = [prompt + answer.tokens if echo else answer.tokens for prompt, answer in answers]
        values = [a.prompt_token_logprobs + a.token_logprobs for _, a in answers] if logprobs else None
        top = options.get("top_logprobs")
        if not (any(top) if isinstance(top, (list, tuple)) else top):
            return tokens, values
        return tokens, values, [a.prompt_top_logprobs + a.top_logprobs for _, a in answers]

    def text_completion(
        self,
        prompts: SequenceOf[str],
        temperature: float | list[float] = 0.6,
        top_p: float | list[float] = 0.9,
        max_gen_len: int | list[int] | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        progress: bool = False,
        **options: Any,
    ) -> list[CompletionPrediction]:
        """Continues texts. Arguments and errors as in `generate`; an empty text is continued from nothing.

        Returns:
            For each answer {"generation": text}, with "tokens", "logprobs" and "top_logprobs" when these are asked for.
        """
        prompt_tokens = self._encode_texts(prompts)
        options |= {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
        by_prompt = self.answer(prompt_tokens, logprobs, echo, progress, **options)
        predictions: list[CompletionPrediction] = []
        for prompt, group in zip(prompt_tokens, by_prompt):
            predictions += [{"generation": a.text, **self.details(prompt, a, logprobs, echo, options)} for a in group]
        return predictions

    def chat_completion(
        self,
        dialogs: SequenceOf[Dialog],
        temperature: float | list[float] = 0.6,
        top_p: float | list[float] = 0.9,
        max_gen_len: int | list[int] | None = None,
        logprobs: bool = False,
        *,
        progress: bool = False,
        **options: Any,
    ) -> list[ChatPrediction]:
        """Answers dialogs, each a list of {"role", "content"} that ends with the user's message.

        Arguments and errors as in `generate`. Text in a message is text: "<|eot_id|>" is those characters. Messages of
        the assistant whose content is "<PLACEHOLDER>" are generated in their places, in order, each as a call with all
        the messages before it would, of the same options and seed.

        Returns:
            For each answer {"generation": {"role": "assistant", "content": text}}, with "tokens", "logprobs" and
            "top_logprobs" when these are asked for. For a dialog with placeholders it is the last of its answers, and
            "dialog" has all the messages.
        """
        options |= {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
        open_dialogs = self._open_dialogs(dialogs)
        settings = self._check_options(open_dialogs, options)
        for index, (dialog, option) in enumerate(zip(open_dialogs, settings)):
            if dialog.has_placeholders and option.num_return_sequences > 1:
                n = option.num_return_sequences
                raise ValueError(f"dialog {index}: num_return_sequences = {n}: expected 1 where there are open turns")
        last: list[tuple[list[int], list[Answer]]] = [([], [])] * len(settings)  # prompt and answers
        while turn := [index for index, dialog in enumerate(open_dialogs) if not dialog.is_done]:
            prompts = [self.check_prompt(index, self._encode_dialog(index, open_dialogs[index])) for index in turn]
            groups = self._answer_some(turn, prompts, [settings[index] for index in turn], logprobs, progress)
            for index, prompt, group in zip(turn, prompts, groups):
                open_dialogs[index].fill(group[0].text)
                last[index] = prompt, group
        predictions: list[ChatPrediction] = []
        for dialog, (prompt, group) in zip(open_dialogs, last):
            whole = {"dialog": dialog.messages} if dialog.has_placeholders else {}
            for a in group:
                message: Message = {"role": "assistant", "content": a.text}
                details = self.details(prompt, a, logprobs, False, options)
                predictions.append({"generation": message, **whole, **details})
        return predictions

    def stream_text(self, prompt: str, **options: Any) -> Iterator[str]:
        """Yields the text that continues a prompt while it is decided; the options are those of `DecodingOptions`.

        A piece is never half a character, and nothing of a stop string is yielded; joined, the pieces are what
        `text_completion` returns with the same seed. An answer of nothing yields nothing. Closing the iterator ends
        the answer and frees its slot.
        """
        return self._stream(self._encode_texts([prompt])[0], **options)

    def stream_chat(self, dialog: Dialog, **options: Any) -> Iterator[str]:
        """Yields the answer to a dialog while it is decided, as `stream_text` does."""
        (open_dialog,) = self._open_dialogs([dialog])
        if open_dialog.has_placeholders:
            raise ValueError("a stream is one answer: expected a dialog without open turns")
        return self._stream(self._encode_dialog(0, open_dialog), **options)

    def score(self, texts: SequenceOf, top_logprobs: int = 0, stride: int | None = None) -> list[dict]:
        """The log-probability of each token of texts or lists of ids: see `llama.decoding.scoring.score`."""
        return scoring.score(self, texts, top_logprobs, stride)

    def perplexity(self, texts: SequenceOf, stride: int | None = None) -> list[float]:
        """The perplexity of each text: see `llama.decoding.scoring.perplexity`."""
        return scoring.perplexity(self, texts, stride)

    def answer(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        logprobs: bool = False,
        echo: bool = False,
        progress: bool = False,
        shared: bool = True,
        **options: Any,
    ) -> list[list[Answer]]:
        """What `generate` and the completions are made of: the answers to each prompt, with all that is known of them.

        Arguments and errors as in `generate`. With replicas, each takes its share of the prompts; or, if not `shared`,
        answers all, whatever the others do.
        """
        prompts = [self.check_prompt(index, prompt) for index, prompt in enumerate(prompts)]
        return self._answerer.answer(prompts, self._check_options(prompts, options), logprobs, echo, progress, shared)

    def answer_jobs(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, list[Answer]]]:
        """Yields jobs with their answers as each is done, by this replica alone: see `Answerer.run`. Checks nothing."""
        return self._answerer.run(jobs)

    def _answer_some(
        self,
        indices: list[int],
        prompts: list[list[int]],
        settings: list[DecodingOptions],
        logprobs: bool,
        progress: bool,
    ) -> list[list[Answer]]:
        """The answers to some of a call's prompts; an error names the first that failed by its index in the call."""
        try:
            return self._answerer.answer(prompts, settings, logprobs, False, progress)
        except GenerationError as error:
            bad = next(index for index, group in zip(indices, error.answers) if any(a.error for a in group))
            message = re.sub(r"^prompt \d+", f"prompt {bad}", str(error))
            raise GenerationError(message, error.answers) from error.__cause__

    def _stream(self, prompt: list[int], **options: Any) -> Iterator[str]:
        """Checks at once, and not when the first piece is asked for."""
        (option,) = self._check_options([self.check_prompt(0, prompt)], options)
        if option.num_beams > 1 or option.num_return_sequences > 1:
            raise ValueError("a stream is one answer: expected num_beams = 1 and num_return_sequences = 1")
        if option.top_logprobs:
            raise ValueError("a stream is text alone: expected top_logprobs = 0")
        return self._answerer.stream(prompt, option)

    def details(self, prompt: list[int], answer: Answer, logprobs: bool, echo: bool, options: dict) -> dict:
        """The keys of a prediction that are there when asked for. The text of a token has its leading space."""
        top = options.get("top_logprobs")
        asked_for_top = any(top) if isinstance(top, (list, tuple)) else bool(top)
        details: dict = {}
        if isinstance(self._engine, SpeculativeEngine):
            details["speculation"] = asdict(answer.speculation)
        if not logprobs and not asked_for_top:
            return details
        tokens = prompt + answer.tokens if echo else answer.tokens
        details["tokens"] = [self.token_text(token) for token in tokens]
        details["logprobs"] = answer.prompt_token_logprobs + answer.token_logprobs
        if asked_for_top:
            details["top_logprobs"] = answer.prompt_top_logprobs + answer.top_logprobs
        return details

    def token_text(self, token: int) -> str:
        """The text that a token adds, its leading space included; U+FFFD where it is part of a character."""
        return self.tokenizer.token_bytes(token).decode(errors="replace")

    def _encode_texts(self, prompts: SequenceOf[str]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise TypeError("prompts is a str: expected a list of them, so pass [prompt]")
        prompts = list(prompts)
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                kind = type(prompt).__name__
                raise TypeError(f"prompt {index} is a {kind}: expected a str (`generate` takes token ids)")
        return [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]

    def _open_dialogs(self, dialogs: SequenceOf[Dialog]) -> list[OpenDialog]:
        open_dialogs = []
        for index, dialog in enumerate(dialogs):
            try:
                open_dialogs.append(OpenDialog(dialog, self.formatter))
            except ValueError as error:
                raise ValueError(f"dialog {index}: {error}") from None
        return open_dialogs

    def _encode_dialog(self, index: int, dialog: OpenDialog) -> list[int]:
        try:
            return self.formatter.encode_dialog_prompt(dialog.prompt)
        except ValueError as error:
            raise ValueError(f"dialog {index}: {error}") from None

    def _check_options(self, prompts: SequenceOf, options: dict[str, Any]) -> list[DecodingOptions]:
        """The options of each prompt, checked against the model; without a seed, they get one of this call."""
        seed = options.get("seed")
        if seed is None or (isinstance(seed, (list, tuple)) and None in seed):
            self._n_calls += 1
            digest = hashlib.blake2b(f"{self.seed} {self._n_calls}".encode(), digest_size=8).digest()
            own = int.from_bytes(digest, "little")
            options = options | {"seed": own if seed is None else [own if s is None else s for s in seed]}
        settings = per_prompt(len(prompts), **options)
        for index, option in {id(option): (index, option) for index, option in enumerate(settings)}.values():
            try:
                self.check_option(option)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        return settings

    def check_option(self, option: DecodingOptions) -> None:
        """Raises ValueError if options name tokens that the model does not have, or more beams than it has rows."""
        option.check_vocabulary(self.model.args.vocab_size)
        if option.num_beams > self.model.args.max_batch_size:
            raise ValueError(
                f"num_beams = {option.num_beams}: expected at most max_batch_size = "
                f"{self.model.args.max_batch_size}, which `Llama.build` sets"
            )

    def check_prompt(self, index: int | str, prompt: SequenceOf[int], any_length: bool = False) -> list[int]:
        """The prompt as a list of int, whatever holds its ids: a list, a tuple, an array or a tensor.

        Args:
            index: of the prompt in the call, or what else errors are to call it.
            prompt: its ids.
            any_length: whether it may be longer than max_seq_len.

        Raises:
            ValueError, TypeError: it is empty, longer than max_seq_len (unless any_length), or holds no ids.
        """
        name = f"prompt {index}" if isinstance(index, int) else index
        limit, vocab_size = self.model.args.max_seq_len, self.model.args.vocab_size
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(prompt, (list, tuple)):
            kind = type(prompt).__name__
            raise TypeError(f"{name} is a {kind}: expected a list of token ids (`text_completion` takes texts)")
        if len(prompt) == 0:
            raise ValueError(f"{name} is empty: expected at least one token id, such as the tokenizer's bos_id")
        if not any_length and len(prompt) > limit:
            raise ValueError(
                f"{name} has {len(prompt):,} tokens: expected at most max_seq_len = {limit:,}, which `Llama.build` sets"
            )
        for token in prompt:
            if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= token < vocab_size:
                raise ValueError(f"{name} has {token!r} among its ids: expected integers from 0 to {vocab_size - 1}")
        return [int(token) for token in prompt]


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its object or its name, such as "bfloat16"."""
    named = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if named not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype = {dtype!r}: expected bfloat16, float16 or float32")
    return named
