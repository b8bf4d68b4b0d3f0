"""`python -m varptq` and the command `varptq`.

Importing the command line takes a moment; Ctrl-C during the import also ends in one line.
"""

import sys


def main() -> None:
    """Run the command line on the arguments of this process."""
    try:
        from varptq.cli.main import app
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
