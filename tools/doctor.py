"""`lcp doctor` of this checkout, installed or not: python tools/doctor.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lcp_plugin.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
