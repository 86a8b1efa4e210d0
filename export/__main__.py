"""`python -m fewstep.export`: says that this release does not export yet."""

import sys


def main() -> int:
    """Say so on stderr.

    Returns:
        2, the exit status of a request that cannot be served.
    """
    print("fewstep.export: this release of fewstep does not export pipelines yet", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
