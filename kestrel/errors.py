"""The errors a user is meant to read. Everything else that escapes a script is a bug."""


class KestrelError(Exception):
    """A run that cannot go on: bad data, a missing artifact, a failed proof. Exit status 1.

    The message says what happened, where (file, line, dialogue, key) and what to do.
    """

    exit_status = 1


class UsageError(KestrelError):
    """A command line or a YAML file that means nothing. Exit status 2.

    Args:
        problems: one line each; all of them are shown at once.
    """

    exit_status = 2

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


class ProofError(KestrelError):
    """A check made during the run did not hold: what was asked for is not what happened."""


class Interrupted(KeyboardInterrupt):
    """The run was told to stop (SIGINT, SIGTERM) after it saved what can be resumed.

    No Exception: libraries that go on after any of those would swallow it.

    Args:
        signal_number: 2 or 15; the exit status is 128 more, as shells expect.
    """

    def __init__(self, signal_number: int, message: str = "interrupted"):
        self.exit_status = 128 + signal_number
        super().__init__(message)
