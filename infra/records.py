"""The record of a service of ours: which process it is, and on which port it listens.

A record counts only while that very process lives, so a stale one is harmless. Knows nothing of what a service does.
"""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import psutil

LOOPBACK = "127.0.0.1"
PORTS_TRIED = 100


def write_record(path: Path, process: psutil.Process, **content: Any) -> None:
    """Name a process, and what else is to be known of it."""
    path.write_text(json.dumps({"pid": process.pid, "create_time": process.create_time(), **content}))


def read_record(path: Path) -> dict[str, Any] | None:
    """The record; None where there is none, or only a part of one was written."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        record = json.loads(path.read_text())
        if isinstance(record, dict) and {"pid", "create_time"} <= record.keys():
            return record
    return None


def recorded_process(path: Path) -> psutil.Process | None:
    """The process that a record names, if that very one still lives."""
    if (record := read_record(path)) is None:
        return None
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(record["pid"])
        if process.create_time() == record["create_time"] and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def left_behind(path: Path) -> list[psutil.Process]:
    """What a killed service left running: its children keep its session, whose id is the dead process's."""
    record = read_record(path)
    return [] if record is None else [process for process in psutil.process_iter() if _in_session(process, record)]


def port_of(path: Path, usual: int) -> int:
    """The port of the service that a record names, while any of its processes lives; else the first free one of the
    recorded port, the usual one and those above it: another user's server may listen on the usual one."""
    record = read_record(path) or {}
    recorded = int(record.get("port") or usual)
    if recorded_process(path) is not None or left_behind(path):
        return recorded
    ports = (recorded, *range(usual, usual + PORTS_TRIED))
    return next((port for port in ports if why_not_free(port) is None), usual)


def why_not_free(port: int) -> OSError | None:
    """Why no server can listen on a port of loopback; None where one can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return error
    return None


def _in_session(process: psutil.Process, record: dict[str, Any]) -> bool:
    try:
        return os.getsid(process.pid) == record["pid"] and process.create_time() >= float(record["create_time"])
    except (ProcessLookupError, PermissionError, psutil.Error):
        return False
