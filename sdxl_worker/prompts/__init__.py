"""From prompts to what the UNet reads."""

from sdxl_worker.prompts.conditioning import Conditioning, applied, unread

__all__ = ["Conditioning", "applied", "unread"]
