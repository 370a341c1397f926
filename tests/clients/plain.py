"""The slow plain model that the clients are compared with: no packing, no cache, no reuse, no batch, one loop."""

from pathlib import Path
from typing import Any

import torch
from conftest import SMALL, random_model, write_byte_tokenizer

from llama import ChatFormat, Llama, Tokenizer, Transformer

SHAPE = SMALL | {"max_seq_len": 64, "max_batch_size": 3}


class PlainLlama:
    """Greedy answers, each from the whole text at every step."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.formatter = model, tokenizer, ChatFormat(tokenizer)

    @torch.inference_mode()
    def generate(self, prompt_tokens: list[list[int]], max_gen_len: int, temperature: float, **options: Any) -> tuple:
        answers, logprobs = [], []
        for prompt in prompt_tokens:
            tokens, scores = list(prompt), []
            for _ in range(max_gen_len):
                row = self.model(torch.tensor([tokens]))[0, -1].float().log_softmax(-1)
                tokens.append(int(row.argmax()))
                scores.append(float(row.max()))
            answers.append(tokens[len(prompt) :])
            logprobs.append(scores)
        return answers, logprobs if options.get("logprobs") else None

    def _texts(self, ids: list[list[int]], max_gen_len: int, temperature: float) -> list[str]:
        answers, _ = self.generate(prompt_tokens=ids, max_gen_len=max_gen_len, temperature=temperature)
        return [self.tokenizer.decode(answer) for answer in answers]

    def text_completion(self, prompts: list[str], temperature: float, max_gen_len: int) -> list[dict]:
        ids = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        texts = self._texts(ids, max_gen_len, temperature)
        return [{"generation": text, "finish_reason": "length"} for text in texts]

    def chat_completion(self, dialogs: list, temperature: float, max_gen_len: int) -> list[dict]:
        ids = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        texts = self._texts(ids, max_gen_len, temperature)
        messages = [{"role": "assistant", "content": text.strip()} for text in texts]
        return [{"generation": message, "finish_reason": "length"} for message in messages]

    def stream_text(self, prompt: str, temperature: float, max_gen_len: int):
        yield self.text_completion([prompt], temperature, max_gen_len)[0]["generation"]


def bare_model(seed: int = 0, **changes: Any) -> Transformer:
    return random_model(seed, **SHAPE | changes)


def build(kind: str, folder: Path, seed: int = 0, **changes: Any) -> "Llama | PlainLlama":
    """A generator of the kind "fast" (`Llama`) or "plain", on the same random float32 weights."""
    path = folder / "tokenizer.model"
    if not path.exists():
        write_byte_tokenizer(path)
    tokenizer = Tokenizer(path)
    tokenizer.stop_tokens = set()  # random weights end at any time
    model = bare_model(seed, **changes)
    model.packable = kind == "fast"
    if kind == "plain":
        return PlainLlama(model, tokenizer)
    llama = Llama(model, tokenizer)
    llama._engine.model_is_held = False  # as `Llama.build` leaves it
    return llama
