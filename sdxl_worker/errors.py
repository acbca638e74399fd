"""Every failure the worker reports, with its stable code.

WorkerError
├── InvalidRequest        the JSON is wrong: the caller fixes it
├── FetchError            a reference did not become a local file
│   ├── BadReference          not a reference form we know, or one we refuse
│   ├── NotFound              nothing there
│   ├── Ambiguous             several candidates, the caller must choose
│   ├── AccessDenied          the host wants a token
│   ├── BlockedAddress        not a public address
│   ├── FetchFailed           the host answered wrongly or not at all
│   ├── FetchTimeout          the deadline of the whole download passed
│   ├── FetchIncomplete       the body ended early, on every try
│   ├── TooLarge              over the size limit of its kind
│   └── CacheWriteError       worker's side: the cache folder cannot be written
├── AssetFileError        a local file is not what its kind has to be
│   ├── WrongFile             a web page came instead, or a file without tensors
│   ├── BadFile               broken, hostile, or holds NaN
│   ├── LoraIncompatible      made for another base model, or does not fit the modules
│   └── EmbeddingIncompatible made for another base model, or does not fit the text encoders
├── GenerationError       rendering failed
│   ├── OutOfMemory           worker's side: the picture does not fit the GPU
│   ├── Cancelled             RunPod asked to stop the job
│   ├── DeviceFailed          worker's side: CUDA is broken, a fresh worker is needed
│   └── RestoreFailed         worker's side: base weights may be changed, a fresh worker is needed
├── UploadError           worker's side: the bucket refused the pictures
├── ResponseTooLarge      the answer does not fit the platform's limit
└── ModelUnavailable      worker's side: the base model cannot be loaded

The codes of FetchError and AssetFileError depend on the kind of file: `assets.kind.Kind.codes` has those that differ
from the class's own (NOT_FOUND is LORA_NOT_FOUND for a LoRA), and AssetStore sets them on the way out.
"""

import contextlib
from collections.abc import Iterator
from typing import ClassVar


class WorkerError(Exception):
    """Base of all failures: `str(error)` is one sentence that is safe to show the caller.

    `code` is stable and documented; `caller_at_fault` says who has to act; `refresh_worker` says that this process
    can no longer be trusted. `reference` is the one that it is about, where there is one, and not for showing.
    """

    code: str = "INTERNAL"
    caller_at_fault: ClassVar[bool] = False
    refresh_worker: bool = False
    reference: str = ""

    def as_answer(self) -> dict[str, object]:
        """The job's JSON answer: `{"error": "CODE: sentence"}`, with `refresh_worker` where it is needed."""
        answer: dict[str, object] = {"error": f"{self.code}: {self}"}
        if self.refresh_worker:
            answer["refresh_worker"] = True
        return answer


class InvalidRequest(WorkerError):
    """The job's input breaks the schema; the sentence lists every problem found."""

    code = "INVALID_INPUT"
    caller_at_fault = True


class FetchError(WorkerError):
    """A reference did not become a verified local file."""

    code = "FETCH"
    caller_at_fault = True


class BadReference(FetchError):
    """The reference has no known form, or names something the worker never opens."""

    code = "REFERENCE"


class NotFound(FetchError):
    """The host, the repo or the cache has no such file."""

    code = "NOT_FOUND"


class Ambiguous(FetchError):
    """The repo holds several weight files; the sentence lists them."""

    code = "AMBIGUOUS"


class AccessDenied(FetchError):
    """The host wants a token that is missing or not enough; the sentence names the variable to set."""

    code = "AUTH"


class BlockedAddress(FetchError):
    """The URL, or a redirect of it, leads to an address that is not public."""

    code = "BLOCKED_ADDRESS"


class FetchFailed(FetchError):
    """The host could not be reached or kept answering with errors."""

    code = "FETCH_FAILED"


class FetchTimeout(FetchError):
    """The whole download did not end within DOWNLOAD_TIMEOUT."""

    code = "FETCH_TIMEOUT"


class FetchIncomplete(FetchError):
    """The body ended before its announced length, on every try."""

    code = "FETCH_INCOMPLETE"


class TooLarge(FetchError):
    """The file is larger than LORA_MAX_MB."""

    code = "TOO_LARGE"


class CacheWriteError(FetchError):
    """Neither the cache folder nor local temporary space could take the file."""

    code = "CACHE_WRITE"
    caller_at_fault = False


class AssetFileError(WorkerError):
    """A local file is not what its kind has to be."""

    code = "FILE"
    caller_at_fault = True


class WrongFile(AssetFileError):
    """A web page came instead of the file, or a file without tensors."""

    code = "WRONG_FILE"


class BadFile(AssetFileError):
    """The file is truncated, malformed, hostile, or holds values that are not finite."""

    code = "BAD_FILE"


class LoraIncompatible(AssetFileError):
    """The LoRA is for another base model, or its tensors do not fit the resident modules."""

    code = "LORA_INCOMPATIBLE"


class EmbeddingIncompatible(AssetFileError):
    """The embedding is for another base model, or its vectors do not fit the resident text encoders."""

    code = "EMBEDDING_INCOMPATIBLE"


class GenerationError(WorkerError):
    """Rendering failed."""

    code = "GENERATION_FAILED"


class OutOfMemory(GenerationError):
    """The GPU ran out of memory; what the job held has been freed."""

    code = "OUT_OF_MEMORY"


class Cancelled(GenerationError):
    """The job was stopped from outside, during a download or between two denoising steps."""

    code = "CANCELLED"
    caller_at_fault = True


class DeviceFailed(GenerationError):
    """A CUDA error other than out-of-memory: the process's CUDA context is lost."""

    code = "DEVICE_FAILED"
    refresh_worker = True


class RestoreFailed(GenerationError):
    """The pristine weights could not be put back."""

    code = "RESTORE_FAILED"
    refresh_worker = True


class UploadError(WorkerError):
    """The bucket did not take the pictures, or is only half configured."""

    code = "UPLOAD_FAILED"


class ResponseTooLarge(WorkerError):
    """The encoded pictures exceed what RunPod accepts as a job answer."""

    code = "RESPONSE_TOO_LARGE"
    caller_at_fault = True


class ModelUnavailable(WorkerError):
    """The base model is missing or cannot be loaded; the sentence says what to set or run."""

    code = "MODEL_UNAVAILABLE"


@contextlib.contextmanager
def about(reference: str) -> Iterator[None]:
    """Errors that leave here say which reference they are about."""
    try:
        yield
    except WorkerError as error:
        error.reference = reference
        raise
