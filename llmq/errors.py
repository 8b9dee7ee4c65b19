"""Every error that llmq raises on purpose.

    LlmqError
    ├── SpecError         a recipe, option or combination that cannot be carried out (exit code 2)
    ├── CheckpointError   a checkpoint folder that cannot be read or written
    ├── CalibrationError  calibration data that is missing, unreadable or too short
    ├── SolverError       a weight or Hessian that no solver can work with
    ├── KernelError       no kernel can run a packed layer
    └── RankError         a process that shares the run was lost

A message says what is wrong, where, which values were seen, and what to do. It fits on one line.
"""


class LlmqError(Exception):
    """Base of all errors that llmq raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class SpecError(LlmqError):
    """A recipe, option or combination of them cannot be carried out."""

    exit_code = 2


class CheckpointError(LlmqError):
    """A checkpoint folder cannot be read or written."""


class CalibrationError(LlmqError):
    """Calibration data is missing, unreadable or too short."""


class SolverError(LlmqError):
    """A weight or Hessian that no solver can work with."""


class KernelError(LlmqError):
    """No kernel can run a packed layer."""


class RankError(LlmqError):
    """A process that shares the run was lost, or failed."""
