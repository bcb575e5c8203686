"""``python -m passreid_models`` is ``passreid``."""

import sys

from passreid_models.cli import main

sys.exit(main())
