"""How processes that torchrun starts find each other, and how they end together when one of them cannot go on.

Rank 0 speaks for all. A rank that fails leaves its error in the store that torchrun keeps and closes its connections;
the others find out where they next exchange something, and end with the same error. A rank that is killed leaves none,
but is missed. Torchrun then stops the others, too, as it does on other machines; what is finished is on record, so
the same command, with any number of processes, goes on from there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

import psutil

from llmq import errors
from llmq.errors import LlmqError, RankError, SpecError
from llmq.ranks import ALONE, Ended, Ranks

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

_PATIENCE = timedelta(days=30)  # ranks wait for each other while one of them solves or writes
_NOTICE = 1.0  # seconds that the system may take to say that a process is gone
_ERROR, _PEER, _SPOKEN = "error", "peer ", "spoken"  # keys in the store
_AGAIN = "run the same command again: it goes on where it stopped"

_runs = 0  # how many this process has taken part in: all ranks count alike


def world_here() -> tuple[int, int]:
    """Return the rank of this process and the number of all, as torchrun says; 0 and 1 where it does not run."""
    if "MASTER_ADDR" not in os.environ:
        return 0, 1
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Yield the ranks that share a run on devices of this kind, and the device of this one; `ALONE` without torchrun.

    Raises:
        RankError: another process was lost, or failed in a way that has no name here.
        LlmqError: what another process failed with.
        SpecError: there are more processes on this machine than devices.
    """
    rank, world = world_here()
    if world == 1:
        yield ALONE, device
        return
    device, apart = _own_device(device)
    with _ends_on_term():
        try:
            _open(rank, world, apart=apart)
            yield Ranks(rank, world, device), device
        except Ended as end:
            _hear_no_term()
            error = end.error or (failure() if end.__cause__ else failure("it was told to end"))
            _leave(error, rank, world)
            raise error from None
        except (Exception, KeyboardInterrupt) as error:
            _hear_no_term()
            _leave(error, rank, world)
            raise
        finally:
            _close()


@contextmanager
def first_speaks() -> Iterator[None]:
    """Let rank 0 say how it ended before any other rank ends, upon which torchrun would stop it."""
    rank, world = world_here()
    try:
        yield
    finally:
        if world > 1 and rank == 0:
            with suppress(RuntimeError):
                _store().set(_SPOKEN, "1")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        elif world > 1 and sys.exc_info()[0] is not None:
            with suppress(RuntimeError):  # rank 0 kept the store and is gone
                _store().wait([_SPOKEN], _PATIENCE)


def failure(seen: str = "a connection broke") -> BaseException:
    """Return what to end with where another rank has failed or is gone; `seen` is what is known where none is missed.

    That is its own error, a `RankError` that names it, or a KeyboardInterrupt.
    """
    rank, world = world_here()
    deadline = time.monotonic() + _NOTICE
    with suppress(RuntimeError):  # the store is gone too
        while True:
            if _run_store().check([_ERROR]):
                kind, text = json.loads(_run_store().get(_ERROR))
                return KeyboardInterrupt() if kind == "KeyboardInterrupt" else getattr(errors, kind)(text)
            for other in range(world):
                if other != rank and (lost := _missed(other)):
                    return RankError(f"rank {other} of {world} ({lost}) was lost; {_AGAIN}")
            if time.monotonic() > deadline:
                break
            time.sleep(_NOTICE / 20)
    return RankError(f"rank {rank} of {world}: {seen}; {_AGAIN}")


@cache
def _store() -> Store:
    """Return what ranks leave word in: kept by torchrun, or by rank 0 where they were started without it."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the word of an earlier one is still there
    return PrefixStore(f"llmq/{attempt}", next(rendezvous("env://", timeout=_PATIENCE))[0])


def _run_store() -> Store:
    """Return the part of the store that is for the run at hand."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(str(_runs), _store())


def _open(rank: int, world: int, *, apart: bool) -> None:
    """Connect all ranks."""
    global _runs
    from torch import distributed

    if distributed.is_initialized():
        raise SpecError("torch.distributed is in use in this process; llmq connects its processes itself")
    _runs += 1
    _run_store().set(f"{_PEER}{rank}", json.dumps([os.getpid(), socket.gethostname()]))
    backend = "cpu:gloo,cuda:nccl" if apart else "gloo"
    try:
        distributed.init_process_group(backend, store=_run_store(), rank=rank, world_size=world, timeout=_PATIENCE)
    except RuntimeError as error:
        raise Ended(failure(f"another process cannot be reached ({error})")) from error


def _close() -> None:
    """End the connections, which others notice."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _leave(error: BaseException, rank: int, world: int) -> None:
    """Leave word of what this rank failed with, unless another one was first."""
    kind, text = type(error).__name__, str(error)
    if not isinstance(error, (LlmqError, KeyboardInterrupt)):
        kind, text = RankError.__name__, f"rank {rank} of {world}: {kind}: {text}"
    with suppress(RuntimeError):
        _run_store().compare_set(_ERROR, "", json.dumps([kind, text]))


def _missed(rank: int) -> str | None:
    """Return which process a rank was if it ran on this machine and is gone."""
    if not _run_store().check([f"{_PEER}{rank}"]):
        return None
    pid, host = json.loads(_run_store().get(f"{_PEER}{rank}"))
    if host != socket.gethostname():
        return None
    try:
        alive = psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        alive = False
    return None if alive else f"process {pid} on {host}"


def _hear_no_term() -> None:
    """Ignore SIGTERM from now on: the run is ending already, and how is still to be found out and said."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _ends_on_term() -> Iterator[None]:
    """Let SIGTERM, by which torchrun stops what is left of a run, end it as an error does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        _hear_no_term()  # once is enough
        raise Ended

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        # what went wrong is still to be said; the others wait for that, and may be stopped
        signal.signal(signal.SIGTERM, signal.SIG_IGN if world_here()[0] == 0 else before)
        raise
    signal.signal(signal.SIGTERM, before)


def _own_device(device: torch.device) -> tuple[torch.device, bool]:
    """Return the device of this rank, and whether every rank of this machine has its own."""
    import torch

    if device.type != "cuda" or device.index is not None:
        return device, False
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise SpecError(
            f"torch sees {count} CUDA devices for {os.environ.get('LOCAL_WORLD_SIZE', number + 1)} processes; use "
            f"--nproc-per-node {count}, or --device cuda:0 to let them share one"
        )
    own = torch.device("cuda", number)
    torch.cuda.set_device(own)
    return own, True
