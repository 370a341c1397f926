"""Prompts of ids to answers: the sampled ones through the engine, the others by beam search, shared out over replicas.

Where tokens become text, for the engine knows none: stop strings are looked for here. Knows nothing of dialogs or
files, and checks nothing: what comes here has been checked.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from llama import parallel
from llama.answer_text import AnswerText
from llama.beam_search import BeamSearch, run_beams
from llama.engine import Engine, Sequence, Speculation
from llama.options import DecodingOptions
from llama.sampling import RandomStream, process_logits
from llama.tokenizer import Tokenizer

TopLogprobs = list[list[tuple[int, float]]]  # for each token, the most likely (id, log-probability), best first


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
        speculation: what came of the tokens proposed for it, where there was a draft.
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
    speculation: Speculation = field(default_factory=Speculation)


class GenerationError(RuntimeError):
    """Some answers failed; `answers` holds all of the call's, a list for each prompt, the failed marked "error"."""

    def __init__(self, message: str, answers: list[list[Answer]]):
        super().__init__(message)
        self.answers = answers


class Answerer:
    """Answers prompts with a model that has a cache."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine = engine
        self.model = engine.model
        self.tokenizer = tokenizer
        self._cause: BaseException | None = None  # the exception of the caller's own code that an answer failed of

    def answer(
        self,
        prompts: list[list[int]],
        settings: list[DecodingOptions],
        logprobs: bool = False,
        echo: bool = False,
        progress: bool = False,
    ) -> list[list[Answer]]:
        """The answers to each prompt, in their order, on every rank; `settings` are the options of each.

        Raises:
            GenerationError: some of them failed.
        """
        occurrences: Counter[tuple[int, ...]] = Counter()
        jobs = []
        for index, (prompt, option) in enumerate(zip(prompts, settings)):
            jobs.append((index, prompt, option, occurrences[tuple(prompt)]))
            occurrences[tuple(prompt)] += 1
        n_free = len(self.engine.slots) - self.engine.n_used
        for index, option in enumerate(settings):
            if option.num_beams > max(1, n_free):
                raise ValueError(
                    f"prompt {index}: num_beams = {option.num_beams}, but {n_free} of max_batch_size = "
                    f"{len(self.engine.slots)} slots are free: expected no more beams; close the streams that are open"
                )
        mine = jobs[parallel.replica() :: parallel.n_replicas()]
        self._cause = None
        with (
            parallel.fail_at_once(),
            tqdm(total=len(mine), unit="prompt", disable=not progress or dist.get_rank() > 0) as bar,
        ):
            answers = self._run(mine, logprobs, echo, bar)
        everything = [pair for part in parallel.gather_from_replicas(answers) for pair in part]
        by_prompt = [group for _, group in sorted(everything, key=lambda pair: pair[0])]
        failed = [(index, a.error) for index, group in enumerate(by_prompt) for a in group if a.error is not None]
        if failed:
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise GenerationError(f"prompt {failed[0][0]}{others}: {failed[0][1]}", by_prompt) from self._cause
        return by_prompt

    def stream(self, prompt: list[int], option: DecodingOptions) -> Iterator[str]:
        """Yields the text of one answer while it is decided."""
        sequence, text = self._sequence(prompt, option, 0, 0, False, False)
        sequence.should_stop = text.follow
        n_sent = 0
        with parallel.fail_at_once():
            for _ in self.engine.run([sequence]):
                decided = text.decided
                if len(decided) > n_sent and sequence.finish_reason is None:
                    yield decided[n_sent:]
                    n_sent = len(decided)
        if sequence.error is not None:
            raise GenerationError(sequence.error, [[self._answer_of(sequence, text)]])
        if rest := text.finish()[n_sent:]:
            yield rest

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
        beams = [(index, prompt, option) for index, prompt, option, _ in jobs if option.num_beams > 1]
        searched = {index for index, *_ in beams}
        n_tokens, started = 0, time.perf_counter()
        # The largest budgets first, else in order: a long answer begun last would run on alone.
        for ended in self.engine.run(sorted(sequences, key=lambda s: -s.max_new_tokens)):
            for sequence in ended:
                if sequence not in sequences:  # a stream's
                    continue
                index, _ = sequences[sequence]
                n_tokens += len(sequence.tokens)
                self._cause = self._cause or sequence.cause
                missing[index] -= 1
                if not missing[index] and index not in searched:
                    bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
                    bar.update()
        answers: dict[int, list[Answer]] = {index: [] for index, *_ in jobs}
        for sequence, (index, text) in sequences.items():
            answers[index].append(self._answer_of(sequence, text))
            answers[index][-1].prompt_token_logprobs = answers[index][0].prompt_token_logprobs
            answers[index][-1].prompt_top_logprobs = answers[index][0].prompt_top_logprobs
        for index, group in self._search(beams, echo, bar):
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
            text.follow if stops else None,
            logprobs,
            logprobs and echo and sample == 0,
        )
        return sequence, text

    def _answer_of(self, sequence: Sequence, text: AnswerText) -> Answer:
        text.follow(sequence.tokens)
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
            speculation=sequence.speculation,
        )

    def _search(self, jobs: list[tuple], echo: bool, bar: tqdm) -> Iterator[tuple[int, list[Answer]]]:
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
                    process=partial(_process, penalties, option.logits_processor) if option.has_penalties else None,
                )
            )
        for _ in run_beams(self.model, searches, self.engine.reserve()) if searches else ():
            bar.update()
        for (index, prompt, option), search in zip(jobs, searches):
            group = []
            for hypothesis in search.hypotheses:
                text = AnswerText(self.tokenizer, [], prompt if echo else None)
                text.follow(hypothesis.tokens)
                answer = Answer(hypothesis.tokens, text.finish(), hypothesis.finish_reason)
                answer.token_logprobs, answer.score = hypothesis.token_logprobs, hypothesis.score
                group.append(answer)
            if search.error is not None:
                group = [Answer([], "", "error", str(search.error)) for _ in range(option.num_return_sequences)]
            yield index, group

    def _budget(self, prompt: list[int], option: DecodingOptions) -> int:
        room = self.model.args.max_seq_len - len(prompt)
        return room if option.max_gen_len is None else min(option.max_gen_len, room)

    def _stop_tokens(self, option: DecodingOptions) -> frozenset[int]:
        return frozenset(self.tokenizer.stop_tokens) | {stop for stop in option.stops if isinstance(stop, int)}


def _process(penalties: tuple, processor: Any, ids: list[int], scores: torch.Tensor) -> torch.Tensor:
    return process_logits(scores, ids, *penalties, processor)
