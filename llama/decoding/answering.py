"""Turns prompts of ids into answers with text: samples, beam searches and streams, all through one engine.

Tokens become text here, so stop strings are found here, not in the engine. Knows nothing of dialogs or files.
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
        tokens: ids, without prompt and stop token.
        text: the text of the tokens, up to a stop string; with `echo`, the prompt's text comes first.
        finish_reason: "stop", "length" or "error".
        error: what went wrong, if finish_reason is "error".
        token_logprobs, top_logprobs: for each token, if requested.
        prompt_token_logprobs, prompt_top_logprobs: for each token of the prompt, if requested.
        score: of a beam.
        speculation: how many proposed tokens were right, with a draft.
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
        key: identifies the job for its owner.
        prompt: its ids.
        option: how it is decoded, with a seed.
        occurrence: how many equal prompts came before it in the call.
        logprobs: whether to compute the log-probability of each token of the answers.
        echo: whether the text begins with the prompt; with `logprobs`, the prompt's tokens are scored too.
        first_sample: the number of the first answer to draw. An answer does not depend on those before it.
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
    """Returns a job for each prompt of a call. Its key is the index of the prompt."""
    pairs = enumerate(zip(prompts, settings))
    return [Job(index, prompt, option, logprobs=logprobs, echo=echo) for index, (prompt, option) in pairs]


class GenerationError(RuntimeError):
    """Some answers failed. `answers` has a list for each prompt; failed ones have finish_reason "error"."""

    def __init__(self, message: str, answers: list[list[Answer]]):
        super().__init__(message)
        self.answers = answers


class Answerer:
    """Answers prompts with a model. Any number of threads may call it at the same time."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, seed: int = 1):
        self.shared = SharedEngine(engine)
        self.tokenizer = tokenizer
        self.seed = seed
        self._grammars = Grammars(tokenizer, engine.model.args.vocab_size)
        self._calls = itertools.count(1)  # counts the calls without a seed

    @property
    def args(self) -> ModelArgs:
        """The shape of the engine's model."""
        return self.shared.engine.model.args

    @property
    def grammars(self) -> Grammars:
        """Compiled constraints on answers. Created anew when the tokenizer or the model was replaced."""
        if not self._grammars.belong_to(self.tokenizer, self.args.vocab_size):
            self._grammars = Grammars(self.tokenizer, self.args.vocab_size)
        return self._grammars

    def answer(self, jobs: list[Job], progress: bool = False, shared: bool = True) -> list[list[Answer]]:
        """Returns the answers to each job, in the order of the jobs, on every rank.

        Args:
            jobs: their keys are the indices of the prompts in the caller's call, for errors. Sets their occurrences.
            progress: whether to show a progress bar.
            shared: whether the replicas share the jobs. If not, this replica answers all of them.

        Raises:
            GenerationError: some answers failed.
        """
        occurrences: Counter[tuple[int, ...]] = Counter()
        for job in jobs:
            job.occurrence = occurrences[key := (job.first_sample, *job.prompt)]
            occurrences[key] += 1
        is_split = shared and parallel.n_replicas() > 1
        mine = jobs[parallel.replica() :: parallel.n_replicas()] if is_split else jobs
        # The largest budgets first: a long answer that starts last would end up running alone.
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
        """Checks prompts and options, then answers them as `answer` does."""
        prompts, settings = self.check_prompts(prompts, options)
        return self.answer(jobs_of(prompts, settings, logprobs, echo), progress, shared)

    def open_stream(self, prompt: list[int], option: DecodingOptions) -> Iterator[str]:
        """Yields the text of one answer while it is generated. Raises at once if the options do not allow a stream."""
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
                for token in sequence.tokens[n_seen:]:  # several if another thread ran steps in the meantime
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
        """Checks the ids of a prompt with `options.check_ids`. A `name` that is an int is its index in the call.

        With `option.truncate`, cuts a prompt that is too long.
        """
        if isinstance(ids, CutPrompt):
            return ids
        name, side = f"prompt {name}" if isinstance(name, int) else name, option and option.truncate
        ids = check_ids(name, ids, self.args.vocab_size, None if any_length or side else self.args.max_seq_len)
        return ids if side is None else cut_ids(ids, self.prompt_room(option), side, self.tokenizer.bos_id)

    def check_prompts(self, prompts: Any, options: dict[str, Any]) -> tuple[list[list[int]], list[DecodingOptions]]:
        """Checks the prompts of a call and the options of each. Raises ValueError or TypeError with the index."""
        prompts = as_list("prompt_tokens", prompts, "prompts, each a list of token ids", "ids")
        settings = self.check_options(prompts, options)
        checked = (self.check_prompt(index, ids, option) for index, (ids, option) in enumerate(zip(prompts, settings)))
        return list(checked), settings

    def prompt_room(self, option: DecodingOptions) -> int:
        """The most tokens of a truncated prompt: leaves room for max_gen_len, or a quarter of the context if less."""
        quarter, wanted = self.args.max_seq_len // 4, option.max_gen_len
        return self.args.max_seq_len - (quarter if wanted is None else min(wanted, quarter))

    def encode_texts(self, texts: Any, options: dict[str, Any]) -> tuple[list[list[int]], list[DecodingOptions]]:
        """Encodes texts and checks them as `check_prompts` does."""
        prompts = []
        for index, text in enumerate(as_list("prompts", texts, "texts", "prompt")):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise TypeError(f"prompt {index} is a {kind}: expected a str (`generate` takes token ids)")
            prompts.append(self.tokenizer.encode(text, bos=True, eos=False))
        return self.check_prompts(prompts, options)

    def check_option(self, option: DecodingOptions, name: str = "") -> None:
        """Raises ValueError, beginning with `name`, if the model cannot decode with these options.

        Raises ImportError if they constrain the answer, and llguidance is not installed.
        """
        engine = self.shared.engine
        if option.num_beams > 1 and engine.model is not engine.module:
            raise ValueError(
                f"{name}num_beams = {option.num_beams}: a model with hooks of its own, or with blocks that are not "
                "Llama's own, runs one sequence at a time: expected 1"
            )
        option.check_model(self.args.vocab_size, len(engine.slots), name)
        if shapes_of(option) != NO_SHAPE:
            self.grammars.check(option, name)

    def check_options(self, prompts: SequenceOf, options: dict[str, Any]) -> list[DecodingOptions]:
        """Returns the options of each prompt, checked against the model. Those without a seed get one of this call."""
        self.shared.refresh_model()
        seed = options.get("seed")
        if seed is None or (isinstance(seed, (list, tuple)) and None in seed):
            own = call_seed(self.seed, next(self._calls))
            options = options | {"seed": own if seed is None else [own if s is None else s for s in seed]}
        settings, checked = per_prompt(len(prompts), **options), None
        for index, option in enumerate(settings):
            if option is not checked:  # in most calls, all prompts share one record
                self.check_option(option, f"prompt {index}: ")
                checked = option
        return settings

    def token_text(self, token: int) -> str:
        """The text of a token with its leading space. An incomplete character becomes U+FFFD."""
        return self.tokenizer.token_bytes(token).decode(errors="replace")

    def sequence(self, job: Job, sample: int) -> Sequence:
        """Creates the sequence that the engine runs for one answer."""
        option, logprobs = job.option, job.logprobs or job.option.top_logprobs > 0
        stop_tokens, ends = frozenset(self.tokenizer.stop_tokens), []
        if option.stop is not None:
            stop_tokens |= option.stop_ids
            if option.stop_strings:  # text is decoded at each step only to find these
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
            matcher = None if shapes_of(option) == NO_SHAPE else self.grammars.start(option)
            sequence.process = Processing(job.prompt, option, matcher)
            ends += [] if matcher is None else [matcher.is_complete]
        if ends:
            sequence.should_stop = lambda tokens: any(end(tokens) for end in ends)
        return sequence

    def answer_of(self, sequence: Sequence, before: list[int]) -> Answer:
        """Returns the answer of an ended sequence. Its text begins with that of the ids `before`."""
        option, n = sequence.options, len(sequence.tokens)
        if option.stop is not None and (stops := option.stop_strings):
            text = AnswerText(self.tokenizer, stops, before)
            text.follow(sequence.tokens)
            decoded, n = text.finish(), text.n_tokens
        else:
            decoded = self.tokenizer.decode_bytes(before + sequence.tokens).decode(errors="replace")
        return Answer(
            sequence.tokens[:n],
            decoded,
            sequence.finish_reason,
            sequence.error,
            sequence.token_logprobs[:n],
            sequence.top_logprobs[:n],
            sequence.prompt_token_logprobs,
            sequence.prompt_top_logprobs,
            speculation=sequence.speculation,
        )

    def budget(self, job: Job) -> int:
        """The most new tokens of an answer to a job."""
        room = self.args.max_seq_len - len(job.prompt)
        return room if job.option.max_gen_len is None else min(job.option.max_gen_len, room)


class Jobs(Call):
    """Jobs that run in one batch, together with the jobs of all other callers.

    `step` runs the engine until some sequences have ended, and returns the jobs that are done; `answers` returns the
    answers of a done job. Leaving the `with` block cancels all other jobs.

    Attributes:
        cause: the first exception in a caller's own code (a logits_processor) that made an answer fail.
    """

    def __init__(self, answerer: Answerer):
        super().__init__(answerer.shared)
        self.cause: BaseException | None = None
        self._answerer = answerer
        self._jobs: dict[Sequence, Job] = {}
        self._groups: dict[Job, list[Sequence]] = {}  # the sequences of each job
        self._n_missing: Counter[Job] = Counter()  # how many of them have not ended

    def add(self, job: Job) -> None:
        """Adds a job. `step` returns it once all its sequences have ended."""
        option = job.option
        if option.num_beams > 1:
            first = self._answerer.sequence(job, 0)
            first.search = BeamSearch(first)
            group = [first]
            if job.echo and job.logprobs:  # another sequence scores the prompt
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
        """Notes that a sequence has ended. After the last one of a job, `step` returns the job."""
        job = self._jobs.pop(sequence)
        self._n_missing[job] -= 1
        if not self._n_missing[job]:
            self._ended.append(job)

    def answers(self, job: Job) -> list[Answer]:
        """Returns the answers to a job that `step` has returned. Call it once for each job."""
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
        scored = group[-1] if first.search is not None else first  # this one scored the prompt
        for answer in answers:
            answer.prompt_token_logprobs = scored.prompt_token_logprobs
            answer.prompt_top_logprobs = scored.prompt_top_logprobs
        return answers
