"""`Llama`: build it from a directory, then complete texts and answer dialogs. Text at the door, tokens inside.

Everything a user passes in is checked here, before anything runs; the work is the engine's and the beam search's.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from tqdm import tqdm

from llama import checkpoint as checkpoints
from llama import parallel, scoring
from llama.answer_text import AnswerText
from llama.beam_search import BeamSearch, run_beams
from llama.engine import Engine, Sequence
from llama.huggingface import open_checkpoint
from llama.model import Transformer
from llama.options import DecodingOptions, per_prompt
from llama.sampling import RandomStream, process_logits
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

TopLogprobs = list[list[tuple[int, float]]]  # for each token, the most likely (id, log-probability), best first


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # with logprobs=True: the text of each token,
    logprobs: list[float]  # and its natural-log probability
    top_logprobs: TopLogprobs  # with top_logprobs=k


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: TopLogprobs


@dataclass
class Answer:
    """One answer to a prompt.

    Attributes:
        tokens: without prompt and stop token.
        text: of the tokens, up to a stop string; with the prompt's before it under `echo`.
        finish_reason: "stop", "length" or "error".
        error: what went wrong, for "error".
        token_logprobs, top_logprobs: of each token, as asked for.
        prompt_token_logprobs, prompt_top_logprobs: of each token of the prompt, as asked for.
        score: of a beam search.
    """

    tokens: list[int]
    text: str
    finish_reason: str
    error: str | None = None
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: TopLogprobs = field(default_factory=list)
    prompt_token_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: TopLogprobs = field(default_factory=list)
    score: float | None = None


class GenerationError(RuntimeError):
    """Some answers failed; `answers` holds all of the call's, a list for each prompt, the failed marked "error"."""

    def __init__(self, message: str, answers: list[list[Answer]]):
        super().__init__(message)
        self.answers = answers


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
            ckpt_dir: a directory with params.json and consolidated.NN.pth, or Hugging Face's with config.json and
                safetensors files; of any number of shards.
            tokenizer_path: tokenizer.model of `ckpt_dir` when None, or its tokenizer.json where there is no other.
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
            tokenizer, checkpoint = open_checkpoint(Path(ckpt_dir), tokenizer_path, max_seq_len, max_batch_size)
            with torch.device("meta"):
                model = Transformer(checkpoint.args)
            dtype = dtype or parallel.pick_dtype(checkpoint.dtype, device)
            loaded = checkpoints.load_weights(model, checkpoint, dtype, device)
            model.allocate_cache()
        if dist.get_rank() == 0:
            print(loaded.describe(device, time.perf_counter() - started, dist.get_world_size()))
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
        prompts = [self.check_prompt(index, prompt) for index, prompt in enumerate(prompt_tokens)]
        by_prompt = self.answer(prompts, logprobs, echo, progress, **options)
        answers = [(prompt, answer) for prompt, group in zip(prompts, by_prompt) for answer in group]
        tokens = [prompt + answer.tokens if echo else answer.tokens for prompt, answer in answers]
        values = [a.prompt_token_logprobs + a.token_logprobs for _, a in answers] if logprobs else None
        if not options.get("top_logprobs"):
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
            predictions += [{"generation": a.text, **self._details(prompt, a, logprobs, echo)} for a in group]
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

        Arguments and errors as in `generate`. Text in a message is text: "<|eot_id|>" is those characters.

        Returns:
            For each answer {"generation": {"role": "assistant", "content": text}}, with "tokens", "logprobs" and
            "top_logprobs" when these are asked for.
        """
        prompt_tokens = self._encode_dialogs(dialogs)
        options |= {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
        predictions: list[ChatPrediction] = []
        for prompt, group in zip(prompt_tokens, self.answer(prompt_tokens, logprobs, False, progress, **options)):
            for a in group:
                message: Message = {"role": "assistant", "content": a.text}
                predictions.append({"generation": message, **self._details(prompt, a, logprobs, False)})
        return predictions

    def stream_text(self, prompt: str, **options: Any) -> Iterator[str]:
        """Yields the text that continues a prompt while it is decided; options as in `text_completion`.

        A piece is never half a character, and nothing of a stop string is yielded; joined, the pieces are what
        `text_completion` returns with the same seed. An answer of nothing yields nothing. Closing the iterator ends
        the answer and frees its slot.
        """
        return self._stream(self._encode_texts([prompt])[0], **options)

    def stream_chat(self, dialog: Dialog, **options: Any) -> Iterator[str]:
        """Yields the answer to a dialog while it is decided; options as in `chat_completion`, else as `stream_text`."""
        return self._stream(self._encode_dialogs([dialog])[0], **options)

    def score(self, texts: SequenceOf, top_logprobs: int = 0, stride: int | None = None) -> list[dict]:
        """The log-probability of each token of texts or lists of ids, of any length: see `llama.scoring.score`."""
        return scoring.score(self, texts, top_logprobs, stride)

    def perplexity(self, texts: SequenceOf, stride: int | None = None) -> list[float]:
        """The perplexity of each text: see `llama.scoring.perplexity`."""
        return scoring.perplexity(self, texts, stride)

    def answer(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        logprobs: bool = False,
        echo: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> list[list[Answer]]:
        """What `generate` and the completions are made of: the answers to each prompt, with all that is known of them.

        Arguments and errors as in `generate`. With replicas, each takes its share of the prompts.
        """
        prompts = [self.check_prompt(index, prompt) for index, prompt in enumerate(prompts)]
        settings = self._check_options(prompts, options)
        occurrences: Counter[tuple[int, ...]] = Counter()
        jobs = []
        for index, (prompt, option) in enumerate(zip(prompts, settings)):
            jobs.append((index, prompt, option, occurrences[tuple(prompt)]))
            occurrences[tuple(prompt)] += 1
        mine = jobs[parallel.replica() :: parallel.n_replicas()]
        with (
            parallel.fail_at_once(),
            tqdm(total=len(mine), unit="prompt", disable=not progress or dist.get_rank() > 0) as bar,
        ):
            answers = self._run(mine, logprobs, echo, bar)
        everything = parallel.gather_from_replicas(answers)
        by_prompt = [answer for _, answer in sorted((pair for part in everything for pair in part), key=lambda p: p[0])]
        failed = [(i, a.error) for i, group in enumerate(by_prompt) for a in group if a.error is not None]
        if failed:
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise GenerationError(f"prompt {failed[0][0]}{others}: {failed[0][1]}", by_prompt)
        return by_prompt

    def _run(self, jobs: list[tuple], logprobs: bool, echo: bool, bar: tqdm) -> list[tuple[int, list[Answer]]]:
        """Answers this replica's prompts, each (index, ids, options, occurrence): the sampled together, then beams.

        A prompt for a beam search is with the others too, with no budget, where its log-probabilities are asked for.
        """
        sequences: dict[Sequence, tuple[int, AnswerText]] = {}
        for index, prompt, option, occurrence in jobs:
            for sample in range(1 if option.num_beams > 1 else option.num_return_sequences):
                sequence, text = self._sequence(prompt, option, occurrence, sample, logprobs, echo)
                sequences[sequence] = index, text
        missing = Counter(index for index, _ in sequences.values())
        n_tokens, started = 0, time.perf_counter()
        for ended in self._engine.run(list(sequences)):
            for sequence in ended:
                if sequence not in sequences:  # a stream's
                    continue
                index, _ = sequences[sequence]
                n_tokens += len(sequence.tokens)
                missing[index] -= 1
                if not missing[index]:
                    bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
                    bar.update()
        answers: dict[int, list[Answer]] = {index: [] for index, *_ in jobs}
        for sequence, (index, text) in sequences.items():
            answers[index].append(self._answer_of(sequence, text))
            answers[index][-1].prompt_token_logprobs = answers[index][0].prompt_token_logprobs
            answers[index][-1].prompt_top_logprobs = answers[index][0].prompt_top_logprobs
        beams = [(index, prompt, option) for index, prompt, option, _ in jobs if option.num_beams > 1]
        for index, group in self._search(beams, echo):
            for answer in group:
                answer.prompt_token_logprobs = answers[index][0].prompt_token_logprobs
            answers[index] = group
        return list(answers.items())

    def _sequence(
        self, prompt: list[int], option: DecodingOptions, occurrence: int, sample: int, logprobs: bool, echo: bool
    ) -> tuple[Sequence, AnswerText]:
        """The engine's record of one answer to come, and its text."""
        stops = [stop for stop in option.stops if isinstance(stop, str)]
        text = AnswerText(self.tokenizer, stops, prompt if echo else None)
        logprobs = logprobs or option.top_logprobs > 0
        sequence = Sequence(
            prompt,
            0 if option.num_beams > 1 else self._budget(prompt, option),
            option,
            RandomStream(option.seed, prompt, occurrence, sample),
            self._stop_tokens(option),
            # The text is kept up with only where something has to look at it on the way.
            (lambda tokens: text.push(tokens[-1])) if stops else None,
            logprobs,
            logprobs and echo and sample == 0,
        )
        return sequence, text

    def _answer_of(self, sequence: Sequence, text: AnswerText) -> Answer:
        if sequence.should_stop is None:
            for token in sequence.tokens:
                text.push(token)
        whole, n = text.finish(), text.n_tokens
        return Answer(
            sequence.tokens[:n],
            whole,
            sequence.finish_reason,
            sequence.error,
            sequence.token_logprobs[:n],
            sequence.top_logprobs[:n],
            sequence.prompt_token_logprobs,
            sequence.prompt_top_logprobs,
        )

    def _search(self, jobs: list[tuple], echo: bool) -> Iterator[tuple[int, list[Answer]]]:
        """Answers prompts by beam search, in slots that no sequence uses."""
        searches = []
        for _, prompt, option in jobs:
            penalties = (option.logit_bias, option.repetition_penalty, option.no_repeat_ngram_size)
            searches.append(
                BeamSearch(
                    prompt,
                    self._budget(prompt, option),
                    option.num_beams,
                    length_penalty=option.length_penalty,
                    early_stopping=option.early_stopping,
                    num_return_sequences=option.num_return_sequences,
                    stop_tokens=self._stop_tokens(option),
                    process=partial(_process, penalties, option.logits_processor),
                )
            )
        for _ in run_beams(self.model, searches, self._engine.reserve()) if searches else ():
            pass
        for (index, prompt, option), search in zip(jobs, searches):
            group = []
            for hypothesis in search.hypotheses:
                text = AnswerText(self.tokenizer, [], prompt if echo else None)
                for token in hypothesis.tokens:
                    text.push(token)
                answer = Answer(hypothesis.tokens, text.finish(), hypothesis.finish_reason)
                answer.token_logprobs, answer.score = hypothesis.token_logprobs, hypothesis.score
                group.append(answer)
            if search.error is not None:
                group = [Answer([], "", "error", str(search.error)) for _ in range(option.num_return_sequences)]
            yield index, group

    def _stream(self, prompt: list[int], **options: Any) -> Iterator[str]:
        """Checks at once, and not when the first piece is asked for."""
        (option,) = self._check_options([self.check_prompt(0, prompt)], options)
        if option.num_beams > 1 or option.num_return_sequences > 1:
            raise ValueError("a stream is one answer: expected num_beams = 1 and num_return_sequences = 1")
        sequence, text = self._sequence(prompt, option, 0, 0, False, False)
        sequence.should_stop = lambda tokens: text.push(tokens[-1])

        def pieces() -> Iterator[str]:
            n_sent = 0
            with parallel.fail_at_once():
                for _ in self._engine.run([sequence]):
                    decided = text.decided
                    if len(decided) > n_sent and sequence.finish_reason is None:
                        yield decided[n_sent:]
                        n_sent = len(decided)
            if sequence.error is not None:
                raise GenerationError(sequence.error, [[self._answer_of(sequence, text)]])
            if rest := text.finish()[n_sent:]:
                yield rest

        return pieces()

    def _budget(self, prompt: list[int], option: DecodingOptions) -> int:
        room = self.model.args.max_seq_len - len(prompt)
        return room if option.max_gen_len is None else min(option.max_gen_len, room)

    def _stop_tokens(self, option: DecodingOptions) -> frozenset[int]:
        return frozenset(self.tokenizer.stop_tokens) | {stop for stop in option.stops if isinstance(stop, int)}

    def _details(self, prompt: list[int], answer: Answer, logprobs: bool, echo: bool) -> dict:
        """The keys of a prediction that are there when asked for."""
        if not logprobs and not answer.top_logprobs:
            return {}
        tokens = prompt + answer.tokens if echo else answer.tokens
        details: dict = {"tokens": [self.tokenizer.decode([token]) for token in tokens]}
        details["logprobs"] = answer.prompt_token_logprobs + answer.token_logprobs
        if answer.top_logprobs or answer.prompt_top_logprobs:
            details["top_logprobs"] = answer.prompt_top_logprobs + answer.top_logprobs
        return details

    def _encode_texts(self, prompts: SequenceOf[str]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise TypeError("prompts is a str: expected a list of them, so pass [prompt]")
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                kind = type(prompt).__name__
                raise TypeError(f"prompt {index} is a {kind}: expected a str (`generate` takes token ids)")
        return [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]

    def _encode_dialogs(self, dialogs: SequenceOf[Dialog]) -> list[list[int]]:
        prompt_tokens = []
        for index, dialog in enumerate(dialogs):
            try:
                prompt_tokens.append(self.formatter.encode_dialog_prompt(dialog))
            except ValueError as error:
                raise ValueError(f"dialog {index}: {error}") from None
        return prompt_tokens

    def _check_options(self, prompts: list[list[int]], options: dict[str, Any]) -> list[DecodingOptions]:
        """The options of each prompt, checked against the model; without a seed, they get one of this call."""
        self._n_calls += 1
        digest = hashlib.blake2b(f"{self.seed} {self._n_calls}".encode(), digest_size=8).digest()
        own = int.from_bytes(digest, "little")
        seed = options.get("seed")
        seeds = [own if s is None else s for s in seed] if isinstance(seed, (list, tuple)) else seed
        options = options | {"seed": own if seed is None else seeds}
        settings = per_prompt(len(prompts), **options)
        for option in {id(option): option for option in settings}.values():
            option.check_vocabulary(self.model.args.vocab_size)
            if option.num_beams > self.model.args.max_batch_size:
                raise ValueError(
                    f"num_beams = {option.num_beams}: expected at most max_batch_size = "
                    f"{self.model.args.max_batch_size}, which `Llama.build` sets"
                )
        return settings

    def check_prompt(self, index: int, prompt: SequenceOf[int], max_len: int | None = -1) -> list[int]:
        """The prompt as a list of int, whatever holds its ids: a list, a tuple, an array or a tensor.

        Raises:
            ValueError, TypeError: it is empty, longer than max_len (max_seq_len when not given), or holds no ids.
        """
        name, vocab_size = f"prompt {index}", self.model.args.vocab_size
        limit = self.model.args.max_seq_len if max_len == -1 else max_len
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(prompt, (list, tuple)):
            kind = type(prompt).__name__
            raise TypeError(f"{name} is a {kind}: expected a list of token ids (`text_completion` takes texts)")
        if len(prompt) == 0:
            raise ValueError(f"{name} is empty: expected at least one token id, such as the tokenizer's bos_id")
        if limit is not None and len(prompt) > limit:
            raise ValueError(
                f"{name} has {len(prompt):,} tokens: expected at most max_seq_len = {limit:,}, which `Llama.build` sets"
            )
        for token in prompt:
            if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= token < vocab_size:
                raise ValueError(f"{name} has {token!r} among its ids: expected integers from 0 to {vocab_size - 1}")
        return [int(token) for token in prompt]


def _process(penalties: tuple, processor: Any, ids: list[int], scores: torch.Tensor) -> torch.Tensor:
    return process_logits(scores, ids, *penalties, processor)


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its object or its name, such as "bfloat16"."""
    named = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if named not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype = {dtype!r}: expected bfloat16, float16 or float32")
    return named
