"""`python -m fewstep` is `fewstep`."""

from fewstep.cli.main import run

if __name__ == "__main__":
    run()
