"""One model run one way in a process of its own, which stays alive so that ways are timed in turns.

``Worker(spec, cache)`` starts the process; ``prepared`` waits until it has built the model, checked it against eager,
compiled it and measured its memory; ``time`` asks for one sample. A process holds nothing of another way: no compiled
code, no memory pool, no configuration, and only the compile caches in the folder it is given.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

    from .measuring import Footprint
    from .zoo_parts import Size

__all__ = ["Device", "Failure", "Prepared", "Provider", "Spec", "Worker", "WorkerError"]


@dataclass(frozen=True)
class Provider:
    """A way to run a model: eager without a ``backend``, else ``torch.compile`` with it.

    ``activation_budget`` is torch's ``activation_memory_budget``; ``checkpointed`` recomputes every repeated block;
    ``on_host`` leaves the model and its inputs in host memory.
    """

    name: str
    backend: str = ""
    mode: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    activation_budget: float | None = None
    checkpointed: bool = False
    on_host: bool = False


@dataclass(frozen=True)
class Spec:
    """What a worker runs: a model of the zoo on a device, in inference or a training step, by a provider.

    ``check``: compare with eager first, on the same weights.
    """

    model: str
    size: Size
    device: str
    dtype: str
    training: bool
    provider: Provider
    check: bool = True


@dataclass(frozen=True)
class Device:
    """Where a worker ran: all of its memory (0 on a CPU), and the measured bandwidth of copies from the host."""

    name: str
    nbytes: int
    link_bytes_per_s: float


@dataclass(frozen=True)
class Prepared:
    """What a worker found while getting ready.

    ``reports`` are what opweave's backend says of each graph; ``judgement`` is empty where the results equal eager's,
    from which they are off by ``error``; ``held_bytes`` are those of parameters, buffers and inputs, which are there
    before anything runs.
    """

    footprint: Footprint
    reports: tuple[Mapping[str, Any], ...]
    judgement: str
    error: float
    held_bytes: int
    device: Device


@dataclass(frozen=True)
class Failure:
    """Why a worker has no answer; ``kind`` is the name of the exception there, ``required_bytes`` its field if any."""

    kind: str
    message: str
    required_bytes: int | None = None

    @property
    def out_of_memory(self) -> bool:
        """Whether the device had too little memory, perhaps because of other workers."""
        return self.kind == "OutOfMemoryError" or "out of memory" in self.message.lower()

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.kind else self.message


class WorkerError(Exception):
    """A worker failed or took too long."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Worker:
    """The parent's end. ``cache`` is the folder of the compile caches; what the process prints goes to a file there.

    The process compiles ``threads`` kernels at a time.
    """

    def __init__(self, spec: Spec, cache: Path, threads: int = 1) -> None:
        self.spec = spec
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        # A daemon could not start the processes that Inductor compiles in.
        self._process = context.Process(target=serve, args=(theirs, spec, cache, threads))
        self._process.start()
        theirs.close()

    def prepared(self, patience_s: float) -> Prepared:
        """What was found while getting ready. Raises ``WorkerError``, and ends the process, after ``patience_s``."""
        return cast(Prepared, self._received(patience_s))

    def time(self, seconds: float, patience_s: float = 60.0) -> float:
        """One sample: the mean seconds of as many steps as fill ``seconds``. Raises ``WorkerError``."""
        self.connection.send(seconds)
        return float(cast(float, self._received(patience_s)))

    def ready(self) -> bool:
        """Whether an answer is there."""
        return self.connection.poll(0)

    def hang_up(self) -> None:
        """Let the process end by itself."""
        self.connection.close()

    def close(self) -> None:
        """See to it that the process has ended."""
        self.hang_up()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _received(self, patience_s: float) -> object:
        if not self.connection.poll(max(patience_s, 0.0)):
            self._process.kill()
            raise WorkerError(Failure("", "no answer in time"))
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            raise WorkerError(Failure("", f"the process ended by itself ({self._process.exitcode})")) from None
        if isinstance(answer, Failure):
            raise WorkerError(answer)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(connection: Connection[Any, Any], spec: Spec, cache: Path, threads: int) -> None:
    """The process: get ready, say what was found, then time a sample when asked to, until the other end hangs up."""
    cache.mkdir(parents=True, exist_ok=True)
    log = os.open(cache / f"{spec.provider.name.replace(' ', '_')}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):  # autotuning prints its tables, and compilers their warnings
        os.dup2(log, stream)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")  # read when torch is imported, which comes next
    os.environ["TRITON_CACHE_DIR"] = str(cache / "triton")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    try:
        from .workload import prepare

        step, device, prepared = prepare(spec)
        connection.send(prepared)
        _samples(connection, step, device)
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:  # whatever it is, the other end must know
        traceback.print_exc()
        connection.send(_told(error))
    sys.stdout.flush()


def _told(error: Exception) -> Failure:
    """What another process can be told of an exception; torch wraps those of a backend."""
    inner = getattr(error, "inner_exception", None) or error
    lines = str(inner).strip().splitlines() or [""]
    return Failure(type(inner).__name__, lines[0][:300], getattr(inner, "required_bytes", None))


def _samples(connection: Connection[Any, Any], step: Callable[[], None], device: torch.device) -> None:
    from .measuring import calls_for, seconds_of

    calls: dict[float, int] = {}
    while True:
        seconds = connection.recv()
        step()  # the caches of the device hold what another process left
        if seconds not in calls:
            calls[seconds] = calls_for(step, device, seconds)
        connection.send(seconds_of(step, device, calls[seconds]))
