"""``python -m faconv_hpc`` is ``faconv``."""

from .cli.app import main

main()
