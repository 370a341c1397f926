from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="llama",
    version="0.1.0",
    description="Llama inference: the reference, from scratch, on any number of processes",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama": ["py.typed"]},
    entry_points={"console_scripts": ["llama = llama.cli:main"]},
    python_requires=">=3.10",
    install_requires=["torch", "fairscale", "tiktoken", "tyro", "fire", "tqdm"],
    extras_require={
        "llama2": ["sentencepiece"],
        "hf": ["safetensors"],
        "data": ["pyarrow"],
        "plot": ["matplotlib"],
        "eval": ["lm-eval"],
        "test": [
            "pytest",
            "pytest-xdist",
            "sentencepiece",
            "safetensors",
            "transformers",
            "pyarrow",
            "matplotlib",
            "lm-eval",
            "accelerate",
            "peft",
        ],
        "dev": ["ruff"],
    },
)
