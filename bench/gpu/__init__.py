"""Every figure that needs a GPU, in one resumable command: `python -m bench.gpu --help`."""
