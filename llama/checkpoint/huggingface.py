"""Hugging Face's directories to this rank's tensors: safetensors files, with the face of `checkpoint.MetaCheckpoint`.

Knows their layout (that of Transformers' `LlamaForCausalLM`) and how its names and rotary order become Meta's; nothing
of running a model. Files are memory-mapped: only the bytes that a rank asks for are read, and all but the reordered
rows of wq and wk *are* the file. `open_checkpoint` tells the two kinds of directory apart.

Format of the files: github.com/huggingface/safetensors. Their headers are checked by that package: offsets inside the
file, without gap or overlap, sizes that fit shape and dtype.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.huggingface_config import read_json
from llama.checkpoint.meta import COLUMNS, full_shapes, listing
from llama.checkpoint.writer import SAFETENSORS_DTYPES
from llama.model import ModelArgs

FILE_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")

# Meta's names and Hugging Face's, with the layer's number taken out.
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
    """Whether a tensor of this name (Meta's) has its rows in another order in each format: queries and keys."""
    return name.endswith((".wq.weight", ".wk.weight"))


def rows_in_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads, [n * head_dim, dim]: from (i, i + head_dim / 2) as a rotary pair to Meta's (2i, 2i + 1)."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def rows_in_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `rows_in_pairs`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def find_files(ckpt_dir: Path) -> list[Path]:
    """The safetensors files of a model: model.safetensors, or those that an index or their own names count.

    Raises:
        FileNotFoundError: there are none, or not all.
        ValueError: the index is broken.
    """
    if (ckpt_dir / "model.safetensors").is_file():
        return [ckpt_dir / "model.safetensors"]
    index = ckpt_dir / "model.safetensors.index.json"
    if index.is_file():
        expected = "an object whose weight_map has a file name for each tensor"
        weight_map = read_json(index, expected).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no usable weight_map: expected {expected}")
        names, source = sorted(set(weight_map.values())), index.name
        if strange := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names {strange[0]!r}: expected the names of files in its own directory")
    else:
        numbered = [match for entry in ckpt_dir.iterdir() if (match := FILE_NAME.fullmatch(entry.name))]
        names = [
            f"model-{i:05d}-of-{match[2]}.safetensors" for match in numbered[:1] for i in range(1, int(match[2]) + 1)
        ]
        source = numbered[0][0] if numbered else ""
    if not names:
        found = f"{ckpt_dir} holds {listing(ckpt_dir)}"
        if any(ckpt_dir.glob("pytorch_model*.bin")):
            found += "; .bin files are not read (Transformers' save_pretrained writes safetensors)"
        raise FileNotFoundError(f"{found}: expected model.safetensors, or model-00001-of-0000N.safetensors and on")
    missing = [name for name in names if not (ckpt_dir / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{source} in {ckpt_dir} means {len(names)} files, but {', '.join(missing)} is missing")
    return [ckpt_dir / name for name in names]


class HuggingFaceCheckpoint:
    """A directory of Hugging Face's, whose full tensors can be read in slices under Meta's names.

    Names, shapes and dtypes are checked when it is opened, against `args`.

    Args:
        ckpt_dir: the directory.
        args: the shape of the model.
        reward_head: whether it has a reward model's head, `score.weight`, in place of the output matrix.

    Attributes:
        args: the shape of the model.
        dtype: of all its tensors.
        shapes: the full shape of each tensor, by Meta's name.
        paths: the files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or a tensor is missing, too many, or of another shape or dtype.
        ImportError: the safetensors package is not installed.
    """

    quantization: str | None = None

    def __init__(self, ckpt_dir: Path, args: ModelArgs, reward_head: bool = False):
        self.args = args
        self.paths = find_files(ckpt_dir)
        self.shapes = full_shapes(args)
        if args.tied_embeddings or reward_head:
            del self.shapes["output.weight"]
        if reward_head:
            self.shapes["score.weight"] = (1, args.dim)
        self._file_of: dict[str, tuple[Path, Any]] = {}  # by Hugging Face's name
        for path in self.paths:
            file = _open_file(path)
            for name in file.keys():  # noqa: SIM118
                if name in self._file_of:
                    raise ValueError(f"{path} and {self._file_of[name][0]} both hold {name}: expected it once")
                self._file_of[name] = (path, file)
        expected = {file_name(name): shape for name, shape in self.shapes.items()}
        self._check_names(ckpt_dir, expected)
        dtypes: dict[str, str] = {}
        for name, shape in expected.items():
            path, file = self._file_of[name]
            header = file.get_slice(name)
            if tuple(header.get_shape()) != shape:
                found = list(header.get_shape())
                raise ValueError(f"{path}: {name} has shape {found}: expected {list(shape)}, as config.json says")
            dtypes.setdefault(header.get_dtype(), name)
        if len(dtypes) > 1 or not dtypes.keys() <= SAFETENSORS_DTYPES.keys():
            found = " and ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
            raise ValueError(
                f"{ckpt_dir} holds tensors of dtype {found}: expected one of {', '.join(SAFETENSORS_DTYPES)} for all"
            )
        self.dtype = SAFETENSORS_DTYPES[next(iter(dtypes))]

    def _check_names(self, ckpt_dir: Path, expected: Iterable[str]) -> None:
        index = ckpt_dir / "model.safetensors.index.json"
        uses_index = self.paths[0].name != "model.safetensors" and index.is_file()
        for name, file in read_json(index, "an index")["weight_map"].items() if uses_index else ():
            if name not in self._file_of or self._file_of[name][0].name != file:
                raise ValueError(f"{index} says that {name} is in {file}, which does not hold it")
        found = [name for name in self._file_of if not name.endswith("rotary_emb.inv_freq")]  # computed, no weight
        if self.args.tied_embeddings:  # a copy of the table may be there
            found = [name for name in found if name != "lm_head.weight"]
        missing, unexpected = set(expected) - set(found), set(found) - set(expected)
        for what, names in (("lacks", missing), ("has unexpected", unexpected)):
            if names:
                others = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(
                    f"{ckpt_dir} {what} {min(names)}{others}: expected the {len(self.shapes)} tensors of a model with "
                    f"num_hidden_layers {self.args.n_layers} and tie_word_embeddings {self.args.tied_embeddings}, "
                    "as config.json says"
                )

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """[start, stop) along `dim` of a full tensor, or all of it; a view of the mapped file, but for wq and wk.

        Of wq and wk, whole heads: their rows are put into Meta's order.
        """
        _, file = self._file_of[file_name(name)]
        tensor = file.get_tensor(file_name(name))  # a view of the map: nothing is read yet
        if dim is not None:
            tensor = tensor.narrow(dim, start, stop - start)
        if has_rotary_rows(name):
            if dim == COLUMNS or start % self.args.head_dim or stop % self.args.head_dim:
                raise ValueError(f"[{start}, {stop}) along {dim} of {name}: expected rows of whole heads")
            return rows_in_pairs(tensor, self.args.head_dim)
        # The format does not promise that numbers lie at multiples of their size, and PyTorch takes it for granted.
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _open_file(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open  # an optional extra: Meta's files do without
    except ImportError:
        raise ImportError(
            f"{path} needs the safetensors package: pip install safetensors "
            "(or this package's extra `hf`: pip install '.[hf]' in its directory)"
        ) from None
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file: {error}. "
            "Download it again if its size is not the published one"
        ) from None
