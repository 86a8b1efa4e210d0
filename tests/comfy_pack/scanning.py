"""What the Comfy Registry's scan looks for, as far as its public findings tell.

The registry matches text, comments included, and any finding, even one of severity "info", can keep
a version from users. So this is stricter than the rules that are written down, and what stays must
be explained, file by file.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

RUNS_CODE = {"eval", "exec", "compile", "__import__"}
REACHES_OUT = {
    *("aiohttp", "ctypes", "ftplib", "http", "httpx", "huggingface_hub", "marshal", "pickle"),
    *("multiprocessing", "pip", "requests", "smtplib", "socket", "subprocess", "urllib"),
}
OF_OS = {"system", "popen", "environ", "getenv", "putenv", "unsetenv", "startfile", "kill", "fork"}
TEXT = {
    "dynamic execution": r"\b(?:eval|exec)\s*\(",
    "network": r"\.(?:connect|bind|listen|send(?:all|to)?|recv(?:from|_into)?)\s*\(|urlopen",
    "import by name": r"importlib\.import_module|__import__",
    "processes": r"\bsubprocess\b|os\.(?:system|popen)\b",
    "environment": r"os\.(?:environ|getenv|putenv)",
}
TEXT_FILES = {".py", ".js", ".json", ".toml", ".md"}


def findings(folder: Path) -> set[tuple[str, str]]:
    """(file in the folder, what was found)."""
    found: set[tuple[str, str]] = set()
    for file in sorted(folder.rglob("*")):
        if file.suffix in TEXT_FILES:
            name = file.relative_to(folder).as_posix()
            text = file.read_text(encoding="utf-8")
            found |= {(name, what) for what, rule in TEXT.items() if re.search(rule, text)}
            if file.suffix == ".py":
                found |= {(name, what) for what in in_code(text)}
    return found


def in_code(text: str) -> Iterator[str]:
    """What a Python file calls or imports of the above."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (f"imports {top}" for top in tops(*(alias.name for alias in node.names)))
        elif isinstance(node, ast.ImportFrom):
            yield from (f"imports {top}" for top in tops(node.module or ""))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield from (f"calls {name}" for name in {node.func.id} & RUNS_CODE)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            yield from (f"uses os.{name}" for name in {node.attr} & OF_OS)


def tops(*modules: str) -> set[str]:
    return {module.partition(".")[0] for module in modules} & REACHES_OUT
