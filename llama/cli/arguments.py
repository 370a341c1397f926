"""What commands share: how a model is loaded, how an answer is decoded, and which exceptions are a user's mistakes.

tyro reads these classes: a field is a flag, and its comment or docstring is the flag's help. Knows nothing of commands.
"""

import contextlib
import functools
import io
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Suppress, UsePythonSyntaxForLiteralCollections
from tyro.constructors import PrimitiveConstructorSpec

from llama import DecodingOptions, GenerationError, Llama, parallel
from llama.datasets.runs import RemoteModel
from llama.parallel.actors import ReplicaFailed

# A user's mistakes: only the message is shown. Any other exception is the package's mistake and shows a traceback.
MISTAKES = (OSError, ValueError, ImportError, MemoryError, GenerationError, parallel.RankFailed, ReplicaFailed)

DEMO = Path(__file__).resolve().parents[2] / "demo" / "checkpoint"
DEMO_SEQ_LEN = 256  # the embedded model was not trained on more positions


def is_first_rank() -> bool:
    """Whether this process is rank 0, which reads and writes files. Needs no process group."""
    return os.environ.get("RANK", "0") == "0"


def _read_stop(words: list[str]) -> Any:
    """A stop: a JSON list, the id of a token, or else a string."""
    (text,) = words
    if text.isdigit() or text.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    return text


STOP = PrimitiveConstructorSpec(
    nargs=1,
    metavar="STRING|ID|JSON-LIST",
    instance_from_str=_read_stop,
    is_instance=lambda value: True,
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class Decoding(DecodingOptions):
    """How an answer is decoded."""

    stop: Annotated[Any, STOP] = None  # ends the answer: a text, the id of a token, or a JSON list of these
    json_schema: str | None = None  # the answer is JSON of this schema, which is JSON too
    # A number to add to the logits of each of these ids, such as "{97: -5}".
    logit_bias: UsePythonSyntaxForLiteralCollections[dict[int, float] | None] = None
    logits_processor: Suppress[Any] = None

    def __post_init__(self):
        """Checks nothing: `given` does, and its errors are one line instead of tyro's box."""

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults. Raises ValueError if one is out of range."""
        options = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        try:
            DecodingOptions(**options)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return options


@dataclass(frozen=True)
class OneAnswer(Decoding):
    """How an answer is decoded."""

    num_return_sequences: Suppress[int] = 1
    num_beams: Suppress[int] = 1
    length_penalty: Suppress[float] = 1.0
    early_stopping: Suppress[bool] = False
    top_logprobs: Suppress[int] = 0


@dataclass(frozen=True)
class Loading:
    """How the model is loaded."""

    ckpt_dir: str | None = None  # Meta's directory or Hugging Face's; the embedded checkpoint when left out
    tokenizer_path: str | None = None  # the tokenizer's file; the directory's own when left out
    max_seq_len: int | None = None  # tokens of a prompt and its answer; 2048, or 256 with the embedded checkpoint
    max_batch_size: int = 1  # how many sequences run at a time, on each replica
    device: str | None = None  # "cuda", "mps" or "cpu"; the first of these that is there when left out
    dtype: str | None = None  # of weights and computation, such as "bfloat16"; the checkpoint's when left out
    model_parallel_size: int | None = None  # over how many processes the model is split; all when left out
    compile: bool = False  # compiles the decoding step when it first runs: a minute, later some seconds
    quantize: str | None = None  # "int8" or "int4" rounds the matrices while they are loaded
    adapter: str | None = None  # a LoRA's directory, as `llama finetune` and PEFT write it
    draft: str | None = None  # a smaller model's directory, or "ngram", proposes tokens: the same answers, sooner

    def build(self, decoding: Decoding | None = None) -> Llama:
        """Checks the options, then builds the model. Its messages go to stderr.

        Raises:
            FileNotFoundError, ValueError, MemoryError: as in `Llama.build`; an option is out of range.
        """
        options = DecodingOptions(**decoding.given() if decoding is not None else {})
        if self.ckpt_dir is None and not DEMO.is_dir():
            raise FileNotFoundError(
                f"there is no embedded checkpoint at {DEMO} (only a clone of the repository has it): "
                "pass --ckpt_dir DIR, a directory with a checkpoint"
            )
        defaults = {"ckpt_dir": DEMO, "max_seq_len": 2048 if self.ckpt_dir else DEMO_SEQ_LEN}
        names = [field.name for field in fields(Loading)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        with contextlib.redirect_stdout(sys.stderr):
            llama = Llama.build(**defaults | given)
        parallel.silence_other_ranks()  # again, because the end of the redirection undid it
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        llama.answerer.check_option(options)
        return llama


@dataclass(frozen=True)
class BatchLoading(Loading):
    """How the model is loaded."""

    max_batch_size: int = 16  # how many sequences run at a time, on each replica
    replicas: int | None = None  # runs this many replicas on a Ray cluster, each of model_parallel_size processes
    ray: str | None = None  # the cluster's address; without it and RAY_ADDRESS, this machine is the cluster

    @property
    def is_remote(self) -> bool:
        """Whether the model is on replicas of a Ray cluster, not in this process."""
        return self.replicas is not None or self.ray is not None

    def remote(self, decoding: Decoding | None = None, has_model: bool = True) -> RemoteModel:
        """Checks the options, then starts replicas. Raises as `build` and `parallel.actors.Replicas`."""
        options = DecodingOptions(**decoding.given() if decoding is not None else {})
        build = functools.partial(_build_on_replica, self if has_model else None)
        model = RemoteModel(build, self.replicas, self.model_parallel_size or 1, self.ray, self.device)
        if has_model:
            model.check_option(options)
        return model


def _build_on_replica(loading: BatchLoading | None) -> Llama | None:
    return None if loading is None else loading.build()
