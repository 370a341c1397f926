"""The device and the dtype that a rank computes with. Knows nothing of process groups."""

import os

import torch

# The dtypes that a checkpoint may have, and that a model may compute in.
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dtype_by_name(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a name; a dtype or None is returned unchanged. Raises ValueError if it is not one of DTYPES."""
    by_name = {str(each).removeprefix("torch."): each for each in DTYPES}
    found = by_name.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: expected bfloat16, float16, float32 or float64")
    return found


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device that this rank computes on: the one asked for, else CUDA, else MPS, else the CPU.

    A bare "cuda" becomes the card whose index is LOCAL_RANK, which torchrun sets. Raises ValueError if the device does
    not exist here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        expected = "expected 'cpu', 'cuda', 'cuda:N' or 'mps'"
        raise ValueError(f"device {device!r} is not known to PyTorch: {expected}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {str(device)!r} was asked for, but PyTorch finds no CUDA device here")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"this process wants CUDA device {index}, but there are {torch.cuda.device_count()}: "
                "start at most one process per card, or pass device='cpu'"
            )
        device = torch.device("cuda", index)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' was asked for, but PyTorch finds no Apple GPU here")
    return device


def pick_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype nearest to `dtype` (the checkpoint's) that `device` computes in."""
    if dtype == torch.float64 and device.type == "mps":
        return torch.float32
    if dtype == torch.bfloat16 and device.type == "cuda":
        return dtype if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return dtype
