"""`python -m lcp_plugin VERB ...` is `lcp VERB ...`, installed or not."""

import sys

from lcp_plugin.commands.front import main

if __name__ == "__main__":
    sys.exit(main())
