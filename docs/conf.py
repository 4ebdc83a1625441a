"""The documentation's site: `make docs`, or `sphinx-build -W --keep-going -n docs build/docs`.

Pages are Markdown and read well where there is no site. What the package knows better than a page (commands,
configuration fields, docstrings) is put in at build time: `generated.py`, autodoc. Nothing is fetched.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
# Autodoc imports TensorFlow, which would speak about this machine's devices.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import generated  # noqa: E402

project = "distfit"
author = "The distfit developers"
copyright = author
html_title = "distfit"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
# What a program printed needs no button.
copybutton_exclude = ".linenos, .gp, .go"
copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"

myst_heading_anchors = 3
# What is shown is what is to be typed: no curly quotes, no dashes made of two hyphens.
smartquotes = False
# Indented blocks are commands, fenced ones name their language.
highlight_language = "console"
pygments_style = "friendly"

# `name` in a docstring is code, as it is in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_use_param = False
add_module_names = False
toc_object_entries_show_parents = "hide"


def setup(app):
    app.connect("source-read", generated.fill)
    app.connect("autodoc-process-docstring", generated.mend_docstring)
