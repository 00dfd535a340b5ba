"""Configuration of the documentation site: ``make docs`` builds it into ``docs/_build``."""

import importlib.metadata

project = "fcos-deploy"
author = "The fcos-deploy maintainers"
copyright = "the fcos-deploy maintainers, Apache-2.0"  # noqa: A001  (Sphinx asks for this name)
release = importlib.metadata.version("fcos-deploy")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]

# API reference: types stand in the signatures, and the members in the order of the source.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "inherited-members": False}
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "fcos-deploy"
html_static_path: list[str] = []
