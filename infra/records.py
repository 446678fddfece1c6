"""The record of a service of ours: which process it is, and on which port it listens.

A record counts only while that very process lives, so a stale one is harmless. Knows nothing of what a service does.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import psutil


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


def _in_session(process: psutil.Process, record: dict[str, Any]) -> bool:
    try:
        return os.getsid(process.pid) == record["pid"] and process.create_time() >= float(record["create_time"])
    except (ProcessLookupError, PermissionError, psutil.Error):
        return False
