"""README.md from nbs/index.ipynb. `--check` only compares: exit 1 if they differ."""
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
index, readme = root / "nbs" / "index.ipynb", root / "README.md"


def relink(text):
    "Links of the index page are relative to nbs/; the README stands one floor up."
    def up(match): return f"]({match[1][3:]})" if match[1].startswith("../") else f"](nbs/{match[1]})"
    return re.sub(r"\]\((?!https?://|#|mailto:)([^)\s]+)\)", up, text)


def text_of(output):
    "The plain text of a cell's output; pictures and widgets have none."
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return "".join(text).rstrip()


def block(cell):
    "One cell as markdown; '' for hidden cells."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown": return relink(source)
    if cell["cell_type"] != "code" or "#| hide" in source: return ""
    shown = "\n".join(filter(None, map(text_of, cell["outputs"])))
    return f"```python\n{source}\n```" + (f"\n\n```text\n{shown}\n```" if shown else "")


def main():
    cells = json.loads(index.read_text(encoding="utf-8"))["cells"]
    made = "\n\n".join([*filter(None, map(block, cells)), "<!-- made from nbs/index.ipynb by `make readme`; edit that page -->"]) + "\n"
    if "--check" not in sys.argv: return readme.write_text(made, encoding="utf-8") and 0
    if readme.exists() and readme.read_text(encoding="utf-8") == made: return 0
    print("README.md differs from nbs/index.ipynb: run `make readme`", file=sys.stderr)
    return 1


if __name__ == "__main__": sys.exit(main())
