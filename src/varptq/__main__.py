"""`python -m varptq` is the command `varptq`."""

from varptq.cli.main import app

if __name__ == "__main__":
    app()
