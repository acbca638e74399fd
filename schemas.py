"""The job's input: its schema in the RunPod SDK's format, and the validation of one request."""

from sdxl_worker.request.validation import INPUT_SCHEMA, validate_request

__all__ = ["INPUT_SCHEMA", "validate_request"]
