"""What happens to kernels: one event per build, load and wait; one log line each, and a hook for metrics.

A log line is the kind and then name=value pairs, so that it can be searched and cut up:
    jitgen: load entry=sm90-3f2a… kernel='attention sm90 bfloat16 hd128' arch=9.0a source=layer seconds=0.0012 bytes=84568
"""

from __future__ import annotations

from collections.abc import Callable

from jitgen.errors import InvalidType
from jitgen.progress import logger
from jitgen.records import record

KINDS = ("load", "build", "wait", "fail", "fetch", "upload")


@record
class Event:
    """Something that was done for one kernel.

    kind     'load': its module was found; 'build': compiled; 'wait': another process compiled it; 'fail': the compiler
             refused it; 'fetch': it came from the remote layer; 'upload': it went there
    source   load: 'layer', 'store', 'remote', 'temporary' or 'built'; wait: whose build it was
    entry    name of the entry, empty for a failed build
    seconds  how long that took; size: bytes of the module, 0 where there is none
    """

    kind: str
    entry: str
    label: str
    arch: str
    seconds: float
    source: str = ""
    size: int = 0

    def __str__(self) -> str:
        text = f"{self.kind} entry={self.entry or '-'} kernel={self.label!r} arch={self.arch}"
        text += f" source={self.source!r}" if " " in self.source else f" source={self.source}" if self.source else ""
        return f"{text} seconds={self.seconds:.4f}" + (f" bytes={self.size}" if self.size else "")


Listener = Callable[[Event], None]
_listeners: list[Listener] = []


def on_event(listener: Listener) -> Callable[[], None]:
    """Call ``listener`` with every Event from now on, in the thread that caused it; returns a function that ends this.

    An exception of a listener is logged and goes no further: metrics must not break a service.
    """
    if not callable(listener):
        raise InvalidType(f"listener is {listener!r} of type {type(listener).__name__}, expected a function of an Event.")
    _listeners.append(listener)

    def remove() -> None:
        if listener in _listeners:
            _listeners.remove(listener)

    return remove


def emit(event: Event) -> None:
    """Log an event and tell all listeners."""
    log = logger()
    (log.warning if event.kind == "fail" else log.info)("%s", event)
    for listener in tuple(_listeners):
        try:
            listener(event)
        except Exception as error:
            log.warning("listener %r failed on %s: %s: %s", listener, event.kind, type(error).__name__, error)
