"""``python -m fedmed``."""

import sys

from fedmed.cli.main import main

sys.exit(main())
