"""What can go wrong, told in one line: where, what was expected, what was found, what to do.

Every error that a user can meet is an `LrcError`; its `exit_code` is the documented exit code of the command line
(1 failed, 2 bad spec or usage, 3 a quality or parity gate missed).
"""


class LrcError(Exception):
    """An error with a place and a remedy.

    `where` names the place (a file and line, a site's fully qualified name, an option). The text reads
    `where: expected …, got …. hint` and leaves out what was not given.
    """

    exit_code = 1

    def __init__(self, where: str, *, expected: str = "", got: str = "", hint: str = "", message: str = "") -> None:
        self.where = where
        self.expected = expected
        self.got = got
        self.hint = hint
        self.message = message
        super().__init__(self._text())

    def _text(self) -> str:
        found = [f"expected {self.expected}"] if self.expected else []
        if self.got:
            found.append(f"got {self.got}")
        sentences = [part for part in (self.message, ", ".join(found), self.hint) if part]
        body = " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in sentences)
        return f"{self.where}: {body}" if body else self.where


class SpecError(LrcError):
    """The spec file or an override cannot be read or does not validate."""

    exit_code = 2


class UsageError(LrcError):
    """A command or a call was given something that it cannot take."""

    exit_code = 2


class DataError(LrcError):
    """A data file is missing, empty or of another shape than the model needs."""

    exit_code = 2


class ModelError(LrcError):
    """The model folder is missing, damaged or unsafe to load."""


class CaptureError(LrcError):
    """torch.export refused the model, or its graph holds something that no pass can rewrite."""


class SiteError(LrcError):
    """A pass or solver cannot do what was asked at one site."""


class SolverError(LrcError):
    """A solver was given statistics or options that it cannot use."""


class TrainError(LrcError):
    """Training cannot go on; the last good checkpoint is kept."""


class LowerError(LrcError):
    """An artifact could not be written or does not load."""


class GateError(LrcError):
    """The result was written, and misses a quality or parity gate."""

    exit_code = 3
