"""Prompts of ids to answers: the sampled ones through the engine, the others by beam search, shared out over replicas.

Where tokens become text, for the engine knows none: stop strings are looked for here. Knows nothing of dialogs or
files, and checks nothing: what comes here has been checked.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from llama import parallel
from llama.decoding.beam_search import BeamSearch, run_beams
from llama.engine import Engine, Sequence, Speculation
from llama.options import DecodingOptions
from llama.sampling import RandomStream, process_logits
from llama.tokenizer import Tokenizer
from llama.tokenizer.answer_text import AnswerText

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


@dataclass(eq=False)
class Job:
    """A prompt to answer.

    Attributes:
        key: whatever its owner knows it by.
        prompt: its ids.
        option: how it is decoded, with a seed.
        occurrence: how many equal prompts came before it in the call.
        logprobs: whether the log-probability of each token of the answers is wanted.
        echo: whether the text begins with the prompt; with `logprobs`, they are wanted of the prompt's tokens too.
        first_sample: from which answer to the prompt on; each is the same without those before it.
    """

    key: Any
    prompt: list[int]
    option: DecodingOptions
    occurrence: int = 0
    logprobs: bool = False
    echo: bool = False
    first_sample: int = 0


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
        shared: bool = True,
    ) -> list[list[Answer]]:
        """The answers to each prompt, in their order, on every rank; `settings` are the options of each.

        Each replica takes its share of them; or, if not `shared`, answers all, whatever the others do.

        Raises:
            GenerationError: some of them failed.
        """
        occurrences: Counter[tuple[int, ...]] = Counter()
        jobs = []
        for index, (prompt, option) in enumerate(zip(prompts, settings)):
            jobs.append(Job(index, prompt, option, occurrences[tuple(prompt)], logprobs, echo))
            occurrences[tuple(prompt)] += 1
        n_free = len(self.engine.slots) - self.engine.n_used
        for index, option in enumerate(settings):
            if option.num_beams > max(1, n_free):
                raise ValueError(
                    f"prompt {index}: num_beams = {option.num_beams}, but {n_free} of max_batch_size = "
                    f"{len(self.engine.slots)} slots are free: expected no more beams; close the streams that are open"
                )
        mine = jobs[parallel.replica() :: parallel.n_replicas()] if shared else jobs
        self._cause = None
        with (
            parallel.fail_at_once(),
            tqdm(total=len(mine), unit="prompt", disable=not progress or dist.get_rank() > 0) as bar,
        ):
            answers = self._answer(mine, bar)
        everything = [p for part in parallel.gather_from_replicas(answers) for p in part] if shared else answers
        by_prompt = [group for _, group in sorted(everything, key=lambda pair: pair[0])]
        failed = [(index, a.error) for index, group in enumerate(by_prompt) for a in group if a.error is not None]
        if failed:
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise GenerationError(f"prompt {failed[0][0]}{others}: {failed[0][1]}", by_prompt) from self._cause
        return by_prompt

    def stream(self, prompt: list[int], option: DecodingOptions) -> Iterator[str]:
        """Yields the text of one answer while it is decided."""
        sequence, text = self._sequence(Job(None, prompt, option), 0)
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

    def run(self, jobs: Iterable[Job | None]) -> Iterator[tuple[Job, list[Answer]]]:
        """Answers jobs beside each other, and yields each with its answers as it is done.

        Jobs are taken one after the other, as slots become free. None among them says that there is none yet, which may
        be while one of those before is not done. Where sampled answers and beam searches follow each other, those
        before are completed first.
        """
        source, held = iter(jobs), []

        def next_jobs(beams: bool) -> Iterator[Job | None]:
            """Up to the next of the other kind, which is held."""
            while (job := held.pop() if held else next(source, source)) is not source:
                if job is not None and (job.option.num_beams > 1) != beams:
                    held.append(job)
                    return
                yield job

        while True:
            yield from self._sample(next_jobs(beams=False))
            if not held:
                return
            yield from self._search(next_jobs(beams=True))

    def _answer(self, jobs: list[Job], bar: tqdm) -> list[tuple[int, list[Answer]]]:
        """Answers a list of jobs, whose keys are numbers, in the order that is fastest."""
        # The largest budgets first: a long answer begun last would run on alone.
        order = sorted(jobs, key=lambda job: (job.option.num_beams > 1, -self._budget(job.prompt, job.option)))
        # A beam search does not score its prompt: that is a job of its own.
        scored = [job for job in order if job.option.num_beams > 1 and job.logprobs and job.echo]
        only_score = {"max_gen_len": 0, "num_beams": 1, "num_return_sequences": 1}
        scoring = [replace(job, key=job, option=replace(job.option, **only_score)) for job in scored]
        answers: dict[int, list[Answer]] = {}
        prompt_logprobs: dict[Job, list[float]] = {}
        n_tokens, started = 0, time.perf_counter()
        for job, group in self.run([*scoring, *order]):
            if isinstance(job.key, Job):
                prompt_logprobs[job.key] = group[0].prompt_token_logprobs
                continue
            for answer in group if job in prompt_logprobs else ():
                answer.prompt_token_logprobs = prompt_logprobs[job]
            answers[job.key] = group
            n_tokens += sum(len(answer.tokens) for answer in group)
            bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
            bar.update()
        return list(answers.items())

    def _sample(self, jobs: Iterator[Job | None]) -> Iterator[tuple[Job, list[Answer]]]:
        """Answers jobs through the engine, each with so many sequences as it wants answers."""
        owners: dict[Sequence, Job] = {}
        groups: dict[Job, list[tuple[Sequence, AnswerText]]] = {}  # of the jobs that are not done
        n_missing: Counter[Job] = Counter()

        def sequences() -> Iterator[Sequence | None]:
            for job in jobs:
                if job is None:
                    yield None
                    continue
                samples = range(job.first_sample, job.first_sample + job.option.num_return_sequences)
                groups[job] = [self._sequence(job, sample) for sample in samples]
                owners.update((sequence, job) for sequence, _ in groups[job])
                n_missing[job] = len(groups[job])
                yield from [sequence for sequence, _ in groups[job]]

        for ended in self.engine.run(sequences()):
            for sequence in ended:
                job = owners.pop(sequence)
                self._cause = self._cause or sequence.cause
                n_missing[job] -= 1
                if not n_missing[job]:
                    del n_missing[job]
                    answers = [self._answer_of(*pair) for pair in groups.pop(job)]
                    for answer in answers[1:]:
                        answer.prompt_token_logprobs = answers[0].prompt_token_logprobs
                        answer.prompt_top_logprobs = answers[0].prompt_top_logprobs
                    yield job, answers

    def _sequence(self, job: Job, sample: int) -> tuple[Sequence, AnswerText]:
        """The engine's record of one answer to come, and its text."""
        option = job.option
        stops = [stop for stop in option.stops if isinstance(stop, str)]
        text = AnswerText(self.tokenizer, stops, job.prompt if job.echo else None)
        logprobs = job.logprobs or option.top_logprobs > 0
        sequence = Sequence(
            job.prompt,
            self._budget(job.prompt, option),
            option,
            RandomStream(option.seed, job.prompt, job.occurrence, sample),
            self._stop_tokens(option),
            # The text is kept up with only where something has to look at it on the way.
            text.follow if stops else None,
            logprobs,
            logprobs and job.echo and sample == job.first_sample,
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

    def _search(self, jobs: Iterator[Job | None]) -> Iterator[tuple[Job, list[Answer]]]:
        """Answers jobs by beam search, in the slots that no sequence uses."""
        owners: dict[int, Job] = {}  # by the id of their search

        def searches() -> Iterator[BeamSearch | None]:
            for job in jobs:
                search = None if job is None else self._beam_search(job.prompt, job.option)
                owners[id(search)] = job
                yield search

        with self.engine.reserve() as first_slot:
            for search in run_beams(self.model, searches(), first_slot):
                job = owners.pop(id(search))
                answers = []
                for hypothesis in search.hypotheses:
                    text = AnswerText(self.tokenizer, [], job.prompt if job.echo else None)
                    text.follow(hypothesis.tokens)
                    answers.append(Answer(hypothesis.tokens, text.finish(), hypothesis.finish_reason))
                    answers[-1].token_logprobs, answers[-1].score = hypothesis.token_logprobs, hypothesis.score
                if search.error is not None:
                    n = job.option.num_return_sequences
                    answers = [Answer([], "", "error", str(search.error)) for _ in range(n)]
                yield job, answers

    def _beam_search(self, prompt: list[int], option: DecodingOptions) -> BeamSearch:
        penalties = (option.logit_bias, option.repetition_penalty, option.no_repeat_ngram_size)
        return BeamSearch(
            prompt,
            self._budget(prompt, option),
            option.num_beams,
            length_penalty=option.length_penalty,
            early_stopping=option.early_stopping,
            num_return_sequences=option.num_return_sequences,
            stop_tokens=self._stop_tokens(option),
            process=partial(_process, penalties, option.logits_processor) if option.has_penalties else None,
        )

    def _budget(self, prompt: list[int], option: DecodingOptions) -> int:
        room = self.model.args.max_seq_len - len(prompt)
        return room if option.max_gen_len is None else min(option.max_gen_len, room)

    def _stop_tokens(self, option: DecodingOptions) -> frozenset[int]:
        return frozenset(self.tokenizer.stop_tokens) | {stop for stop in option.stops if isinstance(stop, int)}


def _process(penalties: tuple, processor: Any, ids: list[int], scores: torch.Tensor) -> torch.Tensor:
    return process_logits(scores, ids, *penalties, processor)
