"""Hugging Face's directories to tensors: safetensors files, read in slices as `meta.MetaCheckpoint` reads Meta's.

Knows the layout of Transformers' `LlamaForCausalLM`, and how its names and its rotary order become Meta's; nothing of
running a model. Files are memory-mapped: only the slices in use are read, and a slice is the mapped file, not a copy,
except for wq and wk, whose rows are reordered.

Format of the files: github.com/huggingface/safetensors. That package checks their headers: offsets inside the file,
no gap or overlap, sizes that fit shape and dtype.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.config import read_json
from llama.checkpoint.meta import COLUMNS, dtype_problems, full_shapes, listing, name_problems
from llama.checkpoint.writer import SAFETENSORS_DTYPES
from llama.model import ModelArgs

FILE_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
INDEX_NAME = "model.safetensors.index.json"

# Meta's names and Hugging Face's, with N for the number of the layer.
NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "score.weight": "score.weight",  # a reward model's head
    "layers.N.attention.wq.weight": "model.layers.N.self_attn.q_proj.weight",
    "layers.N.attention.wk.weight": "model.layers.N.self_attn.k_proj.weight",
    "layers.N.attention.wv.weight": "model.layers.N.self_attn.v_proj.weight",
    "layers.N.attention.wo.weight": "model.layers.N.self_attn.o_proj.weight",
    "layers.N.feed_forward.w1.weight": "model.layers.N.mlp.gate_proj.weight",
    "layers.N.feed_forward.w2.weight": "model.layers.N.mlp.down_proj.weight",
    "layers.N.feed_forward.w3.weight": "model.layers.N.mlp.up_proj.weight",
    "layers.N.attention_norm.weight": "model.layers.N.input_layernorm.weight",
    "layers.N.ffn_norm.weight": "model.layers.N.post_attention_layernorm.weight",
}


def file_name(name: str) -> str:
    """Hugging Face's name of a tensor, from Meta's."""
    layer = name.split(".")[1] if name.startswith("layers.") else "N"
    return NAMES[name.replace(f".{layer}.", ".N.", 1)].replace(".N.", f".{layer}.")


def has_rotary_rows(name: str) -> bool:
    """Whether the formats order the rows of a tensor (Meta's name) differently, as they do for queries and keys."""
    return name.endswith((".wq.weight", ".wk.weight"))


def rows_in_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders the rows of whole heads, [n * head_dim, dim]: rotary pairs (i, i + head_dim / 2) become (2i, 2i + 1)."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def rows_in_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `rows_in_pairs`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def read_index(ckpt_dir: Path) -> dict[str, str]:
    """The file of each tensor, from the index of a directory; empty if it has no index, or does not need it.

    Raises ValueError if the index is broken.
    """
    path = ckpt_dir / INDEX_NAME
    if (ckpt_dir / "model.safetensors").is_file() or not path.is_file():
        return {}
    expected = "an object whose weight_map has a file name for each tensor"
    weight_map = read_json(path, expected).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{path} has no usable weight_map: expected {expected}")
    for name in weight_map.values():
        if Path(name).name != name:
            raise ValueError(f"{path} names {name[:100]!r}: expected the names of files in its own directory")
    return weight_map


def find_files(ckpt_dir: Path) -> list[Path]:
    """The safetensors files of a model: model.safetensors, or those that an index or their own numbers name.

    Raises FileNotFoundError if there are none or one is missing, ValueError if the index is broken.
    """
    if (ckpt_dir / "model.safetensors").is_file():
        return [ckpt_dir / "model.safetensors"]
    names, source = sorted(set(read_index(ckpt_dir).values())), INDEX_NAME
    numbered = [match for entry in ckpt_dir.iterdir() if (match := FILE_NAME.fullmatch(entry.name))]
    if not names and numbered:
        source, n_files = numbered[0][0], numbered[0][2]
        names = [f"model-{i:05d}-of-{n_files}.safetensors" for i in range(1, int(n_files) + 1)]
    if not names:
        found = f"{ckpt_dir} holds {listing(ckpt_dir)}"
        if any(ckpt_dir.glob("pytorch_model*.bin")):
            found += "; .bin files are not read (Transformers' save_pretrained writes safetensors)"
        raise FileNotFoundError(f"{found}: expected model.safetensors, or model-00001-of-0000N.safetensors and on")
    if missing := [name[:100] for name in names if not os.path.isfile(ckpt_dir / name)]:  # raises for no name
        some = ", ".join(missing[:8])
        raise FileNotFoundError(f"{source} in {ckpt_dir} names {len(names)} files, but {some} is missing")
    return [ckpt_dir / name for name in names]


class HuggingFaceCheckpoint:
    """Hugging Face's directory. `read` reads its full tensors in slices, under Meta's names.

    Checks, attributes and errors are those of `meta.MetaCheckpoint`; it raises ImportError if the safetensors package
    is not installed. With `reward_head` it has a reward model's head, `score.weight`, instead of the output matrix.
    """

    quantization: str | None = None

    def __init__(self, ckpt_dir: Path, args: ModelArgs, check: bool = True, reward_head: bool = False):
        self.args = args
        self.paths = find_files(ckpt_dir)
        self.shapes = full_shapes(args)
        if args.tied_embeddings or reward_head:
            del self.shapes["output.weight"]
        if reward_head:
            self.shapes["score.weight"] = (1, args.dim)
        self._file_of: dict[str, tuple[Path, Any]] = {}  # by Hugging Face's name
        for path in self.paths:
            file = open_safetensors(path)
            for name in file.keys():  # noqa: SIM118
                if name in self._file_of:
                    raise ValueError(f"{path} and {self._file_of[name][0]} both hold {name}: expected it once")
                self._file_of[name] = (path, file)
        if check and (problem := next(self.problems(), None)) is not None:
            raise ValueError(problem)

    @property
    def dtype(self) -> torch.dtype:
        name = file_name("norm.weight")
        return SAFETENSORS_DTYPES[self._file_of[name][1].get_slice(name).get_dtype()]

    def problems(self) -> Iterator[str]:
        """Messages about wrong names, shapes and dtypes."""
        ckpt_dir = self.paths[0].parent
        for name, file in read_index(ckpt_dir).items():
            if name not in self._file_of or self._file_of[name][0].name != file:
                yield f"{ckpt_dir / INDEX_NAME} says that {name[:100]} is in {file}, which does not hold it"
        expected = {file_name(name): shape for name, shape in self.shapes.items()}
        found = [name for name in self._file_of if not name.endswith("rotary_emb.inv_freq")]  # computed, no weight
        if self.args.tied_embeddings:  # the embedding may be stored as the output matrix too
            found = [name for name in found if name != "lm_head.weight"]
        model = f"num_hidden_layers {self.args.n_layers} and tie_word_embeddings {self.args.tied_embeddings}"
        yield from name_problems(ckpt_dir, expected, found, f"{model}, as config.json says")
        dtypes: dict[torch.dtype | str, str] = {}
        for name, shape in expected.items():
            if name not in self._file_of:
                continue
            path, file = self._file_of[name]
            header = file.get_slice(name)
            if (found_shape := list(header.get_shape())) != list(shape):
                yield f"{path}: {name} has shape {found_shape[:8]}: expected {list(shape)}, as config.json says"
            dtypes.setdefault(SAFETENSORS_DTYPES.get(header.get_dtype(), header.get_dtype()), name)
        yield from dtype_problems(ckpt_dir, dtypes)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """[start, stop) along `dim` of a full tensor, or all of it; a view of the mapped file, except for wq and wk.

        The rows of wq and wk come in Meta's order, so these two are read in rows of whole heads.
        """
        _, file = self._file_of[file_name(name)]
        tensor = file.get_tensor(file_name(name))  # a view of the map: nothing is read yet
        if dim is not None:
            tensor = tensor.narrow(dim, start, stop - start)
        if has_rotary_rows(name):
            if dim == COLUMNS or start % self.args.head_dim or stop % self.args.head_dim:
                raise ValueError(f"[{start}, {stop}) along {dim} of {name}: expected rows of whole heads")
            return rows_in_pairs(tensor, self.args.head_dim)
        # PyTorch needs numbers at addresses that are multiples of their size; the format does not promise that.
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def open_safetensors(path: Path) -> Any:
    """An open safetensors file. Raises ValueError if it is damaged, ImportError without the safetensors package."""
    try:
        from safetensors import SafetensorError, safe_open  # an optional extra: Meta's files do not need it
    except ImportError:
        raise ImportError(
            f"{path} needs the safetensors package: pip install safetensors "
            "(or this package's extra `hf`: pip install '.[hf]' in its directory)"
        ) from None
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file: {str(error)[:200]}. "
            "Download it again if its size is not the published one"
        ) from None
