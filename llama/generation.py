"""`Llama`: build it from a directory, then complete texts and answer dialogs. Text at the door, tokens inside.

Everything a user passes in is checked here, before anything runs; the work is done a floor below.
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
        """Loads a checkpoint, in a plain `python` or in each process of a torchrun.

        Process groups are made if there are none yet; on CUDA the process's current device is set; on ranks other than
        0 stdout is silenced. Nothing else that is global is touched.

        Args:
            ckpt_dir: Meta's directory (params.json and consolidated.NN.pth) or Hugging Face's, of any number of shards.
            tokenizer_path: tokenizer.model of `ckpt_dir` when None, or its tokenizer.json where there is no other.
            max_seq_len: room for a prompt and its answer, tokens.
            max_batch_size: how many sequences run at a time; more prompts than that take turns.
            model_parallel_size: over how many processes the model is split; all of them when None.
            seed: what the random numbers of calls without a seed of their own come from.
            device: "cuda", "mps", "cpu"; the first of these that is there when None.
            dtype: of the weights and the computation; the checkpoint's, or the nearest the device has, when None.
            compile: whether `torch.compile` compiles the decoding step when it first runs: a minute, later seconds.
            quantize: "int8" or "int4" rounds the matrices while they are loaded; in bfloat16, unless `dtype` is given.
            draft: a smaller model's directory, or "ngram", which proposes tokens: the same answers, sooner.
            adapter: a LoRA's directory, as `llama finetune` and PEFT write it; folded in, or beside quantised weights.
            train: whether all weights are parameters that learn, never packed; in float32, unless `dtype` is given.

        Raises:
            FileNotFoundError, ValueError: a file is missing or broken, or a number is out of range.
            MemoryError: the device has no room for the weights and the cache.
        """
        started = time.perf_counter()
        check_flags(compile=compile, train=train)
        DecodingOptions(seed=seed)  # raises if it is none
        dtype = "float32" if train and dtype is None else dtype  # small steps of learning are lost in bfloat16
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
        del checkpoint, smaller  # which hold the weights: only those that nobody else holds are packed
        llama = Llama(model, tokenizer, seed, proposer, compile)
        llama._engine.model_is_held = False  # nobody has seen it
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
        """The network. Who holds it may run or change it, so later calls take no keys that were made before them."""
        self._engine.model_is_held = True
        return self._engine.opened

    @model.setter
    def model(self, model: torch.nn.Module) -> None:
        self.answerer.shared.exchange(model)

    def save(self, dst: str | os.PathLike, to: str = "meta", **options: Any) -> None:
        """Writes the weights as they are now, whole or not at all: see `llama.checkpoint.save_checkpoint`."""
        save_checkpoint(self._engine.opened, self.tokenizer, dst, to, **options)

    @property
    def args(self) -> ModelArgs:
        """The shape of the model, and the room in its cache."""
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
        """Continues prompts of token ids. Any number of threads may call this, and all that follows, at once.

        Each prompt has its own budget of min(max_gen_len, max_seq_len - its length) tokens and ends early at a stop
        token, which is not part of the answer. What a prompt gives does not depend on others, or on how many processes.

        Args:
            prompt_tokens: the prompts, each a list of at least one id; any number of them.
            max_gen_len: the most new tokens of an answer; as many as fit when None.
            temperature: 0 takes the most likely token each time; 0.6 when None, or 0 in a beam search.
            top_p: as in `DecodingOptions`.
            logprobs: whether to return the log-probability of each token.
            echo: whether each answer begins with its prompt; the first prompt token's logprob is 0.0.
            progress: whether to show a bar of the prompts done and tokens/s.
            options: any other field of `DecodingOptions`. Each, and those above, may be a list with one value for each
                prompt. Without `seed`, each call of a `Llama` draws anew, from the seed of `build`.

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
        """Continues texts. Arguments and errors as in `generate`; an empty text is continued from nothing.

        Returns:
            For each answer {"generation": text, "finish_reason": "stop" or "length"}, with a beam's "score", and
            "tokens", "logprobs" and "top_logprobs" when these are asked for.
        """
        options |= {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
        check_flags(logprobs=logprobs, echo=echo, progress=progress)
        ids, settings = self.answerer.encode_texts(prompts, options)
        if (generate := self._other_generate) is None:
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
        """Answers dialogs, each a list of {"role", "content"}, or the user's message; Llama 2's end with the user's.

        Arguments and errors as in `generate`. Text in a message is text: "<|eot_id|>" is those characters. Messages of
        the assistant whose content is "<PLACEHOLDER>" are generated in their places, in order, each as a call with all
        the messages before it would, of the same options and seed. Each of several answers has such turns of its own.

        Returns:
            For each answer {"generation": {"role": "assistant", "content": text}}, and what a text's has. For a dialog
            with placeholders it is the last of its answers, and "dialog" has all the messages.
        """
        options |= {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
        check_flags(logprobs=logprobs, progress=progress)
        opened, generate = open_dialogs(dialogs, self.formatter), self._other_generate
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
        """Yields the text that continues a prompt while it is decided; the options are those of `DecodingOptions`.

        A piece is the text that is new, not the text so far. It is never half a character, and nothing of a stop string
        is yielded; joined, the pieces are what `text_completion` returns with the same seed. An answer of nothing
        yields nothing. Closing the iterator ends the answer and frees its slot.
        """
        (ids,), (option,) = self.answerer.encode_texts([prompt], options)
        return self.answerer.open_stream(ids, option)

    def stream_chat(self, dialog: Dialog | str, **options: Unpack[StreamOptions]) -> Iterator[str]:
        """Yields the answer to a dialog piece by piece, as `stream_text` does: print(piece, end="") shows it."""
        opened = named("dialog 0", OpenDialog, dialog, self.formatter)
        if opened.has_placeholders:
            raise ValueError("a stream is one answer: expected a dialog without open turns")
        (option,) = self.answerer.check_options([dialog], options)
        ids = encode_dialog(self.answerer, self.formatter, 0, opened.prompt, option)
        return self.answerer.open_stream(ids, option)

    def score(self, texts: SequenceOf, top_logprobs: int = 0, stride: int | None = None) -> list[scoring.Score]:
        """The log-probability of each token of texts, without generating.

        Args:
            texts: of any length; they get a begin-of-text token before them. Or lists of ids, taken as they are.
            top_logprobs: how many of the most likely tokens to report at each position.
            stride: by how many tokens the windows over a text longer than max_seq_len advance; half of that when None.

        Raises:
            ValueError, TypeError: as in `generate`, naming the text by its index.
        """
        return scoring.score_texts(self.answerer, texts, top_logprobs, stride)

    def perplexity(self, texts: SequenceOf, stride: int | None = None) -> list[float]:
        """exp of the mean negative log-probability of each text's tokens after its first; arguments as in `score`.

        Raises as `score`; ValueError also for a text that has no token after its first.
        """
        return scoring.perplexities(self.answerer, texts, stride)

    # What the other houses build on

    def answer(self, prompts: SequenceOf[SequenceOf[int]], *flags: bool, **options: Any) -> list[list[Answer]]:
        """The answers to each prompt of ids, with all there is to tell of them: see `Answerer.answer_all`."""
        return self.answerer.answer_all(prompts, *flags, **options)

    def open_jobs(self) -> Jobs:
        """For jobs that come one after the other, on this replica alone. Use it in a `with`; nothing is checked."""
        return Jobs(self.answerer)

    def score_tokens(self, texts: SequenceOf[tuple[list[int], int]], shared: bool = False) -> list[scoring.TokenScores]:
        """The scores of the tokens of each (ids, start), from start on: see `llama.decoding.scoring.score_tokens`."""
        return scoring.score_tokens(self.answerer, texts, shared=shared)

    @property
    def _other_generate(self) -> Callable[..., tuple] | None:
        """The `generate` that somebody has put in the place of ours, which texts and dialogs are answered by then."""
        return None if is_ours(self.generate) else self.generate

    __reduce__ = parts_of_a_copy
