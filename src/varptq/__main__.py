"""`python -m varptq` and the command `varptq`.

The command line takes a moment to import; Ctrl-C ends that in one line, too.
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
