"""`Llama`: build it from a directory, then complete texts and answer dialogs.

Checks everything that a user passes in before anything runs, and turns text into tokens. `llama.decoding` then answers.
"""

import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from llama import parallel
from llama.adapters import build_adapted
from llama.checkpoint import open_checkpoint, save_checkpoint
from llama.decoding import predictions, scoring
from llama.decoding.answering import Answer, Answerer, Jobs, jobs_of
from llama.decoding.predictions import ChatPrediction, CompletionPrediction
from llama.decoding.rollouts import encode_dialog, fill_dialogs, named, open_dialogs
from llama.decoding.speculative import Proposer, SpeculativeEngine, make_proposer, open_draft
from llama.engine import Engine
from llama.keywords import Options, StreamOptions, checks_keywords
from llama.layers.hooks import is_ours
from llama.meta_names import B_INST, B_SYS, E_INST, E_SYS, parts_of_a_copy, sample_top_p, shared_attribute  # noqa: F401
from llama.model import ModelArgs, Transformer
from llama.options import DecodingOptions, check_flags
from llama.tokenizer import ChatFormat, Dialog, Message, Role, Tokenizer  # noqa: F401
from llama.tokenizer.open_turns import OpenDialog


class Llama:
    """A model and its tokenizer, ready to generate. `Llama.build` makes one."""

    @staticmethod
    @checks_keywords
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
        adapter: str | os.PathLike | None = None,
        train: bool = False,
    ) -> "Llama":
        """Loads a checkpoint, in a plain `python` or in each process that torchrun starts.

        Creates process groups if there are none, sets the current device on CUDA, and silences stdout on all ranks but
        rank 0. Changes nothing else that is global.

        Args:
            ckpt_dir: a directory of Meta's (params.json, consolidated.NN.pth) or Hugging Face's, any number of shards.
            tokenizer_path: when None, tokenizer.model in `ckpt_dir`, or tokenizer.json if there is no tokenizer.model.
            max_seq_len: the most tokens of a prompt and its answer together.
            max_batch_size: how many sequences run at the same time. Further prompts wait for their turn.
            model_parallel_size: the number of processes to split the model over; all of them when None.
            seed: determines the random numbers of calls that pass no seed.
            device: "cuda", "mps" or "cpu"; when None, the first of these that the machine has.
            dtype: of the weights and the computation; when None, the checkpoint's or the nearest the device supports.
            compile: compiles the decoding step when it first runs: about a minute, a few seconds in later processes.
            quantize: "int8" or "int4" rounds the matrices while loading; computes in bfloat16 unless `dtype` is given.
            draft: the directory of a smaller model, or "ngram": proposes tokens. The answers are the same, but faster.
            adapter: a LoRA directory written by `llama finetune` or PEFT. Merged, or applied beside quantised weights.
            train: makes all weights trainable and never packs them; uses float32 unless `dtype` is given.

        Raises:
            FileNotFoundError, ValueError: a file is missing or broken, or a number is out of range.
            MemoryError: the weights and the cache do not fit into the device's memory.
        """
        started = time.perf_counter()
        check_flags(compile=compile, train=train)
        DecodingOptions(seed=seed)  # raises ValueError if the seed is out of range
        dtype = "float32" if train and dtype is None else dtype  # bfloat16 rounds small updates of the weights away
        device = parallel.pick_device(device)
        parallel.initialize(model_parallel_size, device)
        parallel.silence_other_ranks()
        with parallel.fail_together():
            tokenizer, checkpoint = open_checkpoint(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
            if compile and adapter is not None and checkpoint.quantization:
                raise ValueError("compile = True with an adapter beside quantised weights: expected one of the two")
            smaller = open_draft(draft, tokenizer, max_seq_len, max_batch_size)
            model, loaded = build_adapted(checkpoint, adapter, dtype, device, quantize, train)
            proposer = make_proposer(draft, smaller, model.dtype, device)
        print(loaded.describe(device, time.perf_counter() - started, dist.get_world_size()))
        del checkpoint, smaller  # they refer to the weights, and a weight with other references is not packed
        llama = Llama(model, tokenizer, seed, proposer, compile)
        llama._engine.model_is_held = False  # no caller has a reference to it
        return llama

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        seed: int = 1,
        proposer: Proposer | None = None,
        compile: bool = False,
    ):
        self.formatter = ChatFormat(tokenizer)
        self._engine = Engine(model) if proposer is None else SpeculativeEngine(model, proposer)
        if compile:
            with parallel.fail_at_once():
                self._engine.compile()
        self.answerer = Answerer(self._engine, tokenizer, seed)

    tokenizer = shared_attribute("answerer", "tokenizer")

    @property
    def model(self) -> Transformer:
        """The network. Callers may run or change it, so later calls do not reuse keys from earlier calls."""
        self._engine.model_is_held = True
        return self._engine.module

    @model.setter
    def model(self, model: torch.nn.Module) -> None:
        self.answerer.shared.exchange(model)

    def save(self, dst: str | os.PathLike, to: str = "meta", **options: Any) -> None:
        """Writes the current weights, completely or not at all: see `llama.checkpoint.save_checkpoint`."""
        save_checkpoint(self._engine.module, self.tokenizer, dst, to, **options)

    @property
    def args(self) -> ModelArgs:
        """The shape of the model and of its cache."""
        return self._engine.model.args

    def generate(
        self,
        prompt_tokens: SequenceOf[SequenceOf[int]],
        max_gen_len: int | SequenceOf[int | None] | None = None,
        temperature: float | SequenceOf[float | None] | None = None,
        top_p: float | SequenceOf[float] = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        progress: bool = False,
        **options: Unpack[Options],
    ) -> tuple:
        """Continues prompts of token ids. Several threads may call this and all other methods at the same time.

        An answer has at most min(max_gen_len, max_seq_len - length of its prompt) tokens. It ends earlier at a stop
        token, which is not part of it. It depends neither on the other prompts nor on the number of processes.

        Args:
            prompt_tokens: the prompts, each a list of at least one id.
            max_gen_len: the most new tokens of an answer; when None, as many as fit.
            temperature: 0 takes the most likely token each time. None means 0.6, or 0 in a beam search.
            top_p: as in `DecodingOptions`.
            logprobs: whether to return the log-probability of each token.
            echo: whether each answer begins with its prompt. The log-probability of the first prompt token is 0.0.
            progress: whether to show a progress bar of finished prompts and tokens/s.
            options: any other field of `DecodingOptions`. Each of these options, max_gen_len, temperature and top_p may
                be a list with one value for each prompt. Calls without `seed` differ; `build(seed=…)` determines them.

        Returns:
            (ids, logprobs): the ids of `num_return_sequences` answers for each prompt, in the order of the prompts, and
            the log-probability of each token under the model, in nats, at temperature 1; None without `logprobs`.
            With top_logprobs=k, a third element: the k most likely (id, log-probability) at each token.

        Raises:
            ValueError, TypeError: a prompt is empty, too long or has ids out of range (the message gives its index),
                or an option is out of range. Raised before anything runs.
            GenerationError: the model or a logits_processor returned unusable logits for some of the prompts.
        """
        options |= {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
        check_flags(logprobs=logprobs, echo=echo, progress=progress)
        prompts, settings = self.answerer.check_prompts(prompt_tokens, options)
        groups = self.answerer.answer(jobs_of(prompts, settings, logprobs, echo), progress)
        return predictions.as_ids(prompts, groups, logprobs, echo, options)

    def text_completion(
        self,
        prompts: SequenceOf[str],
        temperature: float | SequenceOf[float | None] | None = None,
        top_p: float | SequenceOf[float] = 0.9,
        max_gen_len: int | SequenceOf[int | None] | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        progress: bool = False,
        **options: Unpack[Options],
    ) -> list[CompletionPrediction]:
        """Continues texts, which may be empty. Arguments and errors are those of `generate`.

        Returns:
            For each answer {"generation": text, "finish_reason": "stop" or "length"}, the "score" of a beam, and
            "tokens", "logprobs" and "top_logprobs" if requested.
        """
        options |= {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
        check_flags(logprobs=logprobs, echo=echo, progress=progress)
        ids, settings = self.answerer.encode_texts(prompts, options)
        if (generate := self._patched_generate) is None:
            groups = self.answerer.answer(jobs_of(ids, settings, logprobs, echo), progress)
        else:
            groups = predictions.answers_of(generate, self.answerer, ids, logprobs, echo, options)
        return predictions.completions(self.answerer, ids, groups, logprobs, echo, options)

    def chat_completion(
        self,
        dialogs: SequenceOf[Dialog | str],
        temperature: float | SequenceOf[float | None] | None = None,
        top_p: float | SequenceOf[float] = 0.9,
        max_gen_len: int | SequenceOf[int | None] | None = None,
        logprobs: bool = False,
        *,
        progress: bool = False,
        **options: Unpack[Options],
    ) -> list[ChatPrediction]:
        """Answers dialogs. A dialog is a list of {"role", "content"}, or a single message of the user.

        Arguments and errors are those of `generate`. Llama 2's dialogs must end with a message of the user. Text in a
        message stays text: "<|eot_id|>" is encoded as these characters. Assistant messages whose content is
        "<PLACEHOLDER>" are open turns: they are generated in order, each as a call with the messages before it, the
        same options and the same seed would do. With num_return_sequences, each answer fills the open turns anew.

        Returns:
            For each answer {"generation": {"role": "assistant", "content": text}} and the other keys of
            `text_completion`. With open turns, "generation" is the last of them and "dialog" has all messages.
        """
        options |= {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
        check_flags(logprobs=logprobs, progress=progress)
        opened, generate = open_dialogs(dialogs, self.formatter), self._patched_generate
        if [dialog for dialog in opened if dialog.has_placeholders]:
            return fill_dialogs(self.answerer, self.formatter, opened, options, logprobs, progress, generate)
        settings = self.answerer.check_options(opened, options)
        pairs = enumerate(zip(opened, settings))
        ids = [encode_dialog(self.answerer, self.formatter, i, dialog.prompt, option) for i, (dialog, option) in pairs]
        if generate is None:
            groups = self.answerer.answer(jobs_of(ids, settings, logprobs), progress)
        else:
            groups = predictions.answers_of(generate, self.answerer, ids, logprobs, False, options)
        return predictions.chats(self.answerer, ids, groups, logprobs, options)

    def stream_text(self, prompt: str, **options: Unpack[StreamOptions]) -> Iterator[str]:
        """Yields the continuation of a prompt piece by piece while it is generated; options as in `DecodingOptions`.

        A piece is new text only: never part of a character, never part of a stop string. Joined, the pieces are what
        `text_completion` returns with the same seed. An empty answer yields nothing. Closing the iterator ends the
        answer and frees its slot.
        """
        (ids,), (option,) = self.answerer.encode_texts([prompt], options)
        return self.answerer.open_stream(ids, option)

    def stream_chat(self, dialog: Dialog | str, **options: Unpack[StreamOptions]) -> Iterator[str]:
        """Yields the answer to a dialog piece by piece, as `stream_text` does."""
        opened = named("dialog 0", OpenDialog, dialog, self.formatter)
        if opened.has_placeholders:
            raise ValueError("a stream is one answer: expected a dialog without open turns")
        (option,) = self.answerer.check_options([dialog], options)
        ids = encode_dialog(self.answerer, self.formatter, 0, opened.prompt, option)
        return self.answerer.open_stream(ids, option)

    def score(self, texts: SequenceOf, top_logprobs: int = 0, stride: int | None = None) -> list[scoring.Score]:
        """Returns the log-probability of each token of texts. Generates nothing.

        Args:
            texts: texts of any length, each scored after a begin-of-text token, or lists of ids, scored as they are.
            top_logprobs: how many of the most likely tokens to report at each position.
            stride: how many tokens the window over a text longer than max_seq_len advances; max_seq_len / 2 when None.

        Raises:
            ValueError, TypeError: as in `generate`; the message gives the index of the text.
        """
        return scoring.score_texts(self.answerer, texts, top_logprobs, stride)

    def perplexity(self, texts: SequenceOf, stride: int | None = None) -> list[float]:
        """Returns, for each text, exp of the mean negative log-probability of its tokens after the first.

        Arguments and errors are those of `score`. Also raises ValueError for a text without a token after the first.
        """
        return scoring.perplexities(self.answerer, texts, stride)

    # For the other houses

    def answer(self, prompts: SequenceOf[SequenceOf[int]], *flags: bool, **options: Any) -> list[list[Answer]]:
        """Answers prompts of ids and returns full `Answer` records: see `Answerer.answer_all`."""
        return self.answerer.answer_all(prompts, *flags, **options)

    def open_jobs(self) -> Jobs:
        """Returns a context manager that takes jobs one by one, on this replica only. Checks nothing."""
        return Jobs(self.answerer)

    def score_tokens(self, texts: SequenceOf[tuple[list[int], int]], shared: bool = False) -> list[scoring.TokenScores]:
        """Scores the tokens of each (ids, start) from start on: see `llama.decoding.scoring.score_tokens`."""
        return scoring.score_tokens(self.answerer, texts, shared=shared)

    @property
    def _patched_generate(self) -> Callable[..., tuple] | None:
        """The `generate` that a caller put in place of ours, if any: it then answers texts and dialogs."""
        return None if is_ours(self.generate) else self.generate

    __reduce__ = parts_of_a_copy
