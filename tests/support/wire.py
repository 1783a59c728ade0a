"""Counts the payload bytes of all collectives that a process takes part in, by kind.

Collectives of torch.distributed go through torch's dispatcher, whoever calls them: Python functions, the C++ reducer
of DistributedDataParallel, FSDP2, functional collectives, DTensor. A dispatch mode sees them there. (On a CPU the
backward pass runs in the thread that called it, and so under the mode.) One that is not known is an error: none is left
out in silence.

A payload is what `hf_galore.plan.wire` calls so: the whole tensor that a collective is about. Single numbers count too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _bytes(tensors: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


def _of_first(args: tuple[Any, ...], out: Any) -> int:
    return _bytes(args[0])


def _of_second(args: tuple[Any, ...], out: Any) -> int:
    return _bytes(args[1])


def _of_result(args: tuple[Any, ...], out: Any) -> int:
    return _bytes(out)


_Payload = Callable[[tuple[Any, ...], Any], int]

# Of `c10d` the result comes first among the arguments; `_c10d_functional` returns it.
_KINDS: dict[str, tuple[str, _Payload]] = {
    "c10d::allreduce_": ("all-reduce", _of_first),
    "c10d::allreduce_coalesced_": ("all-reduce", _of_first),
    "c10d::allgather_": ("all-gather", _of_first),
    "c10d::_allgather_base_": ("all-gather", _of_first),
    "c10d::allgather_coalesced_": ("all-gather", _of_first),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", _of_first),
    "c10d::reduce_scatter_": ("reduce-scatter", _of_second),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", _of_second),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", _of_second),
    "c10d::broadcast_": ("broadcast", _of_first),
    "c10d::reduce_": ("reduce", _of_first),
    "_c10d_functional::all_reduce": ("all-reduce", _of_first),
    "_c10d_functional::all_reduce_": ("all-reduce", _of_first),
    "_c10d_functional::all_reduce_coalesced": ("all-reduce", _of_first),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", _of_result),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all-gather", _of_result),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", _of_first),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce-scatter", _of_first),
    "_c10d_functional::broadcast": ("broadcast", _of_first),
}
_NO_PAYLOAD = {"c10d::barrier", "c10d::monitored_barrier_", "_c10d_functional::wait_tensor"}


class CountedBytes(TorchDispatchMode):
    """Within, payloads are added to `bytes` by kind, and collectives to `calls`.

    with CountedBytes() as counted:
        train_a_step()
    assert counted.bytes["all-reduce"] == 4096
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket._qualified_op_name
            if name in _KINDS:
                kind, payload = _KINDS[name]
                self.bytes[kind] += payload(args, out)
                self.calls[kind] += 1
            elif name not in _NO_PAYLOAD:
                raise AssertionError(f"A collective of {name} is not counted: say in tests/support/wire.py what it is.")
        return out
