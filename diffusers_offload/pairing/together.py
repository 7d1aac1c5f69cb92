"""A component's forward together with those that follow it, or a rehearsal of that, inside the component's hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import recovery
from .pairs import Meeting

if TYPE_CHECKING:
    from ..hooks import ComponentHook


def run_together(
    hook: ComponentHook, module: nn.Module, forward: Callable, meeting: Meeting, inputs: recovery.Inputs
) -> Any:
    """Run the forward of the call that was met, for which the component was entered, together with its followers.

    If the result may not be used, the forward is run on its own; a failure that may be due to us ends so, too.

    Returns:
        What the forward returns.

    Raises:
        RuntimeError: the forwards have written to their arguments, or to weights, so that nothing can be run again.
    """
    engine, pairs, restarts = hook.engine, meeting.pairs, False
    args, kwargs = inputs.again()
    together = None
    try:
        together = pairs.run(
            meeting, lambda: forward(*args, **kwargs), forward, lambda a, k: hook.send(module, a, k)
        )
    except Exception as error:
        if not (meeting.rehearsal or recovery.is_out_of_memory(error)):
            raise
        pairs.refuse(meeting, f"{type(error).__name__} with several passes at once")
        recovery.let_go_of_tensors(error)
        restarts = True
    if together is not None and not meeting.rehearsal:
        return together[0]
    if meeting.lost or not inputs.intact():
        raise RuntimeError(
            f"{hook.component.name}: {pairs.reason}, which it did not do in its first forwards. Two of its passes ran "
            "together, and cannot be run again. Call enable_block_offload(pair_passes=False)"
        )
    engine.leave(hook.component, completed=not restarts)
    if restarts:
        engine.streams.empty_cache()
    engine.restore_random()
    args, kwargs = inputs.again()
    hook.enter(args, kwargs)
    engine.counters.forwards -= 1  # it is one for the caller
    alone = forward(*args, **kwargs)
    pairs.ran(meeting, alone, inputs.again(), (args, kwargs))
    if together is not None:
        pairs.lead_proved(meeting, together[0], alone)
    return alone
