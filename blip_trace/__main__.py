"""`python -m blip_trace` is `blip-trace`."""

from .cli import main

main()
