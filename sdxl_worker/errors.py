"""Every failure the worker reports, with its stable code.

WorkerError
├── InvalidRequest        the JSON is wrong: the caller fixes it
├── LoraDownloadError     a LoRA reference did not become a local file
│   ├── LoraReferenceError    not a reference form we know, or one we refuse
│   ├── LoraNotFound          nothing there
│   ├── LoraAmbiguous         several candidates, the caller must choose
│   ├── LoraAuthError         the host wants a token
│   ├── BlockedAddress        not a public address
│   ├── FetchFailed           the host answered wrongly or not at all
│   ├── FetchTimeout          the deadline of the whole download passed
│   ├── FetchIncomplete       the body ended early, on every try
│   ├── TooLarge              over LORA_MAX_MB
│   └── CacheWriteError       worker's side: the cache folder cannot be written
├── LoraFileError         a local file is not a LoRA this worker can apply
│   ├── NotALora              another kind of file (an HTML page, a checkpoint, ...)
│   ├── BadLoraFile           broken, hostile, or holds NaN
│   └── LoraIncompatible      made for another base model, or does not fit the modules
├── GenerationError       rendering failed
│   ├── OutOfMemory           worker's side: the picture does not fit the GPU
│   ├── Cancelled             RunPod asked to stop the job
│   ├── DeviceFailed          worker's side: CUDA is broken, a fresh worker is needed
│   └── RestoreFailed         worker's side: base weights may be changed, a fresh worker is needed
├── UploadError           worker's side: the bucket refused the pictures
├── ResponseTooLarge      the answer does not fit the platform's limit
└── ModelUnavailable      worker's side: the base model cannot be loaded
"""

from typing import ClassVar


class WorkerError(Exception):
    """Base of all failures: `str(error)` is one sentence that is safe to show the caller.

    `code` is stable and documented; `caller_at_fault` says who has to act; `refresh_worker` says that this process
    can no longer be trusted.
    """

    code: ClassVar[str] = "INTERNAL"
    caller_at_fault: ClassVar[bool] = False
    refresh_worker: ClassVar[bool] = False

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


class LoraDownloadError(WorkerError):
    """A LoRA reference did not become a verified local file."""

    code = "LORA_DOWNLOAD"
    caller_at_fault = True


class LoraReferenceError(LoraDownloadError):
    """The reference has no known form, or names something the worker never opens."""

    code = "LORA_REFERENCE"


class LoraNotFound(LoraDownloadError):
    """The host, the repo or the cache has no such file."""

    code = "LORA_NOT_FOUND"


class LoraAmbiguous(LoraDownloadError):
    """The repo holds several weight files; the sentence lists them."""

    code = "LORA_AMBIGUOUS"


class LoraAuthError(LoraDownloadError):
    """The host wants a token that is missing or not enough; the sentence names the variable to set."""

    code = "LORA_AUTH"


class BlockedAddress(LoraDownloadError):
    """The URL, or a redirect of it, leads to an address that is not public."""

    code = "BLOCKED_ADDRESS"


class FetchFailed(LoraDownloadError):
    """The host could not be reached or kept answering with errors."""

    code = "FETCH_FAILED"


class FetchTimeout(LoraDownloadError):
    """The whole download did not end within DOWNLOAD_TIMEOUT."""

    code = "FETCH_TIMEOUT"


class FetchIncomplete(LoraDownloadError):
    """The body ended before its announced length, on every try."""

    code = "FETCH_INCOMPLETE"


class TooLarge(LoraDownloadError):
    """The file is larger than LORA_MAX_MB."""

    code = "TOO_LARGE"


class CacheWriteError(LoraDownloadError):
    """Neither the cache folder nor local temporary space could take the file."""

    code = "CACHE_WRITE"
    caller_at_fault = False


class LoraFileError(WorkerError):
    """A local file is not a LoRA that this worker can apply."""

    code = "LORA_FILE"
    caller_at_fault = True


class NotALora(LoraFileError):
    """The file is of another kind: an HTML page, a whole checkpoint, a text file."""

    code = "NOT_A_LORA"


class BadLoraFile(LoraFileError):
    """The file is truncated, malformed, hostile, or holds values that are not finite."""

    code = "BAD_FILE"


class LoraIncompatible(LoraFileError):
    """The LoRA is for another base model, or its tensors do not fit the resident modules."""

    code = "LORA_INCOMPATIBLE"


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
