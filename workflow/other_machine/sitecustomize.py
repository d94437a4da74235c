"""Another machine, in every process that has this folder on PYTHONPATH.

    PYTHONPATH=$PWD/workflow/other_machine WDA_LAST_BITS=1 python ...    # sums end in other bits
    PYTHONPATH=$PWD/workflow/other_machine WDA_ONEDNN=off python ...     # torch's own kernels in place of oneDNN's

Processors, numbers of threads and versions of a library add numbers up in different orders. With WDA_LAST_BITS every
matrix product, convolution, sum and special function gives the neighbouring float of about two results in three, up or
down by a hash of its bits and of the variable's value: the same input always gives the same output, as on one machine.
Numbers with few digits stay, as sums of small integers are the same everywhere. What a test asserts has to hold here.
"""

import os
from importlib.util import find_spec

ROUNDED = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "convolution", "convolution_backward",
    "sum", "mean", "var", "std", "norm", "linalg_vector_norm", "cumsum", "avg_pool2d", "native_layer_norm",
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_log_softmax", "_softmax", "logsumexp",
    "exp", "log", "erf", "tanh", "sigmoid", "softplus", "gelu", "silu",
}  # fmt: skip

if find_spec("torch") and os.environ.get("WDA_ONEDNN") == "off":
    import torch

    torch.backends.mkldnn.enabled = False

if find_spec("torch") and "WDA_LAST_BITS" in os.environ:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    SEED = int(os.environ["WDA_LAST_BITS"])
    WORDS = {torch.float64: (torch.int64, 12), torch.float32: (torch.int32, 6)}

    def neighbour(value: torch.Tensor) -> torch.Tensor:
        """The value, or the next float below or above it."""
        if value.dtype not in WORDS or not value.numel():
            return value
        word, short = WORDS[value.dtype]
        bits = value.contiguous().view(word)
        mixed = bits.long() * 0x9E3779B1 + SEED
        moved = (bits + (((mixed >> 13) ^ mixed) % 3 - 1).to(word)).view(value.dtype)
        moves = value.isfinite() & moved.isfinite() & (bits % 2**short != 0)
        return torch.where(moves, moved, value)

    class Neighbours(TorchDispatchMode):
        """Applies `neighbour` to what the operations of ROUNDED give."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            largest = name == "linalg_vector_norm" and len(args) > 1 and args[1] == float("inf")
            if name not in ROUNDED or largest:  # the largest entry is no sum
                return out
            if isinstance(out, torch.Tensor):
                return neighbour(out)
            every = name == "convolution_backward"  # of the others, what follows the first output are statistics
            return tuple(neighbour(o) if o is not None and (every or i == 0) else o for i, o in enumerate(out))

    Neighbours().__enter__()
