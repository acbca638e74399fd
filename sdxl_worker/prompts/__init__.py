"""From prompts to what the UNet reads."""
