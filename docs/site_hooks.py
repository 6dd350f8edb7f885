"""Hooks of mkdocs: pages may link to files of the repository, and no page may load anything from elsewhere."""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# What pages link to outside docs/; the site has it under repository/.
SHOWN = (
    *("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/*.py", "benchmarks/results/*.*"),
    "tests/core/noise_families/test_lattice_attack.py",
)
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
# What a browser would fetch by itself. Links that are clicked may lead anywhere.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|audio|video|embed)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?![^>]*\brel=["']?(?:canonical|next|prev))[^>]*\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|(?:@import\s+|url\()["']?((?:https?:)?//[^"'\s)]+)"""
)


def on_files(files, config):
    """Add the repository's files."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = f"repository/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead links that leave docs/ to the repository's files in the site."""
    place = Path(page.file.abs_src_path).resolve().parent
    known = {Path(file.abs_src_path).resolve(): file.src_uri for file in files if file.abs_src_path}
    here = Path(page.file.src_uri).parent

    def moved(match):
        target = known.get((place / match[1]).resolve())
        return match[1] if target is None else Path(os.path.relpath(target, here)).as_posix()

    return LINK.sub(moved, markdown)


def on_post_build(config):
    """Refuse a site of which a page loads something from elsewhere.

    Raises:
        PluginError: If so.
    """
    for path in Path(config.site_dir).rglob("*"):
        if path.suffix in (".html", ".css"):
            text = path.read_text(encoding="utf-8")
            if found := [next(filter(None, match.groups())) for match in FETCHED.finditer(text)]:
                raise PluginError(f"{path}: loads {', '.join(sorted(set(found)))} from elsewhere")
