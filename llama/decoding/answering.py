"""Prompts of ids to answers with their text: sampled ones, beam searches and scores, all through one engine.

Where tokens become text, for the engine knows none: stop strings are looked for here. Knows nothing of dialogs or
files, and checks nothing: what comes here has been checked.
"""

import itertools
import time
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from llama import parallel
from llama.decoding.beam_search import BeamSearch
from llama.decoding.grammar import NO_SHAPE, Grammars, shapes_of
from llama.decoding.penalties import NO_CHANGES, Processing, changes_of
from llama.decoding.shared_engine import Call, SharedEngine
from llama.engine import Engine
from llama.model import ModelArgs
from llama.options import DecodingOptions, as_list, check_ids, per_prompt
from llama.sampling import RandomStream, call_seed
from llama.sequence import Sequence, Speculation
from llama.tokenizer import Tokenizer
from llama.tokenizer.answer_text import AnswerText
from llama.tokenizer.truncate import CutPrompt, cut_ids

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


def jobs_of(
    prompts: list[list[int]], settings: list[DecodingOptions], logprobs: bool = False, echo: bool = False
) -> list[Job]:
    """A job for each prompt of a call, with its options; its key is its index."""
    pairs = enumerate(zip(prompts, settings))
    return [Job(index, prompt, option, logprobs=logprobs, echo=echo) for index, (prompt, option) in pairs]


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
        self._grammars = Grammars(tokenizer, engine.model.args.vocab_size)
        self._calls = itertools.count(1)  # of those without a seed of their own

    @property
    def args(self) -> ModelArgs:
        """The shape of the model that is run."""
        return self.shared.engine.model.args

    @property
    def grammars(self) -> Grammars:
        """The shapes that answers may be asked for; new ones where tokenizer or model were exchanged."""
        if not self._grammars.belong_to(self.tokenizer, self.args.vocab_size):
            self._grammars = Grammars(self.tokenizer, self.args.vocab_size)
        return self._grammars

    def answer(self, jobs: list[Job], progress: bool = False, shared: bool = True) -> list[list[Answer]]:
        """The answers to each job, in their order, on every rank.

        Args:
            jobs: whose keys are the index of the prompt in the caller's call, for errors; here their occurrences are
                counted.
            progress: whether to show a bar.
            shared: whether each replica takes its share of the prompts; if not, it answers all, whatever the others do.

        Raises:
            GenerationError: some of them failed.
        """
        occurrences: Counter[tuple[int, ...]] = Counter()
        for job in jobs:
            job.occurrence = occurrences[key := (job.first_sample, *job.prompt)]
            occurrences[key] += 1
        is_split = shared and parallel.n_replicas() > 1
        mine = jobs[parallel.replica() :: parallel.n_replicas()] if is_split else jobs
        # The largest budgets first: a long answer begun last would run on alone.
        waiting = deque(sorted(mine, key=self.budget, reverse=True))
        answers: dict[Job, list[Answer]] = {}
        n_tokens, started = 0, time.perf_counter()
        bar = tqdm(total=len(mine), unit="prompt", disable=not progress or dist.get_rank() > 0)
        with parallel.fail_at_once(), bar, Jobs(self) as open_jobs:
            while len(answers) < len(mine):
                while waiting and open_jobs.has_room:
                    open_jobs.add(waiting.popleft())
                for job in open_jobs.step():
                    answers[job] = group = open_jobs.answers(job)
                    for answer in group:
                        n_tokens += len(answer.tokens)
                    bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
                    bar.update()
        if is_split:
            found = {index: answers[job] for index, job in enumerate(jobs) if job in answers}
            for part in parallel.gather_from_replicas(found):
                answers |= {jobs[index]: group for index, group in part.items()}
        failed = [(job.key, a.error) for job in jobs for a in answers[job] if a.error is not None]
        by_prompt = [answers[job] for job in jobs]
        if failed:
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise GenerationError(f"prompt {failed[0][0]}{others}: {failed[0][1]}", by_prompt) from open_jobs.cause
        return by_prompt

    def answer_all(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        logprobs: bool = False,
        echo: bool = False,
        progress: bool = False,
        shared: bool = True,
        **options: Any,
    ) -> list[list[Answer]]:
        """As `answer`, of prompts and options that have not been checked."""
        prompts, settings = self.check_prompts(prompts, options)
        return self.answer(jobs_of(prompts, settings, logprobs, echo), progress, shared)

    def open_stream(self, prompt: list[int], option: DecodingOptions) -> Iterator[str]:
        """The text of one answer while it is decided; what is wrong is raised at once, not with the first piece."""
        if option.num_beams > 1 or option.num_return_sequences > 1:
            raise ValueError("a stream is one answer: expected num_beams = 1 and num_return_sequences = 1")
        if option.top_logprobs:
            raise ValueError("a stream is text alone: expected top_logprobs = 0")
        return self._stream(prompt, option)

    def _stream(self, prompt: list[int], option: DecodingOptions) -> Iterator[str]:
        sequence = self.sequence(Job(None, prompt, option), 0)
        text = AnswerText(self.tokenizer, option.stop_strings)
        n_seen = n_sent = 0
        with parallel.fail_at_once(), Call(self.shared) as call:
            call.add(sequence)
            while call.n_open:
                call.step(every=True)
                for token in sequence.tokens[n_seen:]:  # several, where another thread has run steps meanwhile
                    text.push(token)
                    n_seen += 1
                    if len(decided := text.decided) > n_sent:
                        yield decided[n_sent:]
                        n_sent = len(decided)
        if sequence.error is not None:
            raise GenerationError(sequence.error, [[self.answer_of(sequence, [])]]) from sequence.cause
        if rest := text.finish()[n_sent:]:
            yield rest

    def check_prompt(
        self, name: int | str, ids: Any, option: DecodingOptions | None = None, any_length: bool = False
    ) -> list[int]:
        """The ids of a prompt, by `options.check_ids`; an int as its name is its index in the call.

        With an option that says so, a prompt that is too long is cut.
        """
        if isinstance(ids, CutPrompt):
            return ids
        name, side = f"prompt {name}" if isinstance(name, int) else name, option and option.truncate
        ids = check_ids(name, ids, self.args.vocab_size, None if any_length or side else self.args.max_seq_len)
        return ids if side is None else cut_ids(ids, self.prompt_room(option), side, self.tokenizer.bos_id)

    def check_prompts(self, prompts: Any, options: dict[str, Any]) -> tuple[list[list[int]], list[DecodingOptions]]:
        """The prompts of ids of a call, and the options of each. Raises ValueError or TypeError, naming the prompt."""
        prompts = as_list("prompt_tokens", prompts, "prompts, each a list of token ids", "ids")
        settings = self.check_options(prompts, options)
        checked = (self.check_prompt(index, ids, option) for index, (ids, option) in enumerate(zip(prompts, settings)))
        return list(checked), settings

    def prompt_room(self, option: DecodingOptions) -> int:
        """The most tokens of a prompt that is cut: `max_gen_len` fit after it, or a quarter of the context."""
        quarter, wanted = self.args.max_seq_len // 4, option.max_gen_len
        return self.args.max_seq_len - (quarter if wanted is None else min(wanted, quarter))

    def encode_texts(self, texts: Any, options: dict[str, Any]) -> tuple[list[list[int]], list[DecodingOptions]]:
        """As `check_prompts`, of texts to be continued."""
        prompts = []
        for index, text in enumerate(as_list("prompts", texts, "texts", "prompt")):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise TypeError(f"prompt {index} is a {kind}: expected a str (`generate` takes token ids)")
            prompts.append(self.tokenizer.encode(text, bos=True, eos=False))
        return self.check_prompts(prompts, options)

    def check_option(self, option: DecodingOptions, name: str = "") -> None:
        """Raises ValueError, begun by `name`, if options ask for what the model has not, or for a shape that is none.

        Raises ImportError if they ask for a shape, and llguidance is not installed.
        """
        engine = self.shared.engine
        if option.num_beams > 1 and engine.model is not engine.opened:
            raise ValueError(
                f"{name}num_beams = {option.num_beams}: a model with hooks of its own, or with blocks that are not "
                "Llama's own, runs one sequence at a time: expected 1"
            )
        option.check_model(self.args.vocab_size, len(engine.slots), name)
        if shapes_of(option) != NO_SHAPE:
            self.grammars.check(option, name)

    def check_options(self, prompts: SequenceOf, options: dict[str, Any]) -> list[DecodingOptions]:
        """The options of each prompt, checked against the model; without a seed, they get one of this call."""
        self.shared.look_again()
        seed = options.get("seed")
        if seed is None or (isinstance(seed, (list, tuple)) and None in seed):
            own = call_seed(self.seed, next(self._calls))
            options = options | {"seed": own if seed is None else [own if s is None else s for s in seed]}
        settings, checked = per_prompt(len(prompts), **options), None
        for index, option in enumerate(settings):
            if option is not checked:  # of most calls all are the same one
                self.check_option(option, f"prompt {index}: ")
                checked = option
        return settings

    def token_text(self, token: int) -> str:
        """The text that a token adds, its leading space included; U+FFFD where it is part of a character."""
        return self.tokenizer.token_bytes(token).decode(errors="replace")

    def sequence(self, job: Job, sample: int) -> Sequence:
        """The engine's record of one answer to come."""
        option, logprobs = job.option, job.logprobs or job.option.top_logprobs > 0
        stop_tokens, ends = frozenset(self.tokenizer.stop_tokens), []
        if option.stop is not None:
            stop_tokens |= option.stop_ids
            if option.stop_strings:  # the text is followed only where something looks for a string in it
                ends.append(AnswerText(self.tokenizer, option.stop_strings).follow)
        sequence = Sequence(
            job.prompt,
            self.budget(job),
            option,
            RandomStream(option.seed, job.prompt, job.occurrence, sample),
            stop_tokens,
            logprobs=logprobs,
            score_from=0 if logprobs and job.echo and sample == job.first_sample and option.num_beams == 1 else None,
        )
        if changes_of(option) != NO_CHANGES:
            shape = None if shapes_of(option) == NO_SHAPE else self.grammars.start(option)
            sequence.process = Processing(job.prompt, option, shape)
            ends += [] if shape is None else [shape.is_whole]
        if ends:
            sequence.should_stop = lambda tokens: any(end(tokens) for end in ends)
        return sequence

    def answer_of(self, sequence: Sequence, before: list[int]) -> Answer:
        """What came of a sequence; the text of the ids `before` begins its own."""
        option, n = sequence.options, len(sequence.tokens)
        if option.stop is not None and (stops := option.stop_strings):
            text = AnswerText(self.tokenizer, stops, before)
            text.follow(sequence.tokens)
            whole, n = text.finish(), text.n_tokens
        else:
            whole = self.tokenizer.decode_bytes(before + sequence.tokens).decode(errors="replace")
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

    def budget(self, job: Job) -> int:
        """The most new tokens of an answer."""
        room = self.args.max_seq_len - len(job.prompt)
        return room if job.option.max_gen_len is None else min(job.option.max_gen_len, room)


class Jobs(Call):
    """Jobs that are answered beside each other, and beside those of all other callers.

    `step` lets the engine run until some of them are done, and returns these; `answers` are theirs. Leaving its `with`
    cancels what is not done.

    Attributes:
        cause: the first exception of the caller's own code that an answer failed of.
    """

    def __init__(self, answerer: Answerer):
        super().__init__(answerer.shared)
        self.cause: BaseException | None = None
        self._answerer = answerer
        self._jobs: dict[Sequence, Job] = {}
        self._groups: dict[Job, list[Sequence]] = {}  # of the jobs that are not done
        self._n_missing: Counter[Job] = Counter()

    def add(self, job: Job) -> None:
        """Takes a job; `step` returns it once all its sequences have ended."""
        option = job.option
        if option.num_beams > 1:
            first = self._answerer.sequence(job, 0)
            first.search = BeamSearch(first)
            group = [first]
            if job.echo and job.logprobs:  # its prompt is scored by itself
                group.append(Sequence(job.prompt, 0, option, score_from=0))
        else:
            group = []
            for sample in range(job.first_sample, job.first_sample + option.num_return_sequences):
                group.append(self._answerer.sequence(job, sample))
        self._groups[job], self._n_missing[job] = group, len(group)
        for sequence in group:
            self._jobs[sequence] = job
            super().add(sequence)

    def end(self, sequence: Sequence) -> None:
        """Has `step` return a job once the last of its sequences has ended."""
        job = self._jobs.pop(sequence)
        self._n_missing[job] -= 1
        if not self._n_missing[job]:
            self._ended.append(job)

    def answers(self, job: Job) -> list[Answer]:
        """The answers to a job that `step` has returned; once only."""
        del self._n_missing[job]
        group, before = self._groups.pop(job), job.prompt if job.echo else []
        first, answers = group[0], []
        for sequence in group:
            self.cause = self.cause or sequence.cause
        if first.search is None:
            for sequence in group:
                answers.append(self._answerer.answer_of(sequence, before))
        elif (error := first.error or group[-1].error) is not None:
            answers = [Answer([], "", "error", error) for _ in range(job.option.num_return_sequences)]
        else:
            for hypothesis in first.search.hypotheses:
                text = self._answerer.tokenizer.decode_bytes(before + hypothesis.tokens).decode(errors="replace")
                answers.append(Answer(hypothesis.tokens, text, hypothesis.finish_reason))
                answers[-1].token_logprobs, answers[-1].score = hypothesis.token_logprobs, hypothesis.score
        scored = group[-1] if first.search is not None else first  # one of them scores the prompt for all
        for answer in answers:
            answer.prompt_token_logprobs = scored.prompt_token_logprobs
            answer.prompt_top_logprobs = scored.prompt_top_logprobs
        return answers
