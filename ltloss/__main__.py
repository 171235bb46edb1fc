"""`python -m ltloss` is the `ltloss` command."""

import sys

from .cli import main

sys.exit(main())
