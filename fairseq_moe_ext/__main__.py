"""`python -m fairseq_moe_ext` is the command `fairseq-moe`."""

import sys

from fairseq_moe_ext.command_line import main

if __name__ == "__main__":
    sys.exit(main())
