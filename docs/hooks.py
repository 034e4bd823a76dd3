"""What the documentation site has beside the pages of this folder: the README, the changes, the examples, the API.

Pages link to files of the repository as they lie there; here those links are led to where the site has them. The pages
of the API are made from what every package exports, read as text: nothing is imported.
"""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("models", "data", "masks", "rank", "finetune", "unlearn", "evaluate", "report")  # in the order of the data
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s]+)(?=\))")
_FENCE = re.compile(r"^(```.*?^```)$", re.DOTALL | re.MULTILINE)


def on_config(config: Any) -> Any:
    """Puts the pages of the kernels and of the API into the navigation, where the configuration names their folders."""
    apis = ["fillm", *(f"fillm.{name}" for name in PACKAGES), "fillm_kernels"]
    of_folders = {
        "kernels": [f"kernels/{path.name}" for path in sorted((ROOT / "docs" / "kernels").glob("*.md"))],
        "examples": sorted(_example_pages(), key=lambda path: (path != "examples/index.md", path)),
        "api": [{name: f"api/{name}.md"} for name in apis],
    }
    config["nav"] = [
        {title: _expanded(entry, of_folders) for title, entry in section.items()} for section in config["nav"]
    ]
    return config


def _expanded(entry: Any, of_folders: dict[str, list[Any]]) -> Any:
    if not isinstance(entry, list):
        return entry
    return [page for one in entry for page in (of_folders.get(one, [one]) if isinstance(one, str) else [one])]


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and files that lie elsewhere."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        **_example_pages(),
        **_api_pages(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for path in sorted(RESULTS.rglob("*")):
        if path.is_file():
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads links that leave the folder to the site's own places."""
    place = page.file.src_uri
    # README and changes were written at the root of the repository, all other pages in docs/.
    written = Path(place if place in ("index.md", "changelog.md") else f"docs/{place}")
    here = Path(place).parent

    def led(link: re.Match[str]) -> str:
        target, anchor, section = link[1].partition("#")
        if not target:
            return link[0]
        return _relative(_on_site(_normal(written.parent / target)), here) + anchor + section

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(led, part) for part in parts)


def _on_site(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == "examples":
        return "examples/index.md"
    if path.startswith("examples/") and not path.endswith(".md"):
        return path.removesuffix(".py").removesuffix(".ipynb") + ".md"
    return {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}.get(path, path.removeprefix("docs/"))


def _normal(path: Path) -> str:
    """Without `..`, relative to the repository."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _relative(path: str, here: Path) -> str:
    return "../" * len(here.parts) + path


def _example_pages() -> dict[str, str]:
    """A page an example, and their index."""
    pages, lines = {}, ["# Examples", ""]
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(code)) or ""
        title = about.partition("\n")[0].rstrip(".")
        pages[f"examples/{path.stem}.md"] = f"# {title}\n\n`examples/{path.name}`\n\n```python\n{code}```\n"
        lines.append(f"- [`{path.name}`]({path.stem}.md): {title}.")
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        pages[f"examples/{path.stem}.md"] = page = _notebook_page(path)
        lines.append(f"- [`{path.name}`]({path.stem}.md): {page.partition(chr(10))[0].removeprefix('# ')}.")
    cpp = ((ROOT / "examples" / "cpp" / name).read_text(encoding="utf-8") for name in ("CMakeLists.txt", "main.cpp"))
    build, code = cpp
    pages["examples/cpp.md"] = (
        f"# The kernels in a C++ program\n\n`examples/cpp/CMakeLists.txt`\n\n```cmake\n{build}```\n\n"
        f"`examples/cpp/main.cpp`\n\n```cpp\n{code}```\n"
    )
    lines.append("- [`cpp/`](cpp.md): the kernels in a C++ program.")
    pages["examples/index.md"] = "\n".join(lines) + "\n"
    return pages


def _notebook_page(path: Path) -> str:
    """The cells of a notebook, which is kept without outputs."""
    cells = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        # Its links go out from examples/, those of pages from docs/.
        is_code = cell["cell_type"] == "code"
        cells.append(f"```python\n{source}\n```" if is_code else source.replace("](../docs/", "](../"))
    title, _, rest = cells[0].partition("\n")
    return "\n\n".join([title, f"`examples/{path.name}`", rest, *cells[1:]]) + "\n"


def _api_pages() -> dict[str, str]:
    """A page a package, of the names it exports; those of `fillm` itself live in its packages."""
    tree = ast.parse((ROOT / "fillm" / "__init__.py").read_text(encoding="utf-8"))
    names = {name: _resolved(home, name) for name, home in _homes("fillm", tree)}
    lines = [f"- [`fillm.{name}`][{home}.{name}]" for name, home in sorted(names.items(), key=_by_name)]
    pages = {"api/fillm.md": "\n".join(["# `fillm`", "", ast.get_docstring(tree) or "", "", *lines, ""])}
    for name in PACKAGES:
        pages[f"api/fillm.{name}.md"] = _page(f"fillm.{name}", ROOT / "fillm" / name / "__init__.py")
    pages["api/fillm_kernels.md"] = _page("fillm_kernels", ROOT / "kernels" / "fillm_kernels" / "__init__.py")
    return pages


def _page(package: str, path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [f"::: {home}.{name}" for name, home in sorted(_homes(package, tree), key=_by_name)]
    return "\n\n".join([f"# `{package}`", ast.get_docstring(tree) or "", *blocks]) + "\n"


def _by_name(pair: tuple[str, str]) -> str:
    return pair[0].lower()


def _homes(package: str, tree: ast.Module) -> Iterable[tuple[str, str]]:
    """Every exported name and the module that defines it, from imports or from the table of lazy names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{package}."):
            if node.module == "fillm.lazy":
                continue
            yield from ((alias.name, node.module) for alias in node.names)
        elif isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield str(key.value), f"{package}.{value.value}"


def _resolved(package: str, name: str) -> str:
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    return dict(_homes(package, tree))[name]
