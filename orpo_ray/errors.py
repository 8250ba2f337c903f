"""Every error a user can meet, and the exit code the command line gives it.

OrpoRayError
├── UserError            2  wrong usage, config or data: correct it and run again
│   ├── ConfigError         a key, a value, or two settings that do not go together
│   └── DataError           a file, a row, or too many bad rows
├── ResourceError        3  the machine lacks what the run asks for
│   └── SetupError          in its drivers, disks, storage or cluster: `orpo-ray doctor` looks there
├── CannotTellError      3  the planner lacks what a figure needs; it does not guess
└── RunError             1  the run itself failed
    └── NonFiniteError      a loss or gradient that is not a number
StoppedError             4  stopped on request; the same command resumes the run
JobError                 -  a command on a cluster failed; it keeps its own exit code
"""


def on_one_line(error: BaseException) -> str:
    """The message of a library's error, which may have many lines, as one line."""
    return " ".join(str(error).split())


class OrpoRayError(Exception):
    """Base of all errors that become one line on the terminal."""

    exit_code = 1


class UserError(OrpoRayError, ValueError):
    """Something the user wrote is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, has a wrong value, or contradicts another one."""


class DataError(UserError):
    """The preference pairs cannot be read or too many of them are bad."""


class ResourceError(OrpoRayError):
    """The hardware or package that the run needs is missing."""

    exit_code = 3


class SetupError(ResourceError):
    """A driver, a disk, the storage or the cluster is not as a run needs it.

    The command line adds that `orpo-ray doctor` looks for the cause.
    """


class CannotTellError(OrpoRayError):
    """A plan lacks what it needs to know about a base or a GPU; nothing is wrong with the run."""

    exit_code = 3


class RunError(OrpoRayError):
    """The run started and failed."""

    exit_code = 1


class NonFiniteError(RunError):
    """A loss or gradient became NaN or infinite; raised before any weight changes."""


class StoppedError(OrpoRayError):
    """The run was asked to stop and can be resumed."""

    exit_code = 4


class JobError(OrpoRayError):
    """A submitted command failed on the cluster and said why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
