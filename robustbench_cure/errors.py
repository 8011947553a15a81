"""The two ways a command can fail, and the exit code each one has."""

from __future__ import annotations


class CureBenchError(Exception):
    """Base of every error a user may see; printed as one line, never as a traceback."""

    exit_code = 3


class UsageError(CureBenchError):
    """Bad input: what is wrong, where, and what to do. Exit code 2; nothing was written."""

    exit_code = 2


class RunError(CureBenchError):
    """The run itself failed (device lost, model raised). Exit code 3; finished shards are kept."""

    exit_code = 3
