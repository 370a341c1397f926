"""Checks the CUDA code without a card: traces the network on fake CUDA tensors, and compiles its step's kernels.

    python -m benchmarks.trace_cuda [--architecture 90]

needs PyTorch's CUDA build (pip install torch, in a separate environment: some 6 GB) and no card. For weights of 16, 8
and 4 bits, prefill, ragged prefill and the decoding step run on tensors that have shapes and devices but no numbers, so
a tensor on the wrong device raises. Then TorchInductor writes the compiled step, and Triton compiles each of its
kernels for the architecture. tests/test_cuda.py checks values, graphs, copies and the engine. Nothing is timed.
"""

import contextlib
import re
import sys
import types
from collections.abc import Iterator
from unittest import mock

import fire
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llama import ModelArgs, Transformer, parallel
from llama.layers import layouts, quantization
from llama.layers.packing import groups, lay_out_together, pack

SHAPE = {"dim": 256, "n_layers": 1, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 512, "multiple_of": 64}


class Captured(Exception):
    """Raised when the code of a step is written, so that it does not run."""


def main(architecture: int = 90) -> None:
    """Prints two lines for each kind of weights.

    Args:
        architecture: the card's: 90 is an H100, 80 an A100.
    """
    if torch.version.cuda is None:
        print("this PyTorch has no CUDA build: nothing was traced", file=sys.stderr)
        sys.exit(1)
    parallel.initialize(device=torch.device("cpu"))
    for kind in (None, "int8", "int4"):
        with FakeTensorMode(), torch.no_grad():
            model = make_model(kind)
            two = torch.zeros(2, dtype=torch.long, device="cuda")
            ids = torch.zeros(2, 7, dtype=torch.long, device="cuda")
            for starts in (0, [0, 3]):
                assert_on_card(model(ids, starts))
            step = ids[:, :1], two, torch.arange(64, device="cuda")
            assert_on_card(model.step(*step))
            code = code_of_step(model, step, architecture)
        print(f"{kind or 'bfloat16'}: prefill, ragged prefill and the step are traced; the compiled step is written")
        print(f"  Triton compiles its {compile_kernels(code, architecture)} kernels for sm_{architecture}")


def make_model(kind: str | None) -> Transformer:
    """A small bfloat16 model on a fake card, packed or rounded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Transformer(ModelArgs(**SHAPE, max_batch_size=4, max_seq_len=64)).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.rotary = model.rotary.to("cuda")
    model.allocate_cache()
    if kind is None:
        pack(model)
        return model
    # Tensors without numbers cannot be checked for finite ones.
    unchecked = mock.patch.object(quantization, "_checked", lambda s: s.clamp(min=1e-12).bfloat16().float())
    with unchecked:
        for group in list(groups(model)):
            lay_out_together({linear: linear.weight for linear in group}, kind, torch.bfloat16)
    layouts._compiled_int8_product = lambda: layouts._int8_product  # the compiled kernel needs a card's driver
    return model


def assert_on_card(tensor: torch.Tensor) -> None:
    if tensor.device.type != "cuda":
        raise RuntimeError(f"a result is on {tensor.device}: expected cuda")


@contextlib.contextmanager
def described_card(architecture: int) -> Iterator[None]:
    """Answers what TorchInductor and Triton ask the CUDA driver, with the sizes of an H100."""
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    sizes = {"multi_processor_count": 132, "regs_per_multiprocessor": 65536, "warp_size": 32}
    sizes |= {"max_threads_per_multi_processor": 2048, "major": architecture // 10}
    properties = DeviceProperties(type="cuda", index=0, cc=architecture, **sizes)
    target = GPUTarget("cuda", architecture, 32)
    place = {"get_current_device": lambda: 0, "get_active_torch_device": lambda: torch.device("cuda", 0)}
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: target, **place))
    card = types.SimpleNamespace(**sizes, minor=architecture % 10, name="described", total_memory=80 << 30)
    card.shared_memory_per_block_optin, card.L2_cache_size = 232448, 50 << 20
    with (
        mock.patch("torch._inductor.scheduler.has_triton", lambda *arguments: True),
        mock.patch("torch._inductor.compile_fx._check_triton_bf16_support", lambda graph: None),
        mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", lambda: None),
        mock.patch("torch.cuda.get_device_properties", lambda *arguments: card),
        mock.patch("torch.cuda.get_device_capability", lambda *arguments: divmod(architecture, 10)),
        mock.patch.object(DeviceProperties, "create", classmethod(lambda cls, device: properties)),
    ):
        yield


def code_of_step(model: Transformer, arguments: tuple[torch.Tensor, ...], architecture: int) -> str:
    """The code that TorchInductor writes for the step."""
    import torch._inductor.config as config
    from torch._inductor.graph import GraphLowering

    found: list[str] = []

    def capture(graph: GraphLowering) -> None:
        code = graph.codegen()[0]
        found.append(getattr(code, "value", code))
        raise Captured

    with (
        described_card(architecture),
        mock.patch.object(GraphLowering, "compile_to_module", capture),
        config.patch(fx_graph_cache=False, compile_threads=1, joint_graph_constant_folding=False),
    ):
        try:
            torch.compile(model.step, fullgraph=True)(*arguments)
        except Exception as error:
            if not found:
                raise RuntimeError(f"the step does not compile: {error}") from error
    return found[0]


def compile_kernels(code: str, architecture: int) -> int:
    """Compiles the Triton kernels in `code_of_step`'s code, each with its first settings; returns their number."""
    from torch._inductor.codecache import PyCodeCache

    found = re.findall(r"async_compile\.triton\('(\w+)', '{3}(.*?)'{3}", code, re.S)
    with described_card(architecture):
        for name, source in found:
            kernel = getattr(PyCodeCache.load(source), name)
            kernel._precompile_config(kernel.configs[0])
    return len(found)


if __name__ == "__main__":
    fire.Fire(main)
