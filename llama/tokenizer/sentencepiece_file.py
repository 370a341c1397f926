"""Llama 2's tokenizer: a SentencePiece model, and text to its ids. Knows nothing of chat formats.

Format: SentencePiece, arXiv:1808.06226; github.com/google/sentencepiece.
"""

from pathlib import Path


class SentencePieceFile:
    """A SentencePiece model: a protobuf of pieces with their scores.

    Raises ValueError if `data`, the contents of the file, cannot be read as a whole model, or if it has no <s> or </s>;
    ImportError if the sentencepiece package is not installed.
    """

    kind = "llama2"

    def __init__(self, data: bytes, path: Path):
        try:
            import sentencepiece  # an optional extra: Llama 3 does not need it
        except ImportError:
            raise ImportError(
                f"{path} is a SentencePiece model (Llama 2), and the sentencepiece package is not installed: "
                "pip install sentencepiece (or this package's extra `llama2`: pip install '.[llama2]' in its directory)"
            ) from None
        try:
            self.processor = sp = sentencepiece.SentencePieceProcessor(model_proto=data)
            ids = range(sp.vocab_size())
            self.special_tokens = {sp.id_to_piece(i): i for i in ids if sp.is_control(i) or sp.is_unknown(i)}
            self.token_bytes = [self._bytes_of(i) for i in ids]
            starts = frozenset(i for i in ids if sp.id_to_piece(i).startswith("▁"))
            # Encoding adds a space before a text, and decoding removes it. A few models add none.
            self.word_starts = starts if starts.intersection(sp.encode("a")[:1]) else frozenset()
        except (RuntimeError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
            raise ValueError(
                f"{path} begins as a SentencePiece model, but its {len(data)} bytes cannot be read as a whole one: "
                f"{str(error)[:100]}; is the file cut off?"
            ) from None
        self.bos_id, self.eos_id, self.pad_id = sp.bos_id(), sp.eos_id(), sp.pad_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path}: a SentencePiece model without <s> or </s>; expected Llama 2's, which has both")

    def _bytes_of(self, token_id: int) -> bytes:
        piece = self.processor.id_to_piece(token_id)
        if self.processor.is_control(token_id):
            return b""
        if self.processor.is_byte(token_id):  # such as "<0x0A>"
            return bytes([int(piece[1:-1], 16)])
        if self.processor.is_unknown(token_id):
            return self.processor.decode([token_id]).encode()
        return piece.replace("▁", " ").encode()

    def content(self) -> bytes:
        """Everything that the ids depend on, for a fingerprint."""
        return self.processor.serialized_model_proto()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)
