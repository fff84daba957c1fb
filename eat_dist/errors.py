"""Errors that a user can cause and mend. The command line prints them as one line and exits with code 2."""


class EatError(Exception):
    """Something the user gave or owns is wrong. The message is one line: what was expected, what came, what to do."""


class RunsFailedError(EatError):
    """Some runs of a study failed; the others are done. The message names them."""


class ConfigError(EatError):
    """The configuration is not valid. The message lists every fault that was found."""


class DataError(EatError):
    """A dataset, archive or image is missing, damaged or unusable."""


class StorageError(EatError):
    """A folder cannot be read or written (permissions, no space left, not there)."""


class CheckpointError(EatError):
    """No usable checkpoint, or one that belongs to another run."""


class ClusterError(EatError):
    """The cluster cannot hold what was asked for, or lost it."""


class NonFiniteLossError(EatError):
    """A loss became NaN or infinite; training stopped before the optimiser used it."""


class MembersFailedError(ClusterError):
    """Workers died, or were late, more often than is tried: as likely for what they compute as for where (memory)."""


class MemberLateError(MembersFailedError):
    """A member did not hand in its part of a gather in time. The message names it."""


class NonFiniteEmbeddingError(EatError, ValueError):
    """A model's embedding is NaN or infinite."""


def in_one_line(error: BaseException) -> str:
    """What an error says, in one line; one that no user can mend is named by its type, too."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, EatError) else ": ".join(filter(None, (type(error).__name__, text)))
