"""`python -m fewstep.zoo docs/zoo.md`: write the table of entries into a document."""

import os
import sys
from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.zoo import entries
from fewstep.zoo.document import with_table


def main(argv: list[str]) -> int:
    """Rewrite one document; its name is the only argument."""
    if len(argv) != 1:
        print("usage: python -m fewstep.zoo docs/zoo.md", file=sys.stderr)
        return 2
    path = Path(argv[0])
    try:
        text = with_table(path.read_text(encoding="utf-8"), entries())
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except (FewstepError, OSError) as error:
        print(f"fewstep.zoo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
