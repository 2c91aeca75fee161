"""The errors that a user is meant to read. Any other that ends a script is a bug."""


class KestrelError(Exception):
    """A run that cannot continue: bad data, a missing artifact, a failed proof. Exit status 1.

    The message says what happened, where (file, line, dialogue, key) and what to do.
    """

    exit_status = 1


class UsageError(KestrelError):
    """An invalid command line or YAML file, with a line for each problem. Exit status 2."""

    exit_status = 2

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


class ProofError(KestrelError):
    """A check during the run failed: what happened is not what the settings say."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped the run, after it saved what can be resumed. Not an Exception: libraries catch those."""

    def __init__(self, signal_number: int, message: str = "interrupted"):
        self.exit_status = 128 + signal_number
        super().__init__(message)
