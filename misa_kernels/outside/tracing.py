"""What compilers and CUDA graphs must not record: steps handle addresses, and copies that are recorded are not made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch._C._dynamo import eval_frame

Method = TypeVar("Method", bound=Callable[..., Any])
# Whether dynamo looks at frames here; older versions of torch do not tell.
dynamo_callback = getattr(eval_frame, "get_eval_frame_callback", lambda: True)


def not_traced(method: Method) -> Method:
    """Hide a method from dynamo, which traces with tensors that hold nothing, and whose addresses lead nowhere."""
    disabled = torch._disable_dynamo(method)  # type: ignore[attr-defined]

    @wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        # torch's own wrapper takes longer, and mostly for nothing. Dynamo answers the first question itself.
        if torch.compiler.is_dynamo_compiling():
            return disabled(*args, **kwargs)
        return (method if dynamo_callback() is None else disabled)(*args, **kwargs)

    return cast(Method, guarded)


def guard_hooks() -> None:
    """Let dynamo compile anew where a module has got its first hook, which it takes for impossible unless told."""
    dynamo = sys.modules.get("torch._dynamo")
    # Where it was not loaded nothing is compiled yet.
    if dynamo is not None and getattr(dynamo.config, "skip_nnmodule_hook_guards", False):
        dynamo.config.skip_nnmodule_hook_guards = False
        # What was compiled before would not look.
        dynamo.reset()


def refuse_capture(what: str = "") -> None:
    """Raise RuntimeError within the capture of a CUDA graph.

    Args:
        what: The call that only copies, as the subject of the sentence; empty for what is part of a step.
    """
    if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):  # type: ignore[no-untyped-call]
        return
    if what:
        raise RuntimeError(
            f"{what} came within the capture of a CUDA graph, which records copies instead of making them: call it "
            "before or after"
        )
    raise RuntimeError(
        "a step of MISA is being captured in a CUDA graph, whose replays would repeat its learning rates, its "
        "noise and the addresses of its round: capture forward and backward alone, anew in every round and without "
        "release_gradients, and call step() outside"
    )
