"""Prompts of ids to answers with their text: sampled ones, beam searches and scores, all through one engine.

Where tokens become text, for the engine knows none: stop strings are looked for here. Knows nothing of dialogs or
files, and checks nothing: what comes here has been checked.
"""

import hashlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from llama import parallel
from llama.decoding.beam_search import BeamSearch
from llama.decoding.grammar import Grammars
from llama.decoding.shared_engine import SharedEngine
from llama.decoding.speculative import SpeculativeEngine
from llama.engine import Engine
from llama.options import DecodingOptions, check_ids, per_prompt
from llama.sampling import RandomStream
from llama.sequence import Sequence, Speculation
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
        speculation: how often the tokens proposed for it were right, where there was a draft.
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
        key: the owner's, to tell its jobs apart.
        prompt: its ids.
        option: how it is decoded, with a seed.
        occurrence: how many equal prompts came before it in the call.
        logprobs: whether the log-probability of each token of the answers is wanted.
        echo: whether the text begins with the prompt; with `logprobs`, they are wanted of the prompt's tokens too.
        first_sample: the number of the first answer to draw; an answer does not depend on those before it.
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
    """Answers prompts with a model that has a cache. Any number of threads may call it at once."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, seed: int = 1):
        self.shared = SharedEngine(engine)
        self.tokenizer = tokenizer
        self.seed = seed
        args = engine.model.args
        self.grammars = Grammars(tokenizer, args.vocab_size)
        self.vocab_size, self.max_seq_len, self.max_batch_size = args.vocab_size, args.max_seq_len, args.max_batch_size
        self._calls = itertools.count(1)  # of those without a seed of their own

    def answer(
        self,
        prompts: list[list[int]],
        settings: list[DecodingOptions],
        logprobs: bool = False,
        echo: bool = False,
        progress: bool = False,
        shared: bool = True,
        names: list[int] | None = None,
    ) -> list[list[Answer]]:
        """The answers to each prompt, in their order, on every rank.

        Args:
            prompts: ids.
            settings: the options of each.
            logprobs, echo: as in `Job`.
            progress: whether to show a bar.
            shared: whether each replica takes its share of the prompts; if not, it answers all, whatever the others do.
            names: the index of each prompt in the caller's call, for errors.

        Raises:
            GenerationError: some of them failed.
        """
        occurrences: Counter[tuple[int, ...]] = Counter()
        jobs = []
        for index, (prompt, option) in enumerate(zip(prompts, settings)):
            jobs.append(Job(index, prompt, option, occurrences[tuple(prompt)], logprobs, echo))
            occurrences[tuple(prompt)] += 1
        mine = jobs[parallel.replica() :: parallel.n_replicas()] if shared else jobs
        # The largest budgets first: a long answer begun last would run on alone.
        waiting = deque(sorted(mine, key=lambda job: -self.budget(job.prompt, job.option)))
        answers: dict[int, list[Answer]] = {}
        n_tokens, started, cause = 0, time.perf_counter(), None
        bar = tqdm(total=len(mine), unit="prompt", disable=not progress or dist.get_rank() > 0)
        with parallel.fail_at_once(), bar, Jobs(self) as open_jobs:
            while waiting or open_jobs.n_open:
                while waiting and open_jobs.has_room:
                    open_jobs.add(waiting.popleft())
                for job, group in open_jobs.step():
                    answers[job.key] = group
                    n_tokens += sum(len(answer.tokens) for answer in group)
                    bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
                    bar.update()
            cause = open_jobs.cause
        if shared:
            answers = {key: group for part in parallel.gather_from_replicas(answers) for key, group in part.items()}
        by_prompt = [answers[index] for index in range(len(jobs))]
        failed = [(index, a.error) for index, group in enumerate(by_prompt) for a in group if a.error is not None]
        if failed:
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            first = failed[0][0] if names is None else names[failed[0][0]]
            raise GenerationError(f"prompt {first}{others}: {failed[0][1]}", by_prompt) from cause
        return by_prompt

    def stream(self, prompt: list[int], option: DecodingOptions) -> Iterator[str]:
        """Yields the text of one answer while it is decided."""
        sequence = self.sequence(Job(None, prompt, option), 0)
        text = AnswerText(self.tokenizer, _stop_strings(option))
        n_sent = 0
        with parallel.fail_at_once(), self.shared.open() as call:
            call.add(sequence)
            while call.n_open:
                call.step(every=True)
                text.follow(sequence.tokens)
                decided = text.decided
                if len(decided) > n_sent and sequence.finish_reason is None:
                    yield decided[n_sent:]
                    n_sent = len(decided)
        if sequence.error is not None:
            raise GenerationError(sequence.error, [[self.answer_of(sequence, [])]]) from sequence.cause
        if rest := text.finish()[n_sent:]:
            yield rest

    def check_prompt(self, name: int | str, ids: Any, any_length: bool = False) -> list[int]:
        """The ids of a prompt, by `options.check_ids`; an int as its name is its index in the call."""
        name = f"prompt {name}" if isinstance(name, int) else name
        return check_ids(name, ids, self.vocab_size, None if any_length else self.max_seq_len)

    def check_option(self, option: DecodingOptions, name: str = "") -> None:
        """Raises ValueError, begun by `name`, if options ask for what the model does not have, or for no shape at all.

        Raises ImportError if an answer is to have a shape, and llguidance is not installed.
        """
        option.check_model(self.vocab_size, self.max_batch_size, name)
        if option.shape is not None:
            self.grammars.check(option.shape, name)

    def check_options(self, prompts: SequenceOf, options: dict[str, Any]) -> list[DecodingOptions]:
        """The options of each prompt, checked against the model; without a seed, they get one of this call."""
        seed = options.get("seed")
        if seed is None or (isinstance(seed, (list, tuple)) and None in seed):
            digest = hashlib.blake2b(f"{self.seed} {next(self._calls)}".encode(), digest_size=8).digest()
            own = int.from_bytes(digest, "little")
            options = options | {"seed": own if seed is None else [own if s is None else s for s in seed]}
        settings = per_prompt(len(prompts), **options)
        for index, option in {id(option): (index, option) for index, option in enumerate(settings)}.values():
            self.check_option(option, f"prompt {index}: ")
        return settings

    def details(self, prompt: list[int], answer: Answer, logprobs: bool, echo: bool, options: dict) -> dict:
        """The keys of a prediction that are there when asked for. The text of a token has its leading space."""
        details: dict = {}
        if isinstance(self.shared.engine, SpeculativeEngine):
            details["speculation"] = asdict(answer.speculation)
        if logprobs or wants_top(options):
            details["tokens"] = [self.token_text(token) for token in (prompt if echo else []) + answer.tokens]
            details["logprobs"] = answer.prompt_token_logprobs + answer.token_logprobs
        if wants_top(options):
            details["top_logprobs"] = answer.prompt_top_logprobs + answer.top_logprobs
        return details

    def token_text(self, token: int) -> str:
        """The text that a token adds, its leading space included; U+FFFD where it is part of a character."""
        return self.tokenizer.token_bytes(token).decode(errors="replace")

    def sequence(self, job: Job, sample: int) -> Sequence:
        """The engine's record of one answer to come."""
        option, logprobs = job.option, job.logprobs or job.option.top_logprobs > 0
        sequence = Sequence(
            job.prompt,
            self.budget(job.prompt, option),
            option,
            RandomStream(option.seed, job.prompt, job.occurrence, sample),
            frozenset(self.tokenizer.stop_tokens) | {stop for stop in option.stops if isinstance(stop, int)},
            logprobs=logprobs,
            score_from=0 if logprobs and job.echo and sample == job.first_sample else None,
            constraint=None if option.shape is None else self.grammars.start(option.shape),
        )
        if stops := _stop_strings(option):  # the text is followed only where something looks for a string in it
            sequence.should_stop = AnswerText(self.tokenizer, stops).follow
        return sequence

    def answer_of(self, sequence: Sequence, before: list[int]) -> Answer:
        """What came of a sequence; the text of the ids `before` begins its own."""
        text = AnswerText(self.tokenizer, _stop_strings(sequence.options), before)
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

    def budget(self, prompt: list[int], option: DecodingOptions) -> int:
        """The most new tokens of an answer."""
        room = self.max_seq_len - len(prompt)
        return room if option.max_gen_len is None else min(option.max_gen_len, room)


class Jobs:
    """Jobs that are answered beside each other, and beside those of all other callers.

    Leaving its `with` cancels what is not done.

    Attributes:
        cause: the first exception of the caller's own code that an answer failed of.
    """

    def __init__(self, answerer: Answerer):
        self.cause: BaseException | None = None
        self._answerer = answerer
        self._call = answerer.shared.open()
        self._owners: dict[Sequence, Job] = {}
        self._groups: dict[Job, list[Sequence]] = {}  # of the jobs that are not done
        self._n_missing: Counter[Job] = Counter()

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(self, *exception: object) -> None:
        self._call.__exit__(*exception)

    @property
    def has_room(self) -> bool:
        """Whether one more job would find a slot that nothing waits for."""
        return self._call.has_room

    @property
    def n_open(self) -> int:
        """How many jobs have been added and not been returned by `step`."""
        return len(self._groups)

    def add(self, job: Job) -> None:
        """Takes a job; `step` returns it once it is done."""
        option = job.option
        if option.num_beams > 1:
            first = self._answerer.sequence(job, 0)
            first.search = BeamSearch(first)
            group = [first]
            if first.score_from is not None:  # a search is not scored: its prompt is, by itself
                group.append(Sequence(job.prompt, 0, option, score_from=0))
                first.score_from = None
        else:
            samples = range(job.first_sample, job.first_sample + option.num_return_sequences)
            group = [self._answerer.sequence(job, sample) for sample in samples]
        self._groups[job], self._n_missing[job] = group, len(group)
        for sequence in group:
            self._owners[sequence] = job
            self._call.add(sequence)

    def step(self) -> list[tuple[Job, list[Answer]]]:
        """Lets the engine run until answers have ended; returns the jobs that are done by it, with their answers."""
        done = []
        for sequence in self._call.step():
            job = self._owners.pop(sequence)
            self.cause = self.cause or sequence.cause
            self._n_missing[job] -= 1
            if not self._n_missing[job]:
                done.append((job, self._answers(job)))
        return done

    def _answers(self, job: Job) -> list[Answer]:
        """The answers to a job whose sequences have all ended."""
        del self._n_missing[job]
        group, before = self._groups.pop(job), job.prompt if job.echo else []
        first = group[0]
        if first.search is None:
            answers = [self._answerer.answer_of(sequence, before) for sequence in group]
        elif first.error is not None:
            answers = [Answer([], "", "error", first.error) for _ in range(job.option.num_return_sequences)]
        else:
            answers = []
            for hypothesis in first.search.hypotheses:
                text = AnswerText(self._answerer.tokenizer, [], before)
                text.follow(hypothesis.tokens)
                answers.append(Answer(hypothesis.tokens, text.finish(), hypothesis.finish_reason))
                answers[-1].token_logprobs, answers[-1].score = hypothesis.token_logprobs, hypothesis.score
        scored = group[-1] if first.search is not None else first  # one of them scores the prompt for all
        for answer in answers:
            answer.prompt_token_logprobs = scored.prompt_token_logprobs
            answer.prompt_top_logprobs = scored.prompt_top_logprobs
        return answers


def wants_top(options: dict[str, Any]) -> bool:
    """Whether the most likely tokens are asked for, of any of the prompts."""
    top = options.get("top_logprobs")
    return any(top) if isinstance(top, (list, tuple)) else bool(top)


def _stop_strings(option: DecodingOptions) -> list[str]:
    return [stop for stop in option.stops if isinstance(stop, str)]
