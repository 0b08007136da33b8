"""An H200 in the shape of a T4, so that a program is bound there by what binds it on a T4.

python tests/benchmarks/t4_shape.py        prints the rates of the whole card and of the shape

A whole H200 waits for kernels to be launched; a T4 waits for its arithmetic and its memory. A CUDA green context gives this
process 8 of the H200's 132 multiprocessors (no setting of the card is changed): about 56 TFLOP/s of fp16 products and 640 GB/s
copied, 0.088 FLOP a byte, as a T4 sustains about 22 TFLOP/s and 250 GB/s. A time in this shape is then about 0.4 of a T4's
where matrix products or memory decide, and ratios between recipes carry over. **It is no T4**, and it does not model

- arithmetic outside the tensor cores: 8 of these multiprocessors have a quarter (integers) to half (floats) of a T4's, beside
  2.5 times its matrix products, so unpacking 4-bit weights looks 4 to 10 times dearer than it is there. Decoding is
  therefore also timed with 32 multiprocessors, which have a T4's integer arithmetic;
- the way to the host: PCIe 5.0 here, 3.0 there (about 12 GB/s). Count bytes (`activations.host_gib`);
- what libraries choose by the card's generation. `as_on_a_t4` makes those choices by hand, as far as they are known.

At its end the interpreter frees the context before torch's memory and aborts: end such a process by os._exit(0).
"""

import contextlib
import time

MULTIPROCESSORS = 8
T4_TFLOPS, T4_GB_S, T4_PCIE_GB_S = 22.0, 250.0, 12.0  # what a T4 sustains; PCIe 3.0 x16, one way
_whole = None


def enter(multiprocessors: int = MULTIPROCESSORS):
    """Makes a stream with so many multiprocessors the current one of this thread. Before unsloth is imported, which keeps it."""
    global _whole
    import torch
    from torch.cuda.green_contexts import GreenContext

    torch.zeros(1, device="cuda")  # the context of the whole card comes first
    _whole = _whole or torch.cuda.default_stream()
    context = GreenContext.create(num_sms=multiprocessors, device_id=0)
    stream, capturing = context.Stream(), context.Stream()
    stream.green_context = context  # lives as long as its stream
    torch.cuda.synchronize()
    torch.cuda.set_stream(stream)
    torch.cuda.default_stream = lambda *_, **__: stream  # what waits for "the default stream" means this one
    torch.cuda.graph.default_capture_stream = capturing  # or captured graphs would run on the whole card; unsloth's do
    return stream


@contextlib.contextmanager
def whole_card():
    """In here work runs on every multiprocessor, as where weights are loaded; it is finished at both ends."""
    import torch

    if _whole is None:
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(_whole):
        yield
    torch.cuda.synchronize()


def as_on_a_t4():
    """Lets libraries choose what they choose on a T4 (compute capability 7.5, 40 multiprocessors), which has neither flash
    nor cuDNN attention; xformers, where it is installed, with its memory-efficient attention. Before unsloth is imported."""
    import os
    from importlib.util import find_spec

    import bitsandbytes.backends.cuda.ops as products
    import torch

    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ["UNSLOTH_BNB_GEMM_4BIT"] = (
        "1"  # unsloth takes the fused 4-bit product on a T4 and, unless told, nowhere else
    )
    products._gpu_dispatch_props = lambda device: (40, 7, 5)  # up to how many rows that product is taken
    if find_spec("xformers"):
        _xformers_as_on_a_t4()


def _xformers_as_on_a_t4():
    """xformers without its compiled part, which may be built for another CUDA: on a T4 it calls torch's kernel anyway."""
    import json
    from pathlib import Path

    import xformers
    import xformers._cpp_lib as library

    built = json.loads((Path(xformers.__file__).parent / "cpp_lib.json").read_text())
    library._register_extensions = lambda: library._BuildInfo(built)
    library._built_with_cuda = True
    from xformers.ops.fmha import _set_use_fa3, flash, triton_splitk

    _set_use_fa3(False)
    for kernel in (flash.FwOp, flash.BwOp, triton_splitk.FwOp):  # these begin with compute capability 8.0
        kernel.CUDA_MINIMUM_COMPUTE_CAPABILITY = (99, 0)


def rates() -> dict:
    """TFLOP/s of fp16 products, GB/s copied on the card (read plus written), GB/s from and to pinned host memory."""
    import torch

    def seconds(work, times):
        work()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / times

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    here, there = (torch.randint(256, (2**28,), dtype=torch.uint8, device="cuda") for _ in range(2))
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    return {
        "fp16_tflops": 2 * 8192**3 / seconds(lambda: a @ b, 10) / 1e12,
        "copy_gb_s": 2 * 2**28 / seconds(lambda: there.copy_(here), 20) / 1e9,
        "to_host_gb_s": 2**28 / seconds(lambda: host.copy_(here, non_blocking=True), 5) / 1e9,
        "from_host_gb_s": 2**28 / seconds(lambda: here.copy_(host, non_blocking=True), 5) / 1e9,
    }


if __name__ == "__main__":
    import os

    before = rates()
    enter()
    after = rates()
    print(f"{'':<16}{'whole card':>12}{f'{MULTIPROCESSORS} of it':>12}")
    for name in before:
        print(f"{name:<16}{before[name]:12.1f}{after[name]:12.1f}")
    os._exit(0)
