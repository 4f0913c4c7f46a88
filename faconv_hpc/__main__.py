"""``python -m faconv_hpc`` is ``faconv``."""

from .cli import main

main()
