"""The contestants of `benchmarks.decode`, each in its own process: `Llama` in several forms, Transformers, llama.cpp.

    python -m benchmarks.contestants NAME FOLDER DEVICE ROOM

loads the checkpoint and then answers each line of JSON on stdin with one on stdout, so that the driver can let the
contestants take turns: {"batch": B, "context": L, "tokens": n} gives {"seconds": of each step}, and {"prompt": n} gives
{"seconds": of one prefill}. ROOM has the number of positions for each batch size, as JSON.
"""

import ctypes
import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

# In longer contexts than this the keys and values are random numbers, which take as long to read as a prompt's.
LONGEST_PREFILL = 4096


class Ours:
    """Runs the engine as `generate` does; the keys of the context stay in the cache from one turn to the next."""

    def __init__(self, folder: Path, device: str, room: dict[int, int], **build: Any):
        from llama import Llama

        llama = Llama.build(
            # More slots than rows, so that the long contexts stay in the cache.
            *(folder, None, max(room.values()), max(room) + 3),
            **{"device": device, **build},
        )
        self.engine, self.device = llama._engine, device

    def first_token(self, n_tokens: int) -> None:
        self.prefill(n_tokens)

    def prefill(self, n_tokens: int) -> float:
        self.engine.reuse_prefixes = False
        try:
            return self._run(1, n_tokens, 1)[0]
        finally:
            self.engine.reuse_prefixes = True

    def decode(self, batch: int, context: int, n_tokens: int) -> list[float]:
        return self._run(batch, context, n_tokens)[-n_tokens:]

    def _run(self, batch: int, context: int, n_tokens: int) -> list[float]:
        """Seconds of each step of the engine; in the last n_tokens steps every row decodes."""
        from llama.options import DecodingOptions
        from llama.sampling import RandomStream
        from llama.sequence import Sequence

        prompt = token_ids(context)
        n_new = n_tokens + (1 if n_tokens > 1 else 0)
        sequences = [
            Sequence(prompt, n_new, DecodingOptions(temperature=0), RandomStream(1, prompt, 0, i)) for i in range(batch)
        ]
        if context > LONGEST_PREFILL and self.engine.reuse_prefixes:
            self._fill(prompt[:-1])
        for sequence in sequences:
            self.engine.add(sequence)
        seconds = []
        while self.engine.has_work:
            started = time.perf_counter()
            self.engine.step()
            synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return seconds

    def _fill(self, ids: list[int]) -> None:
        """Fills the cache with random keys and values for some ids, unless it has them."""
        slots = self.engine.slots
        if slots.find(ids, len(ids))[1] == len(ids):
            return
        slots.take(0, 0, 0)
        for tensor in (*slots.cache.keys, *slots.cache.values):
            tensor[0, :, : len(ids)] = torch.randn_like(tensor[0, :1, : len(ids)])
        slots.record(0, 0, ids)


class Transformers:
    """Runs `generate`, greedy, with its default cache, and times its steps."""

    def __init__(self, folder: Path, device: str, room: dict[int, int]):
        from transformers import AutoModelForCausalLM

        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(
            hugging_face_copy(folder), dtype=torch.bfloat16, device_map=device if device != "cpu" else None
        )

    def first_token(self, n_tokens: int) -> None:
        self.prefill(n_tokens)

    def prefill(self, n_tokens: int) -> float:
        started = time.perf_counter()
        return self._generate(1, n_tokens, 1)[0] - started

    def decode(self, batch: int, context: int, n_tokens: int) -> list[float]:
        times = self._generate(batch, context, n_tokens + 1)
        return [after - before for before, after in itertools.pairwise(times)]

    @torch.inference_mode()
    def _generate(self, batch: int, context: int, n_tokens: int) -> list[float]:
        times: list[float] = []

        def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            synchronize(self.device)
            times.append(time.perf_counter())
            return scores

        ids = torch.tensor([token_ids(context)] * batch, device=self.device)
        limits = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens}
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, logits_processor=[note], **limits
        )
        return times


class LlamaCpp:
    """Runs llama.cpp through its C interface, with as many threads as PyTorch."""

    def __init__(self, folder: Path, device: str, room: dict[int, int], kind: str = "bf16"):
        import llama_cpp as c

        self.c = c
        self._quiet = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._quiet, ctypes.c_void_p(0))
        c.llama_backend_init()
        path = gguf_copy(folder, kind)
        params = c.llama_model_default_params()
        self.model = c.llama_load_model_from_file(str(path).encode(), params)
        self.rooms = room
        self.context, self.key = None, None

    def _open(self, batch: int, positions: int) -> None:
        """Makes a context with room for `batch` rows and `positions` positions."""
        c = self.c
        if self.key == (batch, positions):
            return
        if self.context is not None:
            c.llama_free(self.context)
        params = c.llama_context_default_params()
        params.n_ctx, params.n_seq_max = batch * positions, batch
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.kv_unified = True
        self.context, self.key = c.llama_init_from_model(self.model, params), (batch, positions)
        self.batch = c.llama_batch_init(512, 0, batch)

    def _decode(self, tokens: list[tuple[int, int, list[int], bool]]) -> None:
        """Runs tokens, each as (id, position, rows, whether to compute its logits)."""
        for i, (token, position, rows, wanted) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, position, len(rows)
            for j, row in enumerate(rows):
                self.batch.seq_id[i][j] = row
            self.batch.logits[i] = wanted
        self.batch.n_tokens = len(tokens)
        if self.c.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _best(self, i: int) -> int:
        logits = self.c.llama_get_logits_ith(self.context, i)
        vocabulary = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        return int(
            torch.frombuffer(
                (ctypes.c_float * vocabulary).from_address(ctypes.addressof(logits.contents)), dtype=torch.float32
            ).argmax()
        )

    def first_token(self, n_tokens: int) -> None:
        self.prefill(n_tokens)

    def _prompt(self, n_tokens: int, rows: list[int]) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)
        ids = token_ids(n_tokens)
        for start in range(0, n_tokens, 512):
            stop = min(start + 512, n_tokens)
            self._decode([(ids[i], i, rows, i == n_tokens - 1) for i in range(start, stop)])
        self._best(stop - start - 1)

    def prefill(self, n_tokens: int) -> float:
        self._open(1, self.rooms[1])
        started = time.perf_counter()
        self._prompt(n_tokens, [0])
        return time.perf_counter() - started

    def decode(self, batch: int, context: int, n_tokens: int) -> list[float]:
        self._open(batch, self.rooms[batch])
        self._prompt(context, list(range(batch)))
        tokens, seconds = [1] * batch, []
        for position in range(context, context + n_tokens):
            started = time.perf_counter()
            self._decode([(token, position, [row], True) for row, token in enumerate(tokens)])
            tokens = [self._best(row) for row in range(batch)]
            seconds.append(time.perf_counter() - started)
        return seconds


CONTESTANTS = {
    "ours": Ours,
    "ours compiled": lambda *a: Ours(*a, compile=True),
    "ours int8": lambda *a: Ours(*a, quantize="int8"),
    "ours int8 compiled": lambda *a: Ours(*a, quantize="int8", compile=True),
    "ours int4": lambda *a: Ours(*a, quantize="int4"),
    "ours int4 compiled": lambda *a: Ours(*a, quantize="int4", compile=True),
    "Transformers": Transformers,
    "llama.cpp bf16": LlamaCpp,
    "llama.cpp Q8_0": lambda *a: LlamaCpp(*a, kind="Q8_0"),
    "llama.cpp Q4_0": lambda *a: LlamaCpp(*a, kind="Q4_0"),
}


def token_ids(n: int) -> list[int]:
    """Ids of a prompt; prompts of different lengths begin differently, so that each keeps its own keys in the cache."""
    return [1 + (n + 7 * i) % 1000 for i in range(n)]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def hugging_face_copy(folder: Path) -> Path:
    """The checkpoint as a Hugging Face directory, made once."""
    from llama.checkpoint.convert import convert

    copy = folder.with_name(folder.name + "-hf")
    if not copy.is_dir():
        convert(folder, copy, to="hf")
    return copy


def gguf_with_words(folder: Path, words: list[str]) -> Path:
    """The checkpoint as a GGUF file with a vocabulary in which each word is a token, for llama.cpp's server."""
    path = folder.with_name(folder.name + "-words.gguf")
    if not path.is_file():
        _write_gguf(folder, path, words)
    return path


def gguf_copy(folder: Path, kind: str) -> Path:
    """The checkpoint as a GGUF file, made once; llama.cpp itself quantises it, with its defaults."""
    import llama_cpp as c

    plain, path = folder.with_name(folder.name + "-bf16.gguf"), folder.with_name(f"{folder.name}-{kind}.gguf")
    if not plain.is_file():
        _write_gguf(folder, plain)
    if not path.is_file():
        params = c.llama_model_quantize_default_params()
        params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}")
        partial = path.with_suffix(".partial")
        if c.llama_model_quantize(str(plain).encode(), str(partial).encode(), ctypes.byref(params)) != 0:
            raise RuntimeError(f"llama.cpp could not write {path}")
        partial.rename(path)
    return path


def _write_gguf(folder: Path, path: Path, words: list[str] | None = None) -> None:
    """Writes a GGUF file with its own package. Format: github.com/ggml-org/ggml, docs/gguf.md."""
    import gguf

    from llama.checkpoint.open import open_checkpoint

    _, checkpoint = open_checkpoint(folder)
    args = checkpoint.args
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_context_length(131072)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_vocab_size(args.vocab_size)
    if words is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_words(writer, words, args.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output", "attention_norm": "attn_norm"}
    names |= {"ffn_norm": "ffn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output"}
    names |= {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}
    for name in checkpoint.shapes:
        *place, last, _ = name.split(".")
        prefix = f"blk.{place[1]}." if place else ""
        tensor = checkpoint.read(name)
        if tensor.dim() == 1:
            writer.add_tensor(f"{prefix}{names[last]}.weight", tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(f"{prefix}{names[last]}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def _add_words(writer: Any, words: list[str], vocab_size: int) -> None:
    """Adds a vocabulary like SentencePiece's: bytes, the words with all their prefixes, and fillers."""
    pieces = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}  # with GGUF's types
    for word in ("\u2581" + word for word in words):
        pieces |= dict.fromkeys([*word, *(word[:end] for end in range(2, len(word) + 1))], 1)
    pieces |= {f" w{i}": 1 for i in range(vocab_size - len(pieces))}
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*pieces])
    writer.add_token_scores([float(-i) for i in range(vocab_size)])
    writer.add_token_types([*pieces.values()])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main(name: str, folder: str, device: str, room: str) -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # stdout is for answers alone; libraries print too
    torch.zeros(1, device=device)
    started = time.perf_counter()
    contestant = CONTESTANTS[name](Path(folder), device, {int(b): n for b, n in json.loads(room).items()})
    loaded = time.perf_counter()
    contestant.first_token(128)
    synchronize(device)
    took = {"load": loaded - started, "first_token": time.perf_counter() - started}
    print(json.dumps(took), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prompt" in request:
            answer = {"seconds": [contestant.prefill(request["prompt"])]}
        elif "batch" in request:
            answer = {"seconds": contestant.decode(request["batch"], request["context"], request["tokens"])}
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if device.startswith("cuda"):
                peak = torch.cuda.max_memory_allocated()
            answer = {"peak_bytes": peak}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
