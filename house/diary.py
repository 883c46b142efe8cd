"""What `make diary TITLE="..."` runs: an entry of today from the template, in nbs/diary/."""
import json
import os
import re
import sys
import unicodedata
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "house" / "diary_entry.ipynb"


def slug(
    title: str,
) -> str:  # lower-case letters, digits and single hyphens; empty if nothing of the title can be written so
    "The title as a part of a file name."
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:60].strip("-")


def written(
    title: str,
    folder: Path,  # of the entries
    day: date,
) -> Path:  # the new notebook
    "An entry with this title and date, written whole. Raises ValueError if the title is no name, FileExistsError if the entry is there."
    title = " ".join(title.split())
    if not title:
        raise ValueError('an entry needs a title: make diary TITLE="What does the warm-up change?"')
    if not slug(title):
        raise ValueError(f"no file name can be made of the title {title!r}; use some letters or digits of ASCII")
    path = folder / f"{day.isoformat()}-{slug(title)}.ipynb"
    if path.exists():
        raise FileExistsError(f"{path.name} is there already; choose another title")
    notebook = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    values = {"TITLE": title, "DATE": day.isoformat(), "NAME": path.stem}
    for cell in notebook["cells"]:
        cell["source"] = [re.sub(r"\b(TITLE|DATE|NAME)\b", lambda match: values[match[0]], line) for line in cell["source"]]
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def main(
    title: str,
) -> None:
    "Write the entry; print where it is, and what is left to do."
    try:
        path = written(title, ROOT / "nbs" / "diary", date.today()).relative_to(ROOT)
    except (ValueError, OSError) as error:
        sys.exit(f"make diary: {error}")
    print(f"{path}\nlist it: add diary/{path.name} to the sidebar in _quarto.yml, and run nbs/diary/index.ipynb again for its table")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
