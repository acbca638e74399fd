"""How this process gets its jobs."""

import enum
from pathlib import Path

# Where a local run saves its pictures, in the working folder.
LOCAL_OUTPUT = Path("output")


class Mode(enum.Enum):
    """How this process gets its jobs."""

    LIBRARY = "another program calls Worker.run"
    LOCAL = "one job from --test_input or test_input.json"
    API = "the SDK's HTTP server"
    PRODUCTION = "RunPod's queue"
