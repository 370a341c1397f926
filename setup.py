import re
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"llama needs Python 3.10 or newer, and this is {found}: use another one, such as python3.12")

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    # PyPI has another package named llama: this name is not to be mistaken for it. What is imported is `llama`.
    name="llama-textbook",
    version=re.search(r'^__version__ = "(.*)"$', (HERE / "llama" / "__init__.py").read_text(encoding="utf-8"), re.M)[1],
    description="Llama inference: the reference, from scratch, on any number of processes",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama": ["py.typed", "layers/*.cpp", "layers/*.h"]},
    entry_points={"console_scripts": ["llama = llama.cli:main"]},
    python_requires=">=3.10",
    install_requires=["torch", "fairscale", "tiktoken", "tyro", "fire", "tqdm"],
    extras_require={
        "llama2": ["sentencepiece"],
        "hf": ["safetensors"],
        "templates": ["jinja2"],
        "data": ["pyarrow"],
        "plot": ["matplotlib"],
        "eval": ["lm-eval"],
        "serve": ["fastapi", "uvicorn", "prometheus-client"],
        "grammar": ["llguidance"],
        "web": ["nicegui"],
        "ray": ["ray"],
        "test": [
            "pytest",
            "pytest-xdist",
            "jinja2",
            "mypy",
            "basedpyright",
            "nbformat",
            "sentencepiece",
            "safetensors",
            "transformers",
            "pyarrow",
            "matplotlib",
            "lm-eval[api]",
            "accelerate",
            "fastapi",
            "uvicorn",
            "prometheus-client",
            "llguidance",
            "nicegui",
            "openai",
            "jsonschema",
            "schemathesis",
            "selenium",
            "peft",
            "ray",
        ],
        "dev": ["ruff", "pdoc"],
    },
)
