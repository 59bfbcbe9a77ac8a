"""Run the command line as `python -m rcc`."""

from .cli.app import main

main()
