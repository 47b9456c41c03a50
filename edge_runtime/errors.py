"""Every error this project raises on purpose, and what each means to a program.

::

    EdgeRuntimeError                internal            exit 1
    ├── ModelFileError              model_file          exit 3   a GGUF that is broken
    │   └── UnsupportedModelError   unsupported_model   exit 3   a sound GGUF that the engine cannot run
    ├── ModelNotFoundError          model_not_found     exit 4
    ├── AdapterFileError            adapter_file        exit 3   a LoRA that is broken or of another model
    ├── AdapterNotFoundError        adapter_not_found   exit 4
    ├── DownloadError               download            exit 5
    ├── RequestError                invalid_request     exit 2   a parameter out of range
    │   ├── ContextOverflowError    context_overflow    exit 2   more tokens than the context holds
    │   └── ChatTemplateError       chat_template       exit 2
    ├── OutOfMemoryError            out_of_memory       exit 6
    ├── DependencyError             dependency          exit 7   a library or an extra is missing or wrong
    ├── ConfigError                 config              exit 2   a wrong setting
    ├── OverloadedError             overloaded          exit 8   the daemon's queue is full; try again
    ├── DeadlineError               deadline_exceeded   exit 9   the time given to a request is over
    ├── UnavailableError            unavailable         exit 10  the daemon is stopping, or there is none
    ├── UnauthenticatedError        unauthenticated     exit 11  a token is missing, wrong or revoked
    └── ForbiddenError              permission_denied   exit 11  the token lacks the scope

A message says what was found, what was needed and what to do. It never quotes a prompt.
"""


class EdgeRuntimeError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        code: stable identifier for programs (``--json``, logs, APIs).
        exit_code: what the command line exits with.
    """

    code = "internal"
    exit_code = 1


class ModelFileError(EdgeRuntimeError):
    """A model file is damaged, truncated or contradicts itself."""

    code = "model_file"
    exit_code = 3


class UnsupportedModelError(ModelFileError):
    """A sound model file that needs an architecture or a type the engine does not have."""

    code = "unsupported_model"


class ModelNotFoundError(EdgeRuntimeError):
    """No model of that name in the store and no file at that path."""

    code = "model_not_found"
    exit_code = 4


class AdapterFileError(EdgeRuntimeError):
    """A file of an adapter is damaged, or does not fit the model."""

    code = "adapter_file"
    exit_code = 3


class AdapterNotFoundError(EdgeRuntimeError):
    """No adapter or edit of that name or number."""

    code = "adapter_not_found"
    exit_code = 4


class DownloadError(EdgeRuntimeError):
    """A model could not be fetched, or what arrived was not what was asked for."""

    code = "download"
    exit_code = 5


class RequestError(EdgeRuntimeError, ValueError):
    """A request's parameter is out of range."""

    code = "invalid_request"
    exit_code = 2


class ContextOverflowError(RequestError):
    """Prompt and answer together need more tokens than the context holds."""

    code = "context_overflow"


class ChatTemplateError(RequestError):
    """The model's chat template is missing, broken, or refuses these messages."""

    code = "chat_template"


class OutOfMemoryError(EdgeRuntimeError):
    """The device has too little memory for what was asked."""

    code = "out_of_memory"
    exit_code = 6


class DependencyError(EdgeRuntimeError):
    """A library is missing, too old, or was built without what is needed."""

    code = "dependency"
    exit_code = 7


class ConfigError(EdgeRuntimeError):
    """A setting is unknown, of the wrong type, or unsafe."""

    code = "config"
    exit_code = 2


class OverloadedError(EdgeRuntimeError):
    """More requests wait than the daemon keeps, or a caller failed too often.

    Attributes:
        retry_after: seconds after which another try makes sense.
    """

    code = "overloaded"
    exit_code = 8

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(EdgeRuntimeError):
    """A request took longer than its caller, or the daemon, allows."""

    code = "deadline_exceeded"
    exit_code = 9


class UnavailableError(EdgeRuntimeError):
    """The daemon is stopping, or cannot be reached."""

    code = "unavailable"
    exit_code = 10


class UnauthenticatedError(EdgeRuntimeError):
    """A token is missing, unknown, or was revoked."""

    code = "unauthenticated"
    exit_code = 11


class ForbiddenError(EdgeRuntimeError):
    """A valid token that does not allow this."""

    code = "permission_denied"
    exit_code = 11
