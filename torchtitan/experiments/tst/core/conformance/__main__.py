"""``python -m PACKAGE.conformance FILE`` checks the implementation in a file."""

import sys

from .run import main

sys.exit(main())
